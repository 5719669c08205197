"""Every damaged file of a run that the commands read ends in one line with its name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from models.checkpoint import CheckpointError, save_safetensors
from pipeline.convert.ledger import (
    ConvertEntry,
    Record,
    commit_record,
    read_records,
    record_name,
)
from pipeline.convert.unit_blend import _speakers_indexed
from pipeline.errors import UserError
from pipeline.fingerprint import differences
from pipeline.storage.atomic import read_info, write_info
from pipeline.storage.step_log import StepLog
from pipeline.tools import distill, fetch
from pipeline.tools.demo_corpus import _MARKER, _read_marker
from pipeline.train.run_folder import Checkpoints, RunFolder, read_checkpoint, write_training
from tests.helpers.command import cantor
from tests.helpers.mutations import check_reader, mutated_bytes, mutated_json
from tests.helpers.voices import write_small_voice

ERRORS = (UserError, CheckpointError)


def refuses_damage(path: Path, read: Callable[[], Any], least: int = 50) -> None:
    read()
    assert check_reader(path, mutated_json(path.read_text()), read, ERRORS) > least, path.name


def test_a_training_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_json("run.json", {"format": 1, "dataset": "d", "settings": {"model.n_layers": 6}})

    def settings() -> None:
        differences(run.settings() or {}, {"model.n_layers": 6}, {})

    refuses_damage(tmp_path / "run.json", settings)
    kept = Checkpoints(tmp_path / "checkpoints")
    tensors = {"a/b": torch.zeros(50)}
    folder = kept.save(
        3, lambda to: write_training(to, tensors, {"step": "3"}), {"mel_distance": 1.5}
    ).folder

    def resume() -> None:
        read_checkpoint(folder)
        kept.best()
        kept.would_be_best({"mel_distance": 1.0})

    refuses_damage(folder / "checkpoint.json", resume)


def test_a_log_of_steps(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.5, "phase": "prune"}) for step in range(1, 4)]
    path.write_text("\n".join(lines) + "\n")
    log = StepLog(path)

    def read() -> None:
        log.lines()
        with log.open_from(10):
            pass

    check_reader(path, mutated_bytes(path.read_bytes()), read, UserError)
    path.write_text(lines[0] + "\n")
    refuses_damage(path, read, 20)


def test_a_folder_of_converted_songs(tmp_path: Path) -> None:
    write_info(tmp_path, "convert.json", {"fingerprint": "f", "settings": {"voice": "v"}})
    refuses_damage(tmp_path / "convert.json", lambda: read_info(tmp_path / "convert.json"))
    entry = ConvertEntry("a", "converted", None, None, 1, 2, "ab", "a.wav", notices=("n",))
    commit_record(tmp_path, Record(0, "t", "f", {"torch": "2"}, entry))

    def read() -> None:
        records, damaged = read_records(tmp_path, [0])
        for error in damaged:
            raise error
        assert hash(records[0].entry)

    refuses_damage(tmp_path / record_name(0), read)


def test_an_index_note_of_no_speaker_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"speaker": "ann", "dim": 3}))
    assert _speakers_indexed(tmp_path) == ["ann"]
    versions = mutated_json((tmp_path / "a.json").read_text())
    check_reader(tmp_path / "a.json", versions, lambda: _speakers_indexed(tmp_path), ())


def test_a_distillation(tmp_path: Path) -> None:
    files = distill._RunFiles(tmp_path)
    files.settings.write_text(json.dumps({"steps": 3, "teacher": "t", "layers": [1, 2]}))

    def settings() -> None:
        differences(files.read_settings(), {"steps": 3}, {})

    refuses_damage(files.settings, settings)
    save_safetensors(files.state, {"a": torch.zeros(3)}, {"step": "3", "phase": "prune"})
    versions = mutated_bytes(files.state.read_bytes())
    assert check_reader(files.state, versions, lambda: distill._read(files.state, []), ERRORS) > 50


def test_records_of_downloads_and_the_demo_corpus(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"sha256": "ab" * 32, "size": 3, "url": "https://x"}))
    refuses_damage(record, lambda: fetch._read_record(record))
    part = tmp_path / "part"
    fetch._write_version(part, "https://x", "v")
    version = fetch._version_file(part)
    versions = mutated_json(version.read_text())
    assert not check_reader(version, versions, lambda: fetch._read_version(part, "u"), ())
    marker = tmp_path / _MARKER
    marker.parent.mkdir()
    marker.write_text(json.dumps({"sha256": {"a.wav": "ab"}, "seed": 0}))
    check_reader(marker, mutated_json(marker.read_text()), lambda: _read_marker(tmp_path), ERRORS)


def test_what_is_no_file_is_named_by_every_command(tmp_path: Path) -> None:
    """Opening a FIFO would hang."""
    voice = write_small_voice(tmp_path / "voice")
    song, out, fifo = tmp_path / "song.wav", tmp_path / "out.wav", tmp_path / "fifo"
    soundfile.write(song, np.sin(np.arange(8000) * 0.1), 16000)
    os.mkfifo(fifo)
    convert = ("convert", voice, song, out, "--speaker", "ann")
    for words in (
        ("convert", fifo, song, out),
        (*convert, "--encoder-checkpoint", fifo),
        (*convert, "--config", fifo),
        ("convert", voice, song, out, f"voice.mix={fifo}"),
        (*convert, f"units.codebook={fifo}", "units.codebook_ratio=0.5"),
        (*convert, f"units.index={fifo}", "units.index_ratio=0.5"),
        (*convert, "f0.method=rmvpe", f"f0.checkpoint={fifo}"),
        ("export", fifo, tmp_path / "exported"),
        ("convert-encoder", fifo, "--print"),
    ):
        assert str(fifo) in cantor(*words, status=2), words
    assert "too long a name" in cantor(
        "convert-encoder", tmp_path / ("x" * 300), "--print", status=2
    )
