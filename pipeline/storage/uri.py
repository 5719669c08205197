"""URIs, which name places that Cantor does not read or write.

Tested by tests/pipeline/test_cli.py.
"""

from __future__ import annotations

import re

from pipeline.errors import UserError

_SCHEME = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")


def refuse_uri(path: str, what: str = "") -> None:
    """Raises: UserError: when `path` is a URI. what: its origin, for the message."""
    if _SCHEME.match(path):
        raise UserError(
            f"{what}{path} is a URI, and Cantor uses paths of mounted file systems only; mount the "
            "storage, or copy the files, and give that path"
        )
