"""Enhancement of a voice's output by a vocoder that was trained on far more singers.

The vocoder resynthesizes the audio from its mel spectrogram and f0. Audio above the vocoder's range
is slowed down first, which lowers it by `adaptive_key`, and the result is sped up again.

Source: modules/enhancer.py of so-vits-svc (commit 730930d), which has it from DDSP-SVC.

N harmonics, F frames, T samples.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from models.synthesizer.blocks.noise import KeyedNoise, Noise
from models.synthesizer.blocks.source import first_phase, phase_after
from models.synthesizer.vocoder import Vocoder
from models.synthesizer.vocoder_mel import vocoder_mel
from models.torchaudio_compat import import_torchaudio

_HIGHEST_HZ = 760.0  # highest f0 that needs no adaptive key
_MAX_SEMITONES = 24
_LOWPASS_WIDTH = 128  # zero crossings of the resampling filter

AdaptiveKey = float | Literal["auto"]
"""Semitones, or "auto" for `automatic_key` of the f0."""


def automatic_key(f0: Tensor) -> int:
    """Return the fewest whole semitones, 0 to 24, that lower f0 (F,) to at most 760 Hz.

    Source: the enhancer of DDSP-SVC; so-vits-svc's takes numbers only.
    """
    highest = float(f0.max()) if len(f0) else 0.0
    return min(_MAX_SEMITONES, math.ceil(12 * math.log2(max(1.0, highest / _HIGHEST_HZ))))


class Enhancer:
    """Resynthesis with `vocoder`, on its device."""

    def __init__(self, vocoder: Vocoder) -> None:
        self.vocoder = vocoder
        self.sample_rate = vocoder.config.sample_rate
        self._hop_length = vocoder.config.hop_length
        self._device = next(vocoder.parameters()).device
        self._resamplers: dict[tuple[int, int], nn.Module] = {}

    @torch.no_grad()
    def enhance(
        self,
        wav: Tensor,
        sample_rate: int,
        f0: Tensor,
        hop_length: int,
        adaptive_key: AdaptiveKey = 0.0,
        silence_front: float = 0.0,
        *,
        noise: Noise | None = None,
        phase: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Resynthesize wav (T,); return the result and the vocoder's sample rate.

        The result has whole frames of the vocoder and may end a frame before `wav`.

        f0: (F,) in Hz, one value per `hop_length` samples, interpolated where unvoiced.
        silence_front: seconds, rounded down to frames, that become silence.
        noise: of one example; None: always the same. phase: (1, N) of the sine source before the
        first sample, in cycles; None: 0 for f0, random for its overtones.

        Raises: ValueError: when the key is more than two octaves.
        """
        input_rate = self._input_rate(adaptive_key, f0)
        skipped = int(silence_front * sample_rate / hop_length)
        rest, f0_rest = wav[skipped * hop_length :], f0[skipped:]
        if len(rest) == 0 or len(f0_rest) == 0:
            return wav.new_zeros(round(len(wav) * self.sample_rate / sample_rate)), self.sample_rate
        rest = self._resample(rest.to(self._device), sample_rate, input_rate)
        config = self.vocoder.config
        mel = vocoder_mel(rest[None], config.mel, config.sample_rate, config.hop_length)
        contour = self._contour(f0_rest, hop_length / sample_rate, input_rate, mel.shape[-1])
        contour = contour.to(mel)
        noise = noise or KeyedNoise([0], self._device)
        if phase is None:
            phase = first_phase(contour, noise)
        else:
            before = f0[None, :skipped].to(self._device)
            phase = phase_after(before, sample_rate, hop_length, phase.to(self._device))
        enhanced = self.vocoder.infer(mel, contour, noise, phase)[0, 0]
        silence = enhanced.new_zeros(round(skipped * hop_length * self.sample_rate / sample_rate))
        return torch.cat(
            [silence, self._resample(enhanced, input_rate, self.sample_rate)]
        ), self.sample_rate

    def phase_after(
        self,
        f0: Tensor,
        sample_rate: int,
        hop_length: int,
        adaptive_key: AdaptiveKey,
        phase: Tensor,
    ) -> Tensor:
        """Return the phase (1, N) float64, in cycles, at the end of f0 (F,), for the next piece.

        The arguments are those of `enhance`; phase: (1, N) before the first sample of f0.
        """
        if len(f0) == 0:
            return phase
        input_rate = self._input_rate(adaptive_key, f0)
        frames = len(f0) * hop_length / sample_rate * input_rate / self._hop_length
        whole = int(frames)
        contour = self._contour(f0, hop_length / sample_rate, input_rate, whole + 1)
        phase = phase_after(contour[:, :whole], self.sample_rate, self._hop_length, phase.cpu())
        rest = (frames - whole) * self._hop_length
        return phase_after(contour[:, whole:], self.sample_rate, rest, phase)

    def _input_rate(self, adaptive_key: AdaptiveKey, f0: Tensor) -> int:
        """Return the rate to resample to, which the vocoder then treats as its own rate."""
        key = automatic_key(f0) if adaptive_key == "auto" else adaptive_key
        if not -_MAX_SEMITONES <= key <= _MAX_SEMITONES:
            raise ValueError(
                f"the enhancer's adaptive key is {key:g}; it must be in -{_MAX_SEMITONES} to "
                f"{_MAX_SEMITONES} semitones"
            )
        return 100 * round(self.sample_rate / 2 ** (-key / 12) / 100)

    def _contour(self, f0: Tensor, frame_s: float, input_rate: int, frames: int) -> Tensor:
        """Resample f0 (F,), one value per `frame_s`, to the vocoder's frames (1, frames)."""
        slower = self.sample_rate / input_rate
        lowered = f0.cpu().numpy() * slower
        have = frame_s * np.arange(len(lowered)) / slower
        want = self._hop_length / self.sample_rate * np.arange(frames)
        return torch.from_numpy(np.interp(want, have, lowered)).float().unsqueeze(0)

    def _resample(self, wav: Tensor, rate: int, target: int) -> Tensor:
        if rate == target:
            return wav
        if (rate, target) not in self._resamplers:
            transforms = import_torchaudio().transforms
            resampler = transforms.Resample(rate, target, lowpass_filter_width=_LOWPASS_WIDTH)
            self._resamplers[rate, target] = resampler.to(wav)
        return self._resamplers[rate, target](wav)
