"""The settings that change the output, and their hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pipeline.settings import (
    flatten,
)

# Keys that change where and how fast a run works, not what it writes. The SHA-256 of a file of
# weights counts in place of its path.
_NOT_IN_FINGERPRINT = {
    "decode.timeout_s",
    "decode.memory_mb",
    "f0.device",
    "f0.checkpoint",
    "xvector.device",
    "xvector.checkpoint",
}


_NOT_OF_AN_ENCODER = {"device", "dtype", "checkpoint", "codebook"}


def counted(config: object) -> dict[str, Any]:
    """What changes the output, by key, without the contents of files."""
    return {key: value for key, value in flatten(config).items() if _counts(key)}


def _counts(key: str) -> bool:
    section, _, rest = key.partition(".")
    if section in ("encoder", "encoders"):
        return rest.rpartition(".")[2] not in _NOT_OF_AN_ENCODER
    return section not in ("plan", "workers") and key not in _NOT_IN_FINGERPRINT


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, in words."""
    return "; ".join(
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    )


def fingerprint(settings: dict[str, Any]) -> str:
    """SHA-256 (hex) of `fingerprinted` settings."""
    canonical = json.dumps(settings, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
