"""Sessions of onnxruntime for ONNX graphs that contain their weights.

Tested by tests/models/encoders/test_onnx.py.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import torch

from models.checkpoint import CheckpointError


def is_onnx(path: Path) -> bool:
    """Check whether a file starts like an ONNX graph."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(1) == b"\x08"


def open_session(path: Path, device: torch.device, who_needs: str, device_key: str) -> Any:
    """Open an onnxruntime.InferenceSession with as many threads as torch has in this process now.

    There is no silent fallback to the CPU. who_needs, device_key: parts of the error messages, such
    as "the encoders named *-onnx need" and "encoder.device".

    Raises: CheckpointError: when the file is not a graph; ValueError: when onnxruntime is missing
    or does not support `device`.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(
            f"{who_needs} onnxruntime: pip install 'cantor[onnx]', or onnxruntime-gpu"
        ) from error
    provider: Any = "CPUExecutionProvider"
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise ValueError(
                f"this onnxruntime has no CUDA: install onnxruntime-gpu, or set {device_key}=cpu"
            )
        # The default search tries every algorithm again for each new clip length.
        search = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}
        provider = ("CUDAExecutionProvider", {"device_id": str(device.index or 0)} | search)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # it would keep a plan for each clip length
    options.log_severity_level = 4  # errors are raised, so they are not printed
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except graph_faults() as error:
        raise CheckpointError(
            f"{path} is not an ONNX graph that onnxruntime can run ({first_line(error)})"
        ) from error
    if device.type == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise ValueError(
            "onnxruntime could not start CUDA: its CUDA and cuDNN libraries are missing or have "
            "another version"
        )
    session.disable_fallback()
    return session


def graph_faults() -> tuple[type[Exception], ...]:
    """Return the exceptions that onnxruntime raises for a graph or an input; they share no base."""
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
    """Return the first line of onnxruntime's message, without its code and category."""
    return str(error).partition("\n")[0].rpartition(" : ")[2]


def refuse_external_weights(path: Path) -> None:
    """Check that a graph contains its weights.

    Weights in other files would not be covered by the SHA-256 that identifies the graph.

    Raises: CheckpointError: when weights are in another file, or the file is missing or empty.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # Protobuf of external_data {key: "location"}; its value may come before or after it.
        if data.find(b"\x0a\x08location") >= 0:
            raise CheckpointError(
                f"{path} has its weights in another file: join them with "
                f"onnx.save(onnx.load(IN), OUT)"
            )
