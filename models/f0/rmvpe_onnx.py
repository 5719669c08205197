"""RMVPE as an exported ONNX graph, run by onnxruntime.

The community's `rmvpe.onnx` takes the log-mel, float32 [1, 128, F] with F a multiple of 32, and
gives the salience [1, F, 360]. Clips run one by one: a graph knows no clip's length, and its
convolutions would hear the padding of a batch. One longer than 164 s runs in windows that overlap
by 32 s and meet in the middle: the U-Net sees no further, so only the GRU notices the seam.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.batching import windows
from models.checkpoint import CheckpointError
from models.f0.bins import NUM_BINS
from models.f0.mel import NUM_MELS
from models.f0.rmvpe_checkpoint import LEVELS, RmvpeConfig
from models.onnx_session import first_line, graph_faults, open_session, refuse_weights_elsewhere

WINDOW_FRAMES = 16384
OVERLAP_FRAMES = 2 * RmvpeConfig().reach
_TRIAL_FRAMES = 2 << LEVELS


class OnnxRmvpe:
    """The network as a graph; clip by clip."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        """Raises CheckpointError for a file that is no such graph; as `open_session` does."""
        refuse_weights_elsewhere(path)
        self.session = open_session(
            path, torch.device(device), "RMVPE from an .onnx file needs", "f0.device"
        )
        _check_ends(path, self.session)
        _check_trial(path, self.session)

    def salience(self, mels: Sequence[Tensor]) -> list[Tensor]:
        """(M, F) each, F a multiple of 32 -> (F, K) each, on the CPU."""
        return [self._salience(mel.cpu()) for mel in mels]

    def _salience(self, mel: Tensor) -> Tensor:
        out = torch.empty(mel.shape[1], NUM_BINS)
        for window in windows(len(out), WINDOW_FRAMES, OVERLAP_FRAMES):
            found = torch.from_numpy(_run(self.session, mel[:, window.start : window.stop])[0])
            kept = slice(window.first - window.start, window.last - window.start)
            out[window.first : window.last] = found[kept]
        return out


def _check_ends(path: Path, session: Any) -> None:
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(sorted(entry.name for entry in inputs))
        raise CheckpointError(
            f"{path} takes {len(inputs)} inputs ({names}); an RMVPE takes a log-mel alone"
        )
    (entry,) = inputs
    shape = list(entry.shape)
    fits = len(shape) == 3 and all(
        not isinstance(size, int) or size == wanted
        for size, wanted in zip(shape, (1, NUM_MELS), strict=False)
    )
    if not fits or entry.type != "tensor(float)":
        raise CheckpointError(
            f"{path} takes {entry.type} {shape}; an RMVPE takes tensor(float) [1, 128, frames]"
        )
    if isinstance(shape[2], int):
        raise CheckpointError(
            f"{path} takes clips of {shape[2]} frames alone: export it with a length that varies"
        )


def _check_trial(path: Path, session: Any) -> None:
    try:
        found = _run(session, torch.zeros(NUM_MELS, _TRIAL_FRAMES))
    except graph_faults() as error:
        raise CheckpointError(f"{path} cannot run on a log-mel ({first_line(error)})") from error
    wanted = (1, _TRIAL_FRAMES, NUM_BINS)
    if found.shape != wanted or found.dtype != np.float32:
        raise CheckpointError(
            f"{path} gives {found.dtype} {list(found.shape)} for {_TRIAL_FRAMES} frames; an RMVPE "
            f"gives float32 {list(wanted)}"
        )
    if not ((found >= 0) & (found <= 1)).all():  # nor is NaN
        raise CheckpointError(
            f"{path} gives numbers that are not finite or beyond 0 to 1; an RMVPE's salience is not"
        )


def _run(session: Any, mel: Tensor) -> Any:
    """(M, F) float32 on the CPU -> what the graph's first output is, (1, F, K)."""
    feed = {session.get_inputs()[0].name: mel[None].contiguous().numpy()}
    return session.run([session.get_outputs()[0].name], feed)[0]
