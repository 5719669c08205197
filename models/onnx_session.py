"""ONNX graphs that hold their own weights, opened by onnxruntime."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import torch

from models.checkpoint import CheckpointError


def is_onnx(path: Path) -> bool:
    """Whether a file starts as an ONNX graph does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(1) == b"\x08"


def open_session(path: Path, device: torch.device, who_needs: str, device_key: str) -> Any:
    """An onnxruntime.InferenceSession, in as many threads as torch has in this process now.

    who_needs, device_key: words for the errors: "the encoders named *-onnx need",
    "encoder.device".

    Raises CheckpointError for a file that is no graph; ValueError where onnxruntime is missing or
    cannot compute on `device`: it never takes the processor instead.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(
            f"{who_needs} onnxruntime: install cantor[onnx], or onnxruntime-gpu"
        ) from error
    provider: Any = "CPUExecutionProvider"
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise ValueError(
                f"this onnxruntime has no CUDA: install onnxruntime-gpu, or set {device_key}=cpu"
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
    except graph_faults() as error:
        raise CheckpointError(
            f"{path} is no ONNX graph that onnxruntime can run ({first_line(error)})"
        ) from error
    if device.type == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise ValueError(
            "onnxruntime could not start CUDA: its CUDA and cuDNN libraries are missing or are of "
            "another version"
        )
    session.disable_fallback()
    return session


def graph_faults() -> tuple[type[Exception], ...]:
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


def first_line(error: Exception) -> str:
    """Of what onnxruntime says, without its code and category."""
    return str(error).partition("\n")[0].rpartition(" : ")[2]


def refuse_weights_elsewhere(path: Path) -> None:
    """Weights in other files would not be in the file's SHA-256, by which a dataset knows it.

    Raises CheckpointError for those, and where there is no file or nothing in it.
    """
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
