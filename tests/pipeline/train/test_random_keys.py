"""Random numbers that follow from a seed and the names of their use."""

from __future__ import annotations

import torch

from pipeline.train.random_keys import hashed_key, seed_dropout, seed_networks


def test_keys_are_these_on_any_machine_and_version() -> None:
    """A resumed run depends on them."""
    assert hashed_key(1234, "networks") == 8012078533302876755
    assert hashed_key(1234, 7, 0) == 6744063800967692546
    assert hashed_key(1, 23) != hashed_key(12, 3)


def test_dropout_differs_by_seed_step_and_process() -> None:
    draws = []
    for seed, step, rank in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (1, 0, 0)):
        seed_dropout(seed, step, rank)
        draws.append(float(torch.rand(())))
    assert draws[0] == draws[-1] and len(set(draws)) == 4
    seed_networks(1)
    first = torch.rand(())
    seed_networks(1)
    assert torch.equal(torch.rand(()), first)
