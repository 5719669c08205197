"""Docstrings: the first line stands alone, and exceptions are stated in one form.

    Raises: ValueError: when the rate is not positive; OSError: when the disk is full.

A `Raises:` entry is the end of its paragraph. Each part names one exception and begins with "when";
parts are separated by semicolons.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [
    path
    for room in ("models", "stages", "pipeline", "benchmarks", "examples", "tests")
    for path in sorted((ROOT / room).rglob("*.py"))
] + [ROOT / "run_pipeline.py"]
DANGLING = re.compile(
    r"(Of|What|Where|Whose|Which|That|As|Whether|By|With|From|To|How|When)\b", re.IGNORECASE
)
RAISES = re.compile(r"_?[A-Z]\w+: when .+")


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and not getattr(node, "name", "").startswith("test_"):
                yield f"{getattr(node, 'name', 'module')}: {text.splitlines()[0]}", text


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_first_line_of_a_docstring_stands_alone(path: Path) -> None:
    dangling = [line for line, text in _docstrings(path) if DANGLING.match(text)]
    assert not dangling


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_exceptions_are_stated_in_one_form(path: Path) -> None:
    odd = []
    for line, text in _docstrings(path):
        for entry in re.findall(r"\bRaises\b:? .*?(?=\n\n|\Z)", text, re.DOTALL):
            _, colon, kinds = " ".join(entry.split()).partition("Raises: ")
            if not colon or not all(RAISES.fullmatch(kind) for kind in kinds.split("; ")):
                odd.append(f"{line} ... {entry}")
    assert not odd
