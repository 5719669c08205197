"""The processes that train together: one, or those of torch.distributed.

Tested by tests/pipeline/train/test_trainer.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET_BYTES = 32 << 20  # sent at a time

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run. rank: of this one among `size`; local_size: those on this machine."""

    rank: int
    size: int
    local_size: int
    device: torch.device

    @staticmethod
    def of_this_process(device: torch.device) -> ProcessGroup:
        """Return the group that torch.distributed has set up, or this process alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return ProcessGroup(0, 1, 1, device)
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return ProcessGroup(dist.get_rank(), dist.get_world_size(), local_size, device)

    @property
    def leads(self) -> bool:
        """True in the process that writes."""
        return self.rank == 0

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the processes, in place. All of them give the same shapes."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            sums = torch.split(flat, [tensor.numel() for tensor in bucket])
            for tensor, total in zip(bucket, sums, strict=True):
                tensor.copy_(total.view_as(tensor))

    def any(self, mine: bool) -> bool:
        """Return True when `mine` is true in any process."""
        if self.size == 1:
            return mine
        flag = torch.tensor(float(mine), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def broadcast(self, value: T) -> T:
        """Return the leader's `value`."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return the `value` of every process, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield consecutive tensors of one dtype, about `_BUCKET_BYTES` together."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size > _BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
    if bucket:
        yield bucket
