"""Every path that may name a voice, and every one that does not."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from models.synthesizer.config import MelConfig, SynthesizerConfig
from models.synthesizer.onnx import GRAPH, export_voice
from models.synthesizer.sovits.networks import Synthesizer
from models.synthesizer.voice import (
    DESCRIPTION,
    WEIGHTS,
    Voice,
    VoiceEncoder,
    load_voice,
    save_voice,
)
from pipeline.cli import app
from pipeline.convert.config import ConvertConfig
from pipeline.errors import UserError
from pipeline.train.find_voice import is_graph, read_any_voice, weights_file
from pipeline.train.run_folder import Checkpoints
from tests.models.synthesizer.sovits_files import manifest, state_dict, write_voice

CONFIG = SynthesizerConfig(
    units_dim=6, n_speakers=2, sample_rate=16000, n_fft=64, inter_channels=4, hidden_channels=8,
    filter_channels=8, n_layers=1, resblock="2", resblock_kernel_sizes=(3,),
    resblock_dilation_sizes=((1, 3),), upsample_rates=(4, 4), upsample_initial_channel=8,
    upsample_kernel_sizes=(8, 8), gin_channels=4, n_flow_layers=1, source_rate=16000,
)  # fmt: skip


def small_voice(step: int = 0) -> Voice:
    torch.manual_seed(0)
    return Voice(
        tensors=Synthesizer(CONFIG).state_dict(),
        config=CONFIG,
        mel=MelConfig(n_fft=64, win_length=64, n_mels=10, f_max=8000.0),
        speakers=("ann", "ben"),
        encoder=VoiceEncoder(name="mfcc", dim=6),
        step=step,
    )


@pytest.fixture(scope="module")
def cantor_voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voices") / "ann"
    save_voice(folder, small_voice(7))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run with the checkpoints of steps 3 and 20."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in (3, 20):
        checkpoints.save(step, functools.partial(save_voice, voice=small_voice(step)), {})
    (folder / "run.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def sovits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """G_800.pth and config.json, as so-vits-svc leaves them."""
    folder = tmp_path_factory.mktemp("44k")
    tensors = state_dict(manifest("svc_tiny_manifest")["base"]["keys"])
    tensors["pre.weight"] = torch.zeros(16, 768, 5)
    write_voice(folder, "base", {"model": tensors}, ssl_dim=768)
    return folder


@pytest.fixture
def sovits_folder(sovits: Path, tmp_path: Path) -> Path:
    """A copy of so-vits-svc's folder, to change."""
    return Path(shutil.copytree(sovits, tmp_path / "nyaru"))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["", WEIGHTS, DESCRIPTION])
def test_a_voice_of_ours_by_its_folder_or_either_file(cantor_voice: Path, file: str) -> None:
    assert read_any_voice(cantor_voice / file).step == 7


def test_a_run_is_its_last_checkpoint(run: Path) -> None:
    assert read_any_voice(run).step == 20
    assert read_any_voice(run / "checkpoints" / "step-00000003").step == 3


def test_a_damaged_checkpoint_of_a_run_is_passed_over(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    damaged = copy / "checkpoints" / "step-00000020" / WEIGHTS
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert read_any_voice(copy).step == 3


def test_a_model_of_so_vits_svc_by_its_file_or_its_folder(sovits: Path) -> None:
    for path in (sovits, sovits / "G_800.pth"):
        voice = read_any_voice(path)
        assert (voice.step, voice.speakers[0]) == (800, "mezzo")
        assert voice.encoder.name == "contentvec768l12"


def test_the_model_and_config_of_the_first_releases(sovits_folder: Path) -> None:
    (sovits_folder / "G_800.pth").rename(sovits_folder / "model.pth")
    assert read_any_voice(sovits_folder).speakers[0] == "mezzo"
    (sovits_folder / "model.pth").rename(sovits_folder / "G_alice_release.pth")
    assert read_any_voice(sovits_folder).speakers[0] == "mezzo"


def test_of_several_steps_the_last_is_taken(sovits_folder: Path) -> None:
    for name in ("G_0", "G_9000", "G_10400", "D_20000", "G_best", "zzz"):
        (sovits_folder / f"{name}.pth").touch()
    assert weights_file(sovits_folder) == sovits_folder / "G_10400.pth"
    assert weights_file(sovits_folder / "G_0.pth") == sovits_folder / "G_0.pth"


def test_safetensors_of_so_vits_svc_s_names(sovits_folder: Path) -> None:
    content = torch.load(sovits_folder / "G_800.pth", weights_only=True)
    save_file(content["model"], sovits_folder / "G_801.safetensors")
    assert read_any_voice(sovits_folder / "G_801.safetensors").step == 801


@pytest.mark.parametrize(
    "names, words",
    [
        ([], "has a config.json but no *.pth"),
        (["ann.pth", "ben.pth"], "has several models (ann.pth, ben.pth); name one file"),
        (
            ["G_ann.pth", "G_ben.pth"],
            "has several models (G_ann.pth, G_ben.pth); name one file",
        ),
    ],
)
def test_folders_that_do_not_say_which_model(names: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in names:
        (tmp_path / name).touch()
    assert refusal(tmp_path).endswith(words)


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert refusal(tmp_path) == f"the run {tmp_path} has no checkpoint yet"


def test_what_is_not_there_or_no_voice(tmp_path: Path) -> None:
    kinds = (
        "name the folder of a voice or of a run, or a G_*.pth of so-vits-svc with config.json in "
        "the same folder"
    )
    assert refusal(tmp_path / "none") == f"{tmp_path / 'none'} does not exist; {kinds}"
    assert refusal(tmp_path) == f"{tmp_path} holds no voice; {kinds}"


def test_a_model_without_its_config_or_with_a_broken_one(sovits_folder: Path) -> None:
    config = sovits_folder / "config.json"
    content = config.read_text()
    config.write_text("{")
    assert "config.json is not JSON" in refusal(sovits_folder)
    config.write_text(json.dumps({**json.loads(content), "model": {"ssl_dim": 768}}))
    assert "config.json" in refusal(sovits_folder)
    config.unlink()
    assert "needs config.json in the same folder" in refusal(sovits_folder / "G_800.pth")


@pytest.mark.parametrize(
    "name, words",
    [("D_800.pth", "is a discriminator"), ("kmeans.pt", "k-means"), ("song.wav", "audio file")],
)
def test_checkpoints_of_another_kind_are_named(sovits_folder: Path, name: str, words: str) -> None:
    file = sovits_folder / name
    if name == "song.wav":
        file.write_bytes(b"RIFF" + bytes(100))
    elif name == "kmeans.pt":
        centres = {"n_features_in_": 768, "_n_threads": 1, "cluster_centers_": torch.zeros(2, 768)}
        torch.save({"ann": centres}, file)
    else:
        torch.save({"model": {"discriminators.0.convs.0.bias": torch.zeros(1)}}, file)
    message = refusal(file)
    assert message.startswith(f"{file} ") and words in message


def test_half_of_a_voice_of_ours(cantor_voice: Path, tmp_path: Path) -> None:
    for name in (WEIGHTS, DESCRIPTION):
        shutil.copy(cantor_voice / name, tmp_path / name)
    (tmp_path / DESCRIPTION).unlink()
    assert DESCRIPTION in refusal(tmp_path)
    shutil.copy(cantor_voice / DESCRIPTION, tmp_path / DESCRIPTION)
    (tmp_path / WEIGHTS).write_bytes(b"junk")
    assert "not a complete safetensors file" in refusal(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    assert refusal(tmp_path / DESCRIPTION).endswith(f"it has no {WEIGHTS}")


def test_a_voice_as_graphs_by_its_folder_or_its_graph(
    cantor_voice: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("graphs")
    export_voice(folder, load_voice(cantor_voice))
    for path in (folder, folder / GRAPH):
        voice = read_any_voice(path)
        assert (voice.step, voice.speakers, voice.config) == (7, ("ann", "ben"), CONFIG)
        assert is_graph(weights_file(path)) and not voice.tensors
    assert not is_graph(weights_file(cantor_voice))


def test_the_settings_of_a_voice_are_printed_before_it_is_said_who_sings(
    cantor_voice: Path,
) -> None:
    words = ["convert", str(cantor_voice), "--print-config", "f0.method=dio", "voice.seed=3"]
    printed = yaml.safe_load(CliRunner().invoke(app, words).output)
    assert printed["audio"]["sample_rate"] == 16000 and printed["f0"]["hop_length"] == 16
    assert (printed["f0"]["method"], printed["voice"]["seed"]) == ("dio", 3)
    assert list(printed) == [field.name for field in dataclasses.fields(ConvertConfig)]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_any_voice(path)
    return str(caught.value)
