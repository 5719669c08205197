"""The processes that train together: one, or as many as torch.distributed has been told of."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET_BYTES = 32 << 20  # what is sent at a time

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """rank: this process, of `size`. neighbours: how many of them are on this machine."""

    rank: int
    size: int
    neighbours: int
    device: torch.device

    @staticmethod
    def of_this_process(device: torch.device) -> ProcessGroup:
        if not (dist.is_available() and dist.is_initialized()):
            return ProcessGroup(0, 1, 1, device)
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return ProcessGroup(dist.get_rank(), dist.get_world_size(), neighbours, device)

    @property
    def leads(self) -> bool:
        """The one that writes."""
        return self.rank == 0

    def add_up(self, tensors: Sequence[Tensor]) -> None:
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
        """Whether it is true of any process."""
        if self.size == 1:
            return mine
        flag = torch.tensor(float(mine), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def tell(self, value: T) -> T:
        """The leader's `value`."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every process's `value`, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, together of about `_BUCKET_BYTES`."""
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
