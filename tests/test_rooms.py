"""Imports go one way: run_pipeline.py -> pipeline -> stages -> models."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "models": {"stages", "pipeline", "ray", "pyarrow", "pandas", "omegaconf", "yaml"},
    "stages": {"pipeline", "ray", "pyarrow", "pandas", "omegaconf", "yaml", "typer", "rich"},
    "pipeline": {"run_pipeline", "tests", "benchmarks"},
}
FILES = [path for room in FORBIDDEN for path in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_direction_of_the_rooms(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.partition(".")[0])
    assert not imported & FORBIDDEN[room]


def test_no_drawer_for_odd_things() -> None:
    names = {path.name for path in FILES}
    assert not names & {"utils.py", "common.py", "helpers.py", "misc.py"}
