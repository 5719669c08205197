"""Voices as ONNX graphs: onnxruntime's audio equals torch's and so-vits-svc's."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from models.checkpoint import CheckpointError
from models.synthesizer.blocks.noise import KeyedNoise, NoNoise
from models.synthesizer.blocks.source import HARMONICS
from models.synthesizer.onnx import GRAPH, MELODY, OnnxSynthesizer, export_voice
from models.synthesizer.sovits.networks import Synthesizer
from models.synthesizer.voice import DESCRIPTION, Voice, VoiceEncoder, load_network
from tests.models.synthesizer.conftest import Filled, Reference
from tests.models.synthesizer.sovits.test_networks import INFER, close, require_infer
from tests.models.synthesizer.tiny import MEL, config_of

VARIANTS = (
    "base", "transflow", "share", "depthwise", "snake", "vol", "noautof0", "resblock2", "oddrates",
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """A voice, the folder that it was exported to, and what is opened from there."""

    voice: Voice
    folder: Path
    network: OnnxSynthesizer


Export = Callable[[str], Exported]


@pytest.fixture(scope="module")
def exported(
    reference: Reference, filled: Filled, tmp_path_factory: pytest.TempPathFactory
) -> Export:
    """exported(variant): each is exported once."""
    made: dict[str, Exported] = {}

    def export(variant: str) -> Exported:
        if variant not in made:
            config = config_of(reference(f"svc_tiny_{variant}"))
            voice = Voice(
                tensors=filled(Synthesizer(config)).state_dict(),
                config=config,
                mel=MEL,
                speakers=("mezzo", "tenor"),
                encoder=VoiceEncoder(name="contentvec768l12", dim=config.units_dim),
            )
            folder = tmp_path_factory.mktemp("voices") / variant
            export_voice(folder, voice)
            made[variant] = Exported(voice, folder, OnnxSynthesizer(folder))
        return made[variant]

    return export


@pytest.fixture
def folder(exported: Export, tmp_path: Path) -> Path:
    """Copy the exported "base", to damage it."""
    return Path(shutil.copytree(exported("base").folder, tmp_path / "voice"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_sings_as_the_reference(variant: str, exported: Export, reference: Reference) -> None:
    arrays = reference(f"svc_tiny_{variant}")
    require_infer(exported(variant).network, arrays, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("count", "frames"), [(1, 90), (2, 7)])
def test_equals_torch(variant: str, count: int, frames: int, exported: Export) -> None:
    """With noise, other lengths than in the export, and a batch."""
    sung = exported(variant)
    config, tolerance = sung.voice.config, INFER.get(variant, 1e-5)
    chance = torch.Generator().manual_seed(frames)
    units = torch.randn(count, config.units_dim, frames, generator=chance)
    f0 = torch.rand(count, frames, generator=chance) * 1100 + 50  # above 1103 Hz too
    voiced = torch.rand(count, frames, generator=chance) > 0.3
    volume = torch.rand(count, frames, generator=chance) if config.volume_embedding else None
    phase = torch.rand(count, HARMONICS, generator=chance, dtype=torch.float64)
    mix = torch.rand(count, frames, config.n_speakers, generator=chance)
    ours, theirs = sung.network, load_network(sung.voice)
    for speaker, more in (
        (torch.arange(count), {}),
        (mix[:, 0], {"phase": phase}),
        (mix, {"noise_scale": 0.8}),
    ):
        found, expected = (
            network.infer(
                units, f0, voiced, speaker, noise=KeyedNoise(range(count)), volume=volume, **more
            )
            for network in (ours, theirs)
        )
        close(found[0], expected[0].numpy(), tolerance)
        assert torch.equal(found[1], expected[1])
    if config.predict_f0:
        melody = theirs.predict_f0(units, f0, voiced, mix, volume)
        found_melody = ours.predict_f0(units, f0, voiced, mix, volume)
        np.testing.assert_allclose(found_melody.numpy(), melody.numpy(), rtol=1e-5)


def test_phases_stay_exact_in_a_long_piece(exported: Export) -> None:
    sung = exported("oddrates")
    frames = 1500
    f0 = torch.linspace(400, 1000, frames)[None]
    inputs = (torch.zeros(1, sung.voice.config.units_dim, frames), f0, torch.ones(1, frames))
    found, expected = (
        network.infer(*inputs, torch.tensor([1]), noise=NoNoise())[0]
        for network in (sung.network, load_network(sung.voice))
    )
    close(found, expected.numpy(), 1e-5)


def test_what_only_training_needs_is_left_out(exported: Export) -> None:
    sung = exported("base")
    held = {
        name: {tensor.name for tensor in onnx.load(sung.folder / name).graph.initializer}
        for name in (GRAPH, MELODY)
    }
    for names in held.values():
        assert not any("enc_q" in name or name.endswith("weight_g") for name in names)
    assert not any("f0_decoder" in name for name in held[GRAPH])
    assert not any("dec." in name for name in held[MELODY] if "f0_decoder" not in name)


def test_a_voice_without_its_posterior_is_exported(exported: Export, tmp_path: Path) -> None:
    whole = exported("noautof0").voice
    tensors = {k: t for k, t in whole.tensors.items() if not k.startswith("enc_q.")}
    (tmp_path / MELODY).write_bytes(b"of a voice that was here before")
    export_voice(tmp_path, replace(whole, tensors=tensors))
    assert sorted(path.name for path in tmp_path.iterdir()) == [DESCRIPTION, GRAPH]
    assert OnnxSynthesizer(tmp_path).config == whole.config


def test_refuses_what_the_voice_cannot(exported: Export) -> None:
    config = exported("vol").voice.config
    inputs = (torch.zeros(1, config.units_dim, 9), torch.full((1, 9), 220.0), torch.ones(1, 9))
    speaker = torch.tensor([1])
    with pytest.raises(ValueError, match="needs the volume"):
        exported("vol").network.infer(*inputs, speaker, noise=NoNoise())
    with pytest.raises(ValueError, match="has no pitch predictor"):
        exported("noautof0").network.infer(*inputs, speaker, noise=NoNoise(), predict_f0=True)
    with pytest.raises(ValueError, match="weights for 4 speakers, but this voice has 5"):
        exported("base").network.infer(*inputs, torch.ones(1, 4), noise=NoNoise())


# --- files


def test_the_description_says_who_sings(exported: Export) -> None:
    sung = exported("base")
    for path in (sung.folder, sung.folder / GRAPH, sung.folder / DESCRIPTION):
        voice = OnnxSynthesizer(path).voice
        for field in fields(Voice):
            expected = {} if field.name == "tensors" else getattr(sung.voice, field.name)
            assert getattr(voice, field.name) == expected, field.name


def test_files_of_two_voices_are_refused(folder: Path, exported: Export) -> None:
    path = folder / DESCRIPTION
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {"licence": "all rights reserved"}))
    assert OnnxSynthesizer(folder).voice.licence == "all rights reserved"
    path.write_text(json.dumps(content | {"step": 9}))
    with pytest.raises(
        CheckpointError, match=r"voice\.onnx and voice\.json in .* do not belong together"
    ):
        OnnxSynthesizer(folder)
    path.write_text(json.dumps(content))
    shutil.copy(exported("share").folder / MELODY, folder)
    with pytest.raises(
        CheckpointError, match=r"melody\.onnx and voice\.json in .* do not belong together"
    ):
        OnnxSynthesizer(folder)


def test_what_is_no_exported_voice_is_refused(folder: Path, golden: Path) -> None:
    whole = (folder / GRAPH).read_bytes()
    for content, words in (
        (b"", "is empty"),
        (b"<html>", "not an ONNX graph that onnxruntime can run"),
        (whole[: len(whole) // 2], "not an ONNX graph that onnxruntime can run"),
        (
            (golden / "encoders" / "vec-tiny-layer-3.onnx").read_bytes(),
            "does not have the weights of a Cantor voice",
        ),
    ):
        (folder / GRAPH).write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            OnnxSynthesizer(folder)
    (folder / GRAPH).write_bytes(whole)
    (folder / MELODY).unlink()
    with pytest.raises(CheckpointError, match=r"melody\.onnx does not exist"):
        OnnxSynthesizer(folder)
    (folder / GRAPH).unlink()
    with pytest.raises(CheckpointError, match=r"is not a voice: it has no voice\.onnx"):
        OnnxSynthesizer(folder)


def test_without_onnx_the_error_says_what_to_install(
    exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    voice = exported("base").voice
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"needs onnx: pip install 'cantor\[onnx\]'"):
        export_voice(tmp_path, voice)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="a voice as ONNX needs onnxruntime: pip install"):
        OnnxSynthesizer(exported("base").folder)
