"""Data of earlier versions: shards of every schema version, a dataset, a run, a voice and a
folder of converted songs. README.md of tests/data/shards and tests/data/earlier say how they were
made.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline.convert.command import read_request
from pipeline.convert.folder import BatchOptions, BatchOutcome, convert_folder
from pipeline.dataset.data_config import DataConfig
from pipeline.dataset.decoded_clips import DecodedClips
from pipeline.dataset.schema import (
    AUDIO_COLUMNS,
    OLDEST_SUPPORTED,
    QUALITY_COLUMNS,
    SCHEMA_VERSION,
    pitch_revisions,
    quality_columns,
)
from pipeline.dataset.shard_dataset import ShardDataset
from pipeline.dataset.shards import iter_shards, read_dataset_info, read_footer
from pipeline.dataset.unit_frames import find_units
from pipeline.dataset.verify import verify
from pipeline.errors import UserError
from pipeline.extract.command import ExtractOptions, ExtractOutcome, extract, reextract
from pipeline.extract.config import load_config
from pipeline.extract.from_dataset import config_from, read_source
from pipeline.fingerprint import differences, neutral_values
from pipeline.reports.dataset_page import write_report
from pipeline.settings import load_settings
from pipeline.tools.speaker_purity import PuritySettings, measure_purity
from pipeline.train.config import TrainConfig
from pipeline.train.trainer import TrainOutcome, fit
from stages.quality import measure_quality
from tests.pipeline.conftest import shard_hashes

DATA = Path(__file__).resolve().parents[1] / "data"
VERSIONS = sorted(int(folder.name[1:]) for folder in (DATA / "shards").glob("v*"))
RESUMABLE = [version for version in VERSIONS if version >= OLDEST_SUPPORTED]
MTIME_NS = 1_700_000_000_000_000_000  # of the songs, as plans and ledgers have it

# The settings that made every dataset of tests/data/shards.
SETTINGS = [
    "audio.sample_rate=8000",
    "f0.method=dio",
    "f0.hop_length=64",
    "loudness.mode=peak",
    "plan.task_minutes=0.05",
    "quality.min_snr_db=5",
]


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    """Four songs; git does not keep the time of a file, by which a change is noticed."""
    folder = Path(shutil.copytree(DATA / "earlier" / "songs", tmp_path / "songs"))
    for path in folder.rglob("*.flac"):
        os.utime(path, ns=(MTIME_NS, MTIME_NS))
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Callable[[int], Path]:
    """Copies of the datasets of tests/data/shards, by version."""

    def copy(version: int) -> Path:
        name = f"v{version}"
        return Path(shutil.copytree(DATA / "shards" / name, tmp_path / name))

    return copy


def run_extract(songs: Path, dataset: Path, *overrides: str) -> ExtractOutcome:
    by_key = {word.partition("=")[0]: word for word in (*SETTINGS, *overrides)}
    config = load_config(None, list(by_key.values()))
    return extract(songs, dataset, config, ExtractOptions(local=True), quiet())


def run_from(source: Path, new: Path, *overrides: str) -> ExtractOutcome:
    config = config_from(read_source(source), None, overrides)
    return reextract(source, new, config, ExtractOptions(local=True), quiet())


def set_version(dataset: Path, version: int) -> None:
    """Write another schema version into dataset.json."""
    info = read_dataset_info(dataset)
    settings = info["settings"] | {"schema_version": version}
    info |= {"schema_version": version, "settings": settings}
    (dataset / "dataset.json").write_text(json.dumps(info))


def test_every_version_is_here() -> None:
    assert VERSIONS == list(range(1, SCHEMA_VERSION + 1))
    for version in VERSIONS:
        for path in iter_shards(DATA / "shards" / f"v{version}"):
            assert read_footer(path).schema_version == version
            stored = set(pq.read_schema(path).names)
            assert {name for name in QUALITY_COLUMNS if name in stored} == {
                *quality_columns(version)
            }


@pytest.mark.parametrize("version", VERSIONS)
def test_a_new_dataset_is_made_from_every_version(
    version: int, shards: Callable[[int], Path], songs: Path, tmp_path: Path
) -> None:
    source, new = shards(version), tmp_path / "new"
    outcome = run_from(source, new, "encoders.log-mel={}")
    assert outcome.account.problems == []
    assert read_dataset_info(new)["schema_version"] == SCHEMA_VERSION
    assert verify(new, songs).problems == []
    before = pq.read_table(source / "data", partitioning=None)
    after = pq.read_table(new / "data", partitioning=None)
    assert len(after) == len(before) > 0
    measures_of_pitch_stay = pitch_revisions(version) == pitch_revisions(SCHEMA_VERSION)
    for name in before.column_names:
        if name in AUDIO_COLUMNS or name == "audio" or measures_of_pitch_stay:
            assert after[name] == before[name], name
    missing = set(quality_columns(SCHEMA_VERSION)) - set(before.column_names)
    for row, wav in zip(after.to_pylist(), DecodedClips(after["audio"], "PCM_16"), strict=True):
        for name in missing & {*AUDIO_COLUMNS}:
            assert row[name] == pytest.approx(measure_quality(wav, 8000)[name], rel=1e-6), name
        if "f0_low_hz" in missing:
            voiced = [hz for hz in row["f0"] if hz > 0]
            assert row["f0_low_hz"] == pytest.approx(np.percentile(voiced, 5), rel=1e-6)


@pytest.mark.parametrize("version", VERSIONS)
def test_only_what_is_missing_is_made_again(
    version: int, shards: Callable[[int], Path], tmp_path: Path
) -> None:
    source = shards(version)
    if version == SCHEMA_VERSION:
        with pytest.raises(UserError, match="has every column that these settings ask for"):
            run_from(source, tmp_path / "new")
        return
    outcome = run_from(source, tmp_path / "new")
    assert outcome.account.problems == []
    assert "units" not in outcome.work.stage_s and "decode" not in outcome.work.stage_s
    lacks_pitch = pitch_revisions(version) != pitch_revisions(SCHEMA_VERSION)
    assert ("f0" in outcome.work.stage_s) == lacks_pitch


@pytest.mark.parametrize("version", VERSIONS)
def test_the_report_opens_every_version(version: int, shards: Callable[[int], Path]) -> None:
    page = write_report(shards(version)).read_text(encoding="utf-8")
    assert f"schema {version}<" in page
    root = ElementTree.fromstring(page)
    table = root.find(".//table[@class='measures']")
    assert table is not None
    names = {code.text for code in table.findall("tbody/tr/th/code")}
    assert names == {*quality_columns(version)}


READERS: list[Callable[[Path, Path], object]] = [
    lambda dataset, songs: verify(dataset),
    lambda dataset, songs: run_extract(songs, dataset),
    lambda dataset, songs: ShardDataset(dataset),
    lambda dataset, songs: find_units(dataset),
    lambda dataset, songs: measure_purity(dataset, PuritySettings(), quiet()),
]


@pytest.mark.parametrize("version", [v for v in VERSIONS if v < OLDEST_SUPPORTED])
def test_other_commands_refuse_versions_that_are_too_old(
    version: int, shards: Callable[[int], Path], songs: Path
) -> None:
    dataset = shards(version)
    words = rf"v{version} has shards of schema version {version}, .*`cantor extract --from .* NEW`"
    before = shard_hashes(dataset)
    for reader in READERS:
        with pytest.raises(UserError, match=words):
            reader(dataset, songs)
    assert shard_hashes(dataset) == before


def test_every_command_refuses_a_newer_version(
    shards: Callable[[int], Path], songs: Path, tmp_path: Path
) -> None:
    dataset = shards(SCHEMA_VERSION)
    newer = SCHEMA_VERSION + 1
    set_version(dataset, newer)
    others: list[Callable[[Path, Path], object]] = [
        lambda dataset, songs: run_from(dataset, tmp_path / "new", "encoders.log-mel={}"),
        lambda dataset, songs: write_report(dataset),
    ]
    for reader in [*READERS, *others]:
        with pytest.raises(UserError, match=rf"schema version {newer}, .*install a newer Cantor"):
            reader(dataset, songs)


@pytest.mark.parametrize("version", RESUMABLE)
def test_a_dataset_resumes_in_its_own_version(
    version: int, shards: Callable[[int], Path], songs: Path
) -> None:
    dataset = shards(version)
    info, before = read_dataset_info(dataset), shard_hashes(dataset)
    missing = len(list(songs.rglob("*.flac"))) - len(before)
    assert missing > 0
    outcome = run_extract(songs, dataset)
    assert outcome.work.tasks_run == missing and outcome.account.problems == []
    assert {name: shard_hashes(dataset)[name] for name in before} == before
    old, new = (iter_shards(dataset)[place] for place in (0, -1))
    assert pq.read_schema(new).equals(pq.read_schema(old))
    assert read_footer(new).schema_version == version
    assert read_footer(new).fingerprint == info["fingerprint"]
    after = read_dataset_info(dataset)
    for key in ("schema_version", "settings", "fingerprint"):
        assert after[key] == info[key], key
    assert verify(dataset, songs).problems == []
    assert run_extract(songs, dataset).work.tasks_run == 0


def test_settings_that_differ_are_named_and_only_those(
    shards: Callable[[int], Path], songs: Path
) -> None:
    dataset = shards(OLDEST_SUPPORTED)
    before = shard_hashes(dataset)
    for override, words in (
        ("quality.min_crest_db=6", r"quality\.min_crest_db was null and is 6\.0"),
        ("quality.min_snr_db=null", r"quality\.min_snr_db was 5\.0 and is null"),
        ("f0.interpolate=true", r"f0\.interpolate was false and is true"),
        ("f0.gate=rms", r"f0\.gate was none and is rms"),
        ("encoders.log-mel={}", r"encoders\.log-mel was null and is true"),
    ):
        with pytest.raises(UserError, match=rf"made with other settings \({words}\); choose"):
            run_extract(songs, dataset, override)
    assert shard_hashes(dataset) == before


@pytest.mark.parametrize("version", RESUMABLE)
def test_readers_open_every_version_that_is_supported(
    version: int, shards: Callable[[int], Path]
) -> None:
    dataset = shards(version)
    clips = ShardDataset(dataset, data=DataConfig(validation=0))
    assert len(clips) == len(iter_shards(dataset))
    assert find_units(dataset).total > 0
    assert all(
        "are not done" in problem or "no ledger" in problem for problem in verify(dataset).problems
    )


def train(run: Path, *overrides: str) -> TrainOutcome:
    config = load_settings(TrainConfig, run / "config.yaml", overrides)
    return fit(DATA / "shards" / "v2", run, config)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of four steps."""
    return Path(shutil.copytree(DATA / "earlier" / "run", tmp_path / "run"))


def test_a_run_goes_on(run: Path) -> None:
    recorded = json.loads((run / "run.json").read_text())["settings"]
    outcome = train(run, "run.steps=6")
    assert (outcome.begun_at, outcome.steps) == (4, 6)
    assert np.isfinite(outcome.losses["mel"])
    now = json.loads((run / "run.json").read_text())["settings"]
    assert differences(recorded, now, neutral_values(TrainConfig)) == []
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 6
    with pytest.raises(UserError, match=r"\(data\.key_shift was 0\.0 and is 1\.0\)"):
        train(run, "run.steps=8", "data.key_shift=1")


def convert(voice: Path, source: Path, out: Path, *overrides: str) -> BatchOutcome:
    words = ["voice.speaker=ben", "output.format=flac", *overrides]
    request = read_request(voice, words)
    return convert_folder(request, source, out, BatchOptions(local=True), quiet())


def test_a_voice_converts_and_a_folder_of_converted_songs_is_completed(
    songs: Path, run: Path, tmp_path: Path
) -> None:
    voice = run / "checkpoints" / "step-00000004"
    (songs / "ann" / "b.flac").unlink()
    (songs / "ben" / "d.flac").unlink()
    out = Path(shutil.copytree(DATA / "earlier" / "converted", tmp_path / "converted"))
    info = json.loads((out / "convert.json").read_text())
    before = (out / "ann" / "a.flac").read_bytes()
    assert not (out / "ben" / "c.flac").exists()
    outcome = convert(voice, songs, out)
    assert outcome.work.tasks_run == 1 and outcome.account.problems == []
    assert (out / "ann" / "a.flac").read_bytes() == before
    assert (out / "ben" / "c.flac").stat().st_size > 0
    ledger = [json.loads(path.read_text()) for path in sorted((out / "ledger").iterdir())]
    assert [entry["fingerprint"] for entry in ledger] == [info["fingerprint"]] * 2
    after = json.loads((out / "convert.json").read_text())
    assert {key: after[key] for key in ("fingerprint", "settings")} == {
        key: info[key] for key in ("fingerprint", "settings")
    }
    assert convert(voice, songs, out).work.tasks_run == 0
    for override, words in (
        ("output.envelope=0.5", r"output\.envelope was 0\.0 and is 0\.5"),
        ("units.second_pass=true", r"units\.second_pass was false and is true"),
    ):
        with pytest.raises(UserError, match=rf"made with other settings \({words}\); choose"):
            convert(voice, songs, out, override)


def test_no_path_of_a_machine_is_in_the_data() -> None:
    words = [b"/" + name + b"/" for name in (b"home", b"root", b"tmp", b"work", b"Users")]
    for folder in (DATA / "shards", DATA / "earlier"):
        for path in folder.rglob("*"):
            if path.is_file() and path.name != "training.safetensors":
                content = path.read_bytes()
                assert not [word for word in words if word in content], path


def test_settings_of_commands_are_still_known(shards: Callable[[int], Path]) -> None:
    """A setting that is removed would lock datasets out that recorded it."""
    for version in VERSIONS:
        config: Any = read_source(shards(version)).config
        assert dataclasses.asdict(config)["f0"]["method"] == "dio"
