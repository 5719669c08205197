"""Damaged versions of small files, for tests that a reader answers each in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Put in place of any value of a JSON or YAML document.
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 0.5, -0.5, 1_000_000, 10**9, 2**63, 10**30, -(10**30), 1e308,
    float("nan"), float("inf"), "", "x", "../../x", "\x1b[31m", "\x00", "1", "nan", "/dev/zero",
    [], [[]], [None], ["x"], [1, 2, 3], [0] * 100, {}, {"": None}, {"x": 1},
)  # fmt: skip
_ODD_BYTES = (
    b"\x00",
    b"\xff",
    b"\xff\xff\xff\x7f",
    b"\xff" * 8,
    b"[",
    b"{",
    b'"',
    b"-",
    b"9" * 400,
)


def mutated_bytes(data: bytes, count: int = 200, seed: int = 0) -> Iterator[bytes]:
    """Yield `count` damaged versions of a file, the same ones each time.

    They are cut, or have spans that are overwritten, zeroed, deleted, repeated or inserted.
    """
    rng = np.random.default_rng(seed)
    for number in range(count):
        damaged = bytearray(data)
        # Headers are at the start of most formats and at the end of zip and Parquet.
        near = int(rng.choice([len(data), min(len(data), 300)]))
        start = int(rng.integers(max(1, near)))
        if rng.random() < 0.3:
            start = max(0, len(data) - 1 - start)
        stop = start + int(rng.integers(1, 1 + int(rng.choice([1, 4, 64]))))
        match number % 6:
            case 0:
                del damaged[start:]
            case 1:
                damaged[start:stop] = rng.bytes(len(damaged[start:stop]))
            case 2:
                damaged[start:stop] = bytes(len(damaged[start:stop]))
            case 3:
                del damaged[start:stop]
            case 4:
                damaged[start:start] = damaged[start:stop] * int(rng.choice([1, 2, 50]))
            case 5:
                odd = _ODD_BYTES[int(rng.integers(len(_ODD_BYTES)))]
                place = start if rng.random() < 0.5 else start + len(odd)
                damaged[start:place] = odd
        yield bytes(damaged)


def mutated_values(document: Any, count: int = 200, seed: int = 0) -> Iterator[Any]:
    """Yield `count` copies of a JSON-like document in which one or two values are wrong or missing.

    The document itself is among the values that are replaced. Only its dicts and lists are copied,
    so it may have tensors.
    """
    rng = np.random.default_rng(seed)
    for _ in range(count):
        root = [_copied(document)]
        for _ in range(int(rng.integers(1, 3))):
            places = list(_places(root))
            owner, key = places[int(rng.integers(len(places)))]
            if owner is not root and rng.random() < 0.15:
                del owner[key]
            elif rng.random() < 0.05:
                owner[key] = [owner[key]]
            else:
                owner[key] = _copied(ODD_VALUES[int(rng.integers(len(ODD_VALUES)))])
        yield root[0]


def mutated_json(text: str, count: int = 200, seed: int = 0) -> Iterator[bytes]:
    """Yield `count` damaged versions of a JSON file: half damaged as bytes, half with odd values.

    Two are nested so deeply that a recursive parser ends in a RecursionError.
    """
    half = count // 2
    yield from mutated_bytes(text.encode(), half, seed)
    for document in mutated_values(json.loads(text), count - half - 2, seed):
        yield json.dumps(document).encode()
    yield b"[" * 100_000
    yield b'{"a":' * 100_000 + b"1" + b"}" * 100_000


def check_reader(
    path: Path,
    versions: Iterator[bytes],
    read: Callable[[], Any],
    errors: type[Exception] | tuple[type[Exception], ...],
) -> int:
    """Write each version to `path` and read it; return how many were refused with `errors`.

    A refusal is one line. The file is restored at the end.
    """
    original = path.read_bytes()
    refused = 0
    try:
        for number, version in enumerate(versions):
            path.write_bytes(version)
            try:
                read()
            except errors as error:
                refused += 1
                message = str(error)
                assert message and "\n" not in message, (number, message)
            except Exception as error:
                error.add_note(f"mutation {number} of {path.name}: {version[:300]!r}")
                raise
    finally:
        path.write_bytes(original)
    return refused


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of each value in nested dicts and lists."""
    stack = [value]
    while stack:
        owner = stack.pop()
        for key in list(owner) if isinstance(owner, dict) else range(len(owner)):
            yield owner, key
            if isinstance(owner[key], dict | list):
                stack.append(owner[key])
