"""The check that configs/NAME.yaml is complete."""

from __future__ import annotations

from pathlib import Path

import yaml

from pipeline.settings import flatten, load_settings
from tests.conftest import ROOT


def assert_names_every_key(name: str, schema: type[object]) -> None:
    """Check that the file names each key of `schema` once, with its default and a comment."""
    path = Path(ROOT) / "configs" / f"{name}.yaml"
    written = yaml.safe_load(path.read_text())
    assert {f"{s}.{k}" for s, keys in written.items() for k in keys} == set(flatten(schema()))
    assert load_settings(schema, path) == schema()
    lines = path.read_text().splitlines()
    assert [line for line in lines if line.startswith("  ") and "#" not in line] == []
