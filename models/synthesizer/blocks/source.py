"""The sine source of a neural source-filter vocoder: harmonics of f0, mixed into one excitation.

Source: Wang et al., "Neural Source-Filter Waveform Models for Statistical Parametric Speech
Synthesis" (2019), as so-vits-svc has it (commit 730930d).

B batch, N harmonics, F frames, T samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.synthesizer.blocks.noise import Noise

HARMONICS = 9  # f0 and its overtones
_AMPLITUDE = 0.1
_VOICED_NOISE = 0.003  # standard deviation beside the sines
_UNVOICED_NOISE = _AMPLITUDE / 3  # in their place
_PIECE = 64  # frames that are worked out together where memory is to be spared


class SineSource(nn.Module):
    """f0 of each frame to an excitation of `hop_length` samples for each.

    sample_rate: how many samples are taken for a second.
    """

    def __init__(self, sample_rate: int, hop_length: int) -> None:
        super().__init__()
        self.sample_rate, self.hop_length = sample_rate, hop_length
        self.l_linear = nn.Linear(HARMONICS, 1)

    def forward(self, f0: Tensor, noise: Noise, phase: Tensor | None = None) -> Tensor:
        """(B, 1, T) within (-1, 1); f0 is (B, F) in Hz, 0 where unvoiced.

        phase: (B, N) of the harmonics before the first sample, in cycles. None: f0 itself begins at
        0, its overtones wherever chance has them.
        """
        mixed = self.l_linear.weight @ self.waves(f0, noise, phase)
        return torch.tanh(mixed + self.l_linear.bias)

    @torch.no_grad()
    def infer(self, f0: Tensor, noise: Noise, phase: Tensor | None = None) -> Tensor:
        """What `forward` gives, piece by piece: phases in float64 take much room."""
        if phase is None:
            phase = first_phase(f0, noise)
        drawn = noise.normal(f0.new_empty(*phase.shape, f0.shape[1] * self.hop_length))
        pieces = []
        for part, normal in zip(
            f0.split(_PIECE, dim=1), drawn.split(_PIECE * self.hop_length, dim=2), strict=True
        ):
            waves = sines(part, self.sample_rate, self.hop_length, phase)
            mixed = self.l_linear.weight @ self._with_noise(waves, part, normal)
            pieces.append(torch.tanh(mixed + self.l_linear.bias))
            phase = phase_after(part, self.sample_rate, self.hop_length, phase)
        return torch.cat(pieces, dim=2)

    @torch.no_grad()
    def waves(self, f0: Tensor, noise: Noise, phase: Tensor | None = None) -> Tensor:
        """(B, N, T): sines with a little noise where voiced, noise alone elsewhere."""
        if phase is None:
            phase = first_phase(f0, noise)
        waves = sines(f0, self.sample_rate, self.hop_length, phase)
        return self._with_noise(waves, f0, noise.normal(waves))

    def _with_noise(self, waves: Tensor, f0: Tensor, normal: Tensor) -> Tensor:
        """waves (B, N, T) in place; normal: as many random numbers."""
        voiced = (f0 > 0).repeat_interleave(self.hop_length, dim=1).unsqueeze(1)  # (B, 1, T)
        amplitude = torch.where(voiced, _AMPLITUDE, 0.0).to(waves)
        deviation = torch.where(voiced, _VOICED_NOISE, _UNVOICED_NOISE).to(waves)
        return waves.mul_(amplitude).addcmul_(deviation, normal)


def first_phase(f0: Tensor, noise: Noise) -> Tensor:
    """(B, N) in cycles: 0 of f0 (B, F) itself, of its overtones whatever chance has."""
    chance = noise.uniform(f0.new_empty(len(f0), HARMONICS - 1))
    return torch.cat([torch.zeros_like(chance[:, :1]), chance], dim=1)


def sines(f0: Tensor, sample_rate: int, hop_length: int, initial: Tensor) -> Tensor:
    """sin of the phase (B, N, T) of f0 (B, F) in Hz and its multiples, steady within a frame.

    initial: (B, N) phases before the first sample, in cycles.

    A sample advances the phase by n * f0 / sample_rate, in f0's precision. Phases are summed up in
    float64, over frames instead of samples: they are exact however long the clip is.
    """
    step = _steps(f0, sample_rate, initial.shape[1])
    ends = step.cumsum(-1) * hop_length + initial.unsqueeze(-1)
    begins = ends - step * hop_length
    sample = torch.arange(1, hop_length + 1, dtype=torch.float64, device=f0.device)
    cycles = torch.addcmul(begins.unsqueeze(-1), step.unsqueeze(-1), sample)  # (B, N, F, hop)
    within = cycles.sub_(cycles.round()).to(f0.dtype)
    return within.mul_(2 * math.pi).sin_().flatten(2)


def phase_after(f0: Tensor, sample_rate: int, hop_length: int, initial: Tensor) -> Tensor:
    """Phases (B, N) float64 in cycles, 0 to 1, at the end of f0 (B, F), as `sines` has them there.

    initial: (B, N) before its first sample.
    """
    return (_steps(f0, sample_rate, initial.shape[1]).sum(-1) * hop_length + initial) % 1


def _steps(f0: Tensor, sample_rate: int, harmonics: int) -> Tensor:
    """What a sample of each frame advances the phases by: (B, N, F) float64 of cycles."""
    numbers = torch.arange(1, harmonics + 1, dtype=f0.dtype, device=f0.device)
    return (f0.unsqueeze(1) * numbers[:, None] / sample_rate % 1).double()
