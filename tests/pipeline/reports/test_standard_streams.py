"""Commands whose output nobody reads any more, or has no place to go."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# Prints more than a pipe holds, as a command does, and says at the end that it got there.
COMMAND = """
import sys, threading
from pathlib import Path
from rich.console import Console
from pipeline.reports.standard_streams import keep_running_without_readers

with keep_running_without_readers():
    console = Console()
    thread = threading.Thread(target=lambda: [console.out("p" * 1000) for _ in range(100)])
    thread.start()
    thread.join()
    print("done", file=sys.stderr)
    Path(sys.argv[1]).write_text("all of it")
    sys.exit(int(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("shell", "status", "statuses", "errors"),
    [
        ("{} | cat >/dev/null", 0, "0 0", "done\n"),
        ("{} | head -1 >/dev/null", 0, "141 0", "done\n"),
        ("{} | head -1 >/dev/null", 2, "2 0", "done\n"),
        ("{} >&-", 0, "141", "done\n"),
        ("{} >&- 2>&- <&-", 0, "141", ""),
        ("{} >/dev/null 2>&-", 0, "0", ""),
        ("{} >/dev/null 2>/dev/full", 0, "0", ""),
    ],
)
def test_a_command_runs_on_and_ends_quietly(
    shell: str, status: int, statuses: str, errors: str, tmp_path: Path
) -> None:
    script, file, log = tmp_path / "command.py", tmp_path / "file", tmp_path / "statuses"
    script.write_text(COMMAND)
    words = shell.format(f"{sys.executable} {script} {file} {status}")
    run = subprocess.run(
        ["bash", "-c", f'{words}; echo "${{PIPESTATUS[@]}}" >{log}'],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert (run.stdout, run.stderr) == ("", errors)
    assert log.read_text().strip() == statuses
    assert file.read_text() == "all of it"


def test_a_full_disk_under_the_output_is_a_fault(tmp_path: Path) -> None:
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, script, tmp_path / "file", "0"],
            env={"PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert run.returncode == 1
    assert "OSError: [Errno 28]" in run.stderr
