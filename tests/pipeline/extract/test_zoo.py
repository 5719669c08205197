"""Every bad or odd input through the whole pipeline: each has a fate and a reason, none is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.dataset.verify import verify
from pipeline.songs.balance import KEPT
from pipeline.songs.corpus import song_id_of
from tests.helpers.zoo import make_three_hours, make_zoo
from tests.pipeline.conftest import Extract

ROOT = Path(__file__).resolve().parents[3]


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


# A process counts what its parent held when it was forked; this one's parent is small.
PEAK_OF_COMMAND = """
import resource, subprocess, sys

status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


@pytest.mark.parametrize(
    "sung_of_thirty", [1, pytest.param(30, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])]
)
def test_three_hours_stay_under_two_gigabytes(tmp_path: Path, sung_of_thirty: int) -> None:
    (tmp_path / "corpus" / "ann").mkdir(parents=True)
    make_three_hours(tmp_path / "corpus" / "ann" / "long.flac", sung_of_thirty)
    words = ("extract", tmp_path / "corpus", tmp_path / "d", "plan.task_minutes=240", "--local")
    command = [sys.executable, "-c", PEAK_OF_COMMAND, sys.executable, ROOT / "run_pipeline.py"]
    run = subprocess.run([*map(str, command), *map(str, words)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = verify(tmp_path / "d")
    assert result.problems == []
    assert result.account.count(KEPT) == 1 and result.account.hours_in > 2.99
    # Of the worker and of its decode child, which is bounded likewise; kilobytes on Linux.
    assert int(run.stdout) / 2**20 < 2.0
