from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pandas as pd

from pipeline.dataset.account import Account
from pipeline.dataset.ledger import SongEntry
from pipeline.dataset.verify import export_ledger

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
