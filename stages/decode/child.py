"""The decode child: the only process that parses foreign audio bytes. `Decoder` starts it.

It reads requests from stdin, one JSON object a line, and answers on stdout: {"probe": [path, ...]}
with one line per file, {"decode": path, ...} with progress lines and then one outcome. Outcomes are
`done`, `bad` (a fault of the file) and `fault` (a fault of the storage). It exits when stdin closes
or its parent dies, with OUT_OF_MEMORY_EXIT when memory runs out, and with a traceback on a bug.

Tested by tests/stages/decode/test_decoder.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from models.torchaudio_compat import import_torchaudio
from stages.decode.decoder import OUT_OF_MEMORY_EXIT, DecodeConfig, Header
from stages.decode.ffmpeg import (
    ASSUMED_BYTES_PER_S,
    PR_SET_PDEATHSIG,
    foreign_container,
    open_foreign,
)
from stages.decode.header_claims import NO_CLAIM, read_claim, scan_ogg
from stages.decode.mp3 import TOLERANCE as MP3_TOLERANCE
from stages.decode.mp3 import mp3_claim
from stages.errors import BadInput, Reason
from stages.open_file import open_source
from stages.resample import ResampleConfig, stream_resampler
from stages.types import Array

Block = NDArray[np.float32]  # (T, C)

BLOCK_VALUES = 1 << 17  # samples times channels of one block: 3 s of mono at 44.1 kHz
MIN_RATE_HZ, MAX_RATE_HZ = 1000, 1_000_000
HEAD_BYTES = 4096  # cached, because headers are read in many small pieces
FLAC_RATIO = 0.6  # assumed compression, for the rare header without a length
UNKNOWN_FRAMES = 2**62  # libsndfile returns SF_COUNT_MAX
MPEG_WITHOUT_COUNT = ("MPEG_LAYER_I", "MPEG_LAYER_II")  # libsndfile estimates their length
SF_UNSUPPORTED_ENCODING = 4
SFE_MALLOC_FAILED = 17
SFE_BAD_FILE = 7  # "not a regular file": libsndfile's error for an MP3 without a whole frame


class GuardedFile:
    """A file object for libsndfile over a regular file, which records storage faults.

    `present` sets the view that libsndfile gets. A callback cannot raise through C, so a failed
    read looks like the end of the file there, and `check` raises the fault.
    """

    def __init__(self, path: bytes) -> None:
        self.path = path
        self.fault: OSError | None = None
        self._prefix, self._start, self._at = b"", 0, 0
        self._head = b""
        self._fd = open_source(path)
        self.size = os.fstat(self._fd).st_size
        if self.size == 0:
            os.close(self._fd)
            raise BadInput(Reason.EMPTY, "the file has 0 bytes")
        self._head = self.read_at(0, HEAD_BYTES)

    def present(self, prefix: bytes, start: int) -> None:
        """Show libsndfile `prefix` and then the file from `start` on."""
        self._prefix, self._start, self._at = prefix, start, 0

    def read_at(self, offset: int, count: int) -> bytes:
        """Read bytes of the file itself.

        Raises: OSError: when the storage fails.
        """
        if offset + count <= len(self._head):
            return self._head[offset : offset + count]
        try:
            return os.pread(self._fd, count, offset)
        except OSError as error:
            raise self._named(error) from None

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        if not self._prefix and self._at + len(view) <= len(self._head):
            ahead = self._head[self._at : self._at + len(view)]
        else:
            ahead = self._prefix[self._at : self._at + len(view)]
        view[: len(ahead)] = ahead
        done = len(ahead)
        try:
            while done < len(view):
                offset = self._start + self._at + done - len(self._prefix)
                count = os.preadv(self._fd, [view[done:]], offset)
                if count == 0:
                    break
                done += count
        except OSError as error:
            self.fault = self._named(error)
        self._at += done
        return done

    def seek(self, offset: int, whence: int) -> None:
        total = len(self._prefix) + self.size - self._start
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: total}[whence]
        self._at = max(0, base + offset)

    def tell(self) -> int:
        return self._at

    def check(self) -> None:
        """Raise the recorded storage fault, if any."""
        if self.fault is not None:
            raise self.fault

    def read_through(self) -> None:
        """Read every byte, to surface a fault that another program hid.

        Raises: OSError: when the storage fails.
        """
        offset = 0
        while data := self.read_at(offset, 1 << 20):
            offset += len(data)

    def close(self) -> None:
        os.close(self._fd)

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror, os.fsdecode(self.path))


class OnePassSound(soundfile.SoundFile):  # type: ignore[misc]
    """A SoundFile that is read once, from start to end.

    soundfile seeks after every read of a seekable file. At the end of a FLAC file without a stated
    length libsndfile fails that seek, and the last block would be lost.
    """

    def seekable(self) -> bool:
        return False


@dataclass(frozen=True)
class Song:
    """An opened audio file."""

    header: Header
    declared: int | None  # samples per channel that it must decode to, if stated
    tolerance: int  # samples by which a correct file may differ from that
    blocks: Callable[[int], Iterator[Block]]  # blocks of at most the given number of samples


@contextlib.contextmanager
def open_song(path: bytes, cfg: DecodeConfig, thorough: bool) -> Iterator[Song]:
    """Open an audio file; `thorough`: also check all Ogg pages.

    Raises: BadInput: when the header shows that the file cannot be used.
    """
    with contextlib.closing(GuardedFile(path)) as source:
        container = foreign_container(source.read_at)
        if container is None:
            with _open_native(source, thorough) as song:
                if song is not None:
                    _check_song(song, cfg)
                    yield song
                    return
            container = "ogg"
        with _open_with_ffmpeg(source, container, thorough) as song:
            _check_song(song, cfg)
            yield song


@contextlib.contextmanager
def _open_native(source: GuardedFile, thorough: bool) -> Iterator[Song | None]:
    """Open with libsndfile; None for chained Ogg streams, of which it reads only the first."""
    claim = read_claim(source.read_at, source.size)
    if claim == NO_CLAIM:
        claim = mp3_claim(source.read_at, source.size, thorough)
    if claim.shortage:
        raise BadInput(Reason.TRUNCATED, claim.shortage)
    source.present(claim.prefix, claim.start)
    try:
        sound = OnePassSound(source)
    except soundfile.LibsndfileError as error:
        source.check()
        if source.read_at(0, 4) == b"OggS":
            _scan_ogg(source)
        raise _unreadable(error) from None
    with sound:
        source.check()
        frames = sound.frames if sound.frames < UNKNOWN_FRAMES else None
        if sound.format == "OGG":
            chained = frames is None
            if frames == 0 or (thorough and not chained):
                chained = _scan_ogg(source, f", after {frames} samples")
            if chained:
                yield None
                return
        declared = claim.num_samples
        if declared is None and claim.estimate is None and sound.subtype not in MPEG_WITHOUT_COUNT:
            declared = frames
        length = declared
        if length is None:
            length = claim.estimate or frames or _guess_flac(source.size, sound)
        yield Song(
            header=Header(
                sound.samplerate, sound.channels, length, f"{sound.format} {sound.subtype}"
            ),
            declared=declared,
            tolerance=MP3_TOLERANCE if sound.subtype.startswith("MPEG") else 0,
            blocks=lambda block_samples: _native_blocks(source, sound, block_samples),
        )


def _native_blocks(source: GuardedFile, sound: OnePassSound, block_samples: int) -> Iterator[Block]:
    buffer = np.empty((block_samples, sound.channels), np.float32)
    view = buffer.data.cast("B")
    count = block_samples
    while count == block_samples:
        try:
            count = sound.buffer_read_into(view, "float32")
        except soundfile.LibsndfileError as error:
            source.check()
            raise _unreadable(error) from None
        source.check()
        if count:
            yield buffer[:count]


def _scan_ogg(source: GuardedFile, after: str = "") -> bool:
    """Check for chained Ogg streams.

    Raises: BadInput: when the last stream is truncated.
    """
    pages = scan_ogg(source.read_at, source.size)
    if pages.flaw:
        raise BadInput(Reason.TRUNCATED, f"the Ogg file {pages.flaw}{after}")
    return pages.chained


def _unreadable(error: soundfile.LibsndfileError) -> Exception:
    if error.code == SFE_MALLOC_FAILED:
        return MemoryError()
    reason = Reason.UNSUPPORTED if error.code == SF_UNSUPPORTED_ENCODING else Reason.UNREADABLE
    words = "no whole frame of audio" if error.code == SFE_BAD_FILE else error.error_string
    return BadInput(reason, f"libsndfile: {words}")


def _guess_flac(size: int, sound: OnePassSound) -> int:
    bits = 24 if sound.subtype == "PCM_24" else 16
    return int(size * 8 / (bits * sound.channels * FLAC_RATIO))


@contextlib.contextmanager
def _open_with_ffmpeg(source: GuardedFile, container: str, thorough: bool) -> Iterator[Song]:
    try:
        with contextlib.closing(open_foreign(source.path, container)) as foreign:
            chained = container == "ogg" and thorough and _scan_ogg(source)
            length = foreign.num_samples
            if length is None:
                length = source.size * foreign.sample_rate // ASSUMED_BYTES_PER_S
            yield Song(
                header=Header(
                    foreign.sample_rate, foreign.channels, length, f"{foreign.codec} (ffmpeg)"
                ),
                declared=length if foreign.exact and not chained else None,
                tolerance=foreign.tolerance,
                blocks=foreign.blocks,
            )
    except BadInput as bad:
        if bad.reason is Reason.UNREADABLE:
            source.read_through()
        raise


def _check_song(song: Song, cfg: DecodeConfig) -> None:
    header = song.header
    if header.channels > cfg.max_channels:
        raise BadInput(
            Reason.TOO_MANY_CHANNELS,
            f"it has {header.channels} channels; decode.max_channels is {cfg.max_channels}",
        )
    if not MIN_RATE_HZ <= header.sample_rate <= MAX_RATE_HZ:
        raise BadInput(Reason.UNSUPPORTED, f"its sample rate is {header.sample_rate} Hz")
    if song.declared == 0:
        raise BadInput(Reason.EMPTY, "it has a header and no samples")
    if song.declared is not None:  # a song is not refused for an estimate
        _check_length(header.duration_s, cfg)


def _check_length(seconds: float, cfg: DecodeConfig) -> None:
    if seconds > cfg.max_hours * 3600:
        raise BadInput(
            Reason.TOO_LONG,
            f"it lasts {seconds / 3600:.2f} hours or more; decode.max_hours is {cfg.max_hours:g}",
        )


# ---- requests -----------------------------------------------------------------------------------


def probe(path: bytes, cfg: DecodeConfig) -> dict[str, Any]:
    with open_song(path, cfg, thorough=False) as song:
        return _done(song.header)


def decode(
    path: bytes,
    out: bytes,
    target_rate: int,
    resample_cfg: ResampleConfig,
    cfg: DecodeConfig,
    progress: Callable[[float], None],
) -> dict[str, Any]:
    """Write one channel of `path` to `out` at `target_rate` Hz: float32, little-endian.

    Calls `progress` with the seconds decoded so far.

    Raises: BadInput: when the file is broken, not supported or beyond a limit.
    """
    with open_song(path, cfg, thorough=True) as song, open(out, "wb", buffering=0) as file:
        rate = song.header.sample_rate
        resampler = stream_resampler(rate, target_rate, resample_cfg)
        waiting: Array | None = None  # one block behind, because the last one must be marked
        total = written = bad = first_bad = 0
        try:
            for block in song.blocks(max(1, BLOCK_VALUES // song.header.channels)):
                wav = down_mix(block, cfg.channels)
                if wrong := _count_not_finite(wav):
                    first_bad = first_bad if bad else total + int(np.argmin(np.isfinite(wav)))
                    bad += wrong
                elif waiting is not None and not bad:
                    written += _write(file, out, resampler.push(waiting, last=False))
                waiting = wav
                total += len(wav)
                _check_length(total / rate, cfg)
                progress(total / rate)
        except BadInput as stop:
            raise _with_lengths(stop, song, total) from None
        if song.declared is not None and abs(total - song.declared) > song.tolerance:
            raise BadInput(Reason.TRUNCATED, _lengths(song, total))
        if waiting is None:
            raise BadInput(Reason.EMPTY, "it has a header and no samples")
        if bad:
            raise BadInput(
                Reason.NOT_FINITE,
                f"{bad} of {total} samples are NaN or infinite, the first is number {first_bad} "
                f"({first_bad / rate:.2f} s)",
            )
        written += _write(file, out, resampler.push(waiting, last=True))
        header = replace(song.header, num_samples=total) if song.declared is None else song.header
        return {**_done(header), "num_samples": written, "source_samples": total}


def _with_lengths(stop: BadInput, song: Song, total: int) -> BadInput:
    """Return the error that ended decoding; an unreadable rest means a truncated song."""
    if stop.reason is Reason.UNREADABLE and total < (song.declared or 0):
        lengths = f"{_lengths(song, total)} or a little more"
        return BadInput(Reason.TRUNCATED, f"{lengths}; {stop.detail}")
    return stop


def _lengths(song: Song, total: int) -> str:
    declared, rate = song.declared or 0, song.header.sample_rate
    return (
        f"the header declares {declared} samples ({declared / rate:.2f} s), "
        f"the file decodes to {total} ({total / rate:.2f} s)"
    )


def down_mix(block: Block, channels: str) -> Array:
    """Mix a block (T, C) down to a new array (T,): the "mean" of the channels or the "first"."""
    wav: Array = block[:, 0].copy()
    if channels == "mean" and block.shape[1] > 1:
        for c in range(1, block.shape[1]):
            wav += block[:, c]
        wav *= np.float32(1 / block.shape[1])
    return wav


def _count_not_finite(wav: Array) -> int:
    with np.errstate(all="ignore"):
        if np.isfinite(np.add.reduce(wav)):  # NaN and infinity survive a sum; four times cheaper
            return 0
    return int(len(wav) - np.count_nonzero(np.isfinite(wav)))


def _write(file: IO[bytes], name: bytes, wav: Array) -> int:
    data = np.ascontiguousarray(wav, "<f4").data.cast("B")
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fsdecode(name)) from None
    return len(wav)


def _done(header: Header) -> dict[str, Any]:
    fields = [header.sample_rate, header.channels, header.num_samples, header.format]
    return {"kind": "done", "header": fields}


# ---- the process --------------------------------------------------------------------------------


def main() -> None:
    _die_with(int(sys.argv[2]))
    cfg = DecodeConfig(**json.loads(sys.argv[1]))
    # Replies have their own descriptor; anything that a C library prints goes to stderr.
    replies = os.dup(1)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory(cfg.memory_mb)

    def say(message: dict[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[os.write(replies, data) :]

    say({"kind": "ready"})
    try:
        for line in sys.stdin.buffer:
            for work in _tasks(json.loads(line), cfg, say):
                say(_outcome(work))
    except MemoryError:
        os._exit(OUT_OF_MEMORY_EXIT)


def _tasks(
    request: dict[str, Any], cfg: DecodeConfig, say: Callable[[dict[str, Any]], None]
) -> Iterator[Callable[[], dict[str, Any]]]:
    if "probe" in request:
        for name in request["probe"]:
            yield functools.partial(probe, _path(name), cfg)
        return
    resample_cfg = ResampleConfig(**request["resample"])
    if resample_cfg.backend == "torchaudio" and "torchaudio" not in sys.modules:
        _limit_memory(None)  # torch maps gigabytes that it does not use
        import_torchaudio()
        _limit_memory(cfg.memory_mb)
    yield functools.partial(
        decode,
        _path(request["decode"]),
        _path(request["out"]),
        request["target_rate"],
        resample_cfg,
        cfg,
        lambda seconds: say({"kind": "progress", "seconds": seconds}),
    )


def _outcome(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except BadInput as bad:
        return {"kind": "bad", "reason": bad.reason, "detail": bad.detail}
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError from None
        filename = None if error.filename is None else os.fsdecode(error.filename)
        return {"kind": "fault", "errno": error.errno, "filename": filename}


def _path(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, even while a decoder hangs."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


def _limit_memory(memory_mb: int | None) -> None:
    """Limit the address space to its current size plus `memory_mb`; None removes the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = hard
    if memory_mb is not None:
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        limit = used + (memory_mb << 20)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    main()
