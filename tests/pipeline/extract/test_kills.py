"""Processes really killed, at random moments: every clip once, bit for bit."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile as sf
from rich.console import Console

from pipeline.dataset.shards import iter_shards
from pipeline.dataset.verify import verify
from pipeline.extract.command import ExtractOptions, reextract
from pipeline.extract.from_dataset import config_from, read_source
from tests.helpers.songs import make_songs, tune
from tests.pipeline.conftest import FAST, Extract, shard_hashes

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.ray


# Shadows the real onnxruntime and kills a worker that loads it, as the want of memory would.
DYING_LOADER = """
import os, signal, sys

sys.path.remove(os.path.dirname(__file__))
del sys.modules["onnxruntime"]
import onnxruntime

if any(word.startswith("ray::") for word in open("/proc/self/cmdline").read().split()):
    os.kill(os.getpid(), signal.SIGKILL)
"""

# Shadows the real pyworld and dies on songs whose peak is 0.123, as a native crash would.
CRASHING_PYWORLD = """
import os, signal, sys

sys.path.remove(os.path.dirname(__file__))
del sys.modules["pyworld"]
import pyworld

stonemask = pyworld.stonemask

def crash(wav, *args):
    if abs(float(abs(wav).max()) - 0.123) < 2e-4:
        os.kill(os.getpid(), signal.SIGKILL)
    return stonemask(wav, *args)

pyworld.stonemask = crash
"""

# Shadows the real pyworld and waits in every clip, so that there is time to strike.
SLOW_PYWORLD = """
import os, sys, time

sys.path.remove(os.path.dirname(__file__))
del sys.modules["pyworld"]
import pyworld

stonemask = pyworld.stonemask

def slow(*args):
    time.sleep(0.25)
    return stonemask(*args)

pyworld.stonemask = slow
"""

MANY_TASKS = [*(word for word in FAST if not word.startswith("plan.")), "plan.task_minutes=0.05"]

# Most runs have one worker: each takes seconds to start.
ONE_WORKER = "workers.max_workers=1"


def start(corpus: Path, dataset: Path, *more: str, **environment: str) -> psutil.Popen:
    """Start the command as a user types it, in a process group of its own."""
    return start_extract(corpus, dataset, *FAST, *more, **environment)


def start_extract(*words: object, **environment: str) -> psutil.Popen:
    return start_command("extract", *words, **environment)


def start_command(*words: object, **environment: str) -> psutil.Popen:
    command = [sys.executable, ROOT / "run_pipeline.py", *words]
    return psutil.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
        # Who runs the tests in the background may have it ignored.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def workers(run: psutil.Popen) -> list[psutil.Process]:
    def is_worker(process: psutil.Process) -> bool:
        try:
            return " ".join(process.cmdline()).startswith("ray::MapWorker")
        except psutil.Error:  # it ended while we looked
            return False

    return [process for process in descendants(run) if is_worker(process)]


def descendants(run: psutil.Popen) -> list[psutil.Process]:
    try:
        return [p for p in run.children(recursive=True) if p.is_running()]
    except psutil.Error:
        return []


def kill_driver(run: psutil.Popen) -> None:
    run.kill()


def kill_worker(run: psutil.Popen) -> None:
    """Kill one worker and terminate another, as schedulers do."""
    for process, number in zip(workers(run), (signal.SIGKILL, signal.SIGTERM), strict=False):
        process.send_signal(number)


def kill_everything(run: psutil.Popen) -> None:
    for process in [run, *descendants(run)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def interrupt(run: psutil.Popen) -> None:
    os.killpg(run.pid, signal.SIGINT)


def terminate(run: psutil.Popen) -> None:
    run.terminate()


def strike(
    run: psutil.Popen, dataset: Path, kill: Callable[[psutil.Popen], None], rng: random.Random
) -> None:
    """Kill at a random moment once the workers are up and have committed up to two shards."""
    shards = len(iter_shards(dataset)) + rng.randint(0, 2)
    while (run.poll() is None and len(iter_shards(dataset)) < shards) or not workers(run):
        if run.poll() is not None:
            return
        time.sleep(0.1)  # looking for workers takes a tenth of that
    time.sleep(rng.uniform(0, 0.6))
    kill(run)


@pytest.fixture(scope="module")
def many_songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen songs, each of which makes a task under MANY_TASKS; not to be written to."""
    folder = tmp_path_factory.mktemp("many")
    make_songs(folder, speakers=2, songs=7, seconds=3.05, longer_s=0.01)
    return folder


@pytest.fixture(scope="module")
def expected(
    many_songs: Path, tmp_path_factory: pytest.TempPathFactory, run_extract: Extract
) -> dict[str, str]:
    """Hashes of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "d"
    run_extract(many_songs, folder, MANY_TASKS)
    hashes = shard_hashes(folder)
    assert len(hashes) == 14
    return hashes


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PYTHONPATH under which every clip takes a quarter of a second more."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "pyworld.py").write_text(SLOW_PYWORLD)
    return str(folder)


def test_kills_lose_nothing_and_double_nothing(
    many_songs: Path, tmp_path: Path, expected: dict[str, str], slow: str
) -> None:
    """One dataset that three runs work on. Only the last, which loses a worker, ends by itself.

    All processes of a run are killed at once in the next test, and in the soak test.
    """
    dataset, rng = tmp_path / "d", random.Random(0)
    killed, terminated = -signal.SIGKILL, 128 + signal.SIGTERM
    for kill, status, max_workers in (
        (kill_driver, killed, 1),
        (terminate, terminated, 2),
        (kill_worker, 0, 2),
    ):
        settings = (*MANY_TASKS, f"workers.max_workers={max_workers}")
        run = start_extract(many_songs, dataset, *settings, PYTHONPATH=slow)
        strike(run, dataset, kill, rng)
        struck = time.monotonic()
        output, _ = run.communicate(timeout=240)
        assert run.returncode == status, output
        if status != 0:
            assert len(iter_shards(dataset)) < len(expected)
        if status == terminated:
            assert time.monotonic() - struck < 20
            assert output.endswith("Run the same command again to resume.\n")
        for native in ("Traceback", "SIGTERM", "raylet"):
            assert native not in output
    assert shard_hashes(dataset) == expected
    assert verify(dataset).problems == []


def test_a_killed_re_extraction_loses_nothing_and_doubles_nothing(
    dataset: Path, golden: Path, tmp_path: Path, slow: str
) -> None:
    """Killed in one process; the same command goes on, on Ray."""
    network = golden / "encoders" / "tiny_hubert_base.pt"
    settings = ["f0.hop_length=441", f"encoders.contentvec768l12.checkpoint={network}"]

    config = config_from(read_source(dataset), None, settings)
    quiet = Console(file=io.StringIO())
    reextract(dataset, tmp_path / "whole", config, ExtractOptions(local=True), quiet)
    command = ("--from", dataset, tmp_path / "d", *settings, ONE_WORKER)
    killed = start_extract(*command, "--local", PYTHONPATH=slow)
    while not iter_shards(tmp_path / "d"):
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.02)
    kill_everything(killed)
    killed.communicate(timeout=60)
    assert len(iter_shards(tmp_path / "d")) < len(iter_shards(tmp_path / "whole"))
    again = start_extract(*command)
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert shard_hashes(tmp_path / "d") == shard_hashes(tmp_path / "whole")
    assert verify(tmp_path / "d").problems == []


def test_a_song_that_kills_its_worker_is_quarantined_alone(tmp_path: Path) -> None:
    """A native library that crashes on one song, as segfaults do: the process dies each time."""
    (tmp_path / "faulty").mkdir()
    (tmp_path / "faulty" / "pyworld.py").write_text(CRASHING_PYWORLD)
    make_songs(tmp_path / "corpus", speakers=1, songs=1, seconds=2.0)
    wav = tune(2.0)
    sf.write(tmp_path / "corpus/spk0/killer.wav", wav / np.abs(wav).max() * 0.123, 44100)
    settings = ["loudness.mode=none", "workers.max_task_retries=0", ONE_WORKER]
    run = start(tmp_path / "corpus", tmp_path / "d", *settings, PYTHONPATH=str(tmp_path / "faulty"))
    output, _ = run.communicate(timeout=240)
    assert run.returncode == 0, output
    assert "workers died on spk0/killer.wav" in output and "Traceback" not in output
    result = verify(tmp_path / "d")
    assert result.problems == []
    assert result.shards == 1
    assert result.account.entries["spk0/killer.wav"].reason == "crashed"
    assert result.account.count("kept") == 1


def test_a_model_that_kills_its_worker_is_blamed_and_no_song(
    corpus: Path, golden: Path, tmp_path: Path
) -> None:
    (tmp_path / "faulty").mkdir()
    (tmp_path / "faulty" / "onnxruntime.py").write_text(DYING_LOADER)
    network = golden / "encoders" / "vec-tiny-layer-3.onnx"
    run = start(
        corpus,
        tmp_path / "d",
        "encoder.name=contentvec768l12-onnx",
        f"encoder.checkpoint={network}",
        ONE_WORKER,
        PYTHONPATH=str(tmp_path / "faulty"),
    )
    output, _ = run.communicate(timeout=240)
    assert run.returncode == 2, output
    words = " ".join(output.split())
    assert "a worker process dies while it loads" in words and "Traceback" not in words
    assert iter_shards(tmp_path / "d") == []


@pytest.mark.soak
@pytest.mark.timeout(7200)  # 15 s a kill
def test_soak(many_songs: Path, tmp_path: Path, expected: dict[str, str], slow: str) -> None:
    """CANTOR_SOAK_KILLS random kills (20 by default), seeded by CANTOR_SOAK_SEED."""
    rng = random.Random(int(os.environ.get("CANTOR_SOAK_SEED", "0")))
    left = int(os.environ.get("CANTOR_SOAK_KILLS", "20"))
    number = 0
    while left:
        dataset = tmp_path / str(number)
        number += 1
        while left and len(iter_shards(dataset)) < len(expected):
            run = start_extract(many_songs, dataset, *MANY_TASKS, PYTHONPATH=slow)
            kill = rng.choice([kill_driver, kill_worker, kill_everything, interrupt, terminate])
            strike(run, dataset, kill, rng)
            if run.poll() is None or run.returncode != 0:
                left -= 1
            run.communicate(timeout=240)
        run = start_extract(many_songs, dataset, *MANY_TASKS, PYTHONPATH=slow)
        output, _ = run.communicate(timeout=240)
        assert run.returncode == 0, output
        assert shard_hashes(dataset) == expected
        assert verify(dataset).problems == []
