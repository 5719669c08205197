"""torchaudio with and without its compiled extension.

Small packages named `torchaudio` in a temporary folder stand for the ways in which the real one
fails, whatever this machine has installed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from models.torchaudio_compat import import_torchaudio

IMPORTS_EXTENSION = "from . import _extension\nfrom torchaudio._extension import {name}\n"
BROKEN_LIBRARY = "from torchaudio import _internal\nraise OSError('libc10_cuda.so: not found')\n"


def torchaudio_modules() -> dict[str, object]:
    return {n: m for n, m in sys.modules.items() if n.split(".")[0] == "torchaudio"}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder of an empty package `torchaudio` that shadows the installed one."""
    before = torchaudio_modules()
    for name in before:
        del sys.modules[name]
    folder = tmp_path / "torchaudio"
    folder.mkdir()
    (folder / "_internal.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in torchaudio_modules():
        del sys.modules[name]
    sys.modules.update(before)  # type: ignore[arg-type]
    importlib.invalidate_caches()


def test_a_working_extension_is_kept(package: Path) -> None:
    (package / "__init__.py").write_text(IMPORTS_EXTENSION.format(name="loaded"))
    (package / "_extension.py").write_text("loaded = True\n")
    assert import_torchaudio()._extension.loaded
    assert sys.modules["torchaudio._extension"].__file__


def test_an_extension_that_does_not_load_is_replaced(package: Path) -> None:
    body = IMPORTS_EXTENSION.format(name="_IS_TORCHAUDIO_EXT_AVAILABLE, fail_if_no_align")
    body += "@fail_if_no_align\ndef forced_align(x): return x\n"
    (package / "__init__.py").write_text(body)
    (package / "_extension.py").write_text(BROKEN_LIBRARY)
    torchaudio = import_torchaudio()
    assert torchaudio is importlib.import_module("torchaudio")
    assert torchaudio._IS_TORCHAUDIO_EXT_AVAILABLE is False
    assert torchaudio._extension._load_lib("any") is False
    with pytest.raises(RuntimeError, match="forced_align needs its compiled extension"):
        torchaudio.forced_align(1)


def test_second_call_returns_the_same_module(package: Path) -> None:
    (package / "__init__.py").write_text(IMPORTS_EXTENSION.format(name="_load_lib"))
    (package / "_extension.py").write_text(BROKEN_LIBRARY)
    assert import_torchaudio() is import_torchaudio()


def test_another_fault_passes_and_leaves_nothing_behind(package: Path) -> None:
    (package / "__init__.py").write_text("from . import _internal\nimport no_such_module_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        import_torchaudio()
    assert torchaudio_modules() == {}


def test_an_oserror_that_the_stub_does_not_cure_passes(package: Path) -> None:
    (package / "__init__.py").write_text(
        "from . import _extension\nraise OSError('disk on fire')\n"
    )
    (package / "_extension.py").write_text(BROKEN_LIBRARY)
    with pytest.raises(OSError, match="disk on fire"):
        import_torchaudio()
    assert torchaudio_modules() == {}


def test_the_installed_torchaudio_resamples_and_filters() -> None:
    torchaudio = import_torchaudio()
    tone = torch.sin(torch.arange(4410) * (2 * np.pi * 441 / 44100))
    halved = torchaudio.functional.resample(tone, 44100, 22050)
    assert halved.shape == (2205,)
    assert torch.allclose(halved[100:-100], tone[::2][100:-100], atol=2e-2)
    passed = torchaudio.functional.lfilter(
        tone, torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.0]), clamp=False
    )
    assert torch.allclose(passed, tone / 2)
    importlib.import_module("torchaudio.transforms")
