"""RMVPE: reference results, independent clips, windows, files, ONNX exports."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoint import CheckpointError
from models.f0 import rmvpe, rmvpe_onnx
from models.f0.rmvpe import BatchedRmvpe, Rmvpe, UNetGru, check_rmvpe, decode_rmvpe, load_rmvpe
from models.f0.rmvpe_checkpoint import RmvpeConfig, key_shapes
from tests.helpers.checkpoints import TINY_RMVPE, rmvpe_weights, tiny_rmvpe_weights
from tests.helpers.plain_rmvpe import PlainRmvpe

TOLERANCE = 1e-5  # on the salience, as of the reference vectors
LENGTHS = [1, 159, 160, 512, 513, 16000, 5119 * 16, 5120 * 16, 48123]


def noise(num_samples: int, seed: int = 0) -> Tensor:
    return torch.randn(num_samples, generator=torch.Generator().manual_seed(seed)) * 0.1


def tiny(packed: bool = True) -> Rmvpe:
    return Rmvpe(BatchedRmvpe(UNetGru(TINY_RMVPE, tiny_rmvpe_weights(), packed)))


@pytest.fixture(scope="module")
def reference(golden: Path) -> dict[str, NDArray[np.floating]]:
    with np.load(golden / "rmvpe" / "rmvpe_public.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def singing(golden: Path) -> Tensor:
    with np.load(golden / "encoders" / "audio_public.npz") as arrays:
        return torch.from_numpy(arrays["wav"])


@pytest.fixture(scope="module")
def plain() -> PlainRmvpe:
    network = PlainRmvpe(TINY_RMVPE)
    network.load_state_dict(tiny_rmvpe_weights())
    return network.eval()


def mels_of(estimator: Rmvpe, wavs: list[Tensor]) -> list[Tensor]:
    return [estimator._mel(wav) for wav in wavs]


# Numbers


@pytest.mark.slow
def test_the_published_network_equals_the_reference(
    reference: dict[str, NDArray[np.floating]], singing: Tensor, golden: Path
) -> None:
    config = RmvpeConfig()
    manifest = json.loads((golden / "rmvpe" / "manifest_rmvpe.json").read_text())
    expected = {name: tuple(tensor["shape"]) for name, tensor in manifest.items()}
    assert list(key_shapes(config).items()) == list(expected.items())
    estimator = Rmvpe(BatchedRmvpe(UNetGru(config, rmvpe_weights(config), packed=True)))
    (salience,) = estimator.salience([singing])
    assert salience.shape == (301, 360)
    np.testing.assert_allclose(salience.numpy(), reference["salience"], rtol=0, atol=TOLERANCE)


def test_the_log_mel_equals_the_reference(
    reference: dict[str, NDArray[np.floating]], singing: Tensor
) -> None:
    mel = tiny()._mel(singing)
    assert mel.shape == (128, 320)
    assert not mel[:, 301:].any()
    found = mel[:, :301].exp().numpy()
    np.testing.assert_allclose(found, np.exp(reference["mel"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("source", ["decode", "synthetic"])
@pytest.mark.parametrize("threshold", [0.03, 0.05])
def test_decoding_equals_the_reference(
    source: str, threshold: float, reference: dict[str, NDArray[np.floating]]
) -> None:
    salience = reference["salience" if source == "decode" else "synthetic/salience"]
    expected = reference[f"{source}/avg_{threshold}"]
    f0 = decode_rmvpe(torch.from_numpy(salience), threshold).numpy()
    np.testing.assert_array_equal(f0 > 0, expected > 0)
    np.testing.assert_allclose(f0, expected, rtol=1e-5)


def test_a_frame_without_salience_is_unvoiced() -> None:
    salience = torch.zeros(3, 360)
    salience[1, 100] = 0.5
    salience[2, 100] = 0.03
    cents = 1997.3794084376191 + 20 * 100
    expected = [0, 10 * 2 ** (cents / 1200), 0]
    np.testing.assert_allclose(decode_rmvpe(salience, 0.03).numpy(), expected, rtol=1e-9)
    assert decode_rmvpe(salience, 0.0)[0] == 0


@pytest.mark.parametrize("packed", [True, False])
def test_folding_and_packing_change_nothing(
    packed: bool, plain: PlainRmvpe, singing: Tensor
) -> None:
    estimator = tiny(packed)
    (mel,) = mels_of(estimator, [singing])
    with torch.inference_mode():
        expected = plain.maps(mel[None])
        features = estimator.network.network.unet(mel[None], [320])
        salience = plain(mel[None])
    scale = expected.abs().max()
    np.testing.assert_allclose(features / scale, expected / scale, rtol=0, atol=5e-6)
    (found,) = estimator.network.salience([mel])
    np.testing.assert_allclose(found, salience[0], rtol=0, atol=TOLERANCE)
    assert found.std(dim=0).mean() > 0.05  # frames differ: nothing is saturated


# Clips


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_clips_of_a_batch_do_not_hear_each_other(packed: bool) -> None:
    estimator = tiny(packed)
    longest = 40 if packed else 8  # seconds: the other is slow
    wavs = [noise(length, seed) for seed, length in enumerate([*LENGTHS, longest * 16000])]
    estimator.network.unet_batcher.budget = 1
    estimator.network.gru_batcher.budget = 1
    alone = estimator.salience(wavs)
    estimator.network.unet_batcher.budget = 1 << 20
    estimator.network.gru_batcher.budget = 1 << 20
    together = estimator.salience(wavs)
    features = estimator.network._features(mels_of(estimator, wavs))
    for i, wav in enumerate(wavs):
        assert alone[i].shape == (len(wav) // 160 + 1, 360)
        np.testing.assert_allclose(together[i], alone[i], rtol=0, atol=TOLERANCE)
    estimator.network.unet_batcher.budget = 1
    for found, wav in zip(features, wavs, strict=True):
        (expected,) = estimator.network._features(mels_of(estimator, [wav]))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_padding_of_a_clip_is_part_of_its_numbers(plain: PlainRmvpe) -> None:
    estimator = tiny()
    wav = noise(160 * 40)
    (found,) = estimator.salience([wav])
    (mel,) = mels_of(estimator, [wav])
    assert mel.shape == (128, 64)
    with torch.inference_mode():
        longer = plain(torch.nn.functional.pad(mel, (0, 32))[None])[0, :41]
        own = plain(mel[None])[0, :41]
    np.testing.assert_allclose(found, own, rtol=0, atol=TOLERANCE)
    assert (longer - own).abs().max() > 100 * TOLERANCE


def test_clips_come_back_in_their_order_and_unchanged() -> None:
    estimator = tiny()
    wavs = [noise(4000), noise(90), noise(9000)]
    before = [wav.clone() for wav in wavs]
    first = estimator.salience(wavs)
    second = estimator.salience(wavs[::-1])[::-1]
    for wav, kept, a, b in zip(wavs, before, first, second, strict=True):
        assert torch.equal(wav, kept)
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)
    assert estimator.salience([]) == []


def test_windows_of_a_long_clip_have_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = tiny()
    mels = mels_of(estimator, [noise(160 * 4000), noise(160 * 50)])
    whole = estimator.network._features(mels)
    monkeypatch.setattr(rmvpe, "WINDOW_FRAMES", 2 * TINY_RMVPE.reach + 512)
    pieces = estimator.network._features(mels)
    for a, b in zip(pieces, whole, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(b.abs().max()))


def test_a_frame_sees_as_far_as_stated() -> None:
    """Otherwise windows would overlap by too little or far too much."""
    assert RmvpeConfig().reach == 1600
    estimator = tiny()
    (mel,) = mels_of(estimator, [noise(160 * 1500)])
    changed = mel.clone()
    changed[:, -32:] += 1
    unet = estimator.network.network.unet
    with torch.inference_mode():
        moved = (unet(mel[None], [1504]) != unet(changed[None], [1504]))[0].any(dim=1)
    first = int(moved.nonzero()[0])
    assert 0 <= first - (1504 - 32 - TINY_RMVPE.reach) < 96


@pytest.mark.parametrize("tile_frames", [64, 100])
def test_tiles_change_nothing(tile_frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = tiny()
    mels = mels_of(estimator, [noise(160 * 700)])
    monkeypatch.setattr(rmvpe, "TILE_FRAMES", 1 << 20)
    (whole,) = estimator.network._features(mels)
    monkeypatch.setattr(rmvpe, "TILE_FRAMES", tile_frames)
    (tiles,) = estimator.network._features(mels)
    np.testing.assert_allclose(tiles, whole, rtol=0, atol=1e-6 * float(whole.abs().max()))


# Files


def test_every_form_of_the_file_is_the_same_network(tmp_path: Path, tiny_rmvpe: Path) -> None:
    state = tiny_rmvpe_weights()
    torch.save(state, tmp_path / "bare.pt")
    save_file(state, tmp_path / "rmvpe.safetensors")
    filterless = {key: value for key, value in state.items() if not key.startswith("unet.tf.")}
    torch.save(filterless, tmp_path / "filterless.pt")
    wav = noise(8000)
    (expected,) = tiny().salience([wav])
    for path in (tiny_rmvpe, *tmp_path.iterdir()):
        check_rmvpe(path)
        (found,) = load_rmvpe(path).salience([wav])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=str(path))


def test_a_file_in_half_precision_is_read(tmp_path: Path) -> None:
    half = {k: v.half() if v.is_floating_point() else v for k, v in tiny_rmvpe_weights().items()}
    torch.save({"model": half}, tmp_path / "half.pt")
    wav = noise(8000)
    (found,) = load_rmvpe(tmp_path / "half.pt").salience([wav])
    (expected,) = tiny().salience([wav])
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.1


CONV = "unet.encoder.layers.1.conv.0.conv.0.weight"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda state: state.pop(CONV), f"lacks {CONV}"),
        (lambda state: state.pop("cnn.bias"), "lacks cnn.bias"),
        (lambda state: state.pop("fc.0.gru.weight_hh_l0"), "not an RMVPE.*weight_hh_l0"),
        (lambda state: state.update(extra=torch.zeros(1)), "has unknown keys: extra"),
        (lambda state: state.update(epoch=3), "has unknown keys: epoch"),
        (
            lambda state: state.update({CONV: state[CONV].transpose(0, 1).contiguous()}),
            r"conv\.0\.weight \(is \(2, 4, 3, 3\), must be \(4, 2, 3, 3\)\)",
        ),
        (lambda state: state.update({"fc.1.weight": torch.zeros(128, 12)}), r"fc\.1\.weight"),
        (lambda state: state.pop("unet.tf.layers.2.conv.0.weight"), "lacks unet.tf"),
        (lambda state: [state.pop(key) for key in list(state) if "layers.3" in key], "more"),
        (lambda state: state.clear(), "not an RMVPE"),
    ],
)
def test_what_does_not_fit_is_named(
    spoil: Callable[[dict[str, Any]], Any], says: str, tmp_path: Path
) -> None:
    state: dict[str, Any] = tiny_rmvpe_weights()
    spoil(state)
    path = tmp_path / "rmvpe.pt"
    torch.save({"model": state}, path)
    for read in (check_rmvpe, load_rmvpe):
        with pytest.raises(CheckpointError, match=says) as error:
            read(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x08\x07not an onnx graph"])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rmvpe.pt"
    path.write_bytes(content)
    for read in (check_rmvpe, load_rmvpe):
        with pytest.raises(CheckpointError, match=str(path)):
            read(path)


@pytest.mark.parametrize(
    "key", [CONV, "unet.decoder.layers.2.conv1.1.running_var", "fc.0.gru.bias_hh_l0", "fc.1.weight"]
)
def test_weights_that_are_not_finite_are_refused(key: str, tmp_path: Path) -> None:
    state = tiny_rmvpe_weights()
    state[key].view(-1)[0] = -1 if key.endswith("running_var") else torch.nan
    torch.save(state, tmp_path / "rmvpe.pt")
    with pytest.raises(CheckpointError, match=rf"rmvpe\.pt: {key.rpartition('.')[0]}.*finite"):
        load_rmvpe(tmp_path / "rmvpe.pt")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8, torch.bool])
def test_weights_that_are_no_real_numbers_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "rmvpe.pt"
    torch.save(tiny_rmvpe_weights() | {"cnn.weight": torch.ones(3, 2, 3, 3).to(dtype)}, path)
    for read in (check_rmvpe, load_rmvpe):
        with pytest.raises(
            CheckpointError, match=r"no floating-point tensor for cnn\.weight \(torch\."
        ):
            read(path)


@pytest.mark.parametrize("lacking", ["channels", "inter_layers", "hidden"])
def test_a_network_without_one_of_its_parts_is_refused(lacking: str, tmp_path: Path) -> None:
    shapes = key_shapes(replace(TINY_RMVPE, **{lacking: 0}))  # type: ignore[arg-type]
    path = tmp_path / "rmvpe.pt"
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    for read in (check_rmvpe, load_rmvpe):
        with pytest.raises(CheckpointError, match="is not an RMVPE"):
            read(path)


def test_a_key_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rmvpe.pt"
    torch.save(tiny_rmvpe_weights() | {5: torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="has unknown keys: 5"):
        check_rmvpe(path)


def test_checking_reads_no_weights(tmp_path: Path, tiny_rmvpe: Path) -> None:
    """A file with damaged weights still has its names and shapes."""
    state = {key: torch.full_like(value, -1) for key, value in tiny_rmvpe_weights().items()}
    torch.save(state, tmp_path / "rmvpe.pt")
    check_rmvpe(tmp_path / "rmvpe.pt")


# ONNX


def export(network: torch.nn.Module, path: Path, frames: int = 64, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.randn(1, 128, frames),),
            str(path),
            input_names=["input"],
            output_names=["output"],
            dynamo=False,
            **options,
        )
    return path


@pytest.fixture(scope="module")
def graph(plain: PlainRmvpe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "rmvpe.onnx"
    axes = {"input": {0: "batch", 2: "frames"}, "output": {0: "batch", 1: "frames"}}
    return export(plain, path, dynamic_axes=axes)


@pytest.mark.slow
def test_an_export_gives_the_same_numbers(graph: Path) -> None:
    check_rmvpe(graph)
    wavs = [noise(length, seed) for seed, length in enumerate(LENGTHS)]
    expected = tiny().salience(wavs)
    for found, wanted in zip(load_rmvpe(graph).salience(wavs), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_a_long_clip_runs_through_an_export_in_windows(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wavs = [noise(160 * 4000)]
    estimator = load_rmvpe(graph)
    (whole,) = estimator.salience(wavs)
    monkeypatch.setattr(rmvpe_onnx, "WINDOW_FRAMES", 2048)
    monkeypatch.setattr(rmvpe_onnx, "OVERLAP_FRAMES", 2 * TINY_RMVPE.reach)
    (pieces,) = estimator.salience(wavs)
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=TOLERANCE)


class _Other(torch.nn.Module):
    """A graph from a log-mel to something other than salience."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(128, width)

    def forward(self, mel: Tensor) -> Tensor:
        return self.linear(mel.transpose(1, 2))


@pytest.mark.slow
def test_other_graphs_are_refused(plain: PlainRmvpe, tmp_path: Path, golden: Path) -> None:
    axes = {"input": {2: "frames"}}
    fixed = export(plain, tmp_path / "fixed.onnx")
    narrow = export(_Other(100), tmp_path / "narrow.onnx", dynamic_axes=axes)
    logits = export(_Other(360), tmp_path / "logits.onnx", dynamic_axes=axes)
    encoder = golden / "encoders" / "vec-tiny-layer-3.onnx"
    for path, says in (
        (fixed, "only clips of 64 frames"),
        (narrow, r"returns float32 \[1, 64, 100\]"),
        (logits, "outside 0 to 1"),
        (encoder, r"has the input tensor\(float\) \[1, 1, "),
    ):
        for read in (check_rmvpe, load_rmvpe):
            with pytest.raises(CheckpointError, match=says):
                read(path)


@pytest.mark.slow
def test_an_export_whose_weights_are_damaged_gives_no_pitch(tmp_path: Path) -> None:
    network = PlainRmvpe(TINY_RMVPE)
    network.load_state_dict(tiny_rmvpe_weights())
    with torch.no_grad():
        network.fc[1].weight[7, 0] = torch.nan
    axes = {"input": {2: "frames"}, "output": {1: "frames"}}
    damaged = export(network.eval(), tmp_path / "damaged.onnx", dynamic_axes=axes)
    for read in (check_rmvpe, load_rmvpe):
        with pytest.raises(CheckpointError, match="not finite"):
            read(damaged)


def test_without_onnxruntime_the_error_says_what_to_install(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_rmvpe(graph)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ValueError, match=r"RMVPE from an .onnx file needs onnxruntime: pip install"
    ):
        load_rmvpe(graph)
