"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Set before torch is imported. The networks are small, and the threads of two test processes
# would mostly wait for each other, at full speed.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_LONG = ("pipeline/extract/test_kills.py",)
_INSTALL = {"chromium": "apt install chromium"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files that take minutes first: one of two processes is busy with them meanwhile."""
    items.sort(key=lambda item: not any(file in item.nodeid for file in _LONG))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the system tools whose absence skipped tests, and how to install them."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    skipped = {tool: reasons[f"Skipped: {tool} is not installed"] for tool in _INSTALL}
    if not any(skipped.values()):
        return
    terminalreporter.section("tests skipped because a system tool is missing")
    terminalreporter.line("tool        tests  install")
    for tool, number in skipped.items():
        if number:
            terminalreporter.line(f"{tool:10}  {number:5}  {_INSTALL[tool]}")


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Give torch its threads back: commands that run in this process take all CPUs."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def real_audio() -> Path:
    """Folder of recordings of singing and speech; not to be written to."""
    return ROOT / "tests" / "data" / "audio"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of reference vectors."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def tiny_rmvpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rmvpe.pt of a network of the published shape with few channels and made-up weights."""
    from tests.helpers.checkpoints import write_rmvpe

    return write_rmvpe(tmp_path_factory.mktemp("rmvpe") / "rmvpe.pt")
