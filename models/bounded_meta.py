"""Building of networks that an untrusted file describes, without memory and up to a size.

Tested by tests/models/test_bounded_meta.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

# Parameters for each tensor of a file: a fused one may be stored in parts, and a shared one once.
_PER_TENSOR = 2
_AT_LEAST = 1500  # a whole network, so that a file of another kind is told what it lacks
_EVENTS_PER_PARAMETER = 4  # modules count too, and a weight norm adds parameters and moves one


def most_parameters(tensors_in_file: int) -> int:
    """Return the number of parameters that a network in a file of so many tensors may have."""
    return max(_AT_LEAST, _PER_TENSOR * tensors_in_file)


@contextmanager
def bounded_meta(most: int | None) -> Iterator[None]:
    """Let networks be built on the meta device, without memory or random numbers.

    most: number of parameters at which to give up; None: no limit.

    Raises: ValueError: when the networks have more, or a size that torch refuses.
    """
    count = 0

    def check(_: nn.Module, __: str, ___: Any) -> None:
        nonlocal count
        count += 1
        if most is not None and count > _EVENTS_PER_PARAMETER * most:
            raise ValueError(f"it describes a network of more than {most} tensors, unlike its file")

    handles = (
        register_module_parameter_registration_hook(check),
        register_module_module_registration_hook(check),
    )
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tensors of size zero
            yield
    except (TypeError, RuntimeError, OverflowError, ZeroDivisionError, MemoryError) as error:
        line = str(error).partition("\n")[0]
        raise ValueError(f"it describes a network that cannot be built ({line})") from error
    finally:
        for handle in handles:
            handle.remove()
