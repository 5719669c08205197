"""The command as a user types it: words and exit statuses."""

from __future__ import annotations

import errno
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipeline import cli
from pipeline.errors import Interrupted, StorageFault
from pipeline.settings import dump_yaml, read_settings
from pipeline.storage.atomic import storage_fault
from pipeline.train.config import TrainConfig
from tests.helpers.command import cantor
from tests.pipeline.conftest import FAST
from tests.pipeline.train.small_training import SMALL, write_small_dataset

ROOT = Path(__file__).resolve().parents[2]


def test_no_arguments_print_help() -> None:
    output = cantor(status=2)
    assert "extract" in output and "verify" in output and "report" in output


COMMANDS = (
    *("extract", "train", "convert", "verify", "report", "demo-corpus", "codebook", "index"),
    *("purity", "distill", "export", "fetch-encoder", "convert-encoder"),
)


def test_every_command_has_help_and_recurring_options_are_the_same() -> None:
    texts: dict[str, set[str]] = {}
    listed = CliRunner().invoke(cli.app, ["--help"]).output
    for command in COMMANDS:
        assert f" {command} " in listed
        output = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"}).output
        assert f"Usage: cantor {command} " in " ".join(output.split())
        for line in output.splitlines():
            words = line.strip("│ ").split("  ")
            option = words[0].strip()
            if option.startswith("--"):
                texts.setdefault(option, set()).add(words[-1].strip())
    for option in ("--config", "--print-config", "--ray-address", "--local", "--json"):
        assert len(texts[option]) == 1, texts[option]
    with_json = [
        command
        for command in COMMANDS
        if "--json" in CliRunner().invoke(cli.app, [command, "--help"]).output
    ]
    assert with_json == [
        *("extract", "train", "convert", "verify", "codebook", "index", "purity", "distill"),
        *("export", "convert-encoder"),
    ]


def test_ctrl_c_ends_every_command_with_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.tools.demo_corpus.make_demo_corpus", interrupt)
    with pytest.raises(Interrupted):
        CliRunner().invoke(cli.app, ["demo-corpus", "d"], catch_exceptions=False)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_script_with_one_sentence(number: int, tmp_path: Path) -> None:
    words = ["demo-corpus", str(tmp_path / "demo"), "--minutes", "600"]
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "run_pipeline.py"), *words], stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "demo").exists():
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(number)
    errors = run.communicate(timeout=60)[1]
    assert run.returncode == 128 + number
    assert errors == "\nstopped; finished work is safe. Run the same command again to resume.\n"


@pytest.mark.slow
def test_the_script_ends_with_the_status_of_the_command() -> None:
    words = [sys.executable, str(ROOT / "run_pipeline.py"), "verify", "/nowhere/at/all"]
    run = subprocess.run(words, capture_output=True, text=True, check=False, timeout=180)
    assert (run.returncode, run.stdout) == (2, "")
    assert "is not a dataset" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize("scheme", ["s3", "gs", "file", "az+https"])
@pytest.mark.parametrize(
    "words",
    [
        *(["extract", "/c", "{}"], ["extract", "{}", "/d"], ["extract", "--from", "{}", "/d"]),
        *(["extract", "--from={}", "/d"], ["extract", "/c", "/d", "encoder.checkpoint={}"]),
        *(["extract", "/c", "/d", "--json", "{}"], ["extract", "/c", "/d", "--config", "{}"]),
        *(["train", "{}", "/r"], ["train", "/d", "{}"], ["train", "/d", "/r", "--init-from", "{}"]),
        *(["convert", "{}", "a", "b"], ["convert", "v", "{}", "b"], ["convert", "v", "a", "{}"]),
        *(["convert", "v", "a", "b", "units.codebook='{}'"], ["verify", "{}"], ["report", "{}"]),
        *(["verify", "/d", "--source={}"], ["verify", "/d", "--export", "{}.csv"]),
        *(["demo-corpus", "{}"], ["codebook", "{}", "o"], ["index", "d", "{}"], ["purity", "{}"]),
        *(["distill", "{}", "o"], ["export", "{}", "o"], ["export", "v", "{}"]),
        *(["fetch-encoder", "x", "--to", "{}"], ["convert-encoder", "{}", "o"]),
    ],
)
def test_no_command_takes_a_uri_for_a_path(words: list[str], scheme: str) -> None:
    uri = f"{scheme}://bucket/place"
    output = cantor(*(word.format(uri) for word in words), status=2)
    assert f"{uri}" in output and "is a URI" in output


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
        (["extract"], "CORPUS and DATASET must be given; see --help"),
        (["extract", "/nowhere/at/all", "d"], "no corpus at /nowhere/at/all"),
        (["extract", "c", "d", "f0.metod=dio"], "did you mean 'f0.method'"),
        (["extract", "c", "f0.f0_min=60"], "DATASET must be given ('f0.f0_min=60' is a setting"),
        (["extract", "c", "encoders.log-mel.device=cpu"], "is a setting; write ./enc"),
        (["extract", "c", "d", "method=dio"], "'method=dio' is not a setting; write section.key="),
        (["extract", "--print-config", "method=dio"], "'method=dio' is not a setting"),
        (["extract", "--from", "/nowhere/at/all", "d"], "/nowhere/at/all is not a dataset"),
        (["extract", "--from", "c"], "DATASET must be given"),
        (["extract", "--from", "c", "f0.f0_min=60"], "DATASET must be given ('f0.f0_min=60' is"),
        (["extract", "--from", "c", "d", "--speaker", "ann"], "--speaker does not go with --from"),
        (["extract", "c", "d", "--config", "/"], "settings from /: not a regular file"),
        (["train", "d"], "RUN must be given"),
        (["train", "d", "run.steps=9"], "RUN must be given ('run.steps=9' is a setting"),
        (["train", "d", "c", "run.stepps=9"], "did you mean 'run.steps'"),
        (["train", "d", "c", "--workers", "0"], "--workers is 0; it must be 1 or more"),
        (["verify", "/nowhere/at/all"], "is not a dataset"),
        (["report", "/nowhere/at/all"], "is not a dataset"),
        (["convert", "v", "c"], "OUTPUT must be given"),
        (["convert", "--print-config"], "CHECKPOINT must be given"),
        (["convert", "v", "/nowhere.wav", "o.wav"], "/nowhere.wav does not exist; INPUT is a song"),
        (["codebook", "d"], "OUT must be given"),
        (["codebook", "d", "o", "codebook.clustres=3"], "did you mean 'codebook.clusters'"),
        (["index", "d", "o", "index.nprobe=0"], "index.nprobe is 0; it must be 1 or more"),
        (["purity", "xvector.device=cpu"], "DATASET must be given"),
        (["distill", "d", "o.safetensors"], "teacher.name is not set; give teacher.name=ENCODER"),
        (["distill", "d", "o", "distill.sparsity=2"], "distill.sparsity is 2.0; it must lie"),
    ],
)
def test_faults_are_one_sentence_and_status_2(words: list[str], said: str, tmp_path: Path) -> None:
    words = [str(tmp_path / word) if word in ("c", "d") else word for word in words]
    assert said in " ".join(cantor(*words, status=2).split())


@pytest.mark.slow
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
    output = cantor("verify", tmp_path / "d", "--json", tmp_path / "v.json")
    assert "the dataset is intact" in output
    verified = json.loads((tmp_path / "v.json").read_text())
    assert (verified["songs"], verified["problems"]) == (7, [])
    assert [(song["song_id"], song["reason"]) for song in verified["left_out"]] == [
        ("quiet/silence.wav", "silent")
    ]
    shard = next((tmp_path / "d" / "data").glob("*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    assert "PROBLEM" in cantor("verify", tmp_path / "d", status=1)


@pytest.mark.slow
def test_a_training_ends_with_a_table_and_keeps_its_settings(tmp_path: Path) -> None:
    dataset, run = write_small_dataset(tmp_path / "d"), tmp_path / "run"
    settings = [f"{k}={v}" for k, v in (SMALL | {"run.validation_clips": "1"}).items()]
    (tmp_path / "small.yaml").write_text(dump_yaml(read_settings(TrainConfig, None, settings)))
    words = ("train", dataset, run, "--config", tmp_path / "small.yaml")
    output = cantor(*words, "run.steps=2", "--json", tmp_path / "t.json")
    figures = json.loads((tmp_path / "t.json").read_text())
    assert (figures["steps"], figures["steps_run"]) == (2, 2)
    assert figures["voice"] == str(run / "checkpoints" / "step-00000002")
    assert figures["losses"]["last"]["step"] == 2
    assert figures["validation"]["first"]["step"] == 0
    assert "step 0: posterior / prior: mel distance" in output
    assert "2 steps done, 2 of them in this call" in output
    assert output.count("units are for trying things out only") == 1
    for row in ("mel distance", "pitch accuracy", "voicing errors", "discriminator"):
        assert row in output
    assert str(run / "checkpoints" / "step-00000002") in "".join(output.split())
    assert (run / "checkpoints" / "step-00000002" / "voice.safetensors").is_file()
    assert (run / "validation" / "step-00000002.png").is_file()
    other = cantor(*words, "loss.mel=9", status=2)
    assert "loss.mel was 45.0 and is 9.0" in " ".join(other.split())


def test_dry_run_says_what_would_run(corpus: Path, tmp_path: Path) -> None:
    output = cantor("extract", corpus, tmp_path / "d", *FAST, "--dry-run")
    assert "7 songs of 4 speakers" in output and "nothing was written" in output
    assert re.search(r"speaker +songs +hours +first path\n", output)
    assert re.search(r"spk2 +\d +0\.0\d +spk2/\S+\n", output)
    assert output.count("mfcc units are for trying things out only") == 1
    assert "cantor fetch-encoder contentvec-rvc" in output
    assert "no song lies directly" not in output
    above = tmp_path / "above"
    above.mkdir()
    (above / "songs").symlink_to(corpus)
    output = cantor("extract", above, tmp_path / "d", *FAST, "--dry-run")
    assert "such as quiet, spk0, spk1 and 1 more. If those are the speakers, give " in output
    assert f"give {above}/songs as CORPUS" in output
    assert not (tmp_path / "d").exists()


@pytest.mark.slow
def test_an_export_that_cannot_be_written_is_status_3(dataset: Path) -> None:
    file = dataset.parent / "file"  # where a folder should be
    file.touch()
    output = cantor("verify", dataset, "--export", file / "ledger.csv", status=3)
    assert "stopped: the storage failed" in output and str(file) in output


FULL = OSError(errno.ENOSPC, "No space left on device", "/data/x")
ON = "run the same command again to resume"
NEW = "run the command WITHOUT --force-new"


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        (FULL, 3, "stopped: no space left at /data/x; free some. Finished work is safe."),
        (storage_fault(FULL), 3, "stopped: no space left at /data/x; free some. Finished"),
        (StorageFault("the folder is gone"), 3, "stopped: the folder is gone. Finished"),
        (OSError(errno.EIO, "Input/output error"), 3, "stopped: the storage failed: Input/output"),
        (PermissionError(errno.EACCES, "Permission denied", "/d"), 3, "at /d: Permission denied"),
        (Interrupted(), 130, "stopped; finished work is safe."),
        (Interrupted(signal.SIGTERM), 143, "stopped; finished work is safe."),
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
