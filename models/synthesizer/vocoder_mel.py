"""The mels that vocoders of the NSF-HiFiGAN family sing from.

Source: nvSTFT.py of so-vits-svc (commit 730930d), which OpenVPI's vocoders were trained with.

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
    """Natural logarithm of mel bins (B, M, F) of wav (B, T), F = T // (hop_length * speed).

    Before and after the wav its mirror image counts, where it is too short for one silence. There
    is one frame at least.

    key_shift: semitones that the sound is moved up by, its length kept. speed: above 1, the frames
    lie further apart, and what is sung from them is shorter.

    Raises ValueError for an empty wav, and a speed that leaves gaps between the frames.
    """
    stretch = 2 ** (key_shift / 12)
    n_fft, win_length = round(config.n_fft * stretch), round(config.win_length * stretch)
    hop_length = round(hop_length * speed)
    if not 1 <= hop_length <= win_length:
        raise ValueError(
            f"frames of {win_length} samples cannot be {hop_length} apart (speed {speed:g})"
        )
    samples = wav.shape[-1]
    if samples == 0:
        raise ValueError("a mel of no samples")
    before = (win_length - hop_length) // 2
    after = max((win_length - hop_length + 1) // 2, win_length - samples - before)
    padded = F.pad(wav, (before, after), mode="reflect" if after < samples else "constant")
    spec = magnitudes(padded, n_fft, hop_length, win_length, _FLOOR)
    if key_shift != 0:
        bins = config.n_fft // 2 + 1
        spec = F.pad(spec, (0, 0, 0, max(0, bins - spec.shape[1])))[:, :bins]
        spec = spec * (config.win_length / win_length)
    return mel_of(spec, config, sample_rate)
