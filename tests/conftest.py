"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.checkpoints import write_rmvpe

ROOT = Path(__file__).resolve().parent.parent

_LONG = ("pipeline/test_kills.py",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first: one of two processes is busy with them meanwhile."""
    items.sort(key=lambda item: not any(file in item.nodeid for file in _LONG))


@pytest.fixture(scope="session")
def real_audio() -> Path:
    """Folder of real singing and speech; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("CANTOR_TEST_AUDIO", ROOT.parent / "shared" / "audio"))
    if not (folder / "vocadito_1.flac").is_file():
        pytest.skip(f"no real recordings at {folder} (set CANTOR_TEST_AUDIO)")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of reference vectors."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def tiny_rmvpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rmvpe.pt of a network of the published shape with few channels and made-up weights."""
    return write_rmvpe(tmp_path_factory.mktemp("rmvpe") / "rmvpe.pt")
