"""The singing voice synthesizer.

`from_sovits` and `to_sovits` can be imported from here; torch is loaded at their first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.synthesizer.sovits.files import from_sovits, to_sovits

__all__ = ["from_sovits", "to_sovits"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from models.synthesizer.sovits import files

    return getattr(files, name)
