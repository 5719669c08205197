"""The sine source of a neural source-filter vocoder: harmonics of f0, mixed to one excitation.

Source: Wang et al., "Neural Source-Filter Waveform Models for Statistical Parametric Speech
Synthesis" (2019), as in so-vits-svc (commit 730930d).

B batch, N harmonics, F frames, T samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.synthesizer.blocks.noise import Noise

HARMONICS = 9  # f0 and its overtones
_AMPLITUDE = 0.1
_VOICED_NOISE = 0.003  # standard deviation of the noise added to the sines
_UNVOICED_NOISE = _AMPLITUDE / 3  # standard deviation of the noise without sines
_PIECE = 64  # frames computed together in inference, to save memory


class SineSource(nn.Module):
    """Generator of an excitation from f0, `hop_length` samples per frame.

    sample_rate: assumed samples per second.
    """

    def __init__(self, sample_rate: int, hop_length: int) -> None:
        super().__init__()
        self.sample_rate, self.hop_length = sample_rate, hop_length
        self.l_linear = nn.Linear(HARMONICS, 1)

    def forward(self, f0: Tensor, noise: Noise, phase: Tensor | None = None) -> Tensor:
        """Generate (B, 1, T) within (-1, 1); f0 is (B, F) in Hz, 0 where unvoiced.

        phase: (B, N) of the harmonics before the first sample, in cycles. None: f0 starts at 0, its
        overtones at random phases.
        """
        mixed = self.l_linear.weight @ self.waves(f0, noise, phase)
        return torch.tanh(mixed + self.l_linear.bias)

    @torch.no_grad()
    def infer(self, f0: Tensor, noise: Noise, phase: Tensor | None = None) -> Tensor:
        """Compute `forward` piece by piece, because phases in float64 need much memory."""
        if phase is None:
            phase = first_phase(f0, noise)
        normals = noise.normal(f0.new_empty(*phase.shape, f0.shape[1] * self.hop_length))
        pieces = []
        for part, normal in zip(
            f0.split(_PIECE, dim=1), normals.split(_PIECE * self.hop_length, dim=2), strict=True
        ):
            waves = sines(part, self.sample_rate, self.hop_length, phase)
            mixed = self.l_linear.weight @ self._with_noise(waves, part, normal)
            pieces.append(torch.tanh(mixed + self.l_linear.bias))
            phase = phase_after(part, self.sample_rate, self.hop_length, phase)
        return torch.cat(pieces, dim=2)

    @torch.no_grad()
    def waves(self, f0: Tensor, noise: Noise, phase: Tensor | None = None) -> Tensor:
        """Generate (B, N, T): sines with a little noise where voiced, noise elsewhere."""
        if phase is None:
            phase = first_phase(f0, noise)
        waves = sines(f0, self.sample_rate, self.hop_length, phase)
        return self._with_noise(waves, f0, noise.normal(waves))

    def _with_noise(self, waves: Tensor, f0: Tensor, normal: Tensor) -> Tensor:
        """Scale waves (B, N, T) in place and add noise; normal: as many random numbers."""
        voiced = (f0 > 0).repeat_interleave(self.hop_length, dim=1).unsqueeze(1)  # (B, 1, T)
        amplitude = torch.where(voiced, _AMPLITUDE, 0.0).to(waves)
        deviation = torch.where(voiced, _VOICED_NOISE, _UNVOICED_NOISE).to(waves)
        return waves.mul_(amplitude).addcmul_(deviation, normal)


def first_phase(f0: Tensor, noise: Noise) -> Tensor:
    """Draw initial phases (B, N) in cycles: 0 for f0 (B, F), random for its overtones."""
    overtones = noise.uniform(f0.new_empty(len(f0), HARMONICS - 1))
    return torch.cat([torch.zeros_like(overtones[:, :1]), overtones], dim=1)


def sines(f0: Tensor, sample_rate: int, hop_length: int, initial: Tensor) -> Tensor:
    """Generate sines (B, N, T) at f0 (B, F) in Hz and its multiples, constant within a frame.

    initial: (B, N) phases before the first sample, in cycles.

    Each sample advances the phase by n * f0 / sample_rate, in f0's precision. Phases are summed in
    float64 over frames instead of samples, so they are exact for any length of the clip.
    """
    step = _steps(f0, sample_rate, initial.shape[1])
    ends = step.cumsum(-1) * hop_length + initial.unsqueeze(-1)
    begins = ends - step * hop_length
    sample = torch.arange(1, hop_length + 1, dtype=torch.float64, device=f0.device)
    cycles = torch.addcmul(begins.unsqueeze(-1), step.unsqueeze(-1), sample)  # (B, N, F, hop)
    within = cycles.sub_(cycles.round()).to(f0.dtype)
    return within.mul_(2 * math.pi).sin_().flatten(2)


def phase_after(f0: Tensor, sample_rate: int, hop_length: int, initial: Tensor) -> Tensor:
    """Return the phases (B, N) of `sines` at the end of f0 (B, F): float64 cycles, 0 to 1.

    initial: (B, N) before its first sample.
    """
    return (_steps(f0, sample_rate, initial.shape[1]).sum(-1) * hop_length + initial) % 1


def _steps(f0: Tensor, sample_rate: int, harmonics: int) -> Tensor:
    """Return the phase advance per sample in each frame: (B, N, F) float64 cycles."""
    numbers = torch.arange(1, harmonics + 1, dtype=f0.dtype, device=f0.device)
    return (f0.unsqueeze(1) * numbers[:, None] / sample_rate % 1).double()
