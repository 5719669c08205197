"""Every bad or odd input through the whole pipeline: each has a fate and a reason, none is lost."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from pipeline.corpus import song_id_of
from pipeline.ledger import KEPT
from pipeline.verify import verify
from tests.pipeline.conftest import Extract
from tests.zoo import make_three_hours, make_zoo


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


def test_three_hours_stay_under_two_gigabytes(tmp_path: Path, run_extract: Extract) -> None:
    (tmp_path / "corpus" / "ann").mkdir(parents=True)
    make_three_hours(tmp_path / "corpus" / "ann" / "long.flac")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = run_extract(tmp_path / "corpus", tmp_path / "d", ["plan.task_minutes=240"])
    assert outcome.account.count(KEPT) == 1 and outcome.account.hours_in > 2.99
    assert outcome.account.problems == []
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert peak_gb < 2.0, (before / 2**20, peak_gb)
