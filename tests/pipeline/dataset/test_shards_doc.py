"""The examples of docs/shards.md, run as a reader would copy them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_TEXT = (Path(__file__).parents[3] / "docs" / "shards.md").read_text(encoding="utf-8")
_EXAMPLES = re.findall(r"\n([^\n]+):\n\n```python\n(.*?)```", _TEXT, re.DOTALL)
_ON_RAY = [title for title, _ in _EXAMPLES if title.startswith("Ray")]


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

    ray.init("local", num_cpus=1, include_dashboard=False, logging_level="error")
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        run(next(code for title, code in _EXAMPLES if title in _ON_RAY), rated_dataset)
    finally:
        ray.shutdown()


def run(code: str, dataset: Path) -> None:
    assert "DATASET" in code
    exec(compile(code.replace("DATASET", str(dataset)), "docs/shards.md", "exec"), {})
