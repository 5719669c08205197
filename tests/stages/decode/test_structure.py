"""Pages of Ogg and elements of Matroska: order, end and checksums."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import soundfile as sf

from stages.decode.structure import Read, check_matroska, check_ogg, ogg_checksum


def reader(data: bytes) -> Read:
    return lambda offset, count: data[offset : offset + count]


def ogg(seconds: int = 5) -> list[bytes]:
    """Return the pages of a Vorbis file."""
    buffer = io.BytesIO()
    noise = 0.2 * np.random.default_rng(0).standard_normal(seconds * 44100)
    sf.write(buffer, noise, 44100, format="OGG")
    data, pages, at = buffer.getvalue(), [], 0
    while at < len(data):
        length = 27 + data[at + 26] + sum(data[at + 27 : at + 27 + data[at + 26]])
        pages.append(data[at : at + length])
        at += length
    return pages


PAGES = ogg()


def check(pages: list[bytes]) -> str | None:
    """Return what is wrong with pages, in a word or two."""
    data = b"".join(pages)
    structure = check_ogg(reader(data), len(data))
    return structure.cut or (structure.damage and structure.damage.words)


def test_checksum_of_ogg() -> None:
    for page in PAGES:
        assert ogg_checksum(page) == struct.unpack("<I", page[22:26])[0]


def test_whole_ogg_file() -> None:
    assert check(PAGES) is None
    assert check([*PAGES, b"TAG" + bytes(125)]) is None
    assert check([PAGES[0], empty_page(PAGES[0]), *PAGES[1:]]) is None  # RFC 3533 allows it


def empty_page(like: bytes) -> bytes:
    """Return a page without segments, with a wrong checksum: it has nothing to lose."""
    return like[:5] + b"\0" + like[6:26] + b"\0"


@pytest.mark.parametrize("number", range(len(PAGES)))
def test_one_bit_error_in_any_page(number: int) -> None:
    page = bytearray(PAGES[number])
    page[-5] ^= 8
    assert check([*PAGES[:number], bytes(page), *PAGES[number + 1 :]]) == (
        "an Ogg page with a wrong checksum"
    )


def test_place_of_the_damage() -> None:
    page = bytearray(PAGES[-2])
    page[-5] ^= 8
    data = b"".join([*PAGES[:-2], bytes(page), PAGES[-1]])
    damage = check_ogg(reader(data), len(data)).damage
    assert damage is not None
    assert damage.fraction == sum(map(len, PAGES[:-2])) / len(data)


def test_ogg_that_is_cut_or_has_lost_pages() -> None:
    assert check(PAGES[:-1]) == "has no end-of-stream page"
    assert "inside a page" in str(check([*PAGES[:-1], PAGES[-1][:-1]]))
    assert "inside a page" in str(check([*PAGES[:-1], PAGES[-1][:20]]))
    assert check([*PAGES[:4], *PAGES[5:]]) == "missing Ogg pages"
    assert check([*PAGES[:4], b"\0" * 99, *PAGES[4:]]) == "bytes that are no Ogg page"


def test_joined_ogg_files() -> None:
    data = b"".join([*PAGES, *PAGES])
    assert check_ogg(reader(data), len(data)).joined == 2


def element(kind: str, body: bytes, size: int | None = None) -> bytes:
    """Return an EBML element with a size field of 8 bytes."""
    length = (1 << 56) - 1 if size == -1 else len(body) if size is None else size
    return bytes.fromhex(kind) + bytes([1]) + length.to_bytes(7, "big") + body


def cluster(body: bytes) -> bytes:
    crc = zlib.crc32(body).to_bytes(4, "little")
    return element("1f43b675", b"\xbf\x84" + crc + body)


HEAD = element("1a45dfa3", b"matroska")
CLUSTERS = cluster(b"first" * 100) + cluster(b"second" * 100)


@pytest.mark.parametrize("size", [None, -1])
def test_whole_matroska_file(size: int | None) -> None:
    data = HEAD + element("18538067", CLUSTERS, size)
    structure = check_matroska(reader(data), len(data))
    assert structure.cut is None and structure.damage is None
    damaged = bytearray(data)
    damaged[-700] ^= 1
    structure = check_matroska(reader(bytes(damaged)), len(data))
    assert structure.damage is not None
    assert structure.damage.words == "a Matroska element with a wrong checksum"


@pytest.mark.parametrize("size", [None, -1])
@pytest.mark.parametrize("missing", [1, 300, 610])
def test_cut_matroska_file(missing: int, size: int | None) -> None:
    data = (HEAD + element("18538067", CLUSTERS, size))[:-missing]
    assert check_matroska(reader(data), len(data)).cut is not None


def test_live_recordings_of_matroska_state_no_size() -> None:
    data = HEAD + element("18538067", element("1f43b675", bytes(500), -1), -1)
    assert check_matroska(reader(data), len(data)).cut is None
