"""Environment variables for the processes that a benchmark starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    """These set in here, and as they were after it."""
    before = dict(os.environ)
    os.environ |= settings
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ |= before
