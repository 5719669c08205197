"""Environment variables for the processes that a benchmark starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    """Set environment variables inside the block and restore them after it."""
    before = dict(os.environ)
    os.environ |= settings
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ |= before
