"""The command as a user types it: words and exit statuses."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline import cli
from pipeline.errors import Interrupted, StorageFault
from pipeline.settings import dump_yaml, read_settings
from pipeline.storage.atomic import storage_fault
from pipeline.train.config import TrainConfig
from tests.pipeline.conftest import FAST
from tests.pipeline.train.small_training import SMALL, write_small_dataset

ROOT = Path(__file__).resolve().parents[2]


def cantor(*words: object, status: int = 0) -> str:
    run = subprocess.run(
        [sys.executable, str(ROOT / "run_pipeline.py"), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert run.returncode == status, run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    return run.stdout + run.stderr


def test_no_arguments_print_help() -> None:
    output = cantor(status=2)
    assert "extract" in output and "verify" in output and "report" in output


def test_help_of_extract_names_the_options() -> None:
    output = cantor("extract", "--help")
    options = ("--from", "--config", "--ray-address", "--dry-run", "--retry-quarantined", "--json")
    for option in options:
        assert option in output


def test_help_of_train_names_the_options_and_presets() -> None:
    output = cantor("train", "--help")
    for word in ("--config", "--init-from", "--workers", "--ray-address", "tiny.yaml"):
        assert word in output


def test_print_config_is_yaml_of_everything() -> None:
    printed = yaml.safe_load(cantor("extract", "--print-config", "f0.method=dio"))
    assert printed["f0"]["method"] == "dio"
    assert set(printed) >= {"audio", "slice", "loudness", "encoder", "plan", "workers"}
    preset = ("--config", ROOT / "configs" / "sovits-44k-256.yaml")
    printed = yaml.safe_load(cantor("train", "--print-config", *preset, "run.steps=7"))
    assert set(printed) == {"model", "mel", "data", "loss", "optimizer", "run"}
    assert (printed["model"]["gin_channels"], printed["run"]["steps"]) == (256, 7)
    assert printed["model"]["resblock_dilation_sizes"] == [[1, 3, 5]] * 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["extract"], "name a CORPUS"),
        (["extract", "/nowhere/at/all", "d"], "no corpus at /nowhere/at/all"),
        (["extract", "c", "d", "f0.metod=dio"], "did you mean 'f0.method'"),
        (["extract", "c", "f0.f0_min=60"], "'f0.f0_min=60' is a setting where the DATASET"),
        (["extract", "c", "encoders.log-mel.device=cpu"], "is a setting where the DATASET"),
        (["extract", "--from", "/nowhere/at/all", "d"], "/nowhere/at/all is not a dataset"),
        (["extract", "--from", "c"], "name the folder of the new dataset"),
        (["extract", "--from", "c", "f0.f0_min=60"], "is a setting where the DATASET folder"),
        (["extract", "--from", "c", "d", "--speaker", "ann"], "--speaker is about songs"),
        (["extract", "c", "d", "--config", "/"], "settings from /: Is a directory"),
        (["train", "d"], "name a DATASET and a RUN folder"),
        (["train", "d", "run.steps=9"], "'run.steps=9' is a setting where the RUN folder"),
        (["train", "d", "c", "run.stepps=9"], "did you mean 'run.steps'"),
        (["train", "d", "c", "--workers", "0"], "--workers is 0; it must be 1 or more"),
        (["verify", "/nowhere/at/all"], "is not a dataset"),
        (["report", "/nowhere/at/all"], "is not a dataset"),
    ],
)
def test_faults_are_one_sentence_and_status_2(words: list[str], said: str, tmp_path: Path) -> None:
    words = [str(tmp_path / word) if word in ("c", "d") else word for word in words]
    assert said in " ".join(cantor(*words, status=2).split())


def test_a_run_ends_with_a_table_and_json(corpus: Path, tmp_path: Path) -> None:
    output = cantor(
        "extract", corpus, tmp_path / "d", *FAST, "--local", "--json", tmp_path / "s.json"
    )
    assert "6 kept" in output and "1 filtered: silent" in output and "real time" in output
    numbers = json.loads((tmp_path / "s.json").read_text())
    assert (numbers["songs"], numbers["kept"], numbers["filtered"]) == (7, 6, {"silent": 1})
    assert numbers["problems"] == []
    again = cantor("extract", corpus, tmp_path / "d", *FAST)
    assert "nothing to do" in again
    assert "the dataset is whole" in cantor("verify", tmp_path / "d")
    shard = next((tmp_path / "d" / "data").glob("*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    assert "PROBLEM" in cantor("verify", tmp_path / "d", status=1)


def test_a_training_ends_with_a_table_and_keeps_its_settings(tmp_path: Path) -> None:
    dataset, run = write_small_dataset(tmp_path / "d"), tmp_path / "run"
    settings = [f"{k}={v}" for k, v in (SMALL | {"run.validation_clips": "1"}).items()]
    (tmp_path / "small.yaml").write_text(dump_yaml(read_settings(TrainConfig, None, settings)))
    words = ("train", dataset, run, "--config", tmp_path / "small.yaml")
    output = cantor(*words, "run.steps=2")
    assert "step 0: posterior / prior: mel distance" in output
    assert "2 steps done, 2 of them in this call" in output
    for row in ("mel distance", "right pitch", "voicing wrong", "discriminator"):
        assert row in output
    assert str(run / "checkpoints" / "step-00000002") in "".join(output.split())
    assert (run / "checkpoints" / "step-00000002" / "voice.safetensors").is_file()
    assert (run / "validation" / "step-00000002.png").is_file()
    other = cantor(*words, "loss.mel=9", status=2)
    assert "loss.mel was 45.0 and is 9.0" in " ".join(other.split())


def test_dry_run_says_what_would_run(corpus: Path, tmp_path: Path) -> None:
    output = cantor("extract", corpus, tmp_path / "d", *FAST, "--dry-run")
    assert "7 songs of 4 speakers" in output and "nothing was written" in output
    assert not (tmp_path / "d").exists()


def test_an_export_that_cannot_be_written_is_status_3(dataset: Path) -> None:
    file = dataset.parent / "file"  # where a folder should be
    file.touch()
    output = cantor("verify", dataset, "--export", file / "ledger.csv", status=3)
    assert "stopped: the storage failed" in output and str(file) in output


FULL = OSError(errno.ENOSPC, "No space left on device", "/data/x")
ON = "run the same command to go on"
NEW = "run the command again WITHOUT --force-new"


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        (FULL, 3, "stopped: no space left at /data/x; free some. What was committed is whole. Run"),
        (storage_fault(FULL), 3, "stopped: no space left at /data/x; free some. What was"),
        (StorageFault("the folder is gone"), 3, "stopped: the folder is gone. What was"),
        (OSError(errno.EIO, "Input/output error"), 3, "stopped: the storage failed: Input/output"),
        (PermissionError(errno.EACCES, "Permission denied", "/d"), 3, "at /d: Permission denied"),
        (Interrupted(), 130, "stopped; what was committed is whole. Run"),
    ],
)
@pytest.mark.parametrize("force_new", [False, True])
def test_what_stops_a_run_says_once_how_to_go_on(
    fault: Exception,
    status: int,
    said: str,
    force_new: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop() -> None:
        raise fault

    monkeypatch.setattr(cli, "app", stop)
    monkeypatch.setattr(sys, "argv", ["cantor", "extract", *["--force-new"] * force_new])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == status
    words = " ".join(capsys.readouterr().err.split())
    assert said in words
    counts = [words.lower().count(text.lower()) for text in (ON, NEW)]
    assert counts == ([0, 1] if force_new else [1, 0])
