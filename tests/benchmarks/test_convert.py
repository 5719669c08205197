"""The benchmark of singing: both sides sing the same. No measured cost is asserted."""

from __future__ import annotations

import pytest
import torch

from benchmarks import convert as bench
from models.synthesizer.blocks.noise import KeyedNoise
from tests.benchmarks.test_train import FRAMES, TINY


@pytest.mark.slow
def test_both_sides_sing_the_same() -> None:
    clip = bench.clips(TINY, FRAMES)
    wavs = [build(TINY)(clip, KeyedNoise(clip.noise_keys)) for build in bench.SIDES.values()]
    assert wavs[0].shape == (2, FRAMES * TINY.hop_length)
    assert wavs[0].std() > 1e-3
    # The plain source sums phases up in float32, sample by sample.
    torch.testing.assert_close(*wavs, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_costs_are_measured_and_shown() -> None:
    costs = bench.compare(TINY, 8, 1, repeats=1, allocator={})
    assert all(cost.seconds > 0 and cost.peak_mb > 100 for cost in costs.values())
    ours, plain = bench.Cost(1.0, 300.0), bench.Cost(2.0, 600.0)
    table = bench.table({(200, 2): {"ours": ours, "plain": plain}}, bench.TEMPLATE)
    assert "| 200 x 2 | 1.00 | 2.00 | **0.50** | 0.215 | 300 | 600 | 3.7 |" in table


@pytest.mark.slow
def test_a_conversion_is_measured() -> None:
    assert bench.conversion(0.05).peak_mb > 100
