"""Threads, generators, errors and signals of the training process."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from models.checkpoint import CheckpointError
from pipeline.errors import UserError
from pipeline.train.process_setup import (
    explain_errors,
    keep_global_generators,
    stop_on_signal,
    training_threads,
)


def test_threads_are_limited_and_restored() -> None:
    before = torch.get_num_threads()
    with training_threads(3, 1):
        assert torch.get_num_threads() == 3
    with training_threads(None, 10**6):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_global_generators_are_restored() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with keep_global_generators(torch.device("cpu")):
        torch.manual_seed(6)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA"), "lower data.batch_size"),
        (CheckpointError("it is damaged"), "it is damaged"),
    ],
)
def test_errors_of_memory_and_checkpoints_are_explained(error: Exception, words: str) -> None:
    with pytest.raises(UserError, match=words), explain_errors():
        raise error
    with pytest.raises(KeyError), explain_errors():
        raise KeyError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_sets_the_event_and_the_second_acts_as_before(number: int) -> None:
    received: list[int] = []
    before = signal.signal(number, lambda number, frame: received.append(number))
    try:
        with stop_on_signal() as stop:
            assert not stop.is_set()
            os.kill(os.getpid(), number)
            assert stop.is_set() and not received
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
            seen.append(stop.is_set() or signal.getsignal(signal.SIGINT) is not handler)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]
