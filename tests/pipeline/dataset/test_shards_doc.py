"""The examples of docs/shards.md, run as a reader would copy them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.cluster.ray_connection import connected
from pipeline.dataset.schema import OLDEST_SUPPORTED, SCHEMA_VERSION
from stages.quality import MEASURES

_TEXT = (Path(__file__).parents[3] / "docs" / "shards.md").read_text(encoding="utf-8")
_EXAMPLES = re.findall(r"\n([^\n]+):\n\n```python\n(.*?)```", _TEXT, re.DOTALL)
_ON_RAY = [title for title, _ in _EXAMPLES if title.startswith("Ray")]


def test_the_table_of_measures_is_that_of_the_declarations() -> None:
    rows = [
        f"| {each.name}{'' if each.stored else ' (no column)'} | {each.unit} | {each.meaning} | "
        f"{', '.join(limit.key for limit in each.limits)} | {each.since} |"
        for each in MEASURES
    ]
    assert table_of("| measure | unit | meaning | limit | since version |") == rows


def test_the_versions_are_those_of_the_schema() -> None:
    assert _TEXT.startswith(f"# The shard format, version {SCHEMA_VERSION}\n")
    rows = table_of("| version | opened by |")
    opened = {int(row.split("|")[1]): "everything" in row for row in rows}
    versions = range(1, SCHEMA_VERSION + 1)
    assert opened == {version: version >= OLDEST_SUPPORTED for version in versions}


def table_of(head: str) -> list[str]:
    """Return the rows of a table of the page."""
    _, found, rest = _TEXT.partition(f"\n{head}\n")
    assert found
    return rest.partition("\n\n")[0].splitlines()[1:]


def test_every_example_is_found() -> None:
    assert len(_EXAMPLES) == _TEXT.count("```python") == 6
    assert len(_ON_RAY) == 1


@pytest.mark.parametrize(
    "code", [pytest.param(code, id=title[:12]) for title, code in _EXAMPLES if title not in _ON_RAY]
)
def test_example(
    code: str, rated_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    run(code, rated_dataset)


@pytest.mark.ray
def test_example_on_ray(rated_dataset: Path) -> None:
    import ray

    with connected(None):
        ray.data.DataContext.get_current().enable_progress_bars = False
        run(next(code for title, code in _EXAMPLES if title in _ON_RAY), rated_dataset)


def run(code: str, dataset: Path) -> None:
    assert "DATASET" in code
    exec(compile(code.replace("DATASET", str(dataset)), "docs/shards.md", "exec"), {})
