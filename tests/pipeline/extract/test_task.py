"""One task: what travels between its operators, and what ends where."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cluster.task_rows import BUG, COMMITTED, REFUSED, read_result, task_row
from pipeline.dataset.schema import AUDIO_SCHEMA, PITCH_SCHEMA
from pipeline.dataset.shards import Origin, iter_shards, read_dataset_info, read_footer
from pipeline.extract.config import load_config
from pipeline.extract.job import ExtractJob
from pipeline.extract.task import (
    ClipMaker,
    ExtractTask,
    FinishTask,
    PrepareTask,
    TaskClips,
    load_task_models,
    probe_song,
)
from pipeline.songs.plan import load_plan
from stages.chain import StageClock
from tests.pipeline.conftest import FAST, Extract, shard_hashes


@pytest.fixture
def made(corpus: Path, tmp_path: Path, run_extract: Extract) -> Path:
    """The corpus extracted, to be written to."""
    run_extract(corpus, tmp_path / "d")
    return tmp_path / "d"


def job_of(dataset: Path, corpus: Path, *settings: str) -> ExtractJob:
    by_key = {word.partition("=")[0]: word for word in [*FAST, *settings]}
    config = load_config(None, list(by_key.values()))
    return ExtractJob(dataset, corpus, config, read_dataset_info(dataset)["fingerprint"], {})


def row_of(task: int, *crashed: str) -> pa.Table:
    return pa.Table.from_pylist([task_row(task, crashed)])


def test_clips_survive_the_way_from_operator_to_operator(made: Path, corpus: Path) -> None:
    clip_maker = ClipMaker(job_of(made, corpus), lambda *_: None)
    clips = clip_maker.make(0, (), StageClock())
    clip_maker.close()
    assert clips.table.column_names == [*AUDIO_SCHEMA.names, *PITCH_SCHEMA.names]
    assert clips.table.num_rows == sum(entry.clips for entry in clips.ledger) > 0
    for origin in (None, Origin("abc", {"machine": "abacus"})):
        sent = TaskClips(clips.table, clips.ledger, origin)
        received = TaskClips.from_buffer(pa.py_buffer(sent.to_buffer()))
        assert received.table.equals(clips.table)
        assert (received.ledger, received.origin) == (clips.ledger, origin)


def test_one_operator_and_two_write_the_same_bytes(made: Path, corpus: Path) -> None:
    before = shard_hashes(made)
    job = job_of(made, corpus)
    whole = ExtractTask(job, lambda *_: None)
    prepare, finish = PrepareTask(job, lambda *_: None), FinishTask(job)
    for run in (whole, lambda row: finish(prepare(row))):
        for path in iter_shards(made):
            path.unlink()
        for index in load_plan(made):
            assert read_result(run(row_of(index))).status == COMMITTED
        assert shard_hashes(made) == before
    whole.close()
    prepare.close()


def test_songs_that_killed_a_worker_are_quarantined_and_the_rest_is_kept(
    made: Path, corpus: Path
) -> None:
    index = next(i for i, task in load_plan(made).items() if len(task.songs) > 1)
    songs = load_plan(made)[index].songs
    path = made / "data" / load_plan(made)[index].shard_name
    before = read_footer(path).ledger
    reported: list[tuple[str, float, str | None]] = []
    worker = ExtractTask(job_of(made, corpus), lambda *song: reported.append(song))
    assert read_result(worker(row_of(index, songs[0].song_id))).status == COMMITTED
    worker.close()
    first, *others = read_footer(path).ledger
    assert (first.status, first.reason, first.clips) == ("quarantined", "crashed", 0)
    assert first.sha256 == before[0].sha256
    assert others == before[1:]
    assert set(pq.read_table(path, partitioning=None)["song_id"].to_pylist()) == {
        entry.song_id for entry in others if entry.clips
    }
    assert [song for song, _, _ in reported] == [song.song_id for song in songs]
    assert reported[0][2] == "quarantined"


def test_a_failed_operator_passes_its_result_on(
    made: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug names the song; the operator on GPUs does not touch the task."""
    job = job_of(made, corpus)
    prepare = PrepareTask(job, lambda *_: None)
    monkeypatch.setattr("stages.chain.measure_quality", lambda wav, rate: 1 / 0)
    result = read_result(FinishTask(job)(prepare(row_of(0))))
    prepare.close()
    assert result.status == BUG
    assert f"while working on {load_plan(made)[0].songs[0].song_id}" in result.detail


def test_models_that_do_not_load_are_refused_before_a_song_is_read(
    made: Path, corpus: Path
) -> None:
    reported: list[tuple[str, float, str | None]] = []
    settings = ["encoder.name=contentvec768l12", "encoder.checkpoint=/nowhere/net.pt"]
    worker = ExtractTask(job_of(made, corpus, *settings), lambda *song: reported.append(song))
    result = read_result(worker(row_of(0)))
    worker.close()
    assert result.status == REFUSED and "/nowhere/net.pt" in result.detail
    assert reported == []


def test_probing_runs_a_song_and_writes_nothing(made: Path, corpus: Path) -> None:
    job = job_of(made, corpus)
    for path in iter_shards(made):
        path.unlink()
    load_task_models(job)
    for index, task in load_plan(made).items():
        probe_song(job, index, task.songs[0].song_id)
    assert iter_shards(made) == []
