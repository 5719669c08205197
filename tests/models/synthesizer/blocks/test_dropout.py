"""Dropout on a CPU: the share of dropped elements, the mean, and determinism by seed."""

from __future__ import annotations

import torch
from torch import nn

from models.synthesizer.blocks.attention import MultiHeadAttention
from models.synthesizer.blocks.dropout import Dropout


def test_a_share_is_dropped_wherever_it_stands() -> None:
    drop = Dropout(0.2)
    torch.manual_seed(0)
    x = torch.ones(400_001, requires_grad=True)
    y = drop(x)
    lost, kept = y.detach().unique().tolist()
    assert lost == 0 and abs(kept - 1.25) < 2e-5
    for place in range(4):  # of each draw's four parts
        share = (y[place::4] == 0).float().mean()
        assert abs(float(share) - 0.2) < 5 * (0.2 * 0.8 / 100_000) ** 0.5
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_neighbours_are_dropped_independently() -> None:
    torch.manual_seed(0)
    gone = Dropout(0.5)(torch.ones(400_000)) == 0
    for distance in range(1, 5):
        both = (gone[distance:] & gone[:-distance]).float().mean()
        assert abs(float(both) - 0.25) < 0.01


def test_the_seed_decides() -> None:
    drop, x = Dropout(0.1), torch.randn(2, 3, 50)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(drop(x))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_where_chance_has_no_say() -> None:
    x = torch.randn(100)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert not Dropout(1.0)(x).any()


def test_attention_in_training_attends_as_otherwise_on_average() -> None:
    """Causal attention uses another code path with dropout."""
    torch.manual_seed(0)
    attention = MultiHeadAttention(8, 8, 2, dropout=0.1)
    nn.init.eye_(attention.conv_o.weight[:, :, 0])
    x = torch.randn(1, 8, 12)
    with torch.no_grad():
        expected = attention.eval()(x, x, causal=True)
        many = x.expand(3000, -1, -1)
        drawn = attention.train()(many, many, causal=True)
    error = drawn.std(0) / len(drawn) ** 0.5
    assert (error > 1e-4).any()
    assert ((drawn.mean(0) - expected).abs() < 5 * error + 1e-6).all()
