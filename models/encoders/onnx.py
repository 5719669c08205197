"""ContentVec and HuBERT-Soft as exported ONNX graphs, run by onnxruntime.

A graph takes float32 [1, 1, T] and gives float32 [1, F, D]. F is that of wav2vec 2.0's
convolutions, floor((T - 400) / 320) + 1; HuBERT-Soft, which pads 40 samples at both ends, has
T // 320. A clip too short for one frame is followed by zeros up to it.

Clips run one by one: the graphs have one row, and their group norm would hear the padding of a
batch. One longer than 60 s runs in windows of 60 s that overlap by 10 s and meet in the middle of
the overlap, and that norm hears a window instead of the song. The seam error, one window's frames
against the other's around a seam: 0.04 to 0.06 RMS, where the units' standard deviation is 1; all
frames against those of a graph that sees the whole song: 0.03 (singing, a small random network).

A graph cannot be told from one that is a few layers deeper: which layer it is stays the user's
word. Nor is it known what it computes in.

Axes: T samples, F frames, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.batching import Window, windows
from models.checkpoint import CheckpointError
from models.encoders.encoder import checked
from models.onnx_session import (
    first_line,
    graph_faults,
    open_session,
    refuse_weights_elsewhere,
)

SAMPLE_RATE = 16000
HOP_LENGTH = 320
REACH = 400  # samples that a frame sees
WINDOW_FRAMES = 3000
OVERLAP_FRAMES = 500


@dataclass(frozen=True)
class Kind:
    """What a name promises. pad: zeros that the graph puts before and after the clip."""

    dim: int
    pad: int = 0

    def num_frames(self, num_samples: int) -> int:
        return (num_samples + 2 * self.pad - REACH) // HOP_LENGTH + 1


KINDS = {
    "contentvec256l9-onnx": Kind(256),
    "contentvec256l12-onnx": Kind(256),
    "contentvec768l9-onnx": Kind(768),
    "contentvec768l12-onnx": Kind(768),
    "hubertsoft-onnx": Kind(256, pad=40),
}


class OnnxEncoder:
    """Encoder by an ONNX graph: (T,) -> (F, D). Frames and windows: see the module."""

    sample_rate = SAMPLE_RATE
    hop_length = HOP_LENGTH

    def __init__(self, name: str, kind: Kind, session: Any, dim: int) -> None:
        """session: an onnxruntime.InferenceSession of a graph as the module says, D being `dim`."""
        self.name = name
        self.kind = kind
        self.session = session
        self.dim = dim

    def encode(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """As `Encoder.encode`; clip by clip."""
        return [self._encode(wav.cpu()) for wav in checked(wavs)]

    def _encode(self, wav: Tensor) -> Tensor:
        wav = F.pad(wav, (0, max(0, REACH - 2 * self.kind.pad - len(wav))))
        units = torch.empty(self.kind.num_frames(len(wav)), self.dim)
        for window in windows(len(units), WINDOW_FRAMES, OVERLAP_FRAMES):
            frames = torch.from_numpy(_run(self.session, self._cut(wav, window, len(units)))[0])
            kept = slice(window.first - window.start, window.last - window.start)
            units[window.first : window.last] = frames[kept]
        return units

    def _cut(self, wav: Tensor, window: Window, n_frames: int) -> Tensor:
        """The samples that make the frames of `window`; the last window takes all that is left."""
        start = window.start * HOP_LENGTH
        if window.stop == n_frames:
            return wav[start:]
        return wav[start : (window.stop - 1) * HOP_LENGTH + REACH - 2 * self.kind.pad]


def load_onnx(name: str, checkpoint: str | None, device: str = "cpu") -> OnnxEncoder:
    """The encoder `name`, one of `KINDS`, from an .onnx file that holds its own weights.

    A session computes in as many threads as torch does in this process now.

    Raises CheckpointError for a file that is no such graph, or another name's; ValueError where
    there is none, and where onnxruntime is missing or cannot compute on `device`: it never takes
    the processor instead.
    """
    if checkpoint is None:
        raise ValueError(f"encoder.checkpoint is empty: {name} needs an .onnx file")
    path = Path(checkpoint)
    refuse_weights_elsewhere(path)
    session = _session(path, torch.device(device))
    _check_ends(path, session)
    return OnnxEncoder(name, KINDS[name], session, _width(path, name, session))


def _session(path: Path, device: torch.device) -> Any:
    return open_session(path, device, "the encoders named *-onnx need", "encoder.device")


def describe_onnx(path: Path) -> list[tuple[str, str]]:
    """Label and value of what a graph says of itself, and the encoders it can be.

    Raises CheckpointError for a graph that is no encoder, ValueError where onnxruntime is missing.
    """
    session = _session(path, torch.device("cpu"))
    _check_ends(path, session)
    (entry,), end = session.get_inputs(), session.get_outputs()[0]
    _, dim, names = _trial(path, session)
    return [
        ("kind", "an ONNX graph of an encoder"),
        ("encoder.name", " or ".join(names) or "none"),
        ("input", f"{entry.name}: {entry.type} {list(entry.shape)}"),
        ("output", f"{end.name}: {end.type} {list(end.shape)}"),
        ("units", f"{dim} numbers"),
    ]


def _check_ends(path: Path, session: Any) -> None:
    """Raises CheckpointError where the graph does not go from [1, 1, T] to [1, F, D]."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = {entry.name for entry in inputs}
        what = "a whole voice model, no encoder" if names >= {"c", "f0"} else "no encoder"
        raise CheckpointError(
            f"{path} takes {len(inputs)} inputs ({', '.join(sorted(names))}): it is {what}, which "
            f"takes a waveform alone"
        )
    (entry,) = inputs
    shape = list(entry.shape)
    rows_fit = all(not isinstance(size, int) or size == 1 for size in shape[:2])
    if len(shape) != 3 or not rows_fit or entry.type != "tensor(float)":
        raise CheckpointError(
            f"{path} takes {entry.type} {shape}; an encoder takes tensor(float) [1, 1, samples]"
        )
    if isinstance(shape[2], int):
        raise CheckpointError(
            f"{path} takes clips of {shape[2]} samples alone: export it with a length that varies"
        )


_TRIAL_SAMPLES = 960  # the two ways to pad differ here


def _trial(path: Path, session: Any) -> tuple[int, int, list[str]]:
    """Frames of the trial, D, and the names whose padding and width a graph has, by a trial.

    A width that no name has is taken under any: students and tests are narrower.
    """
    try:
        units = _run(session, torch.zeros(_TRIAL_SAMPLES))
    except graph_faults() as error:
        raise CheckpointError(f"{path} cannot run on a waveform ({first_line(error)})") from error
    shape = list(units.shape)
    if len(shape) != 3 or shape[0] != 1 or units.dtype != np.float32:
        raise CheckpointError(
            f"{path} gives {units.dtype} {shape}; an encoder gives float32 [1, frames, width]"
        )
    _, frames, dim = shape
    widths = {kind.dim for kind in KINDS.values()}
    return (
        frames,
        dim,
        [
            name
            for name, kind in KINDS.items()
            if frames == kind.num_frames(_TRIAL_SAMPLES) and (dim == kind.dim or dim not in widths)
        ],
    )


def _width(path: Path, name: str, session: Any) -> int:
    """D. Raises CheckpointError where the graph is not what `name` says."""
    frames, dim, fits = _trial(path, session)
    if name not in fits:
        hint = f"its name is {' or '.join(fits)}" if fits else "no encoder here does that"
        raise CheckpointError(
            f"{path} is not {name}: of {_TRIAL_SAMPLES} samples it makes {frames} frames of width "
            f"{dim}; {hint}"
        )
    return dim


def _run(session: Any, wav: Tensor) -> Any:
    """(T,) float32 on the CPU -> what the graph's first output is, (1, F, D)."""
    feed = {session.get_inputs()[0].name: wav[None, None].contiguous().numpy()}
    return session.run([session.get_outputs()[0].name], feed)[0]
