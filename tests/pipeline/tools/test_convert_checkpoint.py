"""`convert-encoder`: the same encoder in another file, and descriptions of checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from models.checkpoint import load_foreign, sha256_of
from models.encoders.layouts import read_encoder
from models.encoders.whisper import read_whisper
from pipeline.cli import app
from pipeline.errors import UserError
from pipeline.tools.convert_checkpoint import convert_checkpoint, describe_checkpoint


def run(*args: object) -> str:
    result = CliRunner().invoke(app, ["convert-encoder", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


@pytest.fixture
def encoders(golden: Path) -> Path:
    return golden / "encoders"


def test_the_converted_file_is_the_same_encoder(encoders: Path, tmp_path: Path) -> None:
    source, out = encoders / "tiny_hubert_base_dictconfig_nozip.pt", tmp_path / "a.safetensors"
    assert str(out) in run(source, out)
    config, expected = read_encoder("contentvec256l9", source)
    again, tensors = read_encoder("contentvec256l9", out)
    assert again == config
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


@pytest.mark.slow
def test_half_precision_halves_the_file(encoders: Path, tmp_path: Path) -> None:
    whole, half = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    convert_checkpoint(encoders / "tiny_wavlm.pt", whole)
    run(whole, half, "--dtype", "float16")
    assert {tensor.dtype for tensor in load_foreign(half).values()} == {torch.float16}
    assert half.stat().st_size < 0.6 * whole.stat().st_size


def test_a_whisper_is_converted_without_its_decoder(encoders: Path, tmp_path: Path) -> None:
    convert_checkpoint(encoders / "tiny_whisper.pt", tmp_path / "a.safetensors")
    config, expected = read_whisper(encoders / "tiny_whisper.pt")
    again, tensors = read_whisper(tmp_path / "a.safetensors")
    assert again == config and tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "float16")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("tiny_hubert_large.pt", ["HuBERT or ContentVec", "cnhubertlarge", "3, with 4", "64"]),
        ("tiny_wavlm_large.pt", ["a WavLM", "wavlm-large", "waveform      normalised", "float32"]),
        ("tiny_dpwavlm.pth", ["a DPWavLM", "dphubert", "0 to 3 heads", "8 to 32"]),
        ("tiny_hubert_base_fp16.pt", ["float16", "24 through the final projection"]),
        ("tiny_whisper.pt", ["Whisper", "whisper-ppg", "48 wide"]),
    ],
)
def test_print_describes_any_checkpoint(encoders: Path, file: str, words: list[str]) -> None:
    said = run(encoders / file, "--print")
    assert sha256_of(encoders / file) in said
    assert all(word in said for word in words), said


def test_the_same_network_is_described_the_same(encoders: Path, tmp_path: Path) -> None:
    convert_checkpoint(encoders / "tiny_dphubert.pth", tmp_path / "a.safetensors")
    first, second = (
        describe_checkpoint(path)
        for path in (encoders / "tiny_dphubert.pth", tmp_path / "a.safetensors")
    )
    assert {key for key in first if first[key] != second[key]} == {"file", "sha256"}


def test_a_file_is_not_written_over_itself(encoders: Path, tmp_path: Path) -> None:
    ours = tmp_path / "a.safetensors"
    convert_checkpoint(encoders / "tiny_wavlm.pt", ours)
    before = ours.read_bytes()
    with pytest.raises(UserError, match="the checkpoint itself"):
        convert_checkpoint(ours, ours)
    assert ours.read_bytes() == before


@pytest.mark.parametrize(
    "file, expected",
    [
        ("vec-tiny-layer-3.onnx", {"kind": "ONNX", "encoder.name": "contentvec768l12-onnx"}),
        ("tiny_whisper.pt", {"kind": "Whisper", "dtype": "float32"}),
        ("tiny_hubert_base_fp16.pt", {"kind": "HuBERT", "dtype": "float16"}),
    ],
)
def test_what_a_file_is(encoders: Path, file: str, expected: dict[str, str]) -> None:
    lines = describe_checkpoint(encoders / file)
    for label, words in expected.items():
        assert words in lines[label]
    assert len(lines["sha256"]) == 64


def test_a_graph_that_is_no_encoder_is_not_described_as_one(tmp_path: Path) -> None:
    broken = tmp_path / "half.onnx"
    broken.write_bytes(b"\x08\x09 and then nothing that is a graph")
    with pytest.raises(UserError, match="not an ONNX graph"):
        describe_checkpoint(broken)


def test_what_cannot_be_is_said_in_a_sentence(encoders: Path, tmp_path: Path) -> None:
    source, out = encoders / "tiny_wavlm.pt", tmp_path / "a.safetensors"
    for call, words in (
        (lambda: convert_checkpoint(encoders / "vec-tiny-layer-3.onnx", out), "ONNX"),
        (lambda: convert_checkpoint(tmp_path / "none.pt", out), "does not exist"),
        (lambda: convert_checkpoint(source, out, "int4"), "float32 or float16"),
        (lambda: convert_checkpoint(source, tmp_path), "is a folder"),
        (
            lambda: convert_checkpoint(source, tmp_path / "no" / "a.safetensors"),
            "its folder does not exist",
        ),
        (lambda: convert_checkpoint(source, source), "must end in .safetensors"),
        (lambda: run(source), "--print"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    assert not any(tmp_path.iterdir())
