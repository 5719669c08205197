"""`export` on the command line: what it writes sings as the voice that it was given."""

from __future__ import annotations

import dataclasses
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
    with pytest.raises(UserError, match="holds a voice already"):
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
