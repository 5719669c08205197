"""Spectrograms of training: linear for the posterior encoder, mel for the loss. Gradients flow.

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

_FLOOR = 1e-6  # added to squared magnitudes: the root has a slope at 0
_SMALLEST = 1e-5  # of what the logarithm is taken


def spectrogram(
    wav: Tensor, config: MelConfig, hop_length: int, lengths: Tensor | None = None
) -> Tensor:
    """Magnitudes (B, K, F) of wav (B, T), F = T // hop_length.

    Frame j is centred on the middle of its hop: samples j * hop_length to (j + 1) * hop_length.
    Before and after the wav its mirror image counts.

    lengths: (B,) int64, the frames of each clip where they differ. The mirror is at each one's own
    end, as if it were alone, and frames after it are 0.

    Source: so-vits-svc (commit 730930d). Raises ValueError for a wav that is too short to have a
    mirror image.
    """
    before = (config.n_fft - hop_length) // 2
    after = config.n_fft - hop_length - before
    if wav.shape[-1] <= after:
        raise ValueError(
            f"a spectrogram of n_fft {config.n_fft} and hop length {hop_length} needs more than "
            f"{after} samples; this wav has {wav.shape[-1]}"
        )
    if lengths is None:
        padded = F.pad(wav, (before, after), mode="reflect")
    else:
        padded = _mirrored(wav, lengths * hop_length, before, after)
    spec = magnitudes(padded, config.n_fft, hop_length, config.win_length, _FLOOR)
    return spec if lengths is None else spec * sequence_mask(lengths, spec.shape[-1]).unsqueeze(1)


def _mirrored(wav: Tensor, ends: Tensor, before: int, after: int) -> Tensor:
    """wav with each example's mirror image before it and from its own end on."""
    place = torch.arange(-before, wav.shape[-1] + after, device=wav.device)
    there_and_back = 2 * (ends - 1).unsqueeze(1)  # (B, 1)
    index = place.remainder(there_and_back)
    return wav.gather(1, torch.minimum(index, there_and_back - index))


def magnitudes(
    padded: Tensor, n_fft: int, hop_length: int, win_length: int, floor: float
) -> Tensor:
    """Magnitudes (B, K, F) of frames that begin each `hop_length` samples, under a Hann window.

    floor: is added to their squares.
    """
    window = torch.hann_window(win_length, dtype=padded.dtype, device=padded.device)
    spectrum = torch.stft(
        padded, n_fft, hop_length, win_length, window, center=False, return_complex=True
    )
    return (torch.view_as_real(spectrum).square().sum(-1) + floor).sqrt()


def mel_of(spec: Tensor, config: MelConfig, sample_rate: int) -> Tensor:
    """Natural logarithm of the mel bins (B, M, F) of a spectrogram (B, K, F)."""
    filters = _filters(config, sample_rate, spec.dtype, spec.device)
    return torch.log((filters @ spec).clamp(min=_SMALLEST))


@lru_cache(maxsize=16)
def _filters(
    config: MelConfig, sample_rate: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(M, K) triangles of equal area on the scale of M. Slaney's Auditory Toolbox."""
    weights = librosa.filters.mel(
        sr=sample_rate,
        n_fft=config.n_fft,
        n_mels=config.n_mels,
        fmin=config.f_min,
        fmax=config.f_max,
    )
    with torch.inference_mode(False):  # or gradients could never flow through what is kept
        return torch.from_numpy(weights).to(device, dtype)
