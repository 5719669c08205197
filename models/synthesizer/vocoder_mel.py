"""Mel spectrograms for vocoders of the NSF-HiFiGAN family.

Source: nvSTFT.py of so-vits-svc (commit 730930d), used to train OpenVPI's vocoders.

B batch, M mel bins, F frames, T samples.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from models.synthesizer.config import MelConfig
from models.synthesizer.mel import magnitudes, mel_of

_FLOOR = 1e-9  # added to squared magnitudes


def vocoder_mel(
    wav: Tensor,
    config: MelConfig,
    sample_rate: int,
    hop_length: int,
    *,
    key_shift: float = 0.0,
    speed: float = 1.0,
) -> Tensor:
    """Compute the natural log of mel bins (B, M, F) of wav (B, T), F = T // (hop_length * speed).

    The wav is padded by reflection, or with zeros where it is too short for that. There is at least
    one frame.

    key_shift: semitones by which the pitch is raised; the length stays. speed: above 1, frames lie
    further apart, and the vocoder's output is shorter.

    Raises: ValueError: when the wav is empty or the speed leaves gaps between the frames.
    """
    stretch = 2 ** (key_shift / 12)
    n_fft, win_length = round(config.n_fft * stretch), round(config.win_length * stretch)
    hop_length = round(hop_length * speed)
    if not 1 <= hop_length <= win_length:
        raise ValueError(
            f"frames of {win_length} samples cannot have a hop of {hop_length} (speed {speed:g})"
        )
    samples = wav.shape[-1]
    if samples == 0:
        raise ValueError("the wav has no samples, so it has no mel spectrogram")
    before = (win_length - hop_length) // 2
    after = max((win_length - hop_length + 1) // 2, win_length - samples - before)
    padded = F.pad(wav, (before, after), mode="reflect" if after < samples else "constant")
    spec = magnitudes(padded, n_fft, hop_length, win_length, _FLOOR)
    if key_shift != 0:
        bins = config.n_fft // 2 + 1
        spec = F.pad(spec, (0, 0, 0, max(0, bins - spec.shape[1])))[:, :bins]
        spec = spec * (config.win_length / win_length)
    return mel_of(spec, config, sample_rate)
