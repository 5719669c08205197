"""Graphs that never end, need any amount of memory or read other files are refused."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper, save

from models import onnx_child, onnx_session
from models.checkpoint import CheckpointError
from models.onnx_session import FirstRun, open_session, refuse_external_weights

FEED = FirstRun("a waveform", {"": np.zeros((1, 1, 960), np.float32)})
MANY = numpy_helper.from_array(np.array([4_000_000_000], np.int64), "many")
TRUE = numpy_helper.from_array(np.array(True), "true")


def graph(path: Path, nodes: Sequence[NodeProto], *constants: TensorProto) -> Path:
    """A graph from the waveform `x` to `y`."""
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, f"{name}_samples"])
        for name in ("x", "y")
    ]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], list(constants))
    save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def loop(carried: str) -> NodeProto:
    """A loop without a limit that computes `state` from `carried`."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Sin", ["before"], ["after"]),
        ],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []),
         value("before", TensorProto.FLOAT, None)],
        [value("go_on", TensorProto.BOOL, []), value("after", TensorProto.FLOAT, None)],
    )  # fmt: skip
    return helper.make_node("Loop", ["", "true", carried], ["state"], body=body)


def bombs(folder: Path) -> dict[str, Path]:
    node = helper.make_node
    zero = numpy_helper.from_array(np.zeros(1, np.float32), "zero")
    return {
        "endless loop": graph(
            folder / "run.onnx", [loop("x"), node("Identity", ["state"], ["y"])], TRUE
        ),
        "endless loop while loading": graph(
            folder / "load.onnx", [loop("zero"), node("Add", ["x", "state"], ["y"])], TRUE, zero
        ),
        "16 GB constant": graph(
            folder / "constant.onnx",
            [
                node("ConstantOfShape", ["many"], ["large"]),
                node("ReduceSum", ["large"], ["sum"], keepdims=0),
                node("Add", ["x", "sum"], ["y"]),
            ],
            MANY,
        ),
        "16 GB of the input": graph(
            folder / "expand.onnx",
            [
                node("ReduceSum", ["x"], ["one"], keepdims=0),
                node("Expand", ["one", "many"], ["large"]),
                node("ReduceSum", ["large"], ["sum"], keepdims=0),
                node("Add", ["x", "sum"], ["y"]),
            ],
            MANY,
        ),
    }


def opened(path: Path, first_run: FirstRun = FEED) -> Any:
    return open_session(path, torch.device("cpu"), "this needs", "device", first_run)


def test_a_graph_without_end_or_bound_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_session, "_LIMITS", onnx_child.Limits(cpu_seconds=2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for bomb, path in bombs(tmp_path).items():
        start = time.monotonic()
        with pytest.raises(CheckpointError) as caught:
            opened(path)
        message = str(caught.value)
        assert str(path) in message and message.isprintable(), bomb
        assert "invalid" not in message
        assert ("CPU time" in message) == ("loop" in bomb), message
        assert time.monotonic() - start < 20, bomb
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_a_graph_that_passes_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = graph(tmp_path / "a.onnx", [helper.make_node("Sin", ["x"], ["y"])])
    assert opened(path).run(None, {"x": FEED.feed[""]})[0].shape == (1, 1, 960)
    monkeypatch.setattr(onnx_session.subprocess, "run", None)
    opened(path)
    with pytest.raises(TypeError):  # another file of that name is tried again
        opened(graph(path, [helper.make_node("Cos", ["x"], ["y"], name="other")]))


@pytest.mark.parametrize(
    "entry",
    [
        b"\x0a\x08location\x12\x0b/etc/passwd",
        b"\x0a\x88\x00location\x12\x01x",
        b"\x8a\x00\x88\x80\x00location",
    ],
)
def test_other_spellings_of_other_files_are_found(tmp_path: Path, entry: bytes) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"\x08\x09" + entry)
    with pytest.raises(CheckpointError, match="in another file"):
        refuse_external_weights(path)
    path.write_bytes(b"\x08\x09\x0a\x12attention.location")
    refuse_external_weights(path)


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    path = graph(tmp_path / "a.onnx", [helper.make_node("Sin", ["x"], ["y"])])
    for feed in ({"": np.zeros((1, 960), np.float32)}, {"units": np.zeros((1, 1, 9), np.float32)}):
        with pytest.raises(CheckpointError, match="does not take a voice"):
            opened(path, FirstRun("a voice", feed))
