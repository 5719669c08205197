"""A small extracted dataset that many tests read, made once without Ray."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.extract.command import ExtractOptions, ExtractOutcome, extract
from pipeline.extract.config import load_config
from tests.helpers.songs import make_songs

# Short tasks, so that a few songs make several; dio, because it is quick.
FAST = ["plan.task_minutes=0.2", "f0.method=dio", "slice.min_length_ms=1000"]

Extract = Callable[..., ExtractOutcome]


@pytest.fixture(scope="session")
def run_extract() -> Extract:
    def run(
        corpus: Path, dataset: Path, overrides: list[str] | None = None, **options: object
    ) -> ExtractOutcome:
        options = {"local": True, **options}
        by_key = {word.partition("=")[0]: word for word in [*FAST, *(overrides or [])]}
        config = load_config(None, list(by_key.values()))
        console = Console(file=io.StringIO())
        return extract(corpus, dataset, config, ExtractOptions(**options), console)

    return run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six songs of three speakers, and one that is silent; not to be written to."""
    import numpy as np
    import soundfile as sf

    folder = tmp_path_factory.mktemp("corpus")
    make_songs(folder)
    (folder / "quiet").mkdir()
    sf.write(folder / "quiet" / "silence.wav", np.zeros(44100 * 8, np.float32), 44100)
    return folder


@pytest.fixture(scope="session")
def dataset(corpus: Path, tmp_path_factory: pytest.TempPathFactory, run_extract: Extract) -> Path:
    """The corpus extracted; not to be written to. The silent song has a shard of its own."""
    folder = tmp_path_factory.mktemp("made") / "dataset"
    outcome = run_extract(corpus, folder, ["plan.task_minutes=0.05"])
    assert outcome.account.problems == []
    return folder


@pytest.fixture(scope="session")
def rated_dataset(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset with x-vectors and purity.parquet; not to be written to."""
    from pipeline.tools.speaker_purity import PuritySettings, measure_purity
    from tests.helpers.xvectors import put_xvectors

    folder = Path(shutil.copytree(dataset, tmp_path_factory.mktemp("rated") / "dataset"))
    put_xvectors(folder)
    measure_purity(folder, PuritySettings(), Console(file=io.StringIO()))
    return folder


@pytest.fixture
def writable_corpus(corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus, tmp_path / "corpus"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB, when this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def shard_hashes(dataset: Path) -> dict[str, str]:
    """SHA-256 of every committed shard by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((dataset / "data").iterdir())
    }
