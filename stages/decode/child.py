"""The decode child: the only process that parses foreign audio bytes. `Decoder` starts it.

It reads requests from stdin, one JSON object a line, and answers on stdout: {"probe": [path, ...]}
with one line per file, {"decode": path, ...} with progress lines and then one outcome. Outcomes are
`done`, `bad` (a fault of the file) and `fault` (a fault of the storage). It exits when stdin closes
or its parent dies, with OUT_OF_MEMORY_EXIT when memory runs out, and with a traceback on a bug.

Tested by tests/stages/decode/test_decoder.py.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from models.torchaudio_compat import import_torchaudio
from stages.decode.container import Block
from stages.decode.decoder import OUT_OF_MEMORY_EXIT, DecodeConfig, Header
from stages.decode.song import check_duration, open_song
from stages.errors import BadInput, Reason
from stages.resample import ResampleConfig, stream_resampler
from stages.types import Array

MAX_PEAK = 2.0**15  # floats that hold 16-bit integers; what is larger is no audio
BIG_SHARE = 0.05  # a song that fills more than this of the scratch disk may be too big for it
PR_SET_PDEATHSIG = 1


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
        if song.declared is not None:
            _check_room(out, int(song.declared * target_rate / rate) * 4)
        resampler = stream_resampler(rate, target_rate, resample_cfg)
        waiting: Array | None = None  # one block behind, because the last one must be marked
        samples = _Samples()
        written = 0
        for block in song.read_blocks():
            wav = down_mix(block, cfg.channels)
            samples.add(block, wav)
            if waiting is not None and not samples.bad:
                written += _write(file, out, resampler.push(waiting, last=False))
            waiting = wav
            check_duration(samples.total / rate, cfg)
            progress(samples.total / rate)
        notes = song.judge(samples.total)
        samples.check(rate)
        assert waiting is not None
        written += _write(file, out, resampler.push(waiting, last=True))
        header = Header(rate, song.header.channels, samples.total, song.header.format)
        return {
            **_done(header),
            "num_samples": written,
            "source_samples": samples.total,
            "channels_peak": samples.peak,
            "notes": notes,
        }


class _Samples:
    """Number and peak of the samples of a song, and values that are no number."""

    def __init__(self) -> None:
        self.total = 0  # per channel
        self.peak = 0.0  # highest absolute sample of any channel
        self.peak_at = 0
        self.bad = 0  # samples that are NaN or infinite
        self.first_bad = 0

    def add(self, block: Block, wav: Array) -> None:
        """Count a block (T, C) that was mixed down to `wav` (T,)."""
        with np.errstate(all="ignore"):
            peak = float(max(block.max(), -block.min()))
            if not np.isfinite(peak) and (wrong := np.count_nonzero(~np.isfinite(wav))):
                if not self.bad:
                    self.first_bad = self.total + int(np.argmin(np.isfinite(wav)))
                self.bad += int(wrong)
        if np.isfinite(peak) and peak > self.peak:
            self.peak, self.peak_at = peak, self.total
        self.total += len(wav)

    def check(self, rate: int) -> None:
        """Refuse samples that are no audio.

        Raises: BadInput: when samples are not finite, or far beyond full scale.
        """
        if self.bad:
            raise BadInput(
                Reason.NOT_FINITE,
                f"{self.bad} of {self.total} samples are NaN or infinite, the first is number "
                f"{self.first_bad} ({self.first_bad / rate:.2f} s)",
            )
        if self.peak > MAX_PEAK:
            raise BadInput(
                Reason.OUT_OF_RANGE,
                f"its samples reach {self.peak:.3g} times full scale at about "
                f"{self.peak_at / rate:.2f} s; scale it to -1 to 1",
            )


def down_mix(block: Block, channels: str) -> Array:
    """Mix a block (T, C) down to a new array (T,): the "mean" of the channels or the "first"."""
    wav: Array = block[:, 0].copy()
    if channels == "mean" and block.shape[1] > 1:
        with np.errstate(all="ignore"):
            for c in range(1, block.shape[1]):
                wav += block[:, c]
        wav *= np.float32(1 / block.shape[1])
    return wav


def _check_room(out: bytes, needed: int) -> None:
    """Refuse a song of `needed` bytes that the scratch disk cannot hold.

    A small song that does not fit is no fault of its own: the disk is full.

    Raises: BadInput: when the song is big and does not fit.
    """
    disk = os.statvfs(os.path.dirname(out))
    free, capacity = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    if needed > free and needed > BIG_SHARE * capacity:
        raise BadInput(
            Reason.NO_ROOM,
            f"decoded it takes {needed / 1e6:.0f} MB of scratch, {free / 1e6:.0f} MB are free; "
            "set workers.scratch to a larger disk",
        )


def _write(file: IO[bytes], name: bytes, wav: Array) -> int:
    data = np.ascontiguousarray(wav, "<f4").data.cast("B")
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _check_room(name, file.tell() + 2 * len(data))
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
