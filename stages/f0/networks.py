"""f0 networks: their weights, their sample rate, and the cache of loaded ones.

Tested by tests/stages/f0/test_crepe.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.errors import BadInput
from stages.f0.config import F0Config
from stages.frames import Track
from stages.resample import ResampleConfig, resample
from stages.types import Array

SAMPLE_RATE = 16000
_RESAMPLING = ResampleConfig(backend="torchaudio", lowpass_filter_width=128)  # as in so-vits-svc


def at_16k(wavs: Iterable[Array], sample_rate: int) -> list[Array]:
    """Resample clips (T,) to the 16 kHz that all networks need.

    Raises: ValueError: when the ratio of the rates has no small terms.
    """
    try:
        return [resample(wav, sample_rate, SAMPLE_RATE, _RESAMPLING) for wav in wavs]
    except BadInput as error:
        raise ValueError(
            f"crepe, fcpe and rmvpe cannot resample {sample_rate} Hz to {SAMPLE_RATE} Hz: the "
            "ratio has no small terms. Use a common audio.sample_rate (44100, 48000) or another "
            "f0.method"
        ) from error


def every_10_ms(contours: Iterable[NDArray[np.float64]], sample_rate: int) -> list[Track]:
    """Attach positions to contours (F,) whose frame j lies at sample 160 j at 16 kHz."""
    return [(f0, np.arange(len(f0), dtype=np.float64) * (0.01 * sample_rate)) for f0 in contours]


def network(method: str, cfg: F0Config) -> Any:
    """Load crepe, crepe-tiny, fcpe or rmvpe on `cfg.device`, or return the loaded network.

    Raises: ValueError: when weights are missing or belong to another network, or the device is
    missing.
    """
    from models.device import resolve_device  # torch takes seconds to import

    path = weights(method, cfg)
    state = path.stat()
    device = resolve_device(cfg.device)
    return _loaded(method, path, state.st_size, state.st_mtime_ns, device)


def check_network(method: str, cfg: F0Config) -> None:
    """Check a method's weights without loading them; reads at most names and shapes.

    Raises: ValueError: when the weights are missing or belong to another network.
    """
    path = weights(method, cfg)
    if method == "rmvpe":
        from models.f0.rmvpe import check_rmvpe

        check_rmvpe(path)


def weights(method: str, cfg: F0Config) -> Path:
    """Return the path of the method's weights.

    Raises: ValueError: when the file does not exist.
    """
    if method == "rmvpe":
        path = Path(cfg.checkpoint or "")
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise ValueError(f"f0.checkpoint {path} {what}; it must be rmvpe.pt or rmvpe.onnx")
        return path
    if method == "fcpe":
        from models.f0.fcpe import bundled_fcpe

        return bundled_fcpe()
    from models.f0.crepe import bundled_crepe

    return bundled_crepe("tiny" if method == "crepe-tiny" else "full")


@functools.lru_cache(maxsize=4)
def _loaded(method: str, path: Path, size: int, changed_ns: int, device: str) -> Any:
    """Load the network once; size and changed_ns detect a replaced file."""
    if method == "rmvpe":
        from models.f0.rmvpe import load_rmvpe

        return load_rmvpe(path, device)
    if method == "fcpe":
        from models.f0.fcpe import load_fcpe

        return load_fcpe(path, device)
    from models.f0.crepe import load_crepe

    return load_crepe(path, device)
