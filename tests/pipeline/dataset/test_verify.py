from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset.account import Account
from pipeline.dataset.ledger import SongEntry
from pipeline.dataset.shards import Footer, iter_shards, read_footer, write_shard
from pipeline.dataset.verify import export_ledger, verify
from pipeline.songs.plan import append_plan, load_plan
from stages.flac import encode_flac

Rows = list[dict[str, Any]]

ENTRY = SongEntry(
    "ann/a.wav", "ann", "kept", None, None, 3, 2.5, 2.0, [], 100, -5, None, "44100 Hz, 2 ch, WAV"
)


def test_an_exported_ledger_is_safe_in_a_spreadsheet(tmp_path: Path) -> None:
    names = ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "＝1", " =1", "a\x1b[31m\nb", "1e5", "歌, x"]
    entries = {
        name: replace(ENTRY, song_id=name, speaker=name, detail=None if name == "@x" else name)
        for name in names
    }
    account = Account(planned=len(names), entries=entries)
    export_ledger(account, tmp_path / "ledger.csv")
    export_ledger(account, tmp_path / "ledger.parquet")
    with (tmp_path / "ledger.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    shown = {row["speaker"] for row in rows}
    assert {"'=1+1", "'+1", "'-1", "'@x", r"\t=1", r"\r=1", "'＝1", "' =1", "歌, x"} <= shown
    assert r"a\x1b[31m\nb" in shown
    numbers = pd.read_csv(tmp_path / "ledger.csv")
    assert numbers["mtime_ns"].tolist() == [-5] * len(names)
    assert numbers["duration_s"].tolist() == [2.5] * len(names)
    assert set(pd.read_parquet(tmp_path / "ledger.parquet")["song_id"]) == set(names)


@pytest.fixture
def forge(dataset: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Return the problems of a copy of the dataset in which a shard has other rows or footer."""

    def run(
        change_rows: Callable[[Rows], Any], change_footer: Callable[[Footer], Footer] | None = None
    ) -> list[str]:
        copy = Path(shutil.copytree(dataset, tmp_path / "forged"))
        shards = [path for path in iter_shards(copy) if pq.read_metadata(path).num_rows > 1]
        path = min(shards, key=lambda path: path.stat().st_size)
        table, footer = pq.read_table(path), read_footer(path)
        rows = table.to_pylist()
        change_rows(rows)
        table = pa.Table.from_pylist(rows, table.schema)
        write_shard(copy, path.name, table, change_footer(footer) if change_footer else footer)
        assert verify(dataset).problems == []
        return verify(copy).problems

    return run


def _rename_song(rows: Rows) -> None:
    for row in rows:
        number = row["clip_index"]
        clip_id = f"zoe/other.wav#{number:06d}"
        row |= {"song_id": "zoe/other.wav", "clip_id": clip_id}
        row["audio"]["path"] = f"{clip_id}.flac"


def _shorten(rows: Rows) -> None:
    samples = np.zeros(rows[0]["num_samples"] - 1, np.int16)
    rows[0]["audio"]["bytes"] = encode_flac(samples, rows[0]["sample_rate"], "PCM_16")


def _other_rate(rows: Rows) -> None:
    samples = np.zeros(rows[0]["num_samples"], np.int16)
    rows[0]["audio"]["bytes"] = encode_flac(samples, 22050, "PCM_16")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[0].update(speaker="mallory"), "its speaker is mallory, in the ledger"),
        (_rename_song, "its song zoe/other.wav is not in the ledger"),
        (lambda rows: rows[0].update(clip_id="spk9/x.wav#000000"), "has the id spk9/x.wav#000000"),
        (lambda rows: rows[0].update(clip_index=7), "clip_index 7"),
        (lambda rows: rows[0].update(clip_count=99), "clip_count is 99, but the song has"),
        (lambda rows: rows[0].update(start=5, stop=5), "samples 5 to 5 are no span"),
        (lambda rows: rows[0]["audio"].update(path="../../x"), "its audio has the path ../../x"),
        (lambda rows: rows.pop(), "in its rows|clips in the ledger"),
        (_shorten, "samples decoded, but num_samples is"),
        (_other_rate, "its FLAC is at 22050 Hz"),
    ],
)
def test_forged_rows_are_problems(
    forge: Callable[..., list[str]], change: Callable[[Rows], Any], words: str
) -> None:
    problems = forge(change)
    assert pd.Series(problems).str.contains(words).any(), problems


def test_a_speaker_forged_in_rows_and_ledger_is_not_the_planned_one(
    forge: Callable[..., list[str]],
) -> None:
    def rename(footer: Footer) -> Footer:
        return replace(footer, ledger=[replace(e, speaker="mallory") for e in footer.ledger])

    problems = forge(lambda rows: [row.update(speaker="mallory") for row in rows], rename)
    assert any("planned songs and speakers" in problem for problem in problems)


def test_song_ids_of_a_plan_are_those_of_its_paths(dataset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "forged"))
    task = load_plan(copy)[0]
    song = replace(task.songs[0], path=b"zoe/other.wav")
    append_plan(copy, [replace(task, songs=(song, *task.songs[1:]))])
    assert any(p.startswith(f"plan: {song.song_id} is not the id") for p in verify(copy).problems)
