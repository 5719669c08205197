"""The reference vectors of the synthesizers, and the weights that they were made with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from tests.golden.synthesizers.fill import fill_module

Reference = Callable[[str], dict[str, np.ndarray]]
Filled = Callable[..., nn.Module]


@pytest.fixture(scope="session")
def reference(golden: Path) -> Reference:
    """reference(name): the arrays of tests/golden/synthesizers/<name>.npz, by their keys."""
    loaded: dict[str, dict[str, np.ndarray]] = {}

    def load(name: str) -> dict[str, np.ndarray]:
        if name not in loaded:
            path = golden / "synthesizers" / f"{name}.npz"
            with np.load(path, allow_pickle=False) as arrays:
                loaded[name] = dict(arrays)
        return dict(loaded[name])

    return load


@pytest.fixture(scope="session")
def filled() -> Filled:
    """filled(module, prefix=""): the module with weights from their names, in eval mode.

    prefix: what comes before the module's own names in the keys of the reference's state dict.
    """
    return fill_module
