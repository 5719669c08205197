"""Every bad or odd input through the whole pipeline: each has a fate and a reason, none is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.corpus import song_id_of
from pipeline.ledger import KEPT
from pipeline.verify import verify
from tests.pipeline.conftest import Extract
from tests.zoo import make_three_hours, make_zoo

ROOT = Path(__file__).resolve().parents[2]


def test_every_item_ends_as_expected_and_the_rest_is_complete(
    tmp_path: Path, run_extract: Extract
) -> None:
    expected = make_zoo(tmp_path / "zoo")
    outcome = run_extract(tmp_path / "zoo", tmp_path / "d")
    entries = outcome.account.entries
    found = {song_id: (entry.status, entry.reason) for song_id, entry in entries.items()}
    assert found == {
        song_id_of(os.fsencode(name)): (e.status, e.reason) for name, e in expected.items()
    }
    assert outcome.account.problems == []
    assert verify(tmp_path / "d", tmp_path / "zoo").problems == []
    for entry in entries.values():
        assert entry.status == KEPT or len(entry.detail or "") > 10, entry


@pytest.mark.parametrize(
    "sung_of_ten", [1, pytest.param(10, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])]
)
def test_three_hours_stay_under_two_gigabytes(tmp_path: Path, sung_of_ten: int) -> None:
    (tmp_path / "corpus" / "ann").mkdir(parents=True)
    make_three_hours(tmp_path / "corpus" / "ann" / "long.flac", sung_of_ten)
    words = ("extract", tmp_path / "corpus", tmp_path / "d", "plan.task_minutes=240", "--local")
    command = [sys.executable, ROOT / "run_pipeline.py", *words]
    run = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(run.pid, 0)
    assert status == 0
    result = verify(tmp_path / "d")
    assert result.problems == []
    assert result.account.count(KEPT) == 1 and result.account.hours_in > 2.99
    # Of the worker and of its decode child, which is bounded likewise; kilobytes on Linux.
    assert usage.ru_maxrss / 2**20 < 2.0
