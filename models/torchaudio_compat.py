"""The only import of torchaudio.

torchaudio's wheel has a compiled extension that links CUDA libraries. With a CPU-only torch, or a
torch of another CUDA version, `import torchaudio` therefore raises OSError, although its Python
code runs without the extension: `torchaudio._extension` has a mode for wheels that lack it. This
module activates that mode if the extension does not load; no installed file is changed.

Call `import_torchaudio` before importing anything that imports torchaudio itself: torchcrepe,
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
    """Import `torchaudio`, without its compiled extension if that cannot be loaded.

    Without the extension `lfilter` and `overdrive` run in Python and `forced_align` raises
    RuntimeError; resampling, spectrograms and models are the same. After an error `sys.modules` has
    no part of torchaudio.

    Raises: ImportError: when torchaudio is not installed.
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
    """Import torchaudio; on an error remove its partly imported modules."""
    try:
        return importlib.import_module("torchaudio")
    except BaseException:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
        raise


def _absent_extension() -> ModuleType:
    """Build `torchaudio._extension` as in a wheel without the compiled extension."""

    def unavailable(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def refuse(*args: object, **kwargs: object) -> None:
            raise RuntimeError(
                f"torchaudio's {function.__name__} needs its compiled extension, "
                "which does not load with this torch"
            )

        return refuse

    stub = ModuleType(_EXTENSION, "Stub for the compiled extension, which did not load.")
    stub.__spec__ = ModuleSpec(_EXTENSION, None, is_package=True)
    stub.__path__ = []
    stub._IS_TORCHAUDIO_EXT_AVAILABLE = False  # type: ignore[attr-defined]
    stub._IS_ALIGN_AVAILABLE = False  # type: ignore[attr-defined]
    stub._check_cuda_version = lambda: None  # type: ignore[attr-defined]
    stub._load_lib = lambda lib: False  # type: ignore[attr-defined]
    stub.fail_if_no_align = unavailable  # type: ignore[attr-defined]
    return stub
