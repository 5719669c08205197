"""RMVPE with the weights in the file that `F0Config.checkpoint` names (`models.f0.rmvpe`)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stages.f0.config import F0Config
from stages.frames import Track
from stages.resample import ResampleConfig, resample
from stages.types import Array

if TYPE_CHECKING:
    from models.f0.rmvpe import Rmvpe

_RESAMPLING = ResampleConfig(backend="torchaudio", lowpass_filter_width=128)  # as so-vits-svc's
_DEFAULT_VOICING = 0.03  # the paper's code


def rmvpe(wavs: Sequence[Array], sample_rate: int, cfg: F0Config) -> Iterable[Track]:
    """f0 in Hz and the samples that its values belong to, of each clip.

    Raises ValueError where the file is none of RMVPE's weights or cannot run on `cfg.device`.
    """
    from models.f0.mel import HOP_LENGTH, SAMPLE_RATE

    contours = rmvpe_frames(wavs, sample_rate, cfg, _DEFAULT_VOICING)
    hop = HOP_LENGTH * sample_rate / SAMPLE_RATE
    return [(f0, np.arange(len(f0), dtype=np.float64) * hop) for f0 in contours]


def rmvpe_frames(
    wavs: Sequence[Array], sample_rate: int, cfg: F0Config, default_voicing: float
) -> list[NDArray[np.float64]]:
    """f0 in Hz every 10 ms, 0 = unvoiced, of each clip."""
    import torch

    from models.f0.mel import SAMPLE_RATE
    from models.f0.rmvpe import decode

    network = _network(cfg.checkpoint, cfg.device)
    threshold = default_voicing if cfg.voicing_threshold is None else cfg.voicing_threshold
    heard = [resample(wav, sample_rate, SAMPLE_RATE, _RESAMPLING) for wav in wavs]
    saliences = network.salience(
        [torch.from_numpy(np.require(wav, np.float32, "W")) for wav in heard]
    )
    return [decode(salience, threshold).numpy() for salience in saliences]


def _network(checkpoint: str | None, choice: str) -> Rmvpe:
    import torch

    if checkpoint is None:
        raise ValueError("f0.checkpoint is empty: rmvpe needs a file of weights")
    there = torch.cuda.is_available()
    if choice == "cuda" and not there:
        raise ValueError("f0.device is cuda, but torch finds no CUDA device on this machine")
    device = ("cuda" if there else "cpu") if choice == "auto" else choice
    path = Path(checkpoint)
    if not path.is_file():
        raise ValueError(
            f"f0.checkpoint: {path} {'is a folder' if path.is_dir() else 'does not exist'}; name "
            f"rmvpe.pt or rmvpe.onnx"
        )
    state = path.stat()
    return _loaded(path, state.st_size, state.st_mtime_ns, device)


@functools.lru_cache(maxsize=1)
def _loaded(path: Path, size: int, changed_ns: int, device: str) -> Rmvpe:
    """The network; size and changed_ns tell a file from another one in its place."""
    from models.f0.rmvpe import load_rmvpe

    return load_rmvpe(path, device)
