"""Units and f0 anew from the shards of a dataset: `extract --from`."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf
from rich.console import Console

from pipeline.cluster.task_rows import COMMITTED, read_result, task_row
from pipeline.dataset.schema import PITCH_SCHEMA, SCHEMA_VERSION
from pipeline.dataset.shards import (
    iter_shards,
    read_dataset_info,
    read_footer,
    write_shard,
)
from pipeline.dataset.verify import verify
from pipeline.errors import UserError
from pipeline.extract.command import ExtractOptions, ExtractOutcome, reextract
from pipeline.extract.from_dataset import FromDataset, compare, config_from, read_source
from pipeline.extract.job import ExtractJob, TakenOver
from pipeline.extract.task import ClipMaker, FinishTask, PrepareTask
from pipeline.fingerprint import fingerprint
from pipeline.songs.plan import load_plan
from stages.chain import StageClock
from stages.flac import encode_flac
from tests.helpers.songs import tune
from tests.pipeline.conftest import Extract, shard_hashes

Reextract = Callable[..., ExtractOutcome]
OTHER = ["f0.hop_length=441", "f0.f0_min=70", "encoder.name=log-mel"]


@pytest.fixture(scope="module")
def run_reextract() -> Reextract:
    def run(source: Path, new: Path, overrides: list[str], **options: object) -> ExtractOutcome:
        config = config_from(read_source(source), None, overrides)
        console = Console(file=io.StringIO())
        return reextract(source, new, config, ExtractOptions(**{"local": True, **options}), console)

    return run


@pytest.fixture
def source(dataset: Path, tmp_path: Path) -> Path:
    """A copy of the small dataset (mfcc, dio), to be written to."""
    return Path(shutil.copytree(dataset, tmp_path / "source"))


def columns(dataset: Path) -> dict[str, list[object]]:
    table = pq.read_table(dataset / "data", partitioning=None).sort_by("clip_id")
    return table.to_pydict()


@pytest.mark.slow
def test_the_columns_are_those_of_a_direct_extraction(
    corpus: Path,
    dataset: Path,
    tmp_path: Path,
    run_extract: Extract,
    run_reextract: Reextract,
) -> None:
    settings = [*OTHER, "encoders.mfcc.normalize=song"]
    run_extract(corpus, tmp_path / "direct", ["plan.task_minutes=0.05", *settings])
    outcome = run_reextract(dataset, tmp_path / "new", settings)
    assert outcome.account.problems == []
    assert columns(tmp_path / "new") == columns(tmp_path / "direct")
    assert verify(tmp_path / "new", corpus).problems == []
    assert "decode" not in outcome.work.stage_s
    direct, again = (read_footer(iter_shards(tmp_path / n)[0]) for n in ("direct", "new"))
    assert (again.ledger, again.task_id) == (direct.ledger, direct.task_id)
    assert again.fingerprint != direct.fingerprint
    assert again.origin is not None and direct.origin is None
    settings_of = read_dataset_info(tmp_path / "new")["settings"]
    assert settings_of["source.fingerprint"] == read_dataset_info(dataset)["fingerprint"]


@pytest.mark.slow
def test_what_the_settings_leave_alone_is_taken_over_unread(
    dataset: Path,
    tmp_path: Path,
    golden: Path,
    run_extract: Extract,
    run_reextract: Reextract,
    corpus: Path,
) -> None:
    checkpoint = tmp_path / "hubert.pt"
    shutil.copy(golden / "encoders" / "tiny_hubert_base.pt", checkpoint)
    small = Path(shutil.copytree(corpus / "spk0", tmp_path / "corpus" / "spk0")).parent
    network = ["encoder.name=contentvec768l12", f"encoder.checkpoint={checkpoint}"]
    run_extract(small, tmp_path / "d", network)
    checkpoint.unlink()  # it made the units that are there
    outcome = run_reextract(tmp_path / "d", tmp_path / "f0", ["f0.f0_min=115"])
    assert "f0" in outcome.work.stage_s and "units" not in outcome.work.stage_s
    before, after = columns(tmp_path / "d"), columns(tmp_path / "f0")
    changed = {name for name in before if before[name] != after[name]}
    assert {"f0", "voiced_ratio", "f0_low_hz"} <= changed <= {*PITCH_SCHEMA.names}
    assert verify(tmp_path / "f0").problems == []

    outcome = run_reextract(tmp_path / "d", tmp_path / "more", ["encoders.mfcc={}"])
    assert "units" in outcome.work.stage_s and "f0" not in outcome.work.stage_s
    after = columns(tmp_path / "more")
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"units_mfcc", "num_unit_frames_mfcc"}
    assert verify(tmp_path / "more").problems == []

    run_reextract(
        tmp_path / "more", tmp_path / "fewer", ["encoder.name=mfcc", "encoders.mfcc=null"]
    )
    assert set(columns(tmp_path / "fewer")) == set(before) - {
        "units_contentvec768l12",
        "num_unit_frames_contentvec768l12",
    } | {"units_mfcc", "num_unit_frames_mfcc"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "has every column that these settings ask for"),
        (["workers.max_workers=1", "encoder.dtype=float16"], "has every column"),
        (
            ["slice.threshold_db=-50"],
            r"slice\.threshold_db cannot be -50\.0: --from takes over the audio",
        ),
        (["quality.min_snr_db=3"], r"quality\.min_snr_db cannot be"),
        (["plan.task_minutes=3"], r"plan\.task_minutes cannot be"),
        (["encoder.name=contentvec768l9"], r"encoder\.checkpoint is empty"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    dataset: Path, tmp_path: Path, run_reextract: Reextract, settings: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        run_reextract(dataset, tmp_path / "new", settings)
    assert not (tmp_path / "new").exists()


def test_a_dataset_is_not_made_from_itself(dataset: Path, run_reextract: Reextract) -> None:
    with pytest.raises(UserError, match="cannot be made from itself"):
        run_reextract(dataset, dataset / ".." / dataset.name, OTHER)


@pytest.mark.slow
def test_missing_shards_are_made_again_bit_for_bit(
    dataset: Path, tmp_path: Path, run_reextract: Reextract
) -> None:
    run_reextract(dataset, tmp_path / "d", OTHER)
    before = shard_hashes(tmp_path / "d")
    for path in iter_shards(tmp_path / "d")[1:]:
        path.unlink()
    assert run_reextract(dataset, tmp_path / "d", OTHER).work.tasks_run == len(before) - 1
    assert shard_hashes(tmp_path / "d") == before
    assert run_reextract(dataset, tmp_path / "d", OTHER).work.tasks_run == 0


@pytest.mark.slow
def test_a_source_that_grows_adds_tasks(
    writable_corpus: Path, tmp_path: Path, run_extract: Extract, run_reextract: Reextract
) -> None:
    source, new = tmp_path / "source", tmp_path / "new"
    run_extract(writable_corpus, source)
    first = iter_shards(source)[0]
    whole = first.read_bytes()
    first.unlink()
    outcome = run_reextract(source, new, OTHER)
    assert any("1 of" in n and "are not done" in n for n in outcome.notices)
    assert len(iter_shards(new)) == len(iter_shards(source)) > 0
    assert outcome.account.problems == []
    before = shard_hashes(new)

    first.write_bytes(whole)
    sf.write(writable_corpus / "spk0" / "new.wav", tune(5, seed=99), 44100)
    run_extract(writable_corpus, source)
    outcome = run_reextract(source, new, OTHER)
    assert outcome.work.tasks_run == 2 and outcome.account.problems == []
    assert {name: shard_hashes(new)[name] for name in before} == before

    sf.write(writable_corpus / "spk1" / "song0.wav", tune(9, seed=5), 44100)
    run_extract(writable_corpus, source, redo_changed=True)
    outcome = run_reextract(source, new, OTHER)
    assert outcome.work.tasks_run == 1
    assert verify(new, writable_corpus).problems == []
    run_extract(writable_corpus, source, ["slice.threshold_db=-30"], force_new=True)
    with pytest.raises(UserError, match=r"source\.fingerprint was"):
        run_reextract(source, new, OTHER)


@pytest.mark.slow
def test_a_shard_that_was_made_again_elsewhere_is_redone(
    source: Path, tmp_path: Path, run_reextract: Reextract
) -> None:
    run_reextract(source, tmp_path / "new", OTHER)
    path = iter_shards(source)[0]
    footer, table = read_footer(path), pq.read_table(path, partitioning=None)
    elsewhere = {**footer.environment, "machine": "abacus"}
    write_shard(source, path.name, table, replace(footer, environment=elsewhere))
    outcome = run_reextract(source, tmp_path / "new", OTHER)
    assert outcome.work.tasks_run == 1
    origin = read_footer(iter_shards(tmp_path / "new")[0]).origin
    assert origin is not None and origin.environment["machine"] == "abacus"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["footer", "pages"])
def test_a_damaged_shard_of_the_source_is_named(
    source: Path, tmp_path: Path, run_reextract: Reextract, part: str
) -> None:
    path = max(iter_shards(source), key=lambda path: path.stat().st_size)
    whole = path.read_bytes()
    if part == "footer":
        path.write_bytes(whole[:1000])
    else:
        column = pq.read_metadata(path).row_group(0).column(7)  # audio.bytes
        middle = column.data_page_offset + column.total_compressed_size // 2
        path.write_bytes(whole[:middle] + b"torn" + whole[middle + 4 :])
    with pytest.raises(UserError, match=rf"{path.name} cannot be used .*`cantor verify {source}`"):
        run_reextract(source, tmp_path / "new", OTHER)
    path.write_bytes(whole)
    assert run_reextract(source, tmp_path / "new", OTHER).account.problems == []


def test_a_clip_that_is_not_as_long_as_promised_is_refused(
    source: Path, tmp_path: Path, run_reextract: Reextract
) -> None:
    path = max(iter_shards(source), key=lambda path: path.stat().st_size)
    table, footer = pq.read_table(path), read_footer(path)
    rows = table.to_pylist()
    clip = encode_flac(np.zeros(rows[1]["num_samples"] // 2, np.int16), 44100, "PCM_16")
    for change in ({"audio": {"bytes": clip, "path": None}}, {"song_id": "zoe/x.wav"}):
        forged = [rows[0], {**rows[1], **change}, *rows[2:]]
        write_shard(source, path.name, pa.Table.from_pylist(forged, table.schema), footer)
        with pytest.raises(UserError, match=rf"{path.name} cannot be used \({rows[1]['clip_id']}"):
            run_reextract(source, tmp_path / "new", ["encoders.log-mel={}"])


@pytest.mark.slow
def test_a_shard_that_is_lost_is_named(
    source: Path, tmp_path: Path, run_reextract: Reextract
) -> None:
    run_reextract(source, tmp_path / "new", OTHER)
    iter_shards(source)[0].unlink()
    assert run_reextract(source, tmp_path / "new", OTHER).work.tasks_run == 0
    iter_shards(tmp_path / "new")[0].unlink()
    with pytest.raises(UserError, match=r"has lost 1 shards .*train-00000\.parquet"):
        run_reextract(source, tmp_path / "new", OTHER)


def test_a_song_that_kills_its_worker_is_left_out(dataset: Path, tmp_path: Path) -> None:
    source = read_source(dataset)
    task = next(t for t in load_plan(dataset).values() if t.songs[0].song_id == "spk1/song0.wav")
    over = TakenOver(dataset, source.fingerprint, SCHEMA_VERSION, True, (), None)
    job = ExtractJob(dataset, dataset, source.config, "x", {}, taken_over=over)
    clips = ClipMaker(job, lambda *_: None).make(task.index, [task.songs[0].song_id], StageClock())
    table, ledger = clips.table, clips.ledger
    assert table.num_rows == sum(entry.clips for entry in ledger)
    assert (ledger[0].status, ledger[0].reason, ledger[0].clips) == ("quarantined", "crashed", 0)
    assert task.songs[0].song_id not in table["song_id"].to_pylist()
    assert ledger[0].sha256 is not None


def test_a_dry_run_writes_nothing(dataset: Path, tmp_path: Path, run_reextract: Reextract) -> None:
    run_reextract(dataset, tmp_path / "new", OTHER, dry_run=True)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_two_operators_write_the_same_bytes_as_one(
    dataset: Path, tmp_path: Path, run_reextract: Reextract
) -> None:
    """As in a cluster with GPUs, where clips travel from one operator to the other."""
    settings = ["f0.hop_length=441", "encoders.log-mel={}"]
    run_reextract(dataset, tmp_path / "new", settings)
    before = shard_hashes(tmp_path / "new")
    source = read_source(dataset)
    config = config_from(source, None, settings)
    reading = compare(source, config)
    over = FromDataset(reading).take_over()
    job = ExtractJob(
        tmp_path / "new", dataset, config, fingerprint(reading.settings), {}, taken_over=over
    )
    first, second = PrepareTask(job, lambda *_: None), FinishTask(job)
    for path in iter_shards(tmp_path / "new"):
        task = read_footer(path).task
        path.unlink()
        row = second(first(pa.Table.from_pylist([task_row(task)])))
        assert read_result(row).status == COMMITTED
    assert shard_hashes(tmp_path / "new") == before
