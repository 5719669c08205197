"""JSON files that are no JSON, no files or too much of either are refused in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from models.checkpoint import CheckpointError, load_foreign, read_safetensors, sha256_of
from models.input_file import parse_json, read_json, require_regular, shown


def test_json_is_read_with_and_without_a_byte_order_mark(tmp_path: Path) -> None:
    for text in ('{"a": [1, {"b": null}]}', '\ufeff{"a": [1, {"b": null}]}'):
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        assert read_json(tmp_path / "a.json") == {"a": [1, {"b": None}]}
    assert parse_json("3") == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
        (b'{"a":' * 60 + b"1" + b"}" * 60, "nested deeper than 50 levels"),
        (b"[1" + b"0" * 5000 + b"]", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"", "is not JSON"),
        (b"[" + b"1," * (3 << 20) + b"1]", "has more than 4 MiB of JSON"),
    ],
)
def test_what_is_not_sane_json_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_json(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    """Opening a FIFO would hang, and reading /dev/zero never ends."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path, tmp_path / "loop",
                 tmp_path / "file" / "a", tmp_path / ("x" * 300), tmp_path / "a\0b"):  # fmt: skip
        with pytest.raises(ValueError, match=r"is not a regular file|is a folder|cannot|zero byte"):
            read_json(path)
        with pytest.raises(ValueError):
            require_regular(path)
        for read in (load_foreign, read_safetensors):
            with pytest.raises(CheckpointError):
                read(path)
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="not a regular file"):
            sha256_of(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")


def test_a_value_in_a_message_is_short() -> None:
    assert shown([1, "x"]) == "[1, 'x']"
    assert len(shown(["x" * 1000])) < 100
