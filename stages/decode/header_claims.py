"""Lengths that audio headers declare, read without libsndfile.

libsndfile silently clamps a header that claims more than the file has, so a partial download would
look like a shorter song. These parsers read the claim itself. They are pure Python, read a few
hundred bytes, and return "no claim" for an unknown structure, never an error.

    wav, rf64, w64, aiff, au, caf   declared bytes of audio against bytes in the file: exact
    flac                            libsndfile reads STREAMINFO and does not clamp: exact
    ogg (vorbis, opus)              nothing declared; `scan_ogg` checks the last page's flag
    mp3                             see `stages.decode.mp3`
    anything else                   libsndfile's length

Sources: Microsoft RIFF and RFC 2361; EBU Tech 3306 (RF64); Apple AIFF-C 1991 and CAF 1.0; Sony
Wave64; RFC 3533 (Ogg).

Tested by tests/stages/decode/test_decoder.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

Read = Callable[
    [int, int], bytes
]  # (offset, count) -> the bytes there, fewer at the end of the file


@dataclass(frozen=True)
class Claim:
    """The length that a header declares, and how libsndfile must see the file to read all of it."""

    num_samples: int | None = None  # per channel; None if not declared
    num_bytes: int = 0  # declared bytes of audio, where the format counts bytes
    present_bytes: int = 0  # of those, in the file
    estimate: int | None = None  # samples per channel, if nothing is declared
    prefix: bytes = b""  # libsndfile reads this and then the file from `start` on
    start: int = 0

    @property
    def shortage(self) -> str | None:
        """Message for a file with less audio than its header declares, else None."""
        if self.present_bytes >= self.num_bytes:
            return None
        if self.num_samples:
            present = self.num_samples * self.present_bytes // self.num_bytes
            return f"the header declares {self.num_samples} samples, the file has {present}"
        return f"the header declares {self.num_bytes} bytes, the file has {self.present_bytes}"


NO_CLAIM = Claim()
UNKNOWN_BYTES = 2**62  # 64-bit sizes from here on are placeholders
MAX_CHUNKS = 1000  # a file with more chunks before its audio gives no claim


def read_claim(read: Read, size: int) -> Claim:
    """Read the claim of a file of `size` bytes."""
    head = read(0, 16)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _wave(read, size, ">" if head[:4] == b"RIFX" else "<")
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _aiff(read, size)
    if head[:4] in (b".snd", b"dns."):
        return _au(read, size, ">" if head[:4] == b".snd" else "<")
    if head[:4] == b"caff":
        return _caf(read, size)
    if head == W64_RIFF:
        return _wave64(read, size)
    return NO_CLAIM


def _is_placeholder(count: int) -> bool:
    """Check for a 32-bit size from a program that could not seek back to correct it.

    0 and 0xFFFFFFFF (ffmpeg), 0x7FFFF000 and 0x7F000000 (sox), 0x7FFFFFFF or 0x80000000 (arecord),
    some with the length of their headers added or subtracted.
    """
    return (
        count == 0
        or 0x7F000000 <= count < 0x7F000400
        or 0x7FFF0000 <= count < 0x80000400
        or 0xFFFF0000 <= count
    )


def _claim(declared: int, present: int, frame_bytes: int | None) -> Claim:
    """Build a claim of bytes. `frame_bytes`: of one sample of all channels; None: block codec."""
    samples = declared // frame_bytes if frame_bytes else None
    return Claim(
        num_samples=samples,
        num_bytes=declared,
        present_bytes=max(0, min(declared, present)),
    )


# ---- RIFF/WAVE, RF64 ----------------------------------------------------------------------------

WAVE_FIXED_WIDTH = (1, 3, 6, 7)  # PCM, float, A-law, mu-law: every sample has the same width
WAVE_EXTENSIBLE = 0xFFFE


def _wave(read: Read, size: int, endian: str) -> Claim:
    riff_size = struct.unpack(endian + "I", read(4, 4))[0]
    frame_bytes: int | None = None
    long_at, long_data = 0, 0  # RF64: position of its 64-bit data size, and that size
    at = 12
    for _ in range(MAX_CHUNKS):
        chunk = read(at, 48)
        if len(chunk) < 8:
            return NO_CLAIM
        name, count = chunk[:4], struct.unpack(endian + "I", chunk[4:8])[0]
        body = chunk[8:]
        if name == b"ds64" and len(body) >= 16:
            long_at, long_data = at + 16, struct.unpack("<Q", body[8:16])[0]
        elif name == b"fmt " and len(body) >= 16:
            frame_bytes = _wave_frame_bytes(body, count, endian)
        elif name == b"data":
            start = at + 8
            present = size - start
            if count == 0xFFFFFFFF and 0 < long_data < UNKNOWN_BYTES:
                return _claim(long_data, present, frame_bytes)
            if count == 0 and riff_size > start - 8 and not _is_placeholder(riff_size):
                return _claim(0, present, frame_bytes)  # truly empty: the RIFF continues after it
            if not _is_placeholder(count) or 0 < count <= present:
                return _claim(count, present, frame_bytes)
            # Read up to the end of the file. libsndfile does so too, unless the size is 0.
            claim = _claim(present, present, frame_bytes)
            if long_at:
                return _patched(claim, read, long_at, struct.pack("<Q", present))
            return _patched(claim, read, start - 4, b"\xff\xff\xff\xff")
        at += 8 + count + count % 2
    return NO_CLAIM


def _patched(claim: Claim, read: Read, at: int, field: bytes) -> Claim:
    """Make a claim present the file to libsndfile with `field` at byte `at` of its header."""
    prefix = read(0, at) + field
    return replace(claim, prefix=prefix, start=len(prefix))


def _wave_frame_bytes(fmt: bytes, count: int, endian: str) -> int | None:
    tag, channels, _rate, _speed, align, bits = struct.unpack(endian + "HHIIHH", fmt[:16])
    if tag == WAVE_EXTENSIBLE and count >= 26 and len(fmt) >= 26:
        tag = struct.unpack(endian + "H", fmt[24:26])[0]
    plain = tag in WAVE_FIXED_WIDTH and align == channels * ((bits + 7) // 8)
    return align if plain and align else None


# ---- AIFF, AIFC ---------------------------------------------------------------------------------

AIFC_FIXED_WIDTH = b"NONE twos sowt in24 in32 fl32 FL32 fl64 FL64 raw  alaw ALAW ulaw ULAW".split()


def _aiff(read: Read, size: int) -> Claim:
    comm: tuple[int, int | None] | None = None  # samples, bytes a frame
    sound: tuple[int, int, int] | None = None  # position of its size, size, start of the audio
    at = 12
    for _ in range(MAX_CHUNKS):
        chunk = read(at, 32)
        if len(chunk) < 8:
            break
        name, count = chunk[:4], struct.unpack(">I", chunk[4:8])[0]
        if name == b"COMM" and len(chunk) >= 26:
            channels, samples, bits = struct.unpack(">HIH", chunk[8:16])
            code = chunk[26:30].strip() if read(8, 4) == b"AIFC" else b"NONE"
            width = 1 if code.lower() in (b"alaw", b"ulaw") else (bits + 7) // 8
            fixed = code in AIFC_FIXED_WIDTH
            comm = (samples, channels * width if fixed else None)
        elif name == b"SSND" and len(chunk) >= 16:
            skip = struct.unpack(">I", chunk[8:12])[0]
            sound = (at + 4, count, at + 16 + skip)
        if comm and sound:
            break
        at += 8 + count + count % 2
    if not comm or not sound:
        return NO_CLAIM
    samples, frame_bytes = comm
    size_at, count, start = sound
    declared, present = count - (start - size_at - 4), size - start
    if declared > present and _is_placeholder(count):
        return _claim(present, present, frame_bytes)
    if declared <= 0 < present and samples == 0:
        claim = _claim(present, present, frame_bytes)
        return _patched(claim, read, size_at, b"\xff\xff\xff\xff")
    if frame_bytes and not _is_placeholder(samples):
        return _claim(samples * frame_bytes, present, frame_bytes)
    return _claim(declared, present, frame_bytes)


# ---- AU, CAF, Wave64 ----------------------------------------------------------------------------


def _au(read: Read, size: int, endian: str) -> Claim:
    head = read(4, 8)
    if len(head) < 8:
        return NO_CLAIM
    start, count = struct.unpack(endian + "II", head)
    unknown = count == 0xFFFFFFFF
    return NO_CLAIM if unknown else _claim(count, size - start, None)


def _caf(read: Read, size: int) -> Claim:
    at = 8
    for _ in range(MAX_CHUNKS):
        head = read(at, 12)
        if len(head) < 12:
            break
        name, count = head[:4], struct.unpack(">q", head[4:])[0]
        if count < 0:  # -1: up to the end of the file
            break
        if name == b"data":
            return _claim(count, size - at - 12, None)
        at += 12 + count
    return NO_CLAIM


W64_RIFF = bytes.fromhex("726966662e91cf11a5d628db04c10000")
W64_DATA = bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")


def _wave64(read: Read, size: int) -> Claim:
    at = 40
    for _ in range(MAX_CHUNKS):
        head = read(at, 24)
        if len(head) < 24:
            break
        count = struct.unpack("<Q", head[16:])[0]
        if not 24 <= count < UNKNOWN_BYTES:
            break
        if head[:16] == W64_DATA:
            return _claim(count - 24, size - at - 24, None)
        at += (count + 7) // 8 * 8
    return NO_CLAIM


# ---- Ogg ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OggPages:
    """Result of a scan of the pages of an Ogg file."""

    flaw: str | None  # message about a damaged end
    chained: bool  # streams follow one another; libsndfile reads only the first


def scan_ogg(read: Read, size: int) -> OggPages:
    """Scan the headers of all pages of an Ogg file.

    Ogg declares no length. Its last page carries the end-of-stream flag, so a file that ends before
    it, or inside a page, is truncated.
    """
    at = flags = 0
    begun = chained = False  # begun: past the first pages, which open streams
    while at < size:
        page = read(at, 27 + 255)
        if page[:4] != b"OggS":  # damage, or foreign bytes after the last page
            step = page.find(b"OggS", 1)
            at += step if step > 0 else max(1, len(page) - 3)
            continue
        table = page[27 : 27 + page[26]] if len(page) >= 27 else b""
        length = 27 + len(table) + sum(table)
        if not table or len(table) < page[26] or at + length > size:
            return OggPages("ends inside a page", chained)
        flags = page[5]
        opens = bool(flags & 2)
        chained |= begun and opens
        begun |= not opens
        at += length
    return OggPages(None if flags & 4 else "has no end-of-stream page", chained)
