"""Units and f0 anew from the shards of a dataset: `extract --from`."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline.extract import ExtractOptions, Outcome, reextract
from pipeline.reextract import config_from, read_source
from pipeline.shards import iter_shards, read_dataset_info, read_footer
from pipeline.verify import verify
from tests.pipeline.conftest import Extract

Reextract = Callable[..., Outcome]
OTHER = ["f0.method=harvest", "f0.hop_length=441", "encoder.name=log-mel"]


@pytest.fixture(scope="module")
def run_reextract() -> Reextract:
    def run(source: Path, new: Path, overrides: list[str], **options: object) -> Outcome:
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
