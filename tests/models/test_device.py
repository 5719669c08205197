from __future__ import annotations

import pytest
import torch

from models.device import resolve_device


def test_devices() -> None:
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match=r"^f0\.device is 'gpu', which torch does not know"):
        resolve_device("gpu", "f0.device")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_absent_is_refused_by_the_key_that_sets_it(device: str) -> None:
    with pytest.raises(ValueError, match=rf"^f0\.device is {device}, but torch finds no CUDA"):
        resolve_device(device, "f0.device")
