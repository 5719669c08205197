"""The parent's side of decoding: starts, queries and replaces the decode child.

C libraries that parse audio can crash, hang or use too much memory on crafted files. So a
persistent child process parses them, under limits; this process never opens the file.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from stages.errors import BadInput, Reason
from stages.resample import ResampleConfig
from stages.types import PcmFile

AudioPath = bytes | str | Path


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Settings and limits of decoding a file to one channel of samples.

    A header must be read within `timeout_s`. After `timeout_s`, decoding must be faster than
    `MIN_SPEED` times real time: a song of D seconds has `timeout_s + D / MIN_SPEED` seconds in all.
    D counts decoded seconds, so a header that claims hours does not extend the limit.
    `memory_mb` is address space beyond that of the idle child; 64 is enough for common formats.
    `damaged`: a song with damage inside is left out, or kept, with silence in place of what is lost
    and a note in the ledger. A song that is cut is always left out.
    """

    channels: Literal["mean", "first"] = "mean"
    damaged: Literal["quarantine", "keep"] = field(
        default="quarantine", metadata={"neutral": "quarantine"}
    )
    max_channels: int = 32
    timeout_s: float = 60.0
    memory_mb: int = 2048
    max_hours: float = 12.0

    def __post_init__(self) -> None:
        if self.max_channels < 1:
            raise ValueError(f"decode.max_channels must be at least 1, not {self.max_channels}")
        if not self.timeout_s > 0:
            raise ValueError(f"decode.timeout_s must be positive, not {self.timeout_s}")
        if self.memory_mb < 1:
            raise ValueError(f"decode.memory_mb must be at least 1, not {self.memory_mb}")
        if not 0 < self.max_hours <= 1000:
            raise ValueError(f"decode.max_hours must be in (0, 1000], not {self.max_hours}")


MIN_SPEED = 4.0  # times real time; one core reaches about 100
STARTUP_S = 120.0  # time for the child to import numpy from a cold or remote disk
BATCH_CHARS = 32768  # total length of the paths in one request of probe_many
OUT_OF_MEMORY_EXIT = 77


@dataclass(frozen=True, slots=True)
class Header:
    """Properties from a file's header. `num_samples`: per channel; estimated if not stated."""

    sample_rate: int
    channels: int
    num_samples: int
    format: str

    @property
    def duration_s(self) -> float:
        return self.num_samples / self.sample_rate


@dataclass(frozen=True)
class Decoded:
    """A song at the target rate in a scratch file; `close` (or leaving `with`) deletes it."""

    wav: PcmFile
    header: Header
    source_samples: int  # per channel, as decoded
    channels_peak: float = 0.0  # of any channel, before the down-mix; 1 is full scale
    notes: tuple[str, ...] = ()  # what is odd about the file, although it can be used

    def close(self) -> None:
        self.wav.path.unlink(missing_ok=True)

    def __enter__(self) -> Decoded:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Decoder:
    """Reader of headers and songs in one persistent child process, started at first use.

    The child is replaced after a crash, a hang or an exceeded limit. If a child crashes that has
    read other files before, the last file may not be the cause; it is tried again in a new child.
    For one thread at a time; the child dies with the thread that started it.

    Storage faults (EIO, ESTALE, a full scratch disk) raise OSError, faults of the file BadInput,
    and a bug in the child RuntimeError with its traceback.
    """

    def __init__(self, cfg: DecodeConfig, scratch: Path) -> None:
        self.cfg = cfg
        self.scratch = Path(scratch)
        self.scratch.mkdir(parents=True, exist_ok=True)
        self._child: _Child | None = None

    def probe(self, path: AudioPath) -> Header:
        """Read the header of one file.

        Raises: BadInput: when the file is broken or not supported.
        """
        (outcome,) = self.probe_many([path])
        if isinstance(outcome, BadInput):
            raise outcome
        return outcome

    def probe_many(self, paths: Iterable[AudioPath]) -> Iterator[Header | BadInput]:
        """Read the headers of many files, in order, in constant memory.

        A file that crashes the child does not affect the others.
        """
        batch: list[str] = []
        size = 0
        for path in paths:
            batch.append(_name(path))
            size += len(batch[-1])
            if size >= BATCH_CHARS:
                yield from self._probe_batch(batch)
                batch, size = [], 0
        yield from self._probe_batch(batch)

    def decode(self, path: AudioPath, target_rate: int, resample_cfg: ResampleConfig) -> Decoded:
        """Decode one channel of `path` to `target_rate` Hz into a scratch file.

        Raises: BadInput: when the file is broken, not supported or beyond a limit.
        """
        out = self.scratch / f"song-{secrets.token_hex(8)}.f32"
        request = {
            "decode": _name(path),
            "out": _name(out),
            "target_rate": target_rate,
            "resample": asdict(resample_cfg),
        }
        try:
            reply = self._ask(request)
        except BaseException:
            out.unlink(missing_ok=True)
            raise
        wav = PcmFile(out, reply["num_samples"])
        return Decoded(
            wav,
            Header(*reply["header"]),
            reply["source_samples"],
            reply["channels_peak"],
            tuple(reply["notes"]),
        )

    @property
    def child_pid(self) -> int | None:
        """Process id of the child; None before the first use."""
        return None if self._child is None else self._child.pid

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _running(self) -> _Child:
        if self._child is None or not self._child.alive:
            self.close()
            self._child = _Child(self.cfg, self.scratch)
        return self._child

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        while True:
            child = self._running()
            try:
                child.send(request)
                return child.reply()
            except BadInput:
                raise
            except _LostError as lost:
                self.close()
                if lost.reason is Reason.TIMED_OUT or child.answers == 0:
                    raise BadInput(lost.reason, lost.detail) from None
            except BaseException:
                self.close()  # interrupted between request and reply
                raise

    def _probe_batch(self, names: list[str]) -> list[Header | BadInput]:
        outcomes: list[Header | BadInput] = []
        while len(outcomes) < len(names):
            child = self._running()
            try:
                child.send({"probe": names[len(outcomes) :]})
                while len(outcomes) < len(names):
                    try:
                        outcomes.append(Header(*child.reply()["header"]))
                    except BadInput as bad:
                        outcomes.append(bad)
            except _LostError as lost:
                self.close()
                if lost.reason is Reason.TIMED_OUT or child.answers == 0:
                    outcomes.append(BadInput(lost.reason, lost.detail))
            except BaseException:
                self.close()
                raise
        return outcomes


def _name(path: AudioPath) -> str:
    """Return the absolute path as text for JSON; bytes other than UTF-8 become lone surrogates."""
    name = os.fsencode(path)
    if not os.path.isabs(name):
        name = os.path.join(os.getcwdb(), name)
    return name.decode("utf-8", "surrogateescape")


class _LostError(Exception):
    """The child died, hung or ran out of memory."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class _Child:
    """A process that runs `stages.decode.child`, and its protocol of JSON lines."""

    def __init__(self, cfg: DecodeConfig, scratch: Path) -> None:
        self.cfg = cfg
        self.answers = 0
        self._received = bytearray()
        # Not a pipe, which could fill and block the child; append mode, so that it can be emptied.
        self._stderr = tempfile.TemporaryFile(dir=scratch)
        fcntl.fcntl(self._stderr, fcntl.F_SETFL, os.O_APPEND)
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-X", "faulthandler", "-m", "stages.decode.child"),
                *(json.dumps(asdict(cfg)), str(os.getpid())),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            env=_environment(),
            start_new_session=True,  # so Ctrl-C reaches the parent alone, which then ends the child
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._stdin, False)
        try:
            if self._line(time.monotonic() + STARTUP_S) != {"kind": "ready"}:
                raise RuntimeError("the decode child uses another protocol version")
        except _LostError as lost:
            self.kill()
            raise RuntimeError(f"the decode child did not start: {lost.detail}") from None
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, request: dict[str, Any]) -> None:
        os.ftruncate(self._stderr.fileno(), 0)
        data = memoryview(json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + self.cfg.timeout_s
        while data:
            self._wait(self._stdin, select.POLLOUT, deadline)
            try:
                data = data[os.write(self._stdin, data) :]
            except BrokenPipeError:
                raise self._death() from None

    def reply(self) -> dict[str, Any]:
        """Wait for the next final answer.

        Raises: BadInput: when the child reports a fault of the file; OSError: when it reports one
        of the storage; _LostError: when it is lost.
        """
        began = time.monotonic()
        decoded_s = 0.0
        while True:
            message = self._line(began + self.cfg.timeout_s + decoded_s / MIN_SPEED)
            if message["kind"] == "progress":
                decoded_s = message["seconds"]
                continue
            self.answers += 1
            if message["kind"] == "bad":
                raise BadInput(Reason(message["reason"]), message["detail"])
            if message["kind"] == "fault":
                raise OSError(message["errno"], os.strerror(message["errno"]), message["filename"])
            return message

    def kill(self) -> None:
        """Kill the child."""
        with self._process, self._stderr:  # closes the pipes and waits
            if self.alive:
                os.killpg(self.pid, signal.SIGKILL)

    def _line(self, deadline: float) -> dict[str, Any]:
        while (end := self._received.find(b"\n")) < 0:
            self._wait(self._stdout, select.POLLIN, deadline)
            data = os.read(self._stdout, 1 << 16)
            if not data:
                raise self._death()
            self._received += data
        line = self._received[:end]
        del self._received[: end + 1]
        message: dict[str, Any] = json.loads(line)
        return message

    def _wait(self, fd: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise _LostError(
                Reason.TIMED_OUT,
                f"slower than {self.cfg.timeout_s:g} s and {MIN_SPEED:g} times real time allow",
            )

    def _death(self) -> Exception:
        """Explain why the child closed its pipe: it is lost, or it has a bug."""
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return RuntimeError(f"the decode child closed its pipe but runs\n{self._stderr_tail()}")
        if code == OUT_OF_MEMORY_EXIT:
            limit = f"decoding it needs more than decode.memory_mb={self.cfg.memory_mb}"
            return _LostError(Reason.OUT_OF_MEMORY, limit)
        if code < 0:
            crash = f"{signal.Signals(-code).name} while reading it. {self._stderr_tail()}"
            return _LostError(Reason.CRASHED, crash.strip())
        return RuntimeError(f"the decode child failed (exit code {code}):\n{self._stderr_tail()}")

    def _stderr_tail(self) -> str:
        size = os.fstat(self._stderr.fileno()).st_size
        tail = os.pread(self._stderr.fileno(), 2048, max(0, size - 2048))
        return tail.decode("utf-8", "replace").strip()


def _environment() -> dict[str, str]:
    """Return the child's environment: one thread per library, and this process's module path."""
    root = str(Path(__file__).resolve().parents[2])
    path = [entry for entry in sys.path if entry]
    if root not in path:
        path.append(root)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(path)}
