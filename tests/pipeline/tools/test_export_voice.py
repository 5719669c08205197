"""`export`: the files of another program sing like the voice that they were made from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from models.synthesizer.blocks.noise import KeyedNoise
from models.synthesizer.onnx import GRAPH, MELODY, OnnxSynthesizer
from models.synthesizer.sovits.files import write_voice
from models.synthesizer.sovits.networks import Synthesizer
from models.synthesizer.voice import (
    DESCRIPTION,
    Voice,
    VoiceEncoder,
    load_network,
    save_voice,
)
from pipeline.cli import app
from pipeline.errors import UserError
from pipeline.tools.export_voice import export
from pipeline.train.find_voice import read_any_voice
from stages.units import EncoderConfig
from tests.models.synthesizer.test_voice import CONFIG, make

SOFT = dataclasses.replace(CONFIG, units_dim=256)


@pytest.fixture
def voice() -> Voice:
    """One that so-vits-svc could have trained too."""
    torch.manual_seed(1)
    encoder = VoiceEncoder(name="hubertsoft", dim=256)
    return make(config=SOFT, tensors=Synthesizer(SOFT).state_dict(), encoder=encoder)


def sung(network: Synthesizer | OnnxSynthesizer) -> torch.Tensor:
    units = torch.linspace(-1, 1, 256 * 40).view(1, 256, 40)
    f0, voiced = torch.full((1, 40), 330.0), torch.ones(1, 40)
    return network.infer(units, f0, voiced, torch.tensor([1]), noise=KeyedNoise([1]))[0]


@pytest.mark.slow
def test_a_model_of_sovits_sings_on(voice: Voice, tmp_path: Path) -> None:
    g_path, folder = tmp_path / "G_800.pth", tmp_path / "graphs"
    write_voice(voice, g_path)
    result = CliRunner().invoke(app, ["export", str(g_path), str(folder)], catch_exceptions=False)
    assert result.exit_code == 0
    assert str(folder / GRAPH) in result.output and str(folder / MELODY) in result.output
    assert sorted(path.name for path in folder.iterdir()) == sorted((DESCRIPTION, GRAPH, MELODY))
    network = OnnxSynthesizer(folder)
    assert (network.voice.speakers, network.voice.step) == (voice.speakers, 800)
    torch.testing.assert_close(sung(network), sung(load_network(voice)), rtol=0, atol=1e-5)


def test_a_voice_of_ours_is_exported_and_never_overwritten(voice: Voice, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    save_voice(ours, voice)
    before = {path.name: path.read_bytes() for path in ours.iterdir()}
    with pytest.raises(UserError, match="already has a voice"):
        export(ours, ours)
    assert {path.name: path.read_bytes() for path in ours.iterdir()} == before
    export(ours, tmp_path / "graphs")
    assert OnnxSynthesizer(tmp_path / "graphs").voice.f0_method == voice.f0_method


def test_what_cannot_be_exported_is_refused_in_words(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for checkpoint, folder, words in (
        (tmp_path / "none", tmp_path / "graphs", "none does not exist"),
        (tmp_path, tmp_path / "graphs", "holds no voice"),
        (tmp_path, file, "is a file; name a folder"),
    ):
        with pytest.raises(UserError, match=words):
            export(checkpoint, folder)
    assert not (tmp_path / "graphs").exists()
    with pytest.raises(UserError, match=r"--format is 'onyx' \(did you mean 'onnx'\?\)"):
        export(tmp_path, tmp_path / "graphs", "onyx")


def test_files_of_sovits_hold_the_same_voice(voice: Voice, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    save_voice(ours, dataclasses.replace(voice, step=1200))
    words = ["export", str(ours), str(theirs), "--format", "sovits"]
    result = CliRunner().invoke(
        app, [*words, "--json", str(tmp_path / "e.json")], catch_exceptions=False
    )
    assert result.exit_code == 0
    files = [theirs / "G_1200.pth", theirs / "config.json"]
    assert sorted(theirs.iterdir()) == files
    figures = json.loads((tmp_path / "e.json").read_text())
    assert figures == {"bytes": {str(file): file.stat().st_size for file in files}}
    again = read_any_voice(theirs)
    assert (again.speakers, again.step, again.encoder.name) == (voice.speakers, 1200, "hubertsoft")
    assert again.config == voice.config
    assert torch.equal(sung(load_network(again)), sung(load_network(voice)))
    before = {path: path.read_bytes() for path in files}
    with pytest.raises(UserError, match=r"config\.json exists already; name another folder"):
        export(ours, theirs, "sovits")
    assert {path: path.read_bytes() for path in files} == before


def test_voices_that_sovits_cannot_use_are_refused(voice: Voice, tmp_path: Path) -> None:
    normalised = dataclasses.asdict(EncoderConfig(name="hubertsoft", normalize="song"))
    for name, changed, words in (
        (
            "encoder",
            dataclasses.replace(voice, encoder=VoiceEncoder(name="mfcc", dim=256)),
            r"mfcc.*so-vits-svc|so-vits-svc.*mfcc",
        ),
        (
            "codebook",
            dataclasses.replace(
                voice, encoder=dataclasses.replace(voice.encoder, codebook_sha256="ab" * 32)
            ),
            "codebook",
        ),
        (
            "settings",
            dataclasses.replace(voice, extraction={"encoder": normalised}),
            r"trained on units made with encoder\.normalize=song, which so-vits-svc does not have",
        ),
    ):
        save_voice(tmp_path / name, changed)
        with pytest.raises(UserError, match=words):
            export(tmp_path / name, tmp_path / "theirs", "sovits")
    export(_saved(voice, tmp_path / "plain"), tmp_path / "graphs")
    with pytest.raises(UserError, match="is an exported voice; name the voice that it was made"):
        export(tmp_path / "graphs", tmp_path / "theirs", "sovits")
    assert not (tmp_path / "theirs").exists()


def _saved(voice: Voice, folder: Path) -> Path:
    save_voice(folder, voice)
    return folder
