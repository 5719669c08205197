"""RMVPE as an exported ONNX graph, run by onnxruntime.

The community's `rmvpe.onnx` maps the log-mel, float32 [1, 128, F] with F a multiple of 32, to the
salience [1, F, 360]. Clips run one by one: a graph does not know the clips' lengths, and its
convolutions would read the padding of a batch. A clip longer than 164 s runs in windows that
overlap by 32 s and are joined in the middle. The U-Net reaches no further, so only the GRU is
affected by the seam.

Tested by tests/models/f0/test_rmvpe.py.
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
from models.onnx_session import FirstRun, open_session

WINDOW_FRAMES = 16384
OVERLAP_FRAMES = 2 * RmvpeConfig().reach
_TRIAL_FRAMES = 2 << LEVELS


class OnnxRmvpe:
    """RMVPE as an ONNX graph, run clip by clip."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        """Open the graph.

        Raises: CheckpointError: when the file is not such a graph; ValueError: when onnxruntime is
        missing or does not support `device`.
        """
        mel = np.zeros((1, NUM_MELS, _TRIAL_FRAMES), np.float32)
        self.session = open_session(
            path,
            torch.device(device),
            "RMVPE from an .onnx file needs",
            "f0.device",
            FirstRun("a log-mel", {"": mel}, _check_ends),
        )
        _check_trial(path, self.session)

    def salience(self, mels: Sequence[Tensor]) -> list[Tensor]:
        """Compute salience: (M, F) each, F a multiple of 32 -> (F, K) each, on the CPU."""
        return [self._salience(mel.cpu()) for mel in mels]

    def _salience(self, mel: Tensor) -> Tensor:
        out = torch.empty(mel.shape[1], NUM_BINS)
        for window in windows(len(out), WINDOW_FRAMES, OVERLAP_FRAMES):
            salience = torch.from_numpy(_run(self.session, mel[:, window.start : window.stop])[0])
            kept = slice(window.first - window.start, window.last - window.start)
            out[window.first : window.last] = salience[kept]
        return out


def _check_ends(path: Path, session: Any) -> None:
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(sorted(entry.name for entry in inputs))
        raise CheckpointError(
            f"{path} has {len(inputs)} inputs ({names}); an RMVPE has one input, a log-mel"
        )
    (entry,) = inputs
    shape = list(entry.shape)
    fits = len(shape) == 3 and all(
        not isinstance(size, int) or size == expected
        for size, expected in zip(shape, (1, NUM_MELS), strict=False)
    )
    if not fits or entry.type != "tensor(float)":
        raise CheckpointError(
            f"{path} has the input {entry.type} {shape}; an RMVPE has tensor(float) "
            "[1, 128, frames]"
        )
    if isinstance(shape[2], int):
        raise CheckpointError(
            f"{path} accepts only clips of {shape[2]} frames: export it with a dynamic length"
        )


def _check_trial(path: Path, session: Any) -> None:
    salience = _run(session, torch.zeros(NUM_MELS, _TRIAL_FRAMES))
    expected = (1, _TRIAL_FRAMES, NUM_BINS)
    if salience.shape != expected or salience.dtype != np.float32:
        raise CheckpointError(
            f"{path} returns {salience.dtype} {list(salience.shape)} for {_TRIAL_FRAMES} frames; "
            f"an RMVPE returns float32 {list(expected)}"
        )
    if not ((salience >= 0) & (salience <= 1)).all():  # False for NaN too
        raise CheckpointError(
            f"{path} returns values that are not finite or outside 0 to 1; "
            "an RMVPE's salience is in 0 to 1"
        )


def _run(session: Any, mel: Tensor) -> Any:
    """Run a session on (M, F) float32 on the CPU; return its first output, (1, F, K)."""
    feed = {session.get_inputs()[0].name: mel[None].contiguous().numpy()}
    return session.run([session.get_outputs()[0].name], feed)[0]
