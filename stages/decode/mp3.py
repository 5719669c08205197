"""Frame counts of MP3 files, and a Xing tag that makes libsndfile read all frames.

libsndfile trusts a Xing or Info tag. Without one it computes the length from the bit rate of the
first frame and stops there, so a file of variable bit rate loses its end (5/6 of one measured). It
ignores VBRI tags, and reads only the first of concatenated MP3s. So it is given such files behind
an added Xing frame with the number of frames, from the VBRI tag or counted.

Sources: ISO 11172-3 and 13818-3; Xing/LAME and Fraunhofer VBRI tags as encoders write them.

Tested by tests/stages/decode/test_decoder.py.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from stages.decode.header_claims import NO_CLAIM, Claim, Read

# kbit/s of layer III, MPEG 1 and MPEG 2/2.5; index 0 (free format) and 15 are refused
KBPS = {
    True: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
SEARCH = 1 << 16  # bytes in which the first frame must appear
WINDOW = 1 << 20  # bytes read at once while counting
FOLLOWERS = 3  # further frames in a row that confirm a frame
SAMPLED = 400  # frames whose mean length is used to estimate a missing count
MAX_TAGS = 100
TOLERANCE = 2 * 1152  # samples of encoder and decoder delay and padding, if no tag states them


@dataclass(frozen=True)
class Frame:
    """A layer III frame header."""

    header: bytes  # 4 bytes
    length: int  # bytes
    samples: int  # per channel
    side_bytes: int  # length of the side information; a Xing tag follows it

    @property
    def kind(self) -> int:
        """MPEG version and layer, which are constant within a stream."""
        return self.header[1] & 0xFE


def parse_frame(header: bytes) -> Frame | None:
    """Parse 4 bytes; None unless they are a layer III frame header with a stated bit rate."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return None
    version, rate_index, kbps_index = header[1] >> 3 & 3, header[2] >> 2 & 3, header[2] >> 4
    if version == 1 or rate_index == 3 or kbps_index in (0, 15):
        return None
    first = version == 3
    mono = header[3] >> 6 == 3
    kbps, rate = KBPS[first][kbps_index - 1], RATES[version][rate_index]
    length = (144000 if first else 72000) * kbps // rate + (header[2] >> 1 & 1)
    side = (17 if mono else 32) if first else (9 if mono else 17)
    return Frame(header[:4], length, 1152 if first else 576, side)


def skip_id3(read: Read) -> int:
    """Return the offset after the ID3v2 tags at the start of a file; 0 without any."""
    at = 0
    for _ in range(MAX_TAGS):
        length = _id3_length(read(at, 10))
        if not length:
            break
        at += length
    return at


def mp3_claim(read: Read, size: int, thorough: bool) -> Claim:
    """Read the claim of an MP3; `NO_CLAIM` if libsndfile reads it correctly or it is not an MP3.

    `thorough`: without a tag, count the frames, which reads the whole file; else estimate.
    """
    begin = skip_id3(read)
    window = read(begin, SEARCH)
    if window[:4] in (b"fLaC", b"OggS", b"RIFF", b"FORM"):
        return NO_CLAIM
    if begin == 0 and not (window[:1] == b"\xff" and window[1:2] >= b"\xe0"):
        return NO_CLAIM
    first = _first_frame(window)
    if first is None:
        return NO_CLAIM
    at, frame = first
    tag = window[at + 4 + frame.side_bytes :][:16]
    is_xing = tag[:4] in (b"Xing", b"Info")
    if is_xing and len(tag) == 16:
        frames, num_bytes = struct.unpack(">II", tag[8:])
        joined = tag[7] & 2 and _first_frame(read(begin + at + num_bytes, SEARCH))
        if tag[7] & 1 and frames and not joined:
            return NO_CLAIM
    vbri = window[at + 36 : at + 36 + 18]
    if vbri[:4] == b"VBRI" and len(vbri) == 18:
        frames = struct.unpack(">I", vbri[14:])[0]
        return _presented(frame, frames, begin + at + frame.length)
    start = begin + at + (frame.length if is_xing else 0)
    if thorough:
        return _presented(frame, _count_frames(read, size, start, frame), start)
    mean = _mean_length(window[start - begin :])
    return Claim(estimate=int((size - start) / mean * frame.samples))


def _presented(frame: Frame, frames: int, start: int) -> Claim:
    """Return the claim that presents `frames` frames from byte `start` on behind a Xing tag."""
    return Claim(num_samples=frames * frame.samples, prefix=_xing(frame, frames), start=start)


def _xing(frame: Frame, frames: int) -> bytes:
    """Build a silent frame like `frame`, at the top bit rate, with a Xing tag for `frames`."""
    header = bytearray(frame.header)
    header[1] |= 1  # no CRC
    header[2] = header[2] & 0x0D | 14 << 4  # the highest bit rate: room for the tag; no padding
    own = parse_frame(bytes(header))
    assert own is not None
    body = bytes(header) + bytes(own.side_bytes) + b"Xing" + struct.pack(">II", 1, frames)
    return body.ljust(own.length, b"\0")


def _first_frame(window: bytes) -> tuple[int, Frame] | None:
    """Find the first frame that is followed by others of its kind: offset and header."""
    at = window.find(b"\xff")
    while at >= 0:
        frame = parse_frame(window[at : at + 4])
        if frame and _has_followers(window, at, frame):
            return at, frame
        at = window.find(b"\xff", at + 1)
    return None


def _has_followers(window: bytes, at: int, frame: Frame) -> bool:
    """Check that frames of one kind, or the end, directly follow `frame`, which is at `at`."""
    for _ in range(FOLLOWERS):
        at += frame.length
        follower = parse_frame(window[at : at + 4])
        if follower is None or follower.kind != frame.kind:
            return at == len(window)
        frame = follower
    return True


def _mean_length(window: bytes) -> float:
    """Return the mean length in bytes of the first frames in `window`."""
    at = count = 0
    while count < SAMPLED and (frame := parse_frame(window[at : at + 4])):
        count += 1
        at += frame.length
    return at / count if count else 418.0  # 128 kbit/s at 44.1 kHz


def _count_frames(read: Read, size: int, at: int, first: Frame) -> int:
    """Count whole frames of the kind of `first` from byte `at` on, skipping other bytes."""
    count = base = 0
    window = b""
    while at < size:
        if at + SEARCH > base + len(window) and base + len(window) < size:
            base, window = at, read(at, WINDOW)
        here = at - base
        frame = parse_frame(window[here : here + 4])
        if frame and frame.kind == first.kind:
            at += frame.length
            count += at <= size
        elif length := _id3_length(window[here : here + 10]):
            at += length
        else:
            resync = _first_frame(window[here : here + SEARCH])
            at += (resync[0] or resync[1].length) if resync else SEARCH // 2
    return count


def _id3_length(head: bytes) -> int:
    """Return the length in bytes of the ID3v2 tag that starts with `head`; 0 if there is none."""
    if len(head) < 10 or head[:3] != b"ID3" or max(head[6:10]) > 127:
        return 0
    length = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
    return 10 + length + (10 if head[5] & 0x10 else 0)
