"""Headers of MPEG audio and AC-3 frames, and the tags in MP3 files.

FFmpeg decodes half a frame as if it were whole, skips stray bytes in silence, and does not tell
whether it read a length or estimated it. All three follow from the headers.

Sources: ISO 11172-3 and 13818-3; ATSC A/52 (AC-3); Xing, LAME and Fraunhofer VBRI tags as encoders
write them.

Tested by tests/stages/decode/test_frames.py.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.decode.header_claims import is_tag, skip_id3
from stages.decode.structure import Read

# kbit/s by (MPEG 1, layer); index 0 (free format) and 15 give no size
_MPEG1 = {
    1: (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    2: (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    3: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}
_MPEG2_LAYER1 = (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256)
_MPEG2 = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
_AC3_KBPS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640)
SEARCH = 1 << 16  # bytes in which the first frame must appear
FOLLOWERS = 3  # further frames in a row that confirm a frame


@dataclass(frozen=True)
class Frame:
    """A header of MPEG audio, layer I, II or III."""

    length: int  # bytes
    samples: int  # per channel
    side_bytes: int  # length of the side information of layer III; a Xing tag follows it
    kind: int  # MPEG version and layer, which are constant within a stream


def mpeg_frame(head: bytes) -> Frame | None:
    """Parse 4 bytes; None unless they are a frame header with a stated bit rate."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    rate_index, kbps_index, padding = head[2] >> 2 & 3, head[2] >> 4, head[2] >> 1 & 1
    if version == 1 or layer == 4 or rate_index == 3 or kbps_index in (0, 15):
        return None
    first = version == 3
    table = _MPEG1[layer] if first else _MPEG2_LAYER1 if layer == 1 else _MPEG2
    kbps, rate = table[kbps_index - 1], _RATES[version][rate_index]
    samples = 384 if layer == 1 else 576 if layer == 3 and not first else 1152
    if layer == 1:
        length = (12000 * kbps // rate + padding) * 4
    else:
        length = samples // 8 * 1000 * kbps // rate + padding
    mono = head[3] >> 6 == 3
    side = (17 if mono else 32) if first else (9 if mono else 17)
    return Frame(length, samples, side, head[1] & 0xFE)


def is_sync(head: bytes) -> bool:
    """Check for the first bytes of a frame of MPEG audio, ADTS or AC-3."""
    return head[:2] == b"\x0b\x77" or (len(head) > 1 and head[0] == 0xFF and head[1] >= 0xE0)


def frame_bytes(head: bytes) -> int | None:
    """Return the size that a frame states: MPEG audio, AAC in ADTS, AC-3 or E-AC-3; else None."""
    if frame := mpeg_frame(head):
        return frame.length
    if len(head) < 6:
        return None
    if head[0] == 0xFF and head[1] & 0xF6 == 0xF0:  # ADTS
        return (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    if head[:2] != b"\x0b\x77":
        return None
    if head[5] >> 3 > 10:  # E-AC-3
        return 2 * ((head[2] & 7) << 8 | head[3]) + 2
    rate_index, size_index = head[4] >> 6, head[4] & 63
    if rate_index == 3 or size_index >= 2 * len(_AC3_KBPS):
        return None
    kbps = _AC3_KBPS[size_index // 2]
    return (kbps * 4, 2 * (kbps * 960 // 441 + size_index % 2), kbps * 6)[rate_index]


@dataclass(frozen=True)
class Mp3Tag:
    """The content of the Xing, Info or VBRI tag of an MP3."""

    frames: int
    num_samples: int  # per channel, without the silence that the encoder added
    gapless: bool  # states that silence, so FFmpeg takes it off
    music: tuple[int, int, int] | None  # first and last byte of the audio, and its CRC-16


def mp3_tag(read: Read) -> Mp3Tag | None:
    """Read the tag of an MP3; None without one, or if it states no number of frames."""
    begin = skip_id3(read)
    window = read(begin, SEARCH)
    found = first_frame(window)
    if found is None:
        return None
    at, frame = found
    tag = window[at + 4 + frame.side_bytes :][:LAME_TAG_BYTES]
    if tag[:4] in (b"Xing", b"Info") and len(tag) == LAME_TAG_BYTES and tag[7] & 1:
        frames = struct.unpack(">I", tag[8:12])[0]
        added = int.from_bytes(tag[DELAY_AT : DELAY_AT + 3], "big")  # 12 bits before, 12 behind
        gapless = tag[ENCODER_AT : ENCODER_AT + 4] in GAPLESS_ENCODERS
        num_samples = frames * frame.samples
        if gapless:
            num_samples -= (added >> 12) + (added & 0xFFF)
        music = _music(tag, begin + at, frame)
        return Mp3Tag(frames, max(0, num_samples), gapless, music) if frames else None
    vbri = window[at + 36 : at + 36 + 18]
    if vbri[:4] == b"VBRI" and len(vbri) == 18 and (frames := struct.unpack(">I", vbri[14:])[0]):
        return Mp3Tag(frames, frames * frame.samples, gapless=False, music=None)
    return None


LAME_TAG_BYTES = 156
ENCODER_AT = 120
GAPLESS_ENCODERS = (b"LAME", b"Lavf", b"Lavc")  # of these FFmpeg reads the delay
DELAY_AT = 141
MUSIC_BYTES_AT = 148  # then the CRC-16 of the audio, and that of the tag itself


def _music(tag: bytes, begin: int, frame: Frame) -> tuple[int, int, int] | None:
    """Return the first and last byte and the CRC-16 of the audio, from a LAME tag.

    begin: first byte of the tag's frame.
    """
    length, crc, _ = struct.unpack(">IHH", tag[MUSIC_BYTES_AT:])
    full = tag[7] & 15 == 15 and length > frame.length
    return (begin + frame.length, begin + length, crc) if full else None


def checksum_holds(tag: Mp3Tag, read: Read) -> bool:
    """Check the audio of an MP3 against the checksum in its LAME tag; True if that has none.

    Other encoders leave anything in that place. It counts if the length beside it is right.
    """
    if tag.music is None:
        return True
    start, stop, expected = tag.music
    behind = read(stop, 8)
    if behind and not is_tag(behind):
        return True
    crc = 0
    for at in range(start, stop, CRC_CHUNK):
        data = read(at, min(CRC_CHUNK, stop - at))
        crc = crc16(data, crc)
    short = len(data) < min(CRC_CHUNK, stop - at)
    return short or crc == expected


CRC_CHUNK = 4 << 20  # bytes of audio that are read at once
LANES = 4096  # stretches of the data whose checksums are computed side by side


def _crc_table() -> NDArray[np.uint16]:
    table = np.arange(256, dtype=np.uint16)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ 0xA001, table >> 1).astype(np.uint16)
    return table


_TABLE = _crc_table()


def crc16(data: bytes, crc: int = 0) -> int:
    """Return the CRC-16/ARC of `data` behind bytes whose own is `crc`.

    A checksum is linear: those of equal stretches are computed side by side, and then joined.
    """
    step = len(data) // LANES
    rest = len(data) - step * LANES
    for byte in data[:rest]:
        crc = crc >> 8 ^ int(_TABLE[(crc ^ byte) & 255])
    if not step:
        return crc
    stretches = np.frombuffer(data, np.uint8, offset=rest).reshape(LANES, step).T.astype(np.uint16)
    lanes = np.zeros(LANES, np.uint16)
    moved = np.uint16(1) << np.arange(16, dtype=np.uint16)  # each bit, `step` bytes later
    for column in stretches:
        lanes = lanes >> 8 ^ _TABLE[(lanes ^ column) & 255]
        moved = moved >> 8 ^ _TABLE[moved & 255]
    low, high = _all_sums(moved[:8].tolist()), _all_sums(moved[8:].tolist())
    for lane in lanes.tolist():
        crc = low[crc & 255] ^ high[crc >> 8] ^ lane
    return crc


def _all_sums(bits: list[int]) -> list[int]:
    """Return, for each byte, the exclusive or of the values of its bits."""
    sums = [0]
    for value in bits:
        sums += [value ^ other for other in sums]
    return sums


def first_frame(window: bytes) -> tuple[int, Frame] | None:
    """Find the first frame that is followed by others of its kind: offset and header."""
    at = window.find(b"\xff")
    while at >= 0:
        frame = mpeg_frame(window[at : at + 4])
        if frame and _has_followers(window, at, frame):
            return at, frame
        at = window.find(b"\xff", at + 1)
    return None


def _has_followers(window: bytes, at: int, frame: Frame) -> bool:
    """Check that frames of one kind, or the end, directly follow `frame`, which is at `at`."""
    for _ in range(FOLLOWERS):
        at += frame.length
        follower = mpeg_frame(window[at : at + 4])
        if follower is None or follower.kind != frame.kind:
            return at == len(window)
        frame = follower
    return True
