"""The one import of torchaudio.

torchaudio's wheel holds a compiled extension that links CUDA libraries, so beside a CPU-only torch
(or a torch of another CUDA version) `import torchaudio` raises OSError, although its Python code
runs without the extension: `torchaudio._extension` itself has a mode for wheels that lack it. This
module puts that mode in place of the extension that does not load; no installed file is changed.

Call `import_torchaudio` before importing anything that imports torchaudio by itself: torchcrepe,
torchfcpe and the speech models of transformers.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_log = logging.getLogger(__name__)
_EXTENSION = "torchaudio._extension"


def import_torchaudio() -> ModuleType:
    """The module `torchaudio`, without its compiled extension where that cannot be loaded.

    Without the extension `lfilter` and `overdrive` run in Python and `forced_align` raises
    RuntimeError; resampling, spectrograms and models are the same.

    Raises: ImportError where torchaudio is not installed, and whatever else importing it raises for
    a reason other than its shared libraries. `sys.modules` then holds nothing of torchaudio.
    """
    if "torchaudio" in sys.modules:
        return importlib.import_module("torchaudio")
    try:
        return _import_or_forget()
    except OSError as error:
        _log.info("torchaudio runs without its compiled extension (%s)", error)
    sys.modules[_EXTENSION] = stub = _absent_extension()
    torchaudio = _import_or_forget()
    torchaudio._extension = stub  # type: ignore[attr-defined]  # import sets it only for modules it loads
    return torchaudio


def _import_or_forget() -> ModuleType:
    """Import torchaudio, or leave no half-imported part of it behind."""
    try:
        return importlib.import_module("torchaudio")
    except BaseException:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
        raise


def _absent_extension() -> ModuleType:
    """What `torchaudio._extension` is in a wheel that was built without it."""

    def unavailable(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def refuse(*args: object, **kwargs: object) -> None:
            raise RuntimeError(
                f"torchaudio's {function.__name__} needs its compiled extension, "
                "which does not load beside this torch"
            )

        return refuse

    stub = ModuleType(_EXTENSION, "Stands in for the compiled extension, which did not load.")
    stub.__spec__ = ModuleSpec(_EXTENSION, None, is_package=True)
    stub.__path__ = []
    stub._IS_TORCHAUDIO_EXT_AVAILABLE = False  # type: ignore[attr-defined]
    stub._IS_ALIGN_AVAILABLE = False  # type: ignore[attr-defined]
    stub._check_cuda_version = lambda: None  # type: ignore[attr-defined]
    stub._load_lib = lambda lib: False  # type: ignore[attr-defined]
    stub.fail_if_no_align = unavailable  # type: ignore[attr-defined]
    return stub
