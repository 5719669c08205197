"""`distill`: train a student from shards and a teacher, and use it as an encoder."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from models.checkpoint import read_safetensors
from models.encoders import Encoder, load_encoder
from models.encoders.distill import DistillConfig
from pipeline.dataset.audio_batches import AudioDataConfig
from pipeline.errors import UserError
from pipeline.settings import flatten, load_settings
from pipeline.storage.lock import lock
from pipeline.tools.distill import (
    DistillOutcome,
    DistillRunConfig,
    DistillSettings,
    TeacherConfig,
    distill,
)
from tests.conftest import ROOT
from tests.helpers.yaml_keys import assert_names_every_key

TRAINING = DistillConfig(
    sparsity=0.3,
    steps=100,
    finetune_steps=30,
    gates=("stem", "heads", "inner"),
    learning_rate=2e-3,
    finetune_learning_rate=1e-3,
)

# The command takes as many threads as it may use cores.
ON_ONE_CORE = """
import os
from pipeline.cli import main
os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
main()
"""


@pytest.fixture(scope="module")
def settings(golden: Path) -> DistillSettings:
    return DistillSettings(
        teacher=TeacherConfig(
            name="contentvec256l9", checkpoint=str(golden / "encoders" / "tiny_hubert_base.pt")
        ),
        distill=TRAINING,
        data=AudioDataConfig(batch_size=4, crop_s=1.0),
        run=DistillRunConfig(save_every=10),
    )


def change(settings: DistillSettings, **values: object) -> DistillSettings:
    """Return the settings with `section__key=value`."""
    for name, value in values.items():
        section, _, key = name.partition("__")
        changed = dataclasses.replace(getattr(settings, section), **{key: value})
        settings = dataclasses.replace(settings, **{section: changed})
    return settings


def run(dataset: Path, out: Path, settings: DistillSettings) -> DistillOutcome:
    return distill(dataset, out, settings, Console(file=io.StringIO()))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, as the killed processes do: the number of threads changes the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def student(
    dataset: Path, settings: DistillSettings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, DistillOutcome]:
    out = tmp_path_factory.mktemp("student") / "student.safetensors"
    return out, run(dataset, out, settings)


def load_teacher(settings: DistillSettings) -> Encoder:
    assert settings.teacher.name is not None
    return load_encoder(settings.teacher.name, settings.teacher.checkpoint)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return read_safetensors(path)[0]


@pytest.mark.slow
def test_student_is_an_encoder_like_its_teacher(
    student: tuple[Path, DistillOutcome], settings: DistillSettings
) -> None:
    out, outcome = student
    assert outcome.sparsity == pytest.approx(0.3, abs=0.03)
    assert outcome.last_loss < outcome.first_loss
    teacher = load_teacher(settings)
    encoder = load_encoder("dphubert", str(out))
    assert (encoder.dim, encoder.hop_length) == (teacher.dim, teacher.hop_length)
    assert outcome.student_size == sum(t.numel() for t in tensors(out).values())
    time_s = np.arange(16000) / 16000
    wav = torch.from_numpy(np.sin(2 * np.pi * 220 * time_s).astype(np.float32) * 0.3)
    (wanted,), (given,) = teacher.encode([wav]), encoder.encode([wav])
    assert given.shape == wanted.shape
    away = (given - wanted).abs().mean()
    assert 0 < away < 0.5 * wanted.std()


def test_log_tells_of_every_step(student: tuple[Path, DistillOutcome]) -> None:
    folder = Path(f"{student[0]}.run")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(130))
    assert [line["phase"] for line in lines] == ["prune"] * 100 + ["finetune"] * 30
    assert lines[0]["target_sparsity"] == 0
    assert lines[99]["target_sparsity"] == 0.3
    assert lines[99]["sparsity"] == pytest.approx(0.3, abs=0.02)
    left = {path.name for path in folder.iterdir()}
    assert left == {".lock", "settings.json", "log.jsonl", "pruned.safetensors"}


@pytest.mark.slow
def test_killed_run_goes_on_to_the_same_student(
    dataset: Path, settings: DistillSettings, student: tuple[Path, DistillOutcome], tmp_path: Path
) -> None:
    out = tmp_path / "student.safetensors"
    command = [sys.executable, "-c", ON_ONE_CORE, "distill", str(dataset), str(out)]
    device = change(settings, run__device="cpu")
    command += [f"{key}={json.dumps(value)}" for key, value in flatten(device).items()]
    for sign in ("state.safetensors", "pruned.safetensors"):  # once in each phase
        kill_once_there(Path(f"{out}.run") / sign, command)
        assert not out.exists()
    with pytest.raises(UserError, match=r"other settings \(batch was 4 and is 5\)"):
        run(dataset, out, change(settings, data__batch_size=5))
    run(dataset, out, settings)
    expected, found = tensors(student[0]), tensors(out)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    logs = [Path(f"{path}.run") / "log.jsonl" for path in (student[0], out)]
    assert logs[0].read_text() == logs[1].read_text()


def kill_once_there(file: Path, command: list[str]) -> None:
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as child:
        while not file.exists() and child.poll() is None:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        assert child.stderr is not None
        assert child.stderr.read().decode() == ""


@pytest.mark.slow
def test_stopped_between_the_phases(
    dataset: Path, settings: DistillSettings, tmp_path: Path
) -> None:
    settings = change(settings, distill__steps=4, distill__finetune_steps=2)
    through, stopped = tmp_path / "through.safetensors", tmp_path / "stopped.safetensors"
    run(dataset, through, settings)
    in_the_way = Path(f"{stopped}.run") / "pruned.safetensors"
    in_the_way.mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        run(dataset, stopped, settings)
    in_the_way.rmdir()
    run(dataset, stopped, settings)
    for name, tensor in tensors(through).items():
        assert torch.equal(tensor, tensors(stopped)[name]), name


def test_what_cannot_be_is_refused(
    dataset: Path, settings: DistillSettings, golden: Path, tmp_path: Path
) -> None:
    out = tmp_path / "student.safetensors"
    for changes, message in (
        ({"distill__sparsity": 0.95}, r"sparsity is 0\.95; with the gates"),
        ({"teacher__checkpoint": str(tmp_path / "none.pt")}, r"none\.pt"),
        ({"teacher__checkpoint": None}, r"teacher\.checkpoint is not set; give teacher\.name="),
        ({"teacher__name": None}, r"teacher\.name is not set"),
        ({"teacher__name": "hubertsoft"}, r"its encoder\.name is contentvec"),
        ({"data__split": "validation"}, "no split 'validation'; data.split can be train"),
    ):
        with pytest.raises(UserError, match=message):
            run(dataset, out, change(settings, **changes))
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        run(dataset, tmp_path / "student.pt", settings)
    with pytest.raises(UserError, match="is not a dataset"):
        run(tmp_path, out, settings)
    assert list(tmp_path.iterdir()) == []
    with lock(Path(f"{out}.run")), pytest.raises(UserError, match="is in use by process"):
        run(dataset, out, settings)
    out.touch()
    with pytest.raises(UserError, match="exists already"):
        run(dataset, out, settings)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("teacher.name=whisper-ppg", "teacher.name is 'whisper-ppg'; choose from contentvec"),
        ("data.batch_size=0", "data.batch_size is 0; it must be 1 or more"),
        ("data.crop_s=0", "data.crop_s is 0; it must lie in 0.1 to 60 seconds"),
        ("run.seed=-1", "run.seed is -1"),
        ("run.save_every=0", "run.save_every is 0"),
        ("run.device=tpu", "run.device"),
        ("distill.gates=[heads,hands]", "distill.gates has 'hands'"),
        ("distill.layers=[0,x]", "distill.layers must have whole numbers, not 'x'"),
        ("distill.stepps=9", "did you mean 'distill.steps'"),
    ],
)
def test_wrong_settings_are_refused(word: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_settings(DistillSettings, None, [word])


def test_the_yaml_file_names_exactly_the_keys_and_defaults() -> None:
    assert_names_every_key("distill", DistillSettings)
