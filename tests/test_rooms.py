"""Layout: imports go one way and never in a circle, folders stay small, every module has a test."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = (  # a room imports only rooms further down
    "run_pipeline",
    "pipeline.cli",
    "pipeline.tools",
    "pipeline.convert",
    "pipeline.train",
    "pipeline.extract",
    "pipeline.reports",
    "pipeline.cluster",
    "pipeline.dataset",
    "pipeline.songs",
    "pipeline.storage",
    "pipeline.fingerprint",
    "pipeline.settings",
    "pipeline.errors",
    "pipeline",
    "stages",
    "models",
)
FORBIDDEN = {
    "models": {"ray", "pyarrow", "pandas", "omegaconf", "yaml"},
    "stages": {"ray", "pyarrow", "pandas", "omegaconf", "yaml", "typer", "rich"},
    "pipeline": {"tests", "benchmarks"},
    # Voice families share the blocks, not each other.
    "models.synthesizer.blocks": {"models.synthesizer.sovits", "models.synthesizer.text"},
    "models.synthesizer.sovits": {"models.synthesizer.text"},
    "models.synthesizer.text": {"models.synthesizer.sovits"},
}
MOST_FILES = 20
DRAWERS = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py", "shared.py", "base.py"}


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = [ROOT / "run_pipeline.py"] + [
    path for package in ("pipeline", "stages", "models") for path in (ROOT / package).rglob("*.py")
]
MODULES = {_name(path): path for path in sorted(PATHS)}


def _imported(node: ast.AST) -> Iterator[str]:
    """Yield the modules imported below a node, except those for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            for alias in child.names:
                name = f"{child.module}.{alias.name}"
                yield name if name in MODULES else child.module
        yield from _imported(child)


IMPORTS = {
    name: set(_imported(ast.parse(path.read_text("utf-8")))) for name, path in MODULES.items()
}


def _is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _room(name: str) -> int:
    """Return the index in ORDER of the most specific room of a module."""
    return max(
        (i for i, room in enumerate(ORDER) if _is_in(name, room)), key=lambda i: len(ORDER[i])
    )


@pytest.mark.parametrize("name", MODULES)
def test_imports_follow_the_order_of_the_rooms(name: str) -> None:
    own = [target for target in IMPORTS[name] if target in MODULES]
    assert not [target for target in own if _room(target) < _room(name)]
    for package, forbidden in FORBIDDEN.items():
        if _is_in(name, package):
            assert not [t for t in IMPORTS[name] for other in forbidden if _is_in(t, other)]


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = {name: IMPORTS[name] & MODULES.keys() - {name} for name in MODULES}
    while done := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in done}
    assert not left  # what is left is in a circle or imports one


def test_no_folder_has_too_many_files() -> None:
    folders = {path.parent for path in ROOT.rglob("*.py")}
    counts = {
        str(folder.relative_to(ROOT)): len(list(folder.glob("*.py")))
        for folder in folders
        if not any(part.startswith(".") for part in folder.relative_to(ROOT).parts)
    }
    assert not {folder: count for folder, count in counts.items() if count > MOST_FILES}


def test_no_drawer_for_odd_things() -> None:
    assert not {path for path in MODULES.values() if path.name in DRAWERS}


CHECKED = [name for name, path in MODULES.items() if path.name != "__init__.py"]


@pytest.mark.parametrize("name", CHECKED)
def test_every_module_has_a_test_file_or_names_one(name: str) -> None:
    path = MODULES[name].relative_to(ROOT)
    mirror = ROOT / "tests" / path.with_name(f"test_{path.name}")
    docstring = ast.get_docstring(ast.parse(MODULES[name].read_text("utf-8"))) or ""
    named = re.search(r"^Tested by (.+?)\.$", docstring, re.MULTILINE)
    files = [ROOT / file for file in named[1].split(", ")] if named else [mirror]
    assert not [file for file in files if not file.is_file()]
