"""Ctrl-C, SIGTERM and SIGHUP: the first asks for a stop, a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class StopRequest:
    """A request to stop. number: the signal that made it; None: there was none."""

    number: int | None = None


@contextmanager
def interrupt_at_stop_signal() -> Iterator[StopRequest]:
    """Raise KeyboardInterrupt in the block at a stop signal, and end the process at a second one.

    The signal is noted in the request. A thread waits for the second one, since the main thread may
    be deep in a library. It waits on after the block, until the process has ended.
    """
    request = StopRequest()

    def interrupt(number: int) -> None:
        if request.number is None:
            request.number = number
            raise KeyboardInterrupt

    before = _call_at_stop_signal(interrupt)
    if not before:
        yield request
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    former = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end_at_second, args=(reader, writer), daemon=True).start()
    try:
        yield request
    finally:
        if request.number is None:
            signal.set_wakeup_fd(former)
            writer.shutdown(socket.SHUT_WR)
            _restore(before)


def _end_at_second(reader: socket.socket, writer: socket.socket) -> None:
    """End the process at the second stop signal.

    writer: gets the number of each signal from the interpreter; open as long as the thread lives.
    """
    seen = 0
    with reader, writer:
        while numbers := reader.recv(64):
            for number in numbers:
                seen += number in _SIGNALS
                if seen == 2:
                    os._exit(128 + number)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Yield a request that the first stop signal in the block makes; a second one acts as before.

    Only the main thread gets signals: in another thread there is never a request.
    """
    request = StopRequest()

    def note(number: int) -> None:
        request.number = number
        _restore(before)

    before = _call_at_stop_signal(note)
    try:
        yield request
    finally:
        _restore(before)


@contextmanager
def keep_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM, which `ray.init` replaces by one that raises SystemExit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        signal.signal(signal.SIGTERM, before)
        if callable(before):  # called, since a signal raised here would count as a second one
            before(signal.SIGTERM, None)
        else:
            signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _call_at_stop_signal(act: Callable[[int], None]) -> dict[int, Any]:
    """Call `act` with the number of a stop signal, and return the handlers until now.

    Ignored signals stay ignored, as after `nohup`. In another thread than the main one nothing
    changes.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    handlers = {int(number): signal.getsignal(number) for number in _SIGNALS}
    before = {number: old for number, old in handlers.items() if old is not signal.SIG_IGN}

    def handle(number: int, frame: FrameType | None) -> None:
        act(number)

    for number in before:
        signal.signal(number, handle)
    return before


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
