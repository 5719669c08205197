"""Names and shapes of a network's tensors, and the check of a file against them.

Layouts are built on the meta device, without memory or random numbers.

Tested by tests/models/synthesizer/sovits/test_files.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.bounded_meta import bounded_meta
from models.checkpoint import CheckpointError

_SHOWN = 4  # names listed in an error before "and … more"


@dataclass(frozen=True)
class TensorLayout:
    """Names and shapes of a network's state dict, in its order.

    first: for each name the first name of the same tensor. They differ where flows share a network.
    """

    shapes: dict[str, tuple[int, ...]]
    first: dict[str, str]
    buffers: frozenset[str]

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters in the order in which an optimizer numbers them."""
        return [k for k, first in self.first.items() if k == first and k not in self.buffers]

    def without(self, start: str) -> TensorLayout:
        """Return the layout without the names that begin with `start`."""
        kept = {name: shape for name, shape in self.shapes.items() if not name.startswith(start)}
        return TensorLayout(
            kept, {name: self.first[name] for name in kept}, self.buffers & set(kept)
        )


def layout_of(build: Callable[[], nn.Module], most: int | None = None) -> TensorLayout:
    """Return the layout of the network that `build` makes.

    most: number of parameters at which to give up; None: no limit.

    Raises: ValueError: when the network has more, or cannot be built.
    """
    with bounded_meta(most):
        network = build()
    state = network.state_dict(keep_vars=True)
    owners: dict[int, str] = {}
    first = {name: owners.setdefault(id(tensor), name) for name, tensor in state.items()}
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return TensorLayout(shapes, first, frozenset(state.keys() - parameters))


def matching_tensors(
    path: Path,
    what: str,
    content: Mapping[str, Any],
    layout: TensorLayout,
    shared_once: bool = False,
) -> dict[str, Tensor]:
    """Return the tensors of `content` in the layout's order, as float32 copies on the CPU.

    Shared tensors are copied once. what: the network, for errors. shared_once: a tensor with
    several names is in `content` under the first only.

    Raises: CheckpointError: when tensors are missing, unknown, of another shape, not finite, or
    unequal under names that should share one tensor (the message names them).
    """
    wanted = {k: s for k, s in layout.shapes.items() if not shared_once or layout.first[k] == k}
    _require_names_and_shapes(path, what, content, wanted)
    tensors: dict[str, Tensor] = {}
    for name in layout.shapes:
        first = layout.first[name]
        if first in tensors:
            tensors[name] = tensors[first]
        else:
            tensors[name] = content[name].to("cpu", torch.float32, copy=True).contiguous()
    unequal = [
        f"{name} (differs from {layout.first[name]})"
        for name in wanted
        if layout.first[name] != name
        and not torch.equal(content[name].to(tensors[name]), tensors[name])
    ]
    infinite = [name for name in wanted if not torch.isfinite(tensors[name]).all()]
    _raise(
        path,
        what,
        [
            ("has different values where the flows share one network:", unequal),
            ("has values that are not finite (NaN or infinity) in", infinite),
        ],
    )
    return tensors


def _require_names_and_shapes(
    path: Path, what: str, content: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    both = [name for name in wanted if name in tensors]
    missing = [name for name in wanted if name not in content]
    surplus = [str(name) for name in content if name not in wanted]
    misshapen = [
        f"{name} (is {tuple(tensors[name].shape)}, must be {wanted[name]})"
        for name in both
        if tuple(tensors[name].shape) != wanted[name]
    ]
    others = [name for name in wanted if name in content and name not in tensors]
    others += [f"{k} ({tensors[k].dtype})" for k in both if not tensors[k].is_floating_point()]
    _raise(
        path,
        what,
        [
            (f"lacks {len(missing)} of {len(wanted)} tensors:", missing),
            ("has other shapes:", misshapen),
            ("has no floating-point tensor for", others),
            (f"has {len(surplus)} unknown tensors:", surplus),
        ],
    )


def _raise(path: Path, what: str, faults: list[tuple[str, list[str]]]) -> None:
    sentences = [f"{start} {_first_few(names)}" for start, names in faults if names]
    if sentences:
        raise CheckpointError(f"{path} does not match {what}: it {'; it '.join(sentences)}")


def _first_few(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
