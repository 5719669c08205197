"""Decoding of formats that libsndfile cannot read (m4a, aac, wma, video) with `ffmpeg`.

A file is given to ffmpeg only when its first bytes match a container listed here, and with that
container's name. ffmpeg never guesses, so it does not follow a disguised playlist or script. Runs
inside the decode child, under its limits.

Tested by tests/stages/decode/test_decoder.py.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from stages.decode.header_claims import Read
from stages.decode.mp3 import skip_id3
from stages.errors import BadInput, Reason

# first bytes (at an offset) -> ffmpeg's name of the container
CONTAINERS: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftyp", "mov"),
    (4, b"moov", "mov"),
    (4, b"mdat", "mov"),
    (4, b"wide", "mov"),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
    (0, bytes.fromhex("3026b2758e66cf11"), "asf"),
    (0, b"FLV\x01", "flv"),
    (0, b"\x00\x00\x01\xba", "mpeg"),
    (8, b"AVI LIST", "avi"),
    (0, b"wvpk", "wv"),
    (0, b"MAC ", "ape"),
    (0, b"TTA1", "tta"),
    (0, b"ADIF", "aac"),
    (0, b"#!AMR", "amr"),
    (0, b"DSD ", "dsf"),
)
OGG_CODECS_OF_LIBSNDFILE = (b"\x01vorbis", b"OpusHead")
CAF_CODECS_OF_LIBSNDFILE = (b"lpcm", b"alac", b"ulaw", b"alaw")
TOLERANCE_S = 0.5  # containers state milliseconds, and codec delay is counted differently
TOLERANCE_RATIO = 0.01
ASSUMED_BYTES_PER_S = 16000  # 128 kbit/s, where the container states no duration
OUT_OF_MEMORY_MESSAGES = ("Cannot allocate memory", "failed to map segment")
PR_SET_PDEATHSIG = 1


def foreign_container(read: Read) -> str | None:
    """Return ffmpeg's name of a container that libsndfile does not read, else None."""
    head = read(skip_id3(read), 1024)
    for offset, magic, name in CONTAINERS:
        if head[offset : offset + len(magic)] == magic:
            return name
    if head[:1] == b"\xff" and len(head) > 1 and head[1] & 0xF6 == 0xF0:
        return "aac"  # ADTS: the layer bits, 0 here, tell it from MP3
    if head[:1] == head[188:189] == head[376:377] == b"\x47":
        return "mpegts"
    if head[:4] == b"OggS" and not any(codec in head for codec in OGG_CODECS_OF_LIBSNDFILE):
        return "ogg"
    if head[:4] == b"caff" and head[8:12] == b"desc":
        return None if head[28:32] in CAF_CODECS_OF_LIBSNDFILE else "caf"
    return None


@dataclass(frozen=True)
class Foreign:
    """A running ffmpeg process and the properties of its stream."""

    sample_rate: int
    channels: int
    num_samples: int | None  # per channel, where the container states a duration
    exact: bool  # the stated duration is that of this stream
    codec: str
    process: subprocess.Popen[bytes]
    messages: IO[bytes]

    @property
    def tolerance(self) -> int:
        """Samples by which a correct file may differ from its container's duration."""
        stated_s = (self.num_samples or 0) / self.sample_rate
        return int(self.sample_rate * max(TOLERANCE_S, TOLERANCE_RATIO * stated_s))

    def blocks(self, block_samples: int) -> Iterator[NDArray[np.float32]]:
        """Yield float32 blocks (T, C) of at most `block_samples`.

        Raises: BadInput: when ffmpeg fails.
        """
        frame_bytes = 4 * self.channels
        while data := _read_fully(self.process, block_samples * frame_bytes):
            whole = len(data) // frame_bytes * frame_bytes
            yield np.frombuffer(data[:whole], dtype="<f4").reshape(-1, self.channels)
        code = self.process.wait()
        if code != 0:
            raise _failure(self.messages, code)

    def close(self) -> None:
        """Kill ffmpeg and release its pipes."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.messages.close()


def open_foreign(path: bytes, container: str) -> Foreign:
    """Start ffmpeg on the first audio stream of `path`.

    Raises: BadInput: when ffmpeg is missing or cannot open the file.
    """
    program = shutil.which("ffmpeg")
    if program is None:
        raise BadInput(
            Reason.NEEDS_FFMPEG,
            f"decoding a {container} file needs ffmpeg: install it on every machine that decodes "
            "(for example `apt-get install ffmpeg`) and make sure that it is on PATH",
        )
    messages = tempfile.TemporaryFile()
    command: list[str | bytes] = [program, "-nostdin", "-hide_banner", "-nostats", "-threads", "1"]
    command += ["-protocol_whitelist", "file,pipe", "-f", container, "-i", b"file:" + path]
    # WAVE on the pipe: its header states rate and channels before the first sample.
    command += ["-map", "0:a:0", "-c:a", "pcm_f32le", "-f", "wav", "pipe:1"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=messages,
        preexec_fn=_die_with_parent,
    )
    header = _pipe_header(process)
    if header is None:
        with process, messages:
            raise _failure(messages, process.wait())
    channels, sample_rate = header
    banner = _text(messages)
    stated = re.search(r"Duration: (\d+):(\d\d):(\d\d\.\d+)", banner)
    codec = re.search(r"Audio: (\w+)", banner)
    return Foreign(
        sample_rate=sample_rate,
        channels=channels,
        num_samples=round(_seconds(*stated.groups()) * sample_rate) if stated else None,
        exact=stated is not None and _is_exact(banner),
        codec=codec.group(1) if codec else container,
        process=process,
        messages=messages,
    )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _read_fully(process: subprocess.Popen[bytes], count: int) -> bytes:
    assert process.stdout is not None
    return process.stdout.read(count)


def _pipe_header(process: subprocess.Popen[bytes]) -> tuple[int, int] | None:
    """Read channels and rate from ffmpeg's WAVE header, up to the first sample."""
    if len(_read_fully(process, 12)) < 12:
        return None
    channels = sample_rate = 0
    while len(chunk := _read_fully(process, 8)) == 8:
        if chunk[:4] == b"data":
            return channels, sample_rate
        body = _read_fully(process, struct.unpack("<I", chunk[4:])[0])
        if chunk[:4] == b"fmt ":
            channels, sample_rate = struct.unpack("<HI", body[2:8])
    return None


def _seconds(hours: str, minutes: str, seconds: str) -> float:
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def _is_exact(banner: str) -> bool:
    """Check that the container's duration is not estimated and not another stream's (video)."""
    source = re.split("^Stream mapping:", banner, maxsplit=1, flags=re.MULTILINE)[0]
    streams = len(re.findall(r"^ *Stream #0:", source, re.MULTILINE))
    return streams - source.count("(attached pic)") == 1 and "Estimating duration" not in source


def _text(messages: IO[bytes], tail: bool = False) -> str:
    size = os.fstat(messages.fileno()).st_size
    return os.pread(messages.fileno(), 1 << 16, max(0, size - 4096) if tail else 0).decode(
        "utf-8", "replace"
    )


def _failure(messages: IO[bytes], code: int) -> BadInput:
    """Return the error for ffmpeg's last message, without its address prefix."""
    if code < 0:
        return BadInput(Reason.CRASHED, f"ffmpeg was killed by {signal.Signals(-code).name}")
    lines = [line for line in _text(messages, tail=True).splitlines() if line.strip()]
    words = re.sub(r"^\[.*?\] |^file:.*: ", "", lines[-1]) if lines else "no message"
    reason = Reason.UNREADABLE
    if any(message in words for message in OUT_OF_MEMORY_MESSAGES):
        reason = Reason.OUT_OF_MEMORY
    elif code in (126, 127):  # the program itself does not start
        reason = Reason.NEEDS_FFMPEG
    return BadInput(reason, f"ffmpeg: {words.strip()} (exit code {code})")
