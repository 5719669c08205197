"""One contour for one clip, by the method that the settings name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stages.f0.config import F0Config
from stages.f0.peer import PEERS
from stages.f0.praat import praat
from stages.f0.pyin import pyin
from stages.f0.world import dio, harvest
from stages.frames import Track, num_frames, resize_contour
from stages.types import Array

METHODS: dict[str, Callable[[Array, int, F0Config], Track]] = {
    "praat": praat,
    "dio": dio,
    "harvest": harvest,
    "pyin": pyin,
}
"""Each estimator answers on its own clock: f0 in Hz (0 = unvoiced) and the sample that each value
belongs to, ascending; both (N,), N of its choosing, 0 when the clip is too short for it. It meets
finite, non-silent clips of one sample and more."""


def estimate_f0(wav: Array, sample_rate: int, cfg: F0Config, n_frames: int | None = None) -> Array:
    """The pitch of a clip at its samples 0, hop, 2 * hop, ...: float32 (F,) in Hz, 0 = unvoiced.

    wav: (T,) float32. n_frames: F, None for T // hop_length; frames beyond the clip are unvoiced.
    Silence is unvoiced, and so is a pitch of which the clip does not hold two periods.

    Raises ValueError for samples that are not finite, a clip that is not (T,), and a range that the
    sample rate cannot carry.
    """
    if wav.ndim != 1:
        raise ValueError(f"f0 needs a mono clip (T,), not {wav.shape}")
    if not np.isfinite(wav).all():
        raise ValueError("f0 needs finite samples; this clip has NaN or infinite ones")
    if cfg.f0_max >= sample_rate / 2:
        raise ValueError(
            f"f0.f0_max ({cfg.f0_max} Hz) must be below half the sample rate ({sample_rate} Hz)"
        )
    if n_frames is None:
        n_frames = num_frames(len(wav), cfg.hop_length)
    if n_frames == 0 or not wav.any():
        return np.zeros(n_frames, dtype=np.float32)
    if cfg.align == "peer":
        return PEERS[cfg.method](wav, sample_rate, cfg, n_frames).astype(np.float32)
    f0, positions = METHODS[cfg.method](wav, sample_rate, cfg)
    lowest = max(cfg.f0_min, 2 * sample_rate / len(wav))
    in_range = (f0 >= lowest) & (f0 <= cfg.f0_max)
    return resize_contour(np.where(in_range, f0, 0.0), positions, n_frames, cfg.hop_length)
