"""Checks of the structure of Ogg and Matroska files, which FFmpeg skips over in silence.

FFmpeg drops an Ogg page with a wrong checksum, and ignores the checksums of Matroska. Both also
show whether a file was cut: an Ogg file ends with a flagged page, and a Matroska element states
its size.

Sources: RFC 3533 (Ogg), RFC 8794 and 9559 (EBML, Matroska).

Tested by tests/stages/decode/test_structure.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

Read = Callable[[int, int], bytes]  # (offset, count) -> bytes, fewer at the end of the file

CHUNK = 1 << 20  # bytes read at once
FIRST_PAGE, LAST_PAGE = 2, 4  # flags of an Ogg page
NO_AUDIO = (bytes(8), b"\xff" * 8)  # granule positions of pages in which no audio ends
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True)
class Damage:
    """A fault of the structure, `fraction` of the way through the file."""

    words: str
    fraction: float


@dataclass(frozen=True)
class Structure:
    """Result of a check: how the file is cut, if it is, and its first damaged place."""

    cut: str | None = None
    damage: Damage | None = None
    joined: int = 1  # files that follow one another in it
    one_page: bool = False  # all audio is in one Ogg page


def check_ogg(read: Read, size: int) -> Structure:
    """Check the order, the end and the checksums of all pages of an Ogg file.

    A page without data may be damaged without loss, and bytes behind the last page are no part of
    the file.
    """
    at = 0
    flags = LAST_PAGE  # of the last page
    joined = audio_pages = 0
    numbers: dict[int, int] = {}  # number of the last page, by stream
    damage: Damage | None = None
    lost_at: int | None = None  # first byte of a stretch that is no page
    while at < size:
        head = read(at, 27 + 255)
        if head[:4] != b"OggS":
            lost_at = at if lost_at is None else lost_at
            at = _find(read, at + 1, size, b"OggS")
            continue
        table = head[27 : 27 + head[26]] if len(head) >= 27 else b""
        length = 27 + len(table) + sum(table)
        if len(head) < 27 or len(table) < head[26] or at + length > size:
            return Structure(f"ends inside a page, at byte {at} of {size}", damage)
        if lost_at is not None:
            damage = damage or Damage("bytes that are no Ogg page", lost_at / size)
            lost_at = None
        serial = int.from_bytes(head[14:18], "little")
        number = int.from_bytes(head[18:22], "little")
        data = read(at, length)
        if sum(table):
            expected = 0 if head[5] & FIRST_PAGE else numbers.get(serial, number - 1) + 1
            if number != expected and serial in numbers:
                damage = damage or Damage("missing Ogg pages", at / size)
            if ogg_checksum(data) != int.from_bytes(head[22:26], "little"):
                damage = damage or Damage("an Ogg page with a wrong checksum", at / size)
        if head[5] & FIRST_PAGE and flags & LAST_PAGE:
            joined += 1
        audio_pages += head[6:14] not in NO_AUDIO
        numbers[serial] = number
        flags = head[5]
        at += length
    cut = None if flags & LAST_PAGE else "has no end-of-stream page"
    return Structure(cut, damage, joined, audio_pages == 1)


def ogg_checksum(page: bytes) -> int:
    """Return the CRC-32 of an Ogg page, its own checksum field taken as 0.

    Ogg feeds the bits of a byte from the top, zlib from the bottom; otherwise the sums agree.
    """
    blank = (page[:22] + bytes(4) + page[26:]).translate(REVERSED_BITS)
    crc = zlib.crc32(blank, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{crc:032b}"[::-1], 2)


def _find(read: Read, at: int, size: int, magic: bytes) -> int:
    """Return the offset of `magic` from byte `at` on; `size` if it does not appear."""
    while at < size:
        window = read(at, CHUNK)
        if (found := window.find(magic)) >= 0:
            return at + found
        if len(window) < CHUNK:
            break
        at += CHUNK - len(magic) + 1
    return size


SEGMENT = 0x18538067
CRC_32 = 0xBF
UNKNOWN_SIZE = -1


def check_matroska(read: Read, size: int) -> Structure:
    """Check the sizes and the checksums of the top elements of a Matroska or WebM file."""
    at = 0
    damage: Damage | None = None
    end = size
    while at < end:
        element = _element(read, at)
        if element is None:
            cut = f"ends inside an element, at byte {at} of {size}" if at + 12 > size else None
            return Structure(cut, damage or Damage("bytes that are no element", at / size))
        kind, start, length = element
        if kind == SEGMENT:
            if length != UNKNOWN_SIZE:
                end = min(size, start + length)
                if start + length > size:
                    return Structure(f"states {start + length} bytes and has {size}", damage)
            at = start
            continue
        if length == UNKNOWN_SIZE:  # a live recording: nothing states where it ends
            return Structure(None, damage)
        if start + length > size:
            return Structure(f"states {start + length} bytes and has {size}", damage)
        if not _checksum_holds(read, start, length):
            damage = damage or Damage("a Matroska element with a wrong checksum", at / size)
        at = start + length
    return Structure(None, damage)


def _element(read: Read, at: int) -> tuple[int, int, int] | None:
    """Return the id, first byte and size of the element at byte `at`; None if there is none."""
    head = read(at, 12)
    if not head or head[0] < 0x10:
        return None
    id_bytes = 9 - head[0].bit_length()
    if len(head) <= id_bytes or head[id_bytes] == 0:
        return None
    size_bytes = 9 - head[id_bytes].bit_length()
    if len(head) < id_bytes + size_bytes:
        return None
    value = int.from_bytes(head[id_bytes : id_bytes + size_bytes], "big")
    ones = (1 << 7 * size_bytes) - 1
    value &= ones
    kind = int.from_bytes(head[:id_bytes], "big")
    return kind, at + id_bytes + size_bytes, UNKNOWN_SIZE if value == ones else value


def _checksum_holds(read: Read, start: int, length: int) -> bool:
    """Check an element's CRC-32, which is its first child; True if it has none."""
    head = read(start, 6)
    if length < 6 or head[0] != CRC_32 or head[1] != 0x84:
        return True
    crc = 0
    for at in range(start + 6, start + length, CHUNK):
        crc = zlib.crc32(read(at, min(CHUNK, start + length - at)), crc)
    return crc == int.from_bytes(head[2:6], "little")
