"""The contours of so-vits-svc (commit 730930d), for those who need its numbers.

Voice conversion models that were trained on those contours learnt their timing too. Each function
of `PEERS` gives the peer's f0 before it fills unvoiced frames; `fill_unvoiced` is that filling.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from stages.f0.config import F0Config
from stages.f0.fcpe import fcpe_frames
from stages.f0.pitch import resize2d_f0
from stages.f0.praat import praat_track
from stages.f0.world import world_track
from stages.types import Array


def praat_as_peer(
    wav: Array, sample_rate: int, cfg: F0Config, n_frames: int
) -> NDArray[np.float64]:
    """Praat's frames with zeros on both sides: frame i is the pitch at about (i + 0.83) hops."""
    f0, _ = praat_track(wav, sample_rate, cfg)
    return pad_centred(f0, n_frames)


def dio_as_peer(wav: Array, sample_rate: int, cfg: F0Config, n_frames: int) -> NDArray[np.float64]:
    """DIO rounded to 0.1 Hz, its n + 1 frames squeezed into n."""
    f0, _ = world_track("dio", wav, sample_rate, cfg)
    return resize2d_f0(np.round(f0, 1), n_frames)


def harvest_as_peer(
    wav: Array, sample_rate: int, cfg: F0Config, n_frames: int
) -> NDArray[np.float64]:
    """Harvest, its n + 1 frames squeezed into n."""
    f0, _ = world_track("harvest", wav, sample_rate, cfg)
    return resize2d_f0(f0, n_frames)


def fcpe_as_peer(wav: Array, sample_rate: int, cfg: F0Config, n_frames: int) -> NDArray[np.float64]:
    """FCPE above 0.05, its frames stretched over the clip; f0_min and f0_max do not count."""
    (f0,) = fcpe_frames([wav], sample_rate, cfg, 0.05)
    return stretch(f0, n_frames)


PEERS: dict[str, Callable[[Array, int, F0Config, int], NDArray[np.float64]]] = {
    "praat": praat_as_peer,
    "dio": dio_as_peer,
    "harvest": harvest_as_peer,
    "fcpe": fcpe_as_peer,
}


def pad_centred(f0: NDArray[np.float64], n_frames: int) -> NDArray[np.float64]:
    """Zeros on both sides, the odd one before; too many frames are cut at the end."""
    missing = max(0, n_frames - len(f0))
    before = (missing + 1) // 2
    return np.pad(f0, (before, missing - before))[:n_frames]


def stretch(f0: NDArray[np.float64], n_frames: int) -> NDArray[np.float64]:
    """The value before or at each point of n_frames that divide the contour evenly."""
    step = np.float32(len(f0) / n_frames)
    at = np.floor(np.arange(n_frames, dtype=np.float32) * step).astype(np.intp)
    nearest: NDArray[np.float64] = f0[np.minimum(at, len(f0) - 1)]
    return nearest


def fill_unvoiced(
    f0: NDArray[np.float64], sample_rate: int, hop_length: int
) -> NDArray[np.float64]:
    """Straight lines through unvoiced frames, the ends held; zeros where nothing is voiced.

    The peer keeps the times of voiced frames in float32. That also shifts voiced values (by 0.06
    cents in half a minute), so it is kept here.
    """
    voiced = np.flatnonzero(f0 > 0)
    if len(voiced) == 0:
        return np.zeros(len(f0))
    hop_s = hop_length / sample_rate
    times = np.float32(hop_s) * voiced.astype(np.float32)
    return np.interp(np.arange(len(f0)) * hop_length / sample_rate, times, f0[voiced])
