"""Ctrl-C, SIGTERM and SIGHUP: the first stops, a second one ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.cluster.stop_signals import interrupt_at_stop_signal, keep_sigterm, stop_on_signal

ROOT = Path(__file__).resolve().parents[3]
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_makes_the_request_and_the_second_acts_as_before(number: int) -> None:
    received: list[int] = []
    before = signal.signal(number, lambda number, frame: received.append(number))
    try:
        with stop_on_signal() as stop:
            assert stop.number is None
            os.kill(os.getpid(), number)
            assert stop.number == number and not received
            os.kill(os.getpid(), number)
            assert received == [number]
        os.kill(os.getpid(), number)
        assert received == [number, number]
    finally:
        signal.signal(number, before)


def test_another_thread_gets_no_signal() -> None:
    handler = signal.getsignal(signal.SIGINT)
    seen: list[bool] = []

    def run() -> None:
        with stop_on_signal() as stop:
            seen.append(stop.number is not None or signal.getsignal(signal.SIGINT) is not handler)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_interrupts_the_block(number: int) -> None:
    before = [signal.getsignal(each) for each in NUMBERS]
    with interrupt_at_stop_signal() as request:
        pass
    assert [signal.getsignal(each) for each in NUMBERS] == before
    assert request.number is None
    script = """
import os, sys
from pipeline.cluster.stop_signals import interrupt_at_stop_signal
try:
    with interrupt_at_stop_signal() as request:
        os.kill(os.getpid(), int(sys.argv[1]))
except KeyboardInterrupt:
    print(request.number)
"""
    run = _start(script, number)
    assert run.communicate(timeout=60) == (f"{number}\n", "")
    assert run.returncode == 0


RAYS_HANDLER = """
import os, signal, sys, time
from pipeline.cluster.stop_signals import interrupt_at_stop_signal, keep_sigterm
try:
    with interrupt_at_stop_signal() as request, keep_sigterm():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        os.kill(os.getpid(), signal.SIGTERM)
except KeyboardInterrupt:
    time.sleep(0.2)  # a thread would end the process at a second signal
    print(request.number)
"""


def test_one_sigterm_while_a_library_has_its_own_handler_is_one_signal() -> None:
    run = _start(RAYS_HANDLER)
    assert run.communicate(timeout=60) == (f"{int(signal.SIGTERM)}\n", "")


DEAF = """
import signal, sys, time
from pipeline.cluster.stop_signals import interrupt_at_stop_signal
with interrupt_at_stop_signal() as request:
    while True:
        try:
            print("waiting", flush=True)
            time.sleep(100)
        except KeyboardInterrupt:  # as libraries do that swallow it
            print("stopping", flush=True)
"""


@pytest.mark.parametrize("number", NUMBERS)
def test_a_second_signal_ends_a_process_that_does_not_stop(number: int) -> None:
    run = _start(DEAF)
    assert run.stdout is not None
    assert run.stdout.readline() == "waiting\n"
    run.send_signal(signal.SIGTERM)
    assert run.stdout.readline() == "stopping\n"
    run.send_signal(number)
    assert run.communicate(timeout=60)[1] == ""
    assert run.returncode == 128 + number


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupt_at_stop_signal() as request, stop_on_signal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert request.number is None and stop.number is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigterm_keeps_its_handler_where_a_library_sets_another() -> None:
    def rays(number: int, frame: object) -> None:
        sys.exit(number)

    with stop_on_signal() as stop:
        before = signal.getsignal(signal.SIGTERM)
        with keep_sigterm():
            signal.signal(signal.SIGTERM, rays)
        assert signal.getsignal(signal.SIGTERM) is before
        with pytest.raises(SystemExit), keep_sigterm():
            signal.signal(signal.SIGTERM, rays)
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM


def _start(script: str, *words: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # Who runs the tests in the background may have it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
