"""Differentiable spectrograms of training: linear for the posterior encoder, mel for the loss.

B batch, K = n_fft // 2 + 1 bins, M mel bins, F frames, T samples.
"""

from __future__ import annotations

from functools import lru_cache

import librosa
import torch
from torch import Tensor
from torch.nn import functional as F

from models.synthesizer.blocks.segments import sequence_mask
from models.synthesizer.config import MelConfig

_FLOOR = 1e-6  # added to squared magnitudes, so that the root has a finite slope at 0
_MIN_MEL = 1e-5  # lower limit before the logarithm


def spectrogram(
    wav: Tensor, config: MelConfig, hop_length: int, lengths: Tensor | None = None
) -> Tensor:
    """Compute magnitudes (B, K, F) of wav (B, T), F = T // hop_length.

    Frame j is centred on the middle of its hop: samples j * hop_length to (j + 1) * hop_length.
    The wav is padded by reflection.

    lengths: (B,) int64, the frames of each clip where they differ. Each clip is reflected at its
    own end, as if it were alone, and frames after it are 0.

    Source: so-vits-svc (commit 730930d).

    Raises: ValueError: when the wav is too short to reflect.
    """
    before = (config.n_fft - hop_length) // 2
    after = config.n_fft - hop_length - before
    if wav.shape[-1] <= after:
        raise ValueError(
            f"a spectrogram with n_fft {config.n_fft} and hop length {hop_length} needs more than "
            f"{after} samples; this wav has {wav.shape[-1]}"
        )
    if lengths is None:
        padded = F.pad(wav, (before, after), mode="reflect")
    else:
        padded = _reflect_each(wav, lengths * hop_length, before, after)
    spec = magnitudes(padded, config.n_fft, hop_length, config.win_length, _FLOOR)
    return spec if lengths is None else spec * sequence_mask(lengths, spec.shape[-1]).unsqueeze(1)


def _reflect_each(wav: Tensor, ends: Tensor, before: int, after: int) -> Tensor:
    """Pad each example by reflection at its start and at its own end."""
    position = torch.arange(-before, wav.shape[-1] + after, device=wav.device)
    period = 2 * (ends - 1).unsqueeze(1)  # (B, 1)
    index = position.remainder(period)
    return wav.gather(1, torch.minimum(index, period - index))


def magnitudes(
    padded: Tensor, n_fft: int, hop_length: int, win_length: int, floor: float
) -> Tensor:
    """Compute magnitudes (B, K, F) of frames every `hop_length` samples, with a Hann window.

    floor: added to the squared magnitudes.
    """
    window = torch.hann_window(win_length, dtype=padded.dtype, device=padded.device)
    spectrum = torch.stft(
        padded, n_fft, hop_length, win_length, window, center=False, return_complex=True
    )
    return (torch.view_as_real(spectrum).square().sum(-1) + floor).sqrt()


def mel_of(spec: Tensor, config: MelConfig, sample_rate: int) -> Tensor:
    """Convert a spectrogram (B, K, F) to the natural logarithm of mel bins (B, M, F)."""
    filters = _filters(config, sample_rate, spec.dtype, spec.device)
    return torch.log((filters @ spec).clamp(min=_MIN_MEL))


@lru_cache(maxsize=16)
def _filters(
    config: MelConfig, sample_rate: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Build the mel filters (M, K): triangles of equal area, Slaney's mel scale."""
    weights = librosa.filters.mel(
        sr=sample_rate,
        n_fft=config.n_fft,
        n_mels=config.n_mels,
        fmin=config.f_min,
        fmax=config.f_max,
    )
    with torch.inference_mode(False):  # a cached inference tensor would block gradients for ever
        return torch.from_numpy(weights).to(device, dtype)
