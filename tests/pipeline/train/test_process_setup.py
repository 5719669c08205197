"""Threads, generators and errors of the training process."""

from __future__ import annotations

import pytest
import torch

from models.checkpoint import CheckpointError
from pipeline.errors import UserError
from pipeline.train.process_setup import (
    explain_errors,
    keep_global_generators,
    training_threads,
)


def test_threads_are_limited_and_restored() -> None:
    before = torch.get_num_threads()
    with training_threads(3, 1):
        assert torch.get_num_threads() == 3
    with training_threads(None, 10**6):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_global_generators_are_restored() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with keep_global_generators(torch.device("cpu")):
        torch.manual_seed(6)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA"), "lower data.batch_size"),
        (CheckpointError("it is damaged"), "it is damaged"),
    ],
)
def test_errors_of_memory_and_checkpoints_are_explained(error: Exception, words: str) -> None:
    with pytest.raises(UserError, match=words), explain_errors():
        raise error
    with pytest.raises(KeyError), explain_errors():
        raise KeyError
