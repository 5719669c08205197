"""ONNX encoders: so-vits-svc's results, frame counts, windows, and files of other kinds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

from models.checkpoint import CheckpointError
from models.encoders.layouts import read_encoder_file
from models.encoders.onnx import KINDS, OnnxEncoder, load_onnx
from models.encoders.ssl import SslEncoder
from models.encoders.wav2vec2 import Wav2Vec2

TOLERANCE = 2e-5
GRAPHS = ["vec-tiny-layer-3", "vec-tiny-proj-layer-2"]


def noise(num_samples: int, seed: int = 0) -> Tensor:
    return torch.randn(num_samples, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture(scope="module")
def graph(golden: Path) -> Path:
    return golden / "encoders" / "vec-tiny-layer-3.onnx"


@pytest.fixture(scope="module")
def soft(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden graph with HuBERT-Soft's 40 zeros before and after the clip."""
    model = onnx.load(graph)
    name = model.graph.input[0].name
    pads = numpy_helper.from_array(np.array([0, 0, 40, 0, 0, 40], dtype=np.int64), "pads")
    model.graph.initializer.append(pads)
    for node in model.graph.node:
        node.input[:] = ["padded" if entry == name else entry for entry in node.input]
    model.graph.node.insert(0, helper.make_node("Pad", [name, "pads"], ["padded"]))
    path = tmp_path_factory.mktemp("soft") / "hubert-soft.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module", params=["contentvec768l12-onnx", "hubertsoft-onnx"])
def encoder(request: pytest.FixtureRequest, graph: Path, soft: Path) -> OnnxEncoder:
    return load_onnx(request.param, str(soft if KINDS[request.param].pad else graph))


@pytest.fixture(scope="module")
def singing(golden: Path) -> Tensor:
    with np.load(golden / "encoders" / "audio_public.npz") as arrays:
        return torch.from_numpy(arrays["wav"])


# Numbers


@pytest.mark.parametrize("name", GRAPHS)
def test_equals_the_reference(name: str, singing: Tensor, golden: Path) -> None:
    with np.load(golden / "encoders" / "onnx_out.npz") as arrays:
        expected = arrays[name][0].T
    path = str(golden / "encoders" / f"{name}.onnx")
    encoder = load_onnx("contentvec768l12-onnx", path)
    (units,) = encoder.encode([singing])
    assert units.shape == (149, encoder.dim)
    np.testing.assert_allclose(units.numpy(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("graph_name", "layers", "project"),
    [("vec-tiny-layer-3", 3, False), ("vec-tiny-proj-layer-2", 2, True)],
)
def test_equals_our_network_with_the_same_weights(
    graph_name: str, layers: int, project: bool, golden: Path
) -> None:
    folder = golden / "encoders"
    checkpoint = read_encoder_file(folder / "tiny_hubert_base.pt")
    config, tensors = checkpoint.take(layers, project=project, normalize_wav=False)
    network = Wav2Vec2(config)
    network.load_state_dict(tensors)
    ours = SslEncoder("contentvec768l12", network)
    theirs = load_onnx("contentvec768l12-onnx", str(folder / f"{graph_name}.onnx"))
    wavs = [noise(n, seed=n) for n in (1, 8000, 16000 * 20)]
    for expected, units in zip(ours.encode(wavs), theirs.encode(wavs), strict=True):
        torch.testing.assert_close(units, expected, rtol=0, atol=TOLERANCE)


def test_padding_of_the_graph_is_that_of_the_clip(graph: Path, soft: Path, singing: Tensor) -> None:
    (units,) = load_onnx("hubertsoft-onnx", str(soft)).encode([singing])
    plain = load_onnx("contentvec768l12-onnx", str(graph))
    assert units.shape == (150, 48)
    assert torch.equal(units, plain.encode([F.pad(singing, (40, 40))])[0])


# The contract


@pytest.mark.parametrize("num_samples", [1, 319, 320, 399, 400, 639, 640, 720, 37123])
def test_frame_counts(encoder: OnnxEncoder, num_samples: int) -> None:
    (units,) = encoder.encode([noise(num_samples)])
    soft = encoder.name == "hubertsoft-onnx"
    frames = num_samples // 320 if soft else 1 + (num_samples - 400) // 320
    assert units.shape == (max(1, frames), encoder.dim)
    assert units.dtype == torch.float32
    assert torch.isfinite(units).all()


def test_a_clip_does_not_depend_on_its_neighbours(encoder: OnnxEncoder) -> None:
    wavs = [noise(n, seed=i) for i, n in enumerate([8000, 320000, 1, 48017, 8000])]
    before = [wav.clone() for wav in wavs]
    for wav, units in zip(wavs, encoder.encode(wavs), strict=True):
        assert torch.equal(units, encoder.encode([wav])[0])
    assert all(map(torch.equal, wavs, before))
    assert encoder.encode([]) == []


def test_silence(encoder: OnnxEncoder) -> None:
    (units,) = encoder.encode([torch.zeros(16000)])
    assert torch.isfinite(units).all()


def test_samples_that_are_not_finite_are_refused(encoder: OnnxEncoder) -> None:
    broken = noise(16000)
    broken[5000] = torch.inf
    with pytest.raises(ValueError, match="clip 1 has NaN or infinite"):
        encoder.encode([noise(16000), broken])


def test_the_longest_single_window(encoder: OnnxEncoder) -> None:
    """Up to 3000 frames the graph runs on the whole clip, its last samples included."""
    wav = noise(960000)
    (units,) = encoder.encode([wav])
    assert len(units) in (2999, 3000)
    feed = {encoder.session.get_inputs()[0].name: wav[None, None].numpy()}
    assert np.array_equal(units.numpy(), encoder.session.run(None, feed)[0][0])


@pytest.mark.slow
def test_a_song_in_windows(encoder: OnnxEncoder) -> None:
    """At the seams units differ little from those of the graph on the whole song."""
    wav = noise(70 * 16000 + 123)
    (units,) = encoder.encode([wav])
    feed = {encoder.session.get_inputs()[0].name: wav[None, None].numpy()}
    whole = torch.from_numpy(encoder.session.run(None, feed)[0][0])
    assert units.shape == whole.shape
    assert (units - whole).square().mean().sqrt() < 0.05
    seam = len(units) // 2  # in the middle of the overlap
    assert 0 < (units - whole)[seam - 5 : seam + 5].square().mean().sqrt() < 0.1


# Files and machines


def small(
    path: Path,
    dim: int = 48,
    inputs: Sequence[tuple[str, int, list[Any]]] = (("wav", TensorProto.FLOAT, [1, 1, "samples"]),),
    reach: int = 400,
    transposed: bool = True,
    half: bool = False,
) -> str:
    """A graph of one convolution, with inputs (name, type, shape) of which the first is used."""
    weight = np.random.default_rng(0).standard_normal((dim, 1, reach)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", [inputs[0][0]], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "weight"], ["y"], strides=[320]),
        helper.make_node("Transpose", ["y"], ["z"], perm=[0, 2, 1] if transposed else [0, 1, 2]),
        helper.make_node("Cast", ["z"], ["units"], to=10 if half else TensorProto.FLOAT),
    ]
    units = helper.make_tensor_value_info("units", 10 if half else TensorProto.FLOAT, None)
    heard = [helper.make_tensor_value_info(*entry) for entry in inputs]
    weights = [numpy_helper.from_array(weight, "weight")]
    body = helper.make_graph(nodes, "small", heard, [units], weights)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return str(path)


@pytest.mark.parametrize("name", KINDS)
def test_each_name_takes_its_width(name: str, tmp_path: Path) -> None:
    """A first convolution 80 samples shorter counts frames as padding by 40 does."""
    kind = KINDS[name]
    path = small(tmp_path / "it.onnx", kind.dim, reach=400 - 2 * kind.pad)
    encoder = load_onnx(name, path)
    assert (encoder.name, encoder.dim, encoder.hop_length) == (name, kind.dim, 320)
    assert encoder.encode([noise(16000)])[0].shape == (50 if kind.pad else 49, kind.dim)


def test_another_names_file_is_told(tmp_path: Path, graph: Path, soft: Path) -> None:
    wide = small(tmp_path / "wide.onnx", 768)
    with pytest.raises(
        CheckpointError, match=r"use encoder\.name=contentvec768l9-onnx or contentvec768l"
    ):
        load_onnx("contentvec256l9-onnx", wide)
    with pytest.raises(
        CheckpointError, match=r"3 frames of width 48; use encoder.name=hubertsoft-onnx"
    ):
        load_onnx("contentvec256l9-onnx", str(soft))
    with pytest.raises(CheckpointError, match=r"use encoder\.name=contentvec256l9-onnx or"):
        load_onnx("hubertsoft-onnx", str(graph))
    with pytest.raises(CheckpointError, match="7 frames of width 2; no encoder has that"):
        load_onnx("hubertsoft-onnx", small(tmp_path / "turned.onnx", 7, transposed=False))


FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            [("wav", FLOAT, [1, "samples"])],
            r"has the input tensor\(float\) \[1, 'samples'\]; an encoder",
        ),
        ([("wav", FLOAT, [1, 80, "frames"])], r"has the input tensor\(float\) \[1, 80, 'frames'\]"),
        ([("wav", HALF, [1, 1, "samples"])], r"has the input tensor\(float16\)"),
        ([("wav", FLOAT, [1, 1, 16000])], "accepts only clips of 16000 samples"),
        (
            [("c", FLOAT, [1, 1, "f"]), ("f0", FLOAT, [1, "f"]), ("sid", FLOAT, [1])],
            r"has 3 inputs \(c, f0, sid\): it is a whole voice model",
        ),
        (
            [("wav", FLOAT, [1, 1, "t"]), ("mask", FLOAT, [1, "t"])],
            r"has 2 inputs \(mask, wav\): it is not an encoder. An encoder has one input,",
        ),
    ],
)
def test_a_graph_with_another_input(
    tmp_path: Path, inputs: Sequence[tuple[str, int, list[Any]]], message: str
) -> None:
    path = tmp_path / "other.onnx"
    channels = inputs[0][2][1]
    if isinstance(channels, int) and len(inputs[0][2]) == 3 and channels == 1:
        small(path, inputs=inputs)
    else:  # the convolution would not take it
        heard = [helper.make_tensor_value_info(*inputs[0])]
        out = helper.make_tensor_value_info("y", FLOAT, None)
        body = helper.make_graph([helper.make_node("Relu", ["wav"], ["y"])], "g", heard, [out])
        onnx.save(
            helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
        )
    with pytest.raises(CheckpointError, match=message):
        load_onnx("contentvec256l9-onnx", str(path))


def test_a_graph_with_another_output(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="returns float16"):
        load_onnx("contentvec256l9-onnx", small(tmp_path / "half.onnx", half=True))
    with pytest.raises(CheckpointError, match="cannot run on a waveform"):
        load_onnx("contentvec256l9-onnx", small(tmp_path / "long.onnx", reach=2000))


def test_what_is_no_graph(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tiny_wavlm\.pt is not an ONNX graph .*Protobuf"):
        load_onnx("contentvec256l9-onnx", str(golden / "encoders" / "tiny_wavlm.pt"))
    (tmp_path / "empty.onnx").touch()
    for name, message in [("empty", "is empty"), ("nowhere", "does not exist")]:
        with pytest.raises(CheckpointError, match=rf"{name}\.onnx {message}"):
            load_onnx("contentvec256l9-onnx", str(tmp_path / f"{name}.onnx"))
    with pytest.raises(CheckpointError, match="is a folder"):
        load_onnx("contentvec256l9-onnx", str(tmp_path))
    with pytest.raises(ValueError, match=r"encoder\.checkpoint is empty"):
        load_onnx("contentvec256l9-onnx", None)


def test_weights_in_another_file_are_refused(graph: Path, tmp_path: Path) -> None:
    path = tmp_path / "apart.onnx"
    onnx.save(onnx.load(graph), path, save_as_external_data=True, size_threshold=0)
    assert path.stat().st_size < graph.stat().st_size
    with pytest.raises(CheckpointError, match="has its weights in another file"):
        load_onnx("contentvec256l9-onnx", str(path))
    place = b"\x12\x05w.bin"
    onnx.save(onnx.load(graph), path, save_as_external_data=True, location="w.bin")
    turned = path.read_bytes().replace(b"\x0a\x08location" + place, place + b"\x0a\x08location")
    assert b"\x0a\x08location\x12" not in turned
    (tmp_path / "turned.onnx").write_bytes(turned)  # the same message, its fields in other order
    with pytest.raises(CheckpointError, match="has its weights in another file"):
        load_onnx("contentvec256l9-onnx", str(tmp_path / "turned.onnx"))
    onnx.save(onnx.load(path), tmp_path / "one.onnx")  # as the message says
    assert load_onnx("contentvec256l9-onnx", str(tmp_path / "one.onnx")).dim == 48


def test_a_device_that_onnxruntime_lacks_is_refused(graph: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(ValueError, match="no CUDA: install onnxruntime-gpu"):
        load_onnx("contentvec256l9-onnx", str(graph), "cuda:0")


def test_without_onnxruntime(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"install 'cantor\[onnx\]"):
        load_onnx("contentvec256l9-onnx", str(graph))


def test_it_computes_in_torchs_threads(graph: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        options = load_onnx("contentvec256l9-onnx", str(graph)).session.get_session_options()
    finally:
        torch.set_num_threads(before)
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
