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

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.checkpoint import CheckpointError
from models.batching import Window, windows
from models.encoders.encoder import checked

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
    _refuse_weights_elsewhere(path)
    session = _session(path, torch.device(device))
    _check_ends(path, session)
    return OnnxEncoder(name, KINDS[name], session, _width(path, name, session))


def is_onnx(path: Path) -> bool:
    """Whether a file starts as an ONNX graph does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(1) == b"\x08"


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


def _session(path: Path, device: torch.device) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(
            "the encoders named *-onnx need onnxruntime: install cantor[onnx], or onnxruntime-gpu"
        ) from error
    provider: Any = "CPUExecutionProvider"
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise ValueError(
                "this onnxruntime has no CUDA: install onnxruntime-gpu, or set encoder.device=cpu"
            )
        # The default search tries every algorithm again for each new length of clip.
        search = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}
        provider = ("CUDAExecutionProvider", {"device_id": str(device.index or 0)} | search)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # a plan for each length of clip would be kept
    options.log_severity_level = 4  # errors are raised; the terminal need not have them as well
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except _faults() as error:
        raise CheckpointError(
            f"{path} is no ONNX graph that onnxruntime can run ({_first_line(error)})"
        ) from error
    if device.type == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise ValueError(
            "onnxruntime could not start CUDA: its CUDA and cuDNN libraries are missing or are of "
            "another version"
        )
    session.disable_fallback()
    return session


def _faults() -> tuple[type[Exception], ...]:
    """What onnxruntime raises about a graph or its input; nothing of it has a common base."""
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    return (
        errors.Fail,
        errors.InvalidArgument,
        errors.InvalidGraph,
        errors.InvalidProtobuf,
        errors.NotImplemented,
        errors.RuntimeException,
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rpartition(" : ")[2]  # code and category go


def _refuse_weights_elsewhere(path: Path) -> None:
    """Weights in other files would not be in the file's SHA-256, by which a dataset knows it."""
    if not path.is_file():
        raise CheckpointError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # How protobuf writes external_data {key: "location"}; its value may stand on either side.
        if data.find(b"\x0a\x08location") >= 0:
            raise CheckpointError(
                f"{path} keeps its weights in another file: make it one with "
                f"onnx.save(onnx.load(IN), OUT)"
            )


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
    except _faults() as error:
        raise CheckpointError(f"{path} cannot run on a waveform ({_first_line(error)})") from error
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
