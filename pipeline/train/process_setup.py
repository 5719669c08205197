"""Settings of the training process that last as long as a run: threads, seeds, errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

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
