"""Pitch in the shards: what is stored, what it leaves out, and that the ledger balances."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf

from pipeline.cluster.task_rows import COMMITTED, read_result, task_row
from pipeline.dataset.shards import iter_shards, read_footer
from pipeline.dataset.verify import verify
from pipeline.errors import SongBug, UserError
from pipeline.extract.config import load_config
from pipeline.extract.job import ExtractJob
from pipeline.extract.task import FinishTask, PrepareTask
from pipeline.songs.plan import load_plan
from stages.f0 import METHODS, estimate_f0
from stages.f0.rmvpe import rmvpe
from stages.flac import decode_flac
from stages.frames import Track
from stages.pcm import dequantise
from stages.quality import measure_pitch
from stages.types import Array
from tests.helpers.checkpoints import TINY_RMVPE, write_rmvpe
from tests.helpers.songs import tune
from tests.pipeline.conftest import FAST, Extract, shard_hashes


def rows_of(dataset: Path) -> list[dict[str, object]]:
    return pa.concat_tables([pq.read_table(path) for path in iter_shards(dataset)]).to_pylist()


def test_pitch_is_measured_on_the_samples_that_are_stored(dataset: Path) -> None:
    cfg = load_config(None, FAST).f0
    rows = rows_of(dataset)
    assert rows
    for row in rows:
        wav = dequantise(decode_flac(row["audio"]["bytes"], "PCM_16"), "PCM_16")
        f0 = estimate_f0(wav, row["sample_rate"], cfg)
        assert np.array_equal(f0, np.asarray(row["f0"], np.float32))
        measured = measure_pitch(wav, row["sample_rate"], f0, cfg.hop_length)
        assert row["f0_low_hz"] == pytest.approx(measured["f0_low_hz"], rel=1e-6)
        assert row["voiced_ratio"] == pytest.approx(measured["voiced_ratio"], rel=1e-6)


@pytest.mark.slow
def test_clips_beyond_a_limit_go_and_the_ledger_balances(
    corpus: Path, tmp_path: Path, run_extract: Extract
) -> None:
    whole, limited = tmp_path / "whole", tmp_path / "limited"
    run_extract(corpus, whole)
    limit = float(np.median([row["f0_low_hz"] for row in rows_of(whole)]))
    outcome = run_extract(corpus, limited, [f"quality.min_pitch_hz={limit}"])
    assert outcome.account.problems == [] and verify(limited).problems == []
    kept = {(row["song_id"], row["start"]) for row in rows_of(limited)}
    wanted = {(row["song_id"], row["start"]) for row in rows_of(whole) if row["f0_low_hz"] >= limit}
    assert kept == wanted and kept
    entries = outcome.account.entries.values()
    empty = [entry for entry in entries if entry.reason == "pitch_range"]
    assert empty and all(e.status == "filtered" and "pitch_range" in e.detail for e in empty)
    assert outcome.account.dropped_s()["pitch_range"] > 0


def test_what_is_left_of_a_song_is_numbered_anew(
    writable_corpus: Path, tmp_path: Path, run_extract: Extract
) -> None:
    shutil.rmtree(writable_corpus)
    (writable_corpus / "ann").mkdir(parents=True)
    low, high = tune(2.5, pitch_hz=110), tune(2.5, pitch_hz=330)
    sf.write(writable_corpus / "ann" / "a.wav", np.concatenate([low, high, low, high]), 44100)
    outcome = run_extract(writable_corpus, tmp_path / "d", ["quality.min_pitch_hz=200"])
    assert outcome.account.problems == [] and verify(tmp_path / "d").problems == []
    rows = rows_of(tmp_path / "d")
    assert len(rows) > 1 and all(row["f0_low_hz"] > 300 for row in rows)
    assert [row["clip_index"] for row in rows] == list(range(len(rows)))
    assert {row["clip_count"] for row in rows} == {len(rows)}
    assert [row["clip_id"] for row in rows] == [f"ann/a.wav#{i:06d}" for i in range(len(rows))]
    assert [row["audio"]["path"] for row in rows] == [f"{row['clip_id']}.flac" for row in rows]
    (entry,) = outcome.account.entries.values()
    assert entry.status == "kept" and entry.clips == len(rows)


@pytest.mark.slow
def test_filled_contours_still_tell_how_much_was_voiced(
    corpus: Path, tmp_path: Path, run_extract: Extract
) -> None:
    run_extract(corpus, tmp_path / "d", ["f0.interpolate=true"])
    rows = rows_of(tmp_path / "d")
    assert all(min(row["f0"]) > 0 for row in rows)
    assert any(row["voiced_ratio"] < 1 for row in rows)


@pytest.mark.slow
def test_networks_run_where_units_are_made(
    corpus: Path, tmp_path: Path, run_extract: Extract
) -> None:
    outcome = run_extract(corpus, tmp_path / "d", ["f0.method=fcpe", "quality.min_pitch_hz=150"])
    assert outcome.account.problems == [] and verify(tmp_path / "d").problems == []
    for path in iter_shards(tmp_path / "d"):
        footer = read_footer(path)
        assert footer.f0_method == "fcpe" and "torchfcpe" in footer.environment
    assert outcome.account.reasons("filtered")["pitch_range"] > 0


@pytest.mark.slow
def test_a_song_on_which_a_network_fails_is_named(
    corpus: Path, tmp_path: Path, run_extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_extract(corpus, tmp_path / "whole", ["plan.task_minutes=10"])
    row = rows_of(tmp_path / "whole")[-1]
    bad = dequantise(decode_flac(row["audio"]["bytes"], "PCM_16"), "PCM_16")

    def fails(wavs: Sequence[Array], *rest: object) -> Iterator[Track]:
        if any(np.array_equal(wav, bad) for wav in wavs):
            raise RuntimeError("a network of ours is wrong")
        return ((np.zeros(0), np.zeros(0)) for _ in wavs)

    monkeypatch.setattr("stages.f0.fcpe.fcpe", fails)
    with pytest.raises(SongBug, match=f"while working on {row['song_id']}"):
        run_extract(corpus, tmp_path / "d", ["plan.task_minutes=10", "f0.method=fcpe"])


@pytest.mark.slow
def test_weights_that_change_while_a_task_runs_do_not_reach_its_shard(
    singing: Path,
    tmp_path: Path,
    tiny_rmvpe: Path,
    run_extract: Extract,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = tmp_path / "rmvpe.pt"
    settings = ["f0.method=rmvpe", f"f0.checkpoint={weights}"]
    other = write_rmvpe(tmp_path / "other.pt", replace(TINY_RMVPE, hidden=4)).read_bytes()

    for change in (lambda: weights.write_bytes(other), weights.unlink):
        weights.write_bytes(tiny_rmvpe.read_bytes())

        def changed(wavs: Sequence[Array], *rest: Any, change: Any = change) -> Iterable[Track]:
            change()
            return rmvpe(wavs, *rest)

        monkeypatch.setattr("stages.f0.rmvpe.rmvpe", changed)
        with pytest.raises(UserError, match=r"f0\.checkpoint: .*(changed|not there now)"):
            run_extract(singing, tmp_path / "d", settings)
        assert list(iter_shards(tmp_path / "d")) == []


@pytest.fixture(scope="module")
def singing(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of one song: five seconds of real singing."""
    folder = tmp_path_factory.mktemp("singing")
    with np.load(golden / "preprocessing" / "inputs.npz") as inputs:
        wav = inputs["vocadito_3to8s"]
    (folder / "ann").mkdir()
    sf.write(folder / "ann" / "song.wav", wav, 44100)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "ensemble"])
def test_every_method_on_real_singing(
    method: str, singing: Path, tmp_path: Path, tiny_rmvpe: Path, run_extract: Extract
) -> None:
    settings = [f"f0.method={method}"]
    if method == "rmvpe":
        settings.append(f"f0.checkpoint={tiny_rmvpe}")
    if method == "crepe":
        settings.append("f0.crepe_hop_ms=50")
    outcome = run_extract(singing, tmp_path / "d", settings)
    assert outcome.account.problems == [] and verify(tmp_path / "d").problems == []
    rows = rows_of(tmp_path / "d")
    assert rows and {read_footer(path).f0_method for path in iter_shards(tmp_path / "d")} == {
        method
    }
    for row in rows:
        assert len(row["f0"]) == row["num_samples"] // 512
    if method != "rmvpe":  # its weights are made up
        f0 = np.concatenate([row["f0"] for row in rows])
        assert np.mean(f0 > 0) > 0.5 and 120 < np.median(f0[f0 > 0]) < 180


def test_a_gpu_operator_finds_the_pitch_as_one_operator_does(
    singing: Path, tmp_path: Path, run_extract: Extract
) -> None:
    settings = ["f0.method=ensemble", "f0.ensemble=[praat,fcpe]", "quality.min_voiced_ratio=0.2"]
    run_extract(singing, tmp_path / "d", settings)
    before = shard_hashes(tmp_path / "d")
    config = load_config(None, [*FAST[:1], *FAST[2:], *settings])
    fingerprint = read_footer(iter_shards(tmp_path / "d")[0]).fingerprint
    job = ExtractJob(tmp_path / "d", singing, config, fingerprint, {})
    first, second = PrepareTask(job, lambda *_: None), FinishTask(job)
    for path in iter_shards(tmp_path / "d"):
        path.unlink()
    for index in load_plan(tmp_path / "d"):
        row = pa.Table.from_pylist([task_row(index)])
        assert read_result(second(first(row))).status == COMMITTED
    first.close()
    assert shard_hashes(tmp_path / "d") == before
