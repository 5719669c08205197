"""ContentVec and HuBERT-Soft as exported ONNX graphs, run by onnxruntime.

A graph maps float32 [1, 1, T] to float32 [1, F, D]. F is that of wav2vec 2.0's convolutions,
floor((T - 400) / 320) + 1; HuBERT-Soft, which pads 40 samples at both ends, has T // 320. A clip
too short for one frame is padded with zeros.

Clips run one by one: the graphs have one row, and their group norm would include the padding of a
batch. A clip longer than 60 s runs in windows of 60 s that overlap by 10 s and are joined in the
middle of the overlap, so the norm covers a window instead of the song. The error at a seam, one
window's frames against the other's: 0.04 to 0.06 RMS at a standard deviation of 1; all frames
against a graph on the whole song: 0.03 (singing, a small random network).

A graph looks the same as one with a few layers more, so the user has to know its layer and its
precision.

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
from models.encoders.encoder import check_clips
from models.onnx_session import FirstRun, open_session

SAMPLE_RATE = 16000
HOP_LENGTH = 320
REACH = 400  # samples that a frame depends on
WINDOW_FRAMES = 3000
OVERLAP_FRAMES = 500


@dataclass(frozen=True)
class Kind:
    """Properties that a name implies. pad: zeros that the graph adds before and after the clip."""

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
    """Encoder that runs an ONNX graph: (T,) -> (F, D). Frames and windows: see the module."""

    sample_rate = SAMPLE_RATE
    hop_length = HOP_LENGTH

    def __init__(self, name: str, kind: Kind, session: Any, dim: int) -> None:
        """Wrap a session: an onnxruntime.InferenceSession of a graph with the width `dim`."""
        self.name = name
        self.kind = kind
        self.session = session
        self.dim = dim

    def encode(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Encode as `Encoder.encode`, clip by clip."""
        return [self._encode(wav.cpu()) for wav in check_clips(wavs)]

    def _encode(self, wav: Tensor) -> Tensor:
        wav = F.pad(wav, (0, max(0, REACH - 2 * self.kind.pad - len(wav))))
        units = torch.empty(self.kind.num_frames(len(wav)), self.dim)
        for window in windows(len(units), WINDOW_FRAMES, OVERLAP_FRAMES):
            frames = torch.from_numpy(_run(self.session, self._cut(wav, window, len(units)))[0])
            kept = slice(window.first - window.start, window.last - window.start)
            units[window.first : window.last] = frames[kept]
        return units

    def _cut(self, wav: Tensor, window: Window, n_frames: int) -> Tensor:
        """Cut the samples for the frames of `window`; the last window takes all the rest."""
        start = window.start * HOP_LENGTH
        if window.stop == n_frames:
            return wav[start:]
        return wav[start : (window.stop - 1) * HOP_LENGTH + REACH - 2 * self.kind.pad]


def load_onnx(name: str, checkpoint: str | None, device: str = "cpu") -> OnnxEncoder:
    """Load the encoder `name`, one of `KINDS`, from an .onnx file that contains its weights.

    A session gets as many threads as torch has in this process now. There is no silent fallback to
    the CPU.

    Raises: CheckpointError: when the file is not such a graph or fits another name; ValueError:
    when there is no file, or onnxruntime is missing or does not support `device`.
    """
    if checkpoint is None:
        raise ValueError(f"encoder.checkpoint is empty: {name} needs an .onnx file")
    path = Path(checkpoint)
    session = _session(path, torch.device(device))
    return OnnxEncoder(name, KINDS[name], session, _width(path, name, session))


def _session(path: Path, device: torch.device) -> Any:
    silence = np.zeros((1, 1, _TRIAL_SAMPLES), np.float32)
    first_run = FirstRun("a waveform", {"": silence}, _check_ends)
    return open_session(path, device, "the encoders named *-onnx need", "encoder.device", first_run)


def describe_onnx(path: Path) -> list[tuple[str, str]]:
    """Describe a graph as (label, value) pairs, with the encoder names that it fits.

    Raises: CheckpointError: when the graph is not an encoder; ValueError: when onnxruntime is
    missing.
    """
    session = _session(path, torch.device("cpu"))
    (entry,), end = session.get_inputs(), session.get_outputs()[0]
    _, dim, names = _trial(path, session)
    return [
        ("kind", "an ONNX graph of an encoder"),
        ("encoder.name", " or ".join(names) or "none"),
        ("input", f"{entry.name}: {entry.type} {list(entry.shape)}"),
        ("output", f"{end.name}: {end.type} {list(end.shape)}"),
        ("units", f"width {dim}"),
    ]


def _check_ends(path: Path, session: Any) -> None:
    """Check that the graph maps [1, 1, T].

    Raises: CheckpointError: when its inputs are different.
    """
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = {entry.name for entry in inputs}
        what = "a whole voice model" if names >= {"c", "f0"} else "not an encoder"
        raise CheckpointError(
            f"{path} has {len(inputs)} inputs ({', '.join(sorted(names))}): it is {what}. "
            "An encoder has one input, a waveform"
        )
    (entry,) = inputs
    shape = list(entry.shape)
    rows_fit = all(not isinstance(size, int) or size == 1 for size in shape[:2])
    if len(shape) != 3 or not rows_fit or entry.type != "tensor(float)":
        raise CheckpointError(
            f"{path} has the input {entry.type} {shape}; an encoder has tensor(float) "
            "[1, 1, samples]"
        )
    if isinstance(shape[2], int):
        raise CheckpointError(
            f"{path} accepts only clips of {shape[2]} samples: export it with a dynamic length"
        )


_TRIAL_SAMPLES = 960  # a length at which the two ways to pad give different frame counts


def _trial(path: Path, session: Any) -> tuple[int, int, list[str]]:
    """Run a graph on silence; return the frames, D, and the names that it fits.

    A width that no name has fits any name, for distilled students and tests.
    """
    units = _run(session, torch.zeros(_TRIAL_SAMPLES))
    shape = list(units.shape)
    if len(shape) != 3 or shape[0] != 1 or units.dtype != np.float32:
        raise CheckpointError(
            f"{path} returns {units.dtype} {shape}; an encoder returns float32 [1, frames, width]"
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
    """Return D.

    Raises: CheckpointError: when the graph does not fit `name`.
    """
    frames, dim, fits = _trial(path, session)
    if name not in fits:
        hint = f"use encoder.name={' or '.join(fits)}" if fits else "no encoder has that"
        raise CheckpointError(
            f"{path} is not {name}: {_TRIAL_SAMPLES} samples give {frames} frames of width "
            f"{dim}; {hint}"
        )
    return dim


def _run(session: Any, wav: Tensor) -> Any:
    """Run a session on (T,) float32 on the CPU; return its first output, (1, F, D)."""
    feed = {session.get_inputs()[0].name: wav[None, None].contiguous().numpy()}
    return session.run([session.get_outputs()[0].name], feed)[0]
