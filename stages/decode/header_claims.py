"""Lengths that the headers of uncompressed audio declare, in bytes.

FFmpeg reads to the end of the file whatever the header says, so half a download would look like a
shorter song. These parsers compare the declared bytes of audio with the file. They are pure Python,
read a few hundred bytes, and return "no claim" for an unknown structure, never an error.

    wav, rf64, bw64, w64, aiff, au, caf, avr   bytes of audio
    avi, asf (wma)                             bytes of the whole file

Sources: Microsoft RIFF, RFC 2361 and the ASF specification; EBU Tech 3306 (RF64) and ITU-R BS.2088
(BW64); Apple AIFF-C 1991 and CAF 1.0; Sony Wave64; the AVR header of Audio Visual Research.

Tested by tests/stages/decode/test_odd_files.py, tests/stages/decode/test_decoder.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

from stages.decode.structure import Read

Head = Callable[[Read, int], int | None]  # -> bytes of the chunk at an offset; None for no chunk


@dataclass(frozen=True)
class Claim:
    """The length that a header declares, and the part of it that the file has."""

    num_samples: int | None = None  # per channel; None if not declared, or for a coded format
    num_bytes: int = 0  # declared bytes
    present_bytes: int = 0  # of those, in the file
    frame_bytes: int | None = None  # of one sample of all channels; None for a coded format
    unknown_bytes: int = 0  # behind the audio, and no chunk
    contradiction: str | None = None  # why the samples cannot be read with certainty
    by_libsndfile: bool = False  # libsndfile reads it right, and FFmpeg not always
    prefix: bytes = b""  # libsndfile must see this, and then the file from `start` on
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
MAX_TAGS = 100


def skip_id3(read: Read) -> int:
    """Return the offset after the ID3v2 tags at the start of a file; 0 without any."""
    at = 0
    for _ in range(MAX_TAGS):
        length = id3_length(read(at, 10))
        if not length:
            break
        at += length
    return at


def id3_length(head: bytes) -> int:
    """Return the length in bytes of the ID3v2 tag that starts with `head`; 0 if there is none."""
    if len(head) < 10 or head[:3] != b"ID3" or max(head[6:10]) > 127:
        return 0
    length = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
    return 10 + length + (10 if head[5] & 0x10 else 0)


def read_claim(read: Read, size: int) -> Claim:
    """Read the claim of a file of `size` bytes."""
    head = read(0, 16)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _wave(read, size, ">" if head[:4] == b"RIFX" else "<")
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return _avi(read, size)
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _aiff(read, size)
    if head[:4] in (b".snd", b"dns."):
        return _au(read, size, ">" if head[:4] == b".snd" else "<")
    if head[:4] == b"caff":
        return _caf(read, size)
    if head == W64_RIFF:
        return _wave64(read, size)
    if head[:4] == b"2BIT":
        return _avr(read, size)
    if head == ASF_HEADER:
        return _asf(read, size)
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
    return Claim(
        num_samples=declared // frame_bytes if frame_bytes else None,
        num_bytes=declared,
        present_bytes=max(0, min(declared, present)),
        frame_bytes=frame_bytes,
    )


# ---- RIFF/WAVE, RF64, BW64, AVI -----------------------------------------------------------------

WAVE_FIXED_WIDTH = (1, 3, 6, 7)  # PCM, float, A-law, mu-law: every sample has the same width
WAVE_EXTENSIBLE = 0xFFFE
ADPCM_HEAD_BYTES = {2: 7, 0x11: 4}  # of a channel's head of a block: Microsoft and IMA ADPCM
G72X_TAGS = (0x14, 0x38, 0x40)  # G.723, NMS and G.721 ADPCM: FFmpeg takes another bit order
HEADER_SLACK = 512  # a data size that exceeds the data by less may count the header in


def _wave(read: Read, size: int, endian: str) -> Claim:
    riff_size = struct.unpack(endian + "I", read(4, 4))[0]
    frame_bytes: int | None = None
    contradiction: str | None = None
    tag = 0
    long_at, long_data = 0, 0  # RF64 and BW64: position of the 64-bit data size, and that size
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
            tag = struct.unpack(endian + "H", body[:2])[0]
            frame_bytes, contradiction = _wave_frame_bytes(body, count, endian)
        elif name == b"data":
            start = at + 8
            claim = _wave_data(count, long_data, riff_size, start, size, frame_bytes)
            if claim.num_bytes not in (count, long_data):  # libsndfile takes the header's word
                if long_at:
                    claim = _patched(claim, read, long_at, struct.pack("<Q", claim.num_bytes))
                else:
                    field = struct.pack(endian + "I", min(claim.num_bytes, 0xFFFFFFFF))
                    claim = _patched(claim, read, start - 4, field)
            if read(0, 4) == b"BW64":  # the same as RF64, which libsndfile knows
                prefix = b"RF64" + (claim.prefix or read(0, start))[4:]
                claim = replace(claim, prefix=prefix, start=len(prefix))
            behind = _bytes_without_chunks(read, start + claim.num_bytes, size, _riff_chunk(endian))
            return replace(
                claim,
                unknown_bytes=behind,
                contradiction=contradiction,
                by_libsndfile=frame_bytes is not None or tag in G72X_TAGS,
            )
        at += 8 + count + count % 2
    return NO_CLAIM


def _patched(claim: Claim, read: Read, at: int, field: bytes) -> Claim:
    """Make a claim present the file to libsndfile with `field` at byte `at` of its header."""
    prefix = read(0, at) + field
    return replace(claim, prefix=prefix, start=len(prefix))


def _wave_data(
    count: int, long_data: int, riff_size: int, start: int, size: int, frame_bytes: int | None
) -> Claim:
    """Return the claim of a data chunk of `count` bytes that starts at byte `start`."""
    present = size - start
    if count == 0xFFFFFFFF and 0 < long_data < UNKNOWN_BYTES:
        return _claim(long_data, present, frame_bytes)
    if count == 0 and riff_size > start - 8 and not _is_placeholder(riff_size):
        return _claim(0, present, frame_bytes)  # truly empty: the RIFF continues after it
    # Some writers put the size of the file, or of the RIFF, where that of the data belongs.
    counts_header = present < count <= present + HEADER_SLACK and count in (
        *(size, size - 8),
        *(riff_size, riff_size + 8),
    )
    if counts_header and riff_size in (size, size - 8):
        return _claim(present, present, frame_bytes)
    if not _is_placeholder(count) or 0 < count <= present:
        return _claim(count, present, frame_bytes)
    return _claim(present, present, frame_bytes)  # up to the end of the file


def _bytes_without_chunks(read: Read, at: int, size: int, head: Head) -> int:
    """Count the bytes from byte `at` to the end of the file, if they are not chunks, tags or zeros.

    Some writers leave out the padding byte of a chunk of odd size.
    """
    for begin in (at + at % 2, at):
        here = begin
        for _ in range(MAX_CHUNKS):
            if here >= size or is_tag(read(here, 8)) or not any(read(here, 4096)):
                return 0
            chunk = head(read, here)
            if chunk is None or here + chunk > size + 1:
                break
            here += chunk
    return max(0, size - at)


def _riff_chunk(endian: str) -> Head:
    def length(read: Read, at: int) -> int | None:
        head = read(at, 8)
        if len(head) < 8 or not _is_name(head[:4]):
            return None
        count: int = struct.unpack(endian + "I", head[4:])[0]
        return 8 + count + count % 2

    return length


def _caf_chunk(read: Read, at: int) -> int | None:
    head = read(at, 12)
    if len(head) < 12 or not _is_name(head[:4]):
        return None
    count: int = struct.unpack(">q", head[4:])[0]
    return 12 + count if count >= 0 else None


def _wave64_chunk(read: Read, at: int) -> int | None:
    head = read(at, 24)
    count: int = struct.unpack("<Q", head[16:])[0] if len(head) == 24 else 0
    return (count + 7) // 8 * 8 if _is_name(head[:4]) and 24 <= count < UNKNOWN_BYTES else None


def _is_name(name: bytes) -> bool:
    return name.isascii() and all(32 <= byte < 127 for byte in name) and name[:2].isalnum()


def is_tag(head: bytes) -> bool:
    """Check for the first bytes of an ID3, APE or Lyrics3 tag."""
    return head[:3] in (b"TAG", b"ID3") or head[:8] in (b"APETAGEX", b"LYRICSBE")


def _wave_frame_bytes(fmt: bytes, count: int, endian: str) -> tuple[int | None, str | None]:
    """Return the bytes of one sample of all channels, and how the header contradicts itself."""
    tag, channels, _rate, _speed, align, bits = struct.unpack(endian + "HHIIHH", fmt[:16])
    if tag == WAVE_EXTENSIBLE and count >= 26 and len(fmt) >= 26:
        tag = struct.unpack(endian + "H", fmt[24:26])[0]
    if tag in ADPCM_HEAD_BYTES and channels and len(fmt) >= 20:
        block = (align - ADPCM_HEAD_BYTES[tag] * channels) * 2 // channels + (2 if tag == 2 else 1)
        stated = struct.unpack(endian + "H", fmt[18:20])[0]
        if bits != 4 or block != stated:
            return None, f"its header contradicts itself about blocks of {align} bytes"
    if tag not in WAVE_FIXED_WIDTH or not channels:
        return None, None
    width = (bits + 7) // 8
    if width and align and align != channels * width:
        return None, (
            f"its header states {bits} bits a sample, which is {channels * width} bytes for "
            f"{channels} channels, and a block of {align} bytes; convert it with another program"
        )
    return align or None, None


def _avi(read: Read, size: int) -> Claim:
    declared = 8 + struct.unpack("<I", read(4, 4))[0]
    return NO_CLAIM if _is_placeholder(declared - 8) else _claim(declared, size, None)


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
    plain = frame_bytes is not None
    if declared > present and _is_placeholder(count):
        return replace(_claim(present, present, frame_bytes), by_libsndfile=plain)
    if declared <= 0 < present and samples == 0:
        claim = _patched(_claim(present, present, frame_bytes), read, size_at, b"\xff\xff\xff\xff")
        return replace(claim, by_libsndfile=plain)
    behind = _bytes_without_chunks(read, size_at + 4 + count, size, _riff_chunk(">"))
    if frame_bytes and not _is_placeholder(samples):
        claim = _claim(samples * frame_bytes, present, frame_bytes)
        inside = max(0, min(declared, present) - claim.num_bytes)  # of the chunk, not counted
        return replace(
            claim, unknown_bytes=behind or (inside if inside > 1 else 0), by_libsndfile=True
        )
    return replace(
        _claim(declared, present, frame_bytes), unknown_bytes=behind, by_libsndfile=plain
    )


# ---- AU, CAF, Wave64, AVR, ASF ------------------------------------------------------------------


AU_G72X = (23, 25, 26)  # G.721 and G.723: FFmpeg takes another bit order
AU_BYTES = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}  # of a sample, by encoding


def _au(read: Read, size: int, endian: str) -> Claim:
    head = read(4, 20)
    if len(head) < 20:
        return NO_CLAIM
    start, count, encoding, _rate, channels = struct.unpack(endian + "IIIII", head)
    if count == 0xFFFFFFFF:
        return NO_CLAIM
    claim = _claim(count, size - start, AU_BYTES.get(encoding, 0) * channels or None)
    behind = size - start - count
    known = behind <= 0 or is_tag(read(start + count, 8)) or not any(read(start + count, 4096))
    by_libsndfile = encoding in AU_BYTES or encoding in AU_G72X
    return replace(claim, unknown_bytes=0 if known else behind, by_libsndfile=by_libsndfile)


def _caf(read: Read, size: int) -> Claim:
    at = 8
    frame_bytes: int | None = None
    for _ in range(MAX_CHUNKS):
        head = read(at, 12)
        if len(head) < 12:
            break
        name, count = head[:4], struct.unpack(">q", head[4:])[0]
        if name == b"desc" and read(at + 20, 4) == b"lpcm":
            frame_bytes = int.from_bytes(read(at + 28, 4), "big") or None
        if count < 0:  # -1: up to the end of the file
            break
        if name == b"data":
            claim = _claim(count - 4, size - at - 16, frame_bytes)
            behind = _bytes_without_chunks(read, at + 12 + count, size, _caf_chunk)
            return replace(claim, unknown_bytes=behind)
        at += 12 + count
    return NO_CLAIM


W64_RIFF = bytes.fromhex("726966662e91cf11a5d628db04c10000")
W64_DATA = bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")
W64_FORMAT = bytes.fromhex("666d7420f3acd3118cd100c04f8edb8a")


def _wave64(read: Read, size: int) -> Claim:
    at = 40
    frame_bytes: int | None = None
    for _ in range(MAX_CHUNKS):
        head = read(at, 48)
        if len(head) < 24:
            break
        count = struct.unpack("<Q", head[16:24])[0]
        if not 24 <= count < UNKNOWN_BYTES:
            break
        if head[:16] == W64_FORMAT and len(head) >= 40:
            frame_bytes, _ = _wave_frame_bytes(head[24:], 16, "<")
        if head[:16] == W64_DATA:
            claim = _claim(count - 24, size - at - 24, frame_bytes)
            behind = _bytes_without_chunks(read, at + (count + 7) // 8 * 8, size, _wave64_chunk)
            return replace(claim, unknown_bytes=behind)
        at += (count + 7) // 8 * 8
    return NO_CLAIM


AVR_HEADER_BYTES = 128


def _avr(read: Read, size: int) -> Claim:
    head = read(0, 30)
    if len(head) < 30:
        return NO_CLAIM
    mono, bits, samples = struct.unpack(">HH", head[12:16]) + struct.unpack(">I", head[26:30])
    frame_bytes = (1 if mono == 0 else 2) * (bits // 8 or 1)
    if _is_placeholder(samples):
        return NO_CLAIM
    return _claim(samples * frame_bytes, size - AVR_HEADER_BYTES, frame_bytes)


ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def _asf(read: Read, size: int) -> Claim:
    at = 30
    for _ in range(MAX_CHUNKS):
        head = read(at, 104)
        if len(head) < 24:
            break
        if head[:16] == ASF_FILE_PROPERTIES and len(head) >= 92:
            file_size, flags = struct.unpack("<Q", head[40:48]) + struct.unpack("<I", head[88:92])
            live = flags & 1  # a broadcast: its sizes do not hold
            return NO_CLAIM if live or not file_size else _claim(file_size, size, None)
        at += max(24, struct.unpack("<Q", head[16:24])[0])
    return NO_CLAIM
