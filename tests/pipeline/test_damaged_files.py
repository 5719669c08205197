"""Damaged and forged files that extract, verify, report and extract --from read.

Each is read, or refused in one sentence that a UserError carries to exit status 2.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.dataset.folder import open_folder
from pipeline.dataset.shards import (
    Footer,
    has_xvectors,
    iter_shards,
    note_on_trial_units,
    read_footer,
    read_supported_info,
    units_in_words,
    write_shard,
)
from pipeline.dataset.verify import verify
from pipeline.errors import UserError
from pipeline.extract.clip_sources import ClipsOfShards
from pipeline.extract.config import ExtractConfig
from pipeline.extract.from_dataset import FromDataset, compare, read_source
from pipeline.extract.job import ExtractJob, TakenOver
from pipeline.fingerprint import differences, neutral_values, with_settings_off
from pipeline.reports.dataset_statistics import read_played_clips, read_statistics
from pipeline.reports.html import list_settings
from pipeline.settings import flatten, load_settings
from pipeline.songs.corpus import list_corpus
from pipeline.songs.plan import PLAN_SCHEMA, append_plan, load_plan
from stages.chain import StageClock
from stages.flac import decode_flac, encode_flac
from stages.frames import num_frames
from tests.helpers.mutations import check_reader, mutated_bytes, mutated_json, mutated_values

NUM_SAMPLES = 4410
REFUSED_AT_LEAST = 20  # of 200: damage that no reader could miss


@pytest.fixture(scope="module")
def made(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of one task, one song and one clip, to be damaged."""
    folder = Path(shutil.copytree(dataset, tmp_path_factory.mktemp("damaged") / "made"))
    shards = [path for path in iter_shards(folder) if pq.read_metadata(path).num_rows]
    smallest = min(shards, key=lambda path: path.stat().st_size)
    footer = read_footer(smallest)
    for path in iter_shards(folder):
        if path != smallest:
            path.unlink()
    tasks = load_plan(folder)
    for path in (folder / "plan").iterdir():
        path.unlink()
    append_plan(folder, [tasks[footer.task]])
    table = pq.read_table(smallest).slice(0, 1)
    row = table.to_pylist()[0]
    samples = decode_flac(row["audio"]["bytes"], "PCM_16")[:NUM_SAMPLES]
    row["audio"]["bytes"] = encode_flac(samples, footer.sample_rate, "PCM_16")
    row |= {"num_samples": NUM_SAMPLES, "stop": row["start"] + NUM_SAMPLES, "clip_count": 1}
    row |= {"f0": row["f0"][: num_frames(NUM_SAMPLES, footer.hop_length)]}
    row |= {"units_mfcc": row["units_mfcc"][: 2 * 39 * 5], "num_unit_frames_mfcc": 5}
    seconds = NUM_SAMPLES / footer.sample_rate
    (entry,) = footer.ledger
    entry = replace(entry, clips=1, kept_s=seconds, duration_s=seconds, dropped=[])
    table = pa.Table.from_pylist([row], table.schema)
    write_shard(folder, smallest.name, table, replace(footer, ledger=[entry]))
    assert verify(folder).problems == []
    return folder


def _read_dataset_json(dataset: Path) -> None:
    info = read_supported_info(dataset)
    units_in_words(info)
    has_xvectors(info)
    note_on_trial_units(info["encoders"])
    open_folder(dataset).read_info()
    source = read_source(dataset)
    differences(info["settings"], source.settings, neutral_values(ExtractConfig))
    config = replace(source.config, f0=replace(source.config.f0, f0_min=70.0))
    FromDataset(compare(source, config)).take_over()
    settings = with_settings_off(info["settings"], config)
    list_settings(settings, flatten(config))


def test_dataset_json(made: Path) -> None:
    path = made / "dataset.json"
    versions = mutated_json(path.read_text())
    refused = check_reader(path, versions, lambda: _read_dataset_json(made), UserError)
    assert refused > REFUSED_AT_LEAST
    _read_dataset_json(made)


def test_plan(made: Path) -> None:
    (path,) = (made / "plan").iterdir()
    versions = mutated_bytes(path.read_bytes())
    assert check_reader(path, versions, lambda: load_plan(made), UserError) > REFUSED_AT_LEAST


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("split", "../../x", "a split has other characters"),
        ("duration_s", float("nan"), "a duration is not a number"),
        ("task", -1, "a task has a number below 0"),
        ("speaker", None, "empty cells"),
        ("size", "x", "other columns"),
    ],
)
def test_forged_plan(made: Path, tmp_path: Path, column: str, value: Any, words: str) -> None:
    (tmp_path / "plan").mkdir()
    (path,) = (made / "plan").iterdir()
    columns = pq.read_table(path).to_pydict()
    columns[column] = [value] * len(columns[column])
    schema = None if value == "x" else PLAN_SCHEMA
    pq.write_table(pa.table(columns, schema=schema), tmp_path / "plan" / path.name)
    with pytest.raises(UserError, match=rf"{path.name} is damaged: .*{words}"):
        load_plan(tmp_path)


def _shard_reader(dataset: Path) -> Callable[[], None]:
    """Return a function that reads the shard as `verify`, `report` and `extract --from` do."""
    source = read_source(dataset)
    (task,) = load_plan(dataset).values()
    version = source.settings["schema_version"]
    taken = TakenOver(dataset, source.fingerprint, version, True, (), None)
    job = ExtractJob(dataset, dataset, source.config, "x", {}, taken_over=taken)
    (path,) = iter_shards(dataset)

    def read() -> None:
        problems = verify(dataset).problems
        statistics = read_statistics(dataset)
        read_played_clips(dataset, statistics)
        problems += statistics.account.problems
        assert all("\n" not in problem for problem in problems), problems
        read_footer(path)
        list(ClipsOfShards(job, taken).read(task, task.songs, (), StageClock()))

    read()
    return read


def test_shard(made: Path) -> None:
    (path,) = iter_shards(made)
    versions = mutated_bytes(path.read_bytes())
    assert check_reader(path, versions, _shard_reader(made), UserError) > REFUSED_AT_LEAST


@pytest.mark.parametrize("name", ["clip_id", "audio", "num_samples", "f0", "speaker"])
def test_other_columns(made: Path, name: str) -> None:
    (path,) = iter_shards(made)
    whole, table = path.read_bytes(), pq.read_table(path)
    place = table.schema.get_field_index(name)
    tables = (
        table.remove_column(place),
        table.set_column(place, name, pa.array([["x"]])),
        table.set_column(
            place, table.schema.field(place), pa.nulls(1, table.schema.field(place).type)
        ),
    )
    read = _shard_reader(made)
    for other in tables:
        pq.write_table(other.replace_schema_metadata(table.schema.metadata), path)
        assert verify(made).problems != []
        assert any(path.name in problem for problem in read_statistics(made).account.problems) or (
            name == "audio" and read_played_clips(made, read_statistics(made)) == []
        )
        with pytest.raises(UserError, match=f"{path.name} cannot be used"):
            read()
    path.write_bytes(whole)


def test_forged_footer(made: Path) -> None:
    (path,) = iter_shards(made)
    table, document = pq.read_table(path), json.loads(read_footer(path).to_json())
    del document["sha256"]

    def versions() -> Iterator[bytes]:
        for values in mutated_values(document):
            metadata = {**table.schema.metadata, b"cantor": _signed(values)}
            sink = pa.BufferOutputStream()
            pq.write_table(table.replace_schema_metadata(metadata), sink)
            yield sink.getvalue().to_pybytes()

    refused = check_reader(path, versions(), _shard_reader(made), UserError)
    assert refused > 100  # most values have a type that only one kind of odd value fits


def _signed(values: Any) -> str:
    from pipeline.dataset.shards import _canonical_sha256

    if isinstance(values, dict):
        values = values | {"sha256": _canonical_sha256(values)}
    return json.dumps(values)


def test_deep_footer_is_damage() -> None:
    for text in ("[" * 100_000, '{"a":' * 100_000):
        with pytest.raises(ValueError, match="nested too deep"):
            Footer.from_json(text)


@pytest.mark.parametrize("name", ["songs.csv", "songs.jsonl"])
def test_manifest(tmp_path: Path, name: str) -> None:
    rows = [
        ("ann/a.wav", "ann", "train"),
        ('b "x", y.wav', "Zoé", "validation"),
        ("c.wav", "bob", ""),
    ]
    path = tmp_path / name
    keys = ("path", "speaker", "split")
    if name.endswith(".csv"):
        lines = [
            ",".join(f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row) for row in rows
        ]
        path.write_text("\n".join([",".join(keys), *lines]))
    else:
        path.write_text("\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in rows))
    assert len(list_corpus(path).songs) == 3
    versions = mutated_bytes(path.read_bytes())
    refused = check_reader(path, versions, lambda: list_corpus(path), UserError)
    assert refused > REFUSED_AT_LEAST


SETTINGS = {
    "slice": {"threshold_db": -40, "max_length_ms": None},
    "quality": {"max_clipping": 0.5},
    "f0": {"method": "ensemble", "ensemble": ["dio", "harvest"], "f0_min": 70.0},
    "encoders": {"log-mel": {"device": "cpu"}},
}


def test_settings(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))

    def read() -> None:
        load_settings(ExtractConfig, path)

    versions = mutated_bytes(path.read_bytes(), 100)
    assert check_reader(path, versions, read, UserError) > REFUSED_AT_LEAST
    versions = mutated_json(json.dumps(SETTINGS), 100)  # JSON is YAML
    assert check_reader(path, versions, read, UserError) > REFUSED_AT_LEAST
    for odd in (
        "a: 2024-99-99",
        "? [a]\n: b",
        "a: &x [*x]",
        "a: " + "1" * 5000,
        "!!python/name:os",
    ):
        path.write_text(odd)
        with pytest.raises(UserError):
            read()


@pytest.mark.parametrize("value", ["2024-99-99", "[" * 1000, "1" * 5000, "{[a]: b}", "!!set x"])
def test_overrides(value: str) -> None:
    with pytest.raises(UserError):
        load_settings(ExtractConfig, None, [f"slice.threshold_db={value}"])


def test_pipes_and_devices_are_refused_at_once(made: Path, tmp_path: Path) -> None:
    (shard,), (plan,) = iter_shards(made), (made / "plan").iterdir()
    manifest, settings = tmp_path / "songs.csv", tmp_path / "settings.yaml"
    readers = {
        made / "dataset.json": lambda: _read_dataset_json(made),
        plan: lambda: load_plan(made),
        shard: lambda: read_footer(shard),
        manifest: lambda: list_corpus(manifest),
        settings: lambda: load_settings(ExtractConfig, settings),
    }
    for path, read in readers.items():
        before = path.read_bytes() if path.exists() else b""
        for odd in ("pipe", "/dev/zero", "folder"):
            path.unlink(missing_ok=True)
            if odd == "pipe":
                os.mkfifo(path)
            elif odd == "folder":
                path.mkdir()
            else:
                path.symlink_to(odd)
            with pytest.raises(
                UserError,
                match=f"{path.name}.*(not a regular file|is a folder|neither a folder)|no audio",
            ):
                read()
            path.rmdir() if odd == "folder" else path.unlink()
        path.write_bytes(before)
