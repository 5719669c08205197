"""What commands that write one file, or compute on a device, refuse alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.cluster.device import choose_device
from pipeline.errors import UserError
from pipeline.storage.weight_files import require_safetensors


def test_devices() -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="'tpu'; it is auto, cpu or cuda"):
        choose_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UserError, match="finds no CUDA device"):
        choose_device("cuda")


def test_files_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    require_safetensors(tmp_path / "a.safetensors")
    require_safetensors(tmp_path / "new" / "a.safetensors")
    for out, words in (
        (tmp_path, "is a folder; name the file"),
        (tmp_path / "a.pt", r"must end in \.safetensors"),
        (tmp_path / "file" / "a.safetensors", "is a file, not a folder"),
    ):
        with pytest.raises(UserError, match=words):
            require_safetensors(out)
