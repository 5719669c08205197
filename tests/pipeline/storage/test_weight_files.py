from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from models.checkpoint import sha256_of
from pipeline.errors import UserError
from pipeline.storage.weight_files import read_weights, require_safetensors, require_unchanged


@pytest.fixture
def hubert(golden: Path, tmp_path: Path) -> Path:
    """A network of 3 layers, 48 wide; a copy, to be written to."""
    return Path(shutil.copy(golden / "encoders" / "tiny_hubert_base.pt", tmp_path / "hubert.pt"))


def test_a_checkpoint_that_changes_under_a_run_is_noticed(hubert: Path) -> None:
    weights = read_weights({"encoder.checkpoint": str(hubert)})["encoder.checkpoint"]
    require_unchanged("encoder.checkpoint", weights)
    os.utime(hubert, ns=(1, 1))  # as a copy on another machine has it
    require_unchanged("encoder.checkpoint", weights)
    with hubert.open("r+b") as file:
        file.seek(5000)
        file.write(b"!!!!")
    with pytest.raises(UserError, match=r"^encoder\.checkpoint: .*hubert\.pt changed since"):
        require_unchanged("encoder.checkpoint", weights)
    hubert.unlink()
    with pytest.raises(UserError, match=r"hubert\.pt was there when the run began"):
        require_unchanged("encoder.checkpoint", weights)


def test_one_file_is_read_once_however_many_encoders_use_it(
    hubert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def counting(path: str) -> str:
        read.append(path)
        return sha256_of(path)

    monkeypatch.setattr("models.checkpoint.sha256_of", counting)
    keys = ("encoder.checkpoint", "encoders.contentvec256l9.checkpoint")
    weights = read_weights(dict.fromkeys(keys, str(hubert)))
    assert len(read) == 1
    assert weights[keys[0]] == weights[keys[1]]
    assert weights[keys[0]].size == hubert.stat().st_size


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
