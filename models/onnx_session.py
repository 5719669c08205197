"""Sessions of onnxruntime for ONNX graphs that contain their weights.

A graph is a program that may never end or ask for any amount of memory. So a child with limits
opens it and runs it once on a short input (`models.onnx_child`), and only then this process opens
it. All inference in a child would also limit inputs of other lengths, but each process would need
two sessions' set-up, and a device's memory cannot be limited. The first run costs 0.3 s and as long
as opening the graph takes, once per file and process.

Tested by tests/models/test_onnx_session.py.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.checkpoint import CheckpointError, require_recorded_sha256
from models.onnx_child import Limits, first_line, graph_faults, session_options

_LIMITS = Limits()


# Protobuf of external_data {key: "location"}; its value may come before or after it. The tag and
# the length are numbers that may be written in more bytes than they need.
_LOCATION = b"location"
_BEFORE_LOCATION = re.compile(rb"(?:\x0a|\x8a\x80*\x00)(?:\x08|\x88\x80*\x00)\Z")


def is_onnx(path: Path) -> bool:
    """Check whether a file starts like an ONNX graph."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(1) == b"\x08"


@dataclass(frozen=True)
class FirstRun:
    """The run that a graph has to pass.

    what: its input in words, such as "a waveform". feed: arrays by input name; "" names the only
    input. check_ends: called with the path and the session, raises CheckpointError when the graph
    has other inputs.
    """

    what: str
    feed: Mapping[str, Any]
    check_ends: Callable[[Path, Any], Any] | None = None


def open_session(
    path: Path, device: torch.device, who_needs: str, device_key: str, first_run: FirstRun
) -> Any:
    """Open an onnxruntime.InferenceSession with as many threads as torch has in this process now.

    There is no silent fallback to the CPU. who_needs, device_key: parts of the error messages, such
    as "the encoders named *-onnx need" and "encoder.device".

    Raises: CheckpointError: when the file is not a graph that passes its first run; ValueError:
    when onnxruntime is missing or does not support `device`.
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
    refuse_external_weights(path)
    require_recorded_sha256(path)
    answer = _in_child(path, first_run)
    try:
        if "load" in answer:
            raise CheckpointError(
                f"{path} is not an ONNX graph that onnxruntime can run ({answer['load']})"
            )
        session = onnxruntime.InferenceSession(
            str(path), session_options(torch.get_num_threads()), providers=[provider]
        )
    except graph_faults() as error:
        raise CheckpointError(
            f"{path} is not an ONNX graph that onnxruntime can run ({first_line(error)})"
        ) from error
    if first_run.check_ends is not None:
        first_run.check_ends(path, session)
    if "inputs" in answer:
        raise CheckpointError(f"{path} does not take {first_run.what} ({answer['inputs']})")
    if "run" in answer:
        raise CheckpointError(f"{path} cannot run on {first_run.what} ({answer['run']})")
    if device.type == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise ValueError(
            "onnxruntime could not start CUDA: its CUDA and cuDNN libraries are missing or have "
            "another version"
        )
    session.disable_fallback()
    return session


_passed: set[tuple[Any, ...]] = set()  # files that passed their first run in this process


def _in_child(path: Path, first_run: FirstRun) -> dict[str, str]:
    """Open and run the graph in a child and return its answer.

    Raises: CheckpointError: when the child exceeds a limit or crashes.
    """
    status = path.stat()
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns, first_run.what)
    if key in _passed:
        return {}
    feed = io.BytesIO()
    np.savez(feed, **{name or "": array for name, array in first_run.feed.items()})
    seconds = _LIMITS.seconds(status.st_size)
    limits = [str(_LIMITS.memory(status.st_size)), str(seconds)]
    root = str(Path(__file__).resolve().parents[1])
    modules = os.pathsep.join([*(entry for entry in sys.path if entry), root])
    try:
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "models.onnx_child", str(path), *limits],
            input=feed.getvalue(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": modules},
            timeout=20 * seconds,  # of a busy machine or a slow disk; the child counts CPU time
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"{path} took {20 * seconds} s to open") from error
    if ended.returncode == -signal.SIGXCPU:
        raise CheckpointError(
            f"{path} ran for {seconds} s of CPU time on a fraction of a second of input: it is "
            "damaged or an attack"
        )
    if ended.returncode or not ended.stdout:
        raise CheckpointError(
            f"{path} made onnxruntime crash or run out of memory: it is damaged or an attack"
        )
    answer: dict[str, str] = json.loads(ended.stdout)
    if not answer:
        _passed.add(key)
    return answer


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
        found = data.find(_LOCATION)
        while found >= 0:
            if _BEFORE_LOCATION.search(data[max(0, found - 24) : found]):
                raise CheckpointError(
                    f"{path} has its weights in another file: join them with "
                    f"onnx.save(onnx.load(IN), OUT)"
                )
            found = data.find(_LOCATION, found + 1)
