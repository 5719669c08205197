"""The run from end to end, in this process: resume, refusals, changes, balance."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import soundfile as sf

from pipeline.cluster.environment import environment
from pipeline.dataset.shards import iter_shards, read_footer
from pipeline.dataset.verify import export_ledger, verify
from pipeline.errors import SongBug, StorageFault, UserError
from pipeline.songs.plan import load_plan
from tests.helpers.songs import tune
from tests.pipeline.conftest import Extract, shard_hashes


def test_two_songs_one_shard(tmp_path: Path, run_extract: Extract) -> None:
    for name in ("a", "b"):
        (tmp_path / "corpus" / "ann").mkdir(parents=True, exist_ok=True)
        sf.write(tmp_path / "corpus" / "ann" / f"{name}.wav", tune(4), 44100)
    outcome = run_extract(tmp_path / "corpus", tmp_path / "d", ["plan.task_minutes=1"])
    assert (outcome.account.count("kept"), outcome.account.shards) == (2, 1)
    assert outcome.account.problems == []
    rows = pq.read_table(tmp_path / "d" / "data").to_pylist()
    assert [row["clip_id"] for row in rows[:1]] == ["ann/a.wav#000000"]
    voiced = [hz for row in rows for hz in row["f0"] if hz > 0]
    assert abs(sorted(voiced)[len(voiced) // 2] - 220) < 3


@pytest.mark.slow
def test_the_account_balances(dataset: Path) -> None:
    result = verify(dataset)
    assert result.problems == []
    account = result.account
    assert account.planned == 7
    assert (account.count("kept"), account.count("filtered")) == (6, 1)
    assert result.clips == account.clips > 6


def test_verify_compares_the_source(dataset: Path, writable_corpus: Path) -> None:
    assert verify(dataset, writable_corpus).problems == []
    sf.write(writable_corpus / "spk0" / "song0.wav", tune(3), 44100)
    (writable_corpus / "spk1" / "song0.wav").unlink()
    found = verify(dataset, writable_corpus).problems
    assert sorted(found) == [
        "spk0/song0.wav: the file's content changed since",
        "spk1/song0.wav: the file does not exist",
    ]


@pytest.mark.slow
def test_same_corpus_same_bytes(corpus: Path, tmp_path: Path, run_extract: Extract) -> None:
    run_extract(corpus, tmp_path / "one")
    run_extract(corpus, tmp_path / "two")
    assert shard_hashes(tmp_path / "one") == shard_hashes(tmp_path / "two")


@pytest.mark.slow
def test_missing_shards_are_made_again_bit_for_bit(
    corpus: Path, tmp_path: Path, run_extract: Extract
) -> None:
    run_extract(corpus, tmp_path / "d")
    before = shard_hashes(tmp_path / "d")
    first, *_, last = iter_shards(tmp_path / "d")
    first.unlink()
    last.write_bytes(last.read_bytes()[:1000])  # torn by something outside
    (tmp_path / "d" / ".tmp" / "half.parquet.123").write_bytes(b"left by a killed worker")
    outcome = run_extract(corpus, tmp_path / "d")
    assert outcome.work.tasks_run == 2
    assert shard_hashes(tmp_path / "d") == before
    assert list((tmp_path / "d" / ".tmp").iterdir()) == []
    assert any("not a complete Parquet file" in notice for notice in outcome.notices)


@pytest.mark.slow
def test_a_finished_run_does_nothing(corpus: Path, tmp_path: Path, run_extract: Extract) -> None:
    run_extract(corpus, tmp_path / "d")
    before = {path: path.stat().st_mtime_ns for path in iter_shards(tmp_path / "d")}
    assert run_extract(corpus, tmp_path / "d").work.tasks_run == 0
    assert {path: path.stat().st_mtime_ns for path in iter_shards(tmp_path / "d")} == before


@pytest.mark.slow
def test_what_describes_a_dataset_is_completed_by_a_later_run(
    corpus: Path, tmp_path: Path, run_extract: Extract
) -> None:
    dataset = tmp_path / "d"
    run_extract(corpus, dataset)
    info, card = dataset / "dataset.json", dataset / "README.md"
    whole = info.read_bytes(), card.read_bytes()
    begun = json.loads(whole[0]) | {"speakers": [], "card_sha256": None}
    info.write_text(json.dumps(begun))  # as a kill behind the last commit leaves it
    card.unlink()
    run_extract(corpus, dataset)
    assert (info.read_bytes(), card.read_bytes()) == whole
    info.write_text(json.dumps(begun))  # and one behind the card
    before = card.stat().st_mtime_ns
    run_extract(corpus, dataset)
    assert info.read_bytes() == whole[0] and card.stat().st_mtime_ns == before
    card.write_text("mine")
    run_extract(corpus, dataset)
    assert card.read_text() == "mine"


@pytest.mark.slow
def test_other_settings_are_refused_by_key(
    corpus: Path, tmp_path: Path, run_extract: Extract
) -> None:
    run_extract(corpus, tmp_path / "d")
    words = r"slice\.threshold_db was -40\.0 and is -50\.0.*--force-new"
    with pytest.raises(UserError, match=words):
        run_extract(corpus, tmp_path / "d", ["slice.threshold_db=-50"])
    before = shard_hashes(tmp_path / "d")
    (tmp_path / "d" / "mine.txt").write_text("not yours")
    run_extract(corpus, tmp_path / "d", ["slice.threshold_db=-50"], force_new=True)
    assert shard_hashes(tmp_path / "d") != before
    assert (tmp_path / "d" / "mine.txt").exists()


@pytest.mark.slow
def test_machine_settings_may_change(corpus: Path, tmp_path: Path, run_extract: Extract) -> None:
    run_extract(corpus, tmp_path / "d")
    outcome = run_extract(corpus, tmp_path / "d", ["workers.max_workers=1", "encoder.device=cpu"])
    assert outcome.work.tasks_run == 0


def test_a_folder_that_is_not_ours_is_left_alone(
    corpus: Path, tmp_path: Path, run_extract: Extract
) -> None:
    (tmp_path / "d" / "data").mkdir(parents=True)
    (tmp_path / "d" / "data" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="name another folder"):
        run_extract(corpus, tmp_path / "d", force_new=True)
    assert (tmp_path / "d" / "data" / "thesis.txt").exists()


@pytest.mark.slow
def test_new_songs_append_and_touch_nothing_old(
    writable_corpus: Path, tmp_path: Path, run_extract: Extract
) -> None:
    run_extract(writable_corpus, tmp_path / "d")
    before = shard_hashes(tmp_path / "d")
    sf.write(writable_corpus / "spk0" / "new.wav", tune(5, seed=99), 44100)
    outcome = run_extract(writable_corpus, tmp_path / "d")
    after = shard_hashes(tmp_path / "d")
    assert outcome.work.tasks_run == 1 and outcome.account.problems == []
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 1


@pytest.mark.slow
def test_a_changed_song_is_reported_and_redone_on_request(
    writable_corpus: Path, tmp_path: Path, run_extract: Extract
) -> None:
    run_extract(writable_corpus, tmp_path / "d")
    before = shard_hashes(tmp_path / "d")
    sf.write(writable_corpus / "spk1" / "song0.wav", tune(9, seed=5), 44100)
    outcome = run_extract(writable_corpus, tmp_path / "d")
    assert outcome.work.tasks_run == 0
    assert any("spk1/song0.wav" in n and "--redo-changed" in n for n in outcome.notices)
    outcome = run_extract(writable_corpus, tmp_path / "d", redo_changed=True)
    after = shard_hashes(tmp_path / "d")
    assert outcome.work.tasks_run == 1 and outcome.account.problems == []
    assert sum(before[name] != after[name] for name in before) == 1
    assert verify(tmp_path / "d", writable_corpus).problems == []


@pytest.mark.slow
def test_a_song_that_changed_before_its_task_ran_is_planned_anew(
    writable_corpus: Path, tmp_path: Path, run_extract: Extract
) -> None:
    run_extract(writable_corpus, tmp_path / "d")
    task = next(
        t
        for t in load_plan(tmp_path / "d").values()
        if any(s.song_id == "spk1/song0.wav" for s in t.songs)
    )
    (tmp_path / "d" / "data" / task.shard_name).unlink()
    sf.write(writable_corpus / "spk1" / "song0.wav", tune(9, seed=5), 44100)
    outcome = run_extract(writable_corpus, tmp_path / "d")
    assert outcome.account.problems == []
    assert outcome.account.entries["spk1/song0.wav"].status == "kept"


@pytest.mark.slow
def test_quarantined_songs_are_listed_exported_and_retried(
    writable_corpus: Path, tmp_path: Path, run_extract: Extract
) -> None:
    whole = (writable_corpus / "spk2" / "song0.wav").read_bytes()
    (writable_corpus / "spk2" / "song0.wav").write_bytes(b"")
    outcome = run_extract(writable_corpus, tmp_path / "d")
    assert outcome.account.entries["spk2/song0.wav"].reason == "empty_file"
    before = shard_hashes(tmp_path / "d")
    result = verify(tmp_path / "d")
    assert result.problems == []
    export_ledger(result.account, tmp_path / "ledger.csv")
    export_ledger(result.account, tmp_path / "ledger.parquet")
    assert "spk2/song0.wav" in (tmp_path / "ledger.csv").read_text()
    assert pq.read_table(tmp_path / "ledger.parquet").num_rows == 7

    (writable_corpus / "spk2" / "song0.wav").write_bytes(whole)
    outcome = run_extract(writable_corpus, tmp_path / "d", retry_quarantined=True)
    assert outcome.account.entries["spk2/song0.wav"].status == "kept"
    assert outcome.account.problems == [] and outcome.account.planned == 7
    after = shard_hashes(tmp_path / "d")
    assert {name: after[name] for name in before} == before


@pytest.mark.slow
def test_a_song_that_vanishes_after_planning_is_quarantined(
    writable_corpus: Path, tmp_path: Path, run_extract: Extract
) -> None:
    run_extract(writable_corpus, tmp_path / "d")
    for path in iter_shards(tmp_path / "d"):
        path.unlink()
    (writable_corpus / "spk0" / "song1.flac").unlink()
    outcome = run_extract(writable_corpus, tmp_path / "d")
    assert outcome.account.entries["spk0/song1.flac"].reason == "missing"
    assert outcome.account.problems == []


@pytest.mark.slow
def test_a_second_run_is_refused_while_the_first_holds_the_dataset(
    corpus: Path, tmp_path: Path, run_extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.lock._LOCK_WAIT_S", 0.3)
    (tmp_path / "d").mkdir()
    with (tmp_path / "d" / ".lock").open("w") as holder:
        holder.write("process 42 on elsewhere")
        holder.flush()
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by process 42 on elsewhere"):
            run_extract(corpus, tmp_path / "d")
    assert run_extract(corpus, tmp_path / "d").work.tasks_run > 0


def test_a_dry_run_writes_nothing(corpus: Path, tmp_path: Path, run_extract: Extract) -> None:
    run_extract(corpus, tmp_path / "d", dry_run=True)
    assert not (tmp_path / "d").exists()


@pytest.mark.slow
def test_splits_come_from_the_manifest(corpus: Path, tmp_path: Path, run_extract: Extract) -> None:
    manifest = corpus.parent / f"{tmp_path.name}.csv"
    lines = ["path,speaker,split"]
    for n, path in enumerate(sorted(corpus.rglob("song*"))):
        lines.append(f"{path.relative_to(manifest.parent)},s{n},{'test' if n == 0 else ''}")
    manifest.write_text("\n".join(lines))
    outcome = run_extract(manifest, tmp_path / "d")
    assert outcome.account.problems == []
    splits = {path.name.rpartition("-")[0] for path in iter_shards(tmp_path / "d")}
    assert splits == {"train", "test"}


@pytest.mark.slow
def test_one_content_under_two_names_is_reported(
    writable_corpus: Path, tmp_path: Path, run_extract: Extract
) -> None:
    shutil.copy(writable_corpus / "spk0" / "song0.wav", writable_corpus / "spk1" / "copy.wav")
    outcome = run_extract(writable_corpus, tmp_path / "d")
    assert outcome.account.duplicates() == [["spk0/song0.wav", "spk1/copy.wav"]]


@pytest.mark.slow
def test_a_resume_on_another_machine_is_remarked_on(
    corpus: Path, tmp_path: Path, run_extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_extract(corpus, tmp_path / "d")
    iter_shards(tmp_path / "d")[0].unlink()
    monkeypatch.setattr("platform.machine", lambda: "abacus")
    environment.cache_clear()
    outcome = run_extract(corpus, tmp_path / "d")
    environment.cache_clear()
    assert any("machine abacus and" in notice for notice in outcome.notices)


@pytest.mark.slow
def test_a_bug_stops_the_run_and_names_the_song(
    corpus: Path, tmp_path: Path, run_extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr("stages.chain.measure_quality", broken)
        with pytest.raises(SongBug, match=r"(?s)ZeroDivisionError.*while working on spk"):
            run_extract(corpus, tmp_path / "d")
    assert iter_shards(tmp_path / "d") == []
    assert run_extract(corpus, tmp_path / "d").account.problems == []


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_tears_nothing_and_resumes(
    corpus: Path, tmp_path: Path, run_extract: Extract, small_disk: Path
) -> None:
    dataset = small_disk / "d"
    (small_disk / "ballast").write_bytes(b"0" * (small_disk_free(small_disk) - 700_000))
    with pytest.raises(StorageFault, match="no space left"):
        run_extract(corpus, dataset)
    committed = shard_hashes(dataset)
    assert all(read_footer(path) for path in iter_shards(dataset))
    (small_disk / "ballast").unlink()
    outcome = run_extract(corpus, dataset)
    assert outcome.account.problems == [] and verify(dataset).problems == []
    after = shard_hashes(dataset)
    assert {name: after[name] for name in committed} == committed
    run_extract(corpus, tmp_path / "whole")
    assert after == shard_hashes(tmp_path / "whole")


def small_disk_free(path: Path) -> int:
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize
