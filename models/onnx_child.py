"""The process that opens an ONNX graph first: `python -m models.onnx_child GRAPH MEMORY SECONDS`.

A graph is a program. A loop in it can be endless and a constant can have any size, even while it is
only opened, because onnxruntime folds constants. So a graph is opened and run once here, with
limits of memory in bytes and of CPU time, before another process opens it.

stdin has the inputs of the run as npz, by input name; the name "" is that of the only input. stdout
gets one JSON object: {} or {"load": fault}, {"inputs": difference}, {"run": fault}. A process that
ends without one has exceeded a limit or crashed. It imports no torch, which takes a second.

Tested by tests/models/test_onnx_session.py.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import resource
import signal
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

_PR_SET_PDEATHSIG = 1
_TYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


@dataclass(frozen=True)
class Limits:
    """Limits of the child, apart from a share in proportion to the graph's file.

    Real graphs take 1 to 3 times their size and a CPU second per 400 MB.
    """

    memory_bytes: int = 1 << 30
    memory_per_byte: int = 6
    cpu_seconds: int = 5
    bytes_per_cpu_second: int = 20_000_000

    def memory(self, file_size: int) -> int:
        return self.memory_bytes + self.memory_per_byte * file_size

    def seconds(self, file_size: int) -> int:
        return self.cpu_seconds + file_size // self.bytes_per_cpu_second


def session_options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # it would keep a plan for each clip length
    options.log_severity_level = 4  # errors are raised, so they are not printed
    return options


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


def _main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    graph = sys.argv[1]
    answer = os.dup(1)
    os.dup2(2, 1)
    with np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False) as arrays:
        feed = dict(arrays)
    _limit(int(sys.argv[2]), int(sys.argv[3]))
    os.write(answer, json.dumps(_first_run(graph, feed)).encode())
    os._exit(0)  # freeing what a hostile graph has made can crash


def _limit(memory: int, seconds: int) -> None:
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    for what, limit in (
        (resource.RLIMIT_AS, used + memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        most = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (most, hard))


def _first_run(graph: str, feed: dict[str, Any]) -> dict[str, str]:
    import onnxruntime

    faults = (*graph_faults(), MemoryError)
    try:
        session = onnxruntime.InferenceSession(
            graph, session_options(1), providers=["CPUExecutionProvider"]
        )
    except faults as error:
        return {"load": first_line(error)}
    inputs = session.get_inputs()
    if "" in feed and len(inputs) == 1:
        feed = {inputs[0].name: feed[""]}
    if feed.keys() != {entry.name for entry in inputs}:
        return {"inputs": f"it has {', '.join(sorted(entry.name for entry in inputs))}"}
    for entry in inputs:
        array = feed[entry.name]
        fits = len(entry.shape) == array.ndim and all(
            not isinstance(size, int) or size == given
            for size, given in zip(entry.shape, array.shape, strict=True)
        )
        if not fits or _TYPES.get(entry.type) != array.dtype.name:
            return {"inputs": f"it has {entry.name} as {entry.type} {list(entry.shape)}"}
    try:
        session.run(None, feed)
    except faults as error:
        return {"run": first_line(error)}
    return {}


if __name__ == "__main__":
    _main()
