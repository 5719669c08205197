"""Settings of the training process that last as long as a run: threads, seeds, errors, signals."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from models.checkpoint import CheckpointError
from pipeline.errors import UserError


@contextmanager
def training_threads(threads: int | None, local_processes: int) -> Iterator[None]:
    """Let torch use `threads`; None: the cores of this machine, divided among its processes."""
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads or max(1, cores // local_processes))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def keep_global_generators(device: torch.device) -> Iterator[None]:
    """Restore torch's random number generators at the end."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def explain_errors() -> Iterator[None]:
    """Turn a full GPU and unusable checkpoints into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "a step does not fit into the GPU's memory; lower data.batch_size or data.max_frames, "
            "or raise optimizer.accumulate"
        ) from error
    except CheckpointError as error:
        raise UserError(str(error)) from error


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C or SIGTERM sets; a second one acts as before.

    Only the main thread gets signals: in another thread the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, before[number])

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
