"""The training benchmark: both sides do the same work. No measured cost is asserted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks import train as bench
from benchmarks.plain_training import PlainDiscriminator, PlainStep, PlainSynthesizer
from models.synthesizer.blocks.noise import KeyedNoise
from models.synthesizer.config import MelConfig, SynthesizerConfig
from models.synthesizer.step import GanStep, LossWeights

TINY = SynthesizerConfig(
    units_dim=24,
    n_speakers=5,
    n_fft=256,
    inter_channels=20,
    hidden_channels=16,
    filter_channels=24,
    n_layers=2,
    dropout=0.0,
    resblock_kernel_sizes=(3, 7),
    resblock_dilation_sizes=((1, 3), (1, 3)),
    upsample_rates=(8, 4, 2),
    upsample_initial_channel=32,
    upsample_kernel_sizes=(16, 8, 4),
    gin_channels=12,
    discriminator_channels=64,
)
MEL = MelConfig(n_fft=256, win_length=256, n_mels=20, f_max=22050.0)
FRAMES, SEGMENT = 33, 8

# In float32 the two sides differ by up to 2.4e-7 in a loss, relatively, and in a gradient by up to
# 1.6e-5 of the largest one of its parameter; in float64 by 4.5e-6, as far as ours keeps to it. Ten
# times the float32 figures are allowed.
LOSS, GRADIENT = 2.4e-6, 1.6e-4


@pytest.fixture(scope="module")
def sides() -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Tensor]]]:
    """Losses of a step of each side, and the gradients that its optimizers saw."""
    batch = bench.clips(TINY, FRAMES)
    generator, discriminator = bench.networks(TINY)
    critics = PlainDiscriminator(TINY.discriminator_channels)
    plain = PlainStep(PlainSynthesizer(TINY), critics, MEL, SEGMENT)
    plain.generator.load_state_dict(generator.state_dict())
    plain.discriminator.load_state_dict(discriminator.state_dict())
    optimizers = [torch.optim.AdamW(n.parameters(), 1e-4) for n in (generator, discriminator)]
    weights = LossWeights(segment_frames=SEGMENT)
    ours = GanStep(generator, discriminator, *optimizers, MEL, weights)
    for step in (
        ours,
        plain,
    ):  # or G's turn would see discriminators that differ in their last bits
        step.optim_d.param_groups[0]["lr"] = 0.0

    gradients: dict[str, dict[str, Tensor]] = {"ours": {}, "plain": {}}
    keep(ours.optim_g, generator, gradients["ours"])
    keep(ours.optim_d, discriminator, gradients["ours"])
    keep(plain.optim_g, plain.generator, gradients["plain"])
    keep(plain.optim_d, plain.discriminator, gradients["plain"])

    def noise() -> KeyedNoise:
        return KeyedNoise(batch.noise_keys)

    losses = {
        "ours": ours([batch], bench.totals_of(batch), lambda part: noise()),
        "plain": plain(batch, noise()),
    }
    return losses, gradients


def keep(optimizer: torch.optim.Optimizer, network: nn.Module, kept: dict[str, Tensor]) -> None:
    def look(*_: object) -> None:
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            kept[name] = parameter.grad.clone()

    optimizer.register_step_pre_hook(look)


def test_both_sides_have_the_same_losses(sides: tuple) -> None:
    losses, _ = sides
    assert set(losses["plain"]) == set(losses["ours"])
    for name, value in losses["plain"].items():
        assert losses["ours"][name] == pytest.approx(value, rel=LOSS), name


def test_both_sides_have_the_same_gradients(sides: tuple) -> None:
    _, gradients = sides
    assert len(gradients["plain"]) == len(gradients["ours"]) > 300
    for name, expected in gradients["plain"].items():
        found = gradients["ours"][name]
        if name.endswith("conv_k.bias"):  # adds the same to every score: 0 but for rounding
            assert found.abs().max() < 1e-5
        else:
            allowed = GRADIENT * expected.abs().max() + 1e-7
            assert (found - expected).abs().max() <= allowed, name


@pytest.mark.parametrize("side", bench.SIDES)
def test_every_phase_is_timed(side: str) -> None:
    clock = bench.Clock()
    step = bench.SIDES[side](TINY, MEL, clock, SEGMENT)
    clock.begin()
    step(bench.clips(TINY, FRAMES))
    assert set(clock.seconds) == {*bench.PHASES, *bench.NETWORKS}


def test_the_table_and_the_loading() -> None:
    seconds = dict.fromkeys(bench.ROWS, 1.0)
    slow = dict.fromkeys(bench.ROWS, 2.0)
    lines = bench.table(200, {"ours": bench.Cost(seconds, 10), "plain": bench.Cost(slow, 40)})
    assert "| **step** | 1.000 | 2.000 | 0.50 | 7.15 |" in lines
    assert "| peak MB | 10 | 40 | 0.25 | - |" in lines
    with bench.own_dataset(40) as dataset:
        assert bench.loading(dataset, 40, batches=2) > 0
