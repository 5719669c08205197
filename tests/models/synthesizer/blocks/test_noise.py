"""Coherence of pieces of a song: noise tied to positions, and continuous phases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.synthesizer.blocks.noise import PlacedNoise
from models.synthesizer.blocks.source import HARMONICS, phase_after, sines

HOP = 8
BLOCK = 256  # frames that are drawn together


def latents(frames: int) -> Tensor:
    return torch.empty(1, 3, frames)


def waves(frames: int) -> Tensor:
    return torch.empty(1, 9, frames * HOP)


@pytest.mark.parametrize("draw", ["normal", "uniform"])
@pytest.mark.parametrize("like, each", [(latents, 1), (waves, HOP)], ids=["frames", "samples"])
@pytest.mark.parametrize(
    "start, frames",
    [(0, 1), (-300, 700), (-1, 2), (BLOCK - 1, 2), (BLOCK, BLOCK), (-BLOCK, 1), (100, 150)],
)
def test_every_stretch_draws_what_the_whole_song_has_there(
    draw: str, like: Callable[[int], Tensor], each: int, start: int, frames: int
) -> None:
    first, song = -600, 1400
    whole = getattr(PlacedNoise(7, first, song, HOP), draw)(like(song))
    found = getattr(PlacedNoise(7, start, frames, HOP), draw)(like(frames))
    skip = (start - first) * each
    assert torch.equal(found, whole[..., skip : skip + frames * each])


def test_drawing_again_draws_the_same_in_any_order() -> None:
    noise = PlacedNoise(7, 0, 10, HOP)
    before = noise.normal(latents(10))
    noise.uniform(latents(10))
    noise.normal(waves(10))
    assert torch.equal(noise.normal(latents(10)), before)


def test_numbers_are_normal_and_uniform_and_of_their_own() -> None:
    noise = PlacedNoise(7, -500, 2000, HOP)
    normal, uniform = noise.normal(waves(2000)), noise.uniform(waves(2000))  # 144 000 numbers
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    assert 0 <= uniform.min() and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.01 and abs(uniform.var() - 1 / 12) < 0.002
    among = noise.between(waves(2000), -0.5, 1.5)
    torch.testing.assert_close(among, uniform * 2 - 0.5)
    channels = torch.corrcoef(normal[0]) - torch.eye(9)
    assert channels.abs().max() < 0.04  # they have nothing in common
    blocks = normal[0, 0, 500 % BLOCK * HOP :][: 6 * BLOCK * HOP].reshape(6, -1)
    assert (torch.corrcoef(blocks) - torch.eye(6)).abs().max() < 0.1  # nor have places


def test_other_seeds_and_other_shapes_draw_other_numbers() -> None:
    one, other = (PlacedNoise(seed, 0, 500, HOP).normal(latents(500)) for seed in (1, 2))
    assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.1
    wider = PlacedNoise(1, 0, 500, HOP).normal(torch.empty(1, 4, 500))
    assert not torch.equal(wider[:, :3], one)


def test_what_is_drawn_is_of_the_dtype_that_is_asked_for() -> None:
    drawn = PlacedNoise(1, 0, 4, HOP).normal(latents(4).double())
    assert drawn.dtype == torch.float64 and drawn.shape == (1, 3, 4)


@pytest.mark.parametrize(
    "shape", [(2, 3, 10), (1, 3, 9), (1, 3, 11), (1, 3, 20), (1, 9, 10 * HOP + 1), (1, 9, HOP)]
)
def test_shapes_that_are_not_of_the_stretch_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not fit one example of 10 frames"):
        PlacedNoise(1, 0, 10, HOP).normal(torch.empty(shape))


@pytest.mark.parametrize("rate, hop", [(44100, 512), (32000, 320)])
def test_phase_after_is_where_the_sines_are(rate: int, hop: int) -> None:
    generator = torch.Generator().manual_seed(0)
    f0 = 80 + 900 * torch.rand(2, 40, generator=generator)
    f0[0, 5:9] = 0
    initial = torch.rand(2, HARMONICS, dtype=torch.float64, generator=generator)
    whole = sines(f0, rate, hop, initial)
    after = phase_after(f0, rate, hop, initial)
    assert after.shape == (2, HARMONICS) and after.dtype == torch.float64
    assert 0 <= after.min() and after.max() < 1
    last = torch.sin(2 * torch.pi * after).float()
    torch.testing.assert_close(last, whole[..., -1], rtol=0, atol=1e-6)
    half = phase_after(f0[:, :17], rate, hop, initial)
    torch.testing.assert_close(
        sines(f0[:, 17:], rate, hop, half), whole[..., 17 * hop :], rtol=0, atol=1e-6
    )
    torch.testing.assert_close(phase_after(f0[:, 17:], rate, hop, half), after, rtol=0, atol=1e-9)
    none = phase_after(f0[:, :0], rate, hop, initial)
    torch.testing.assert_close(none, initial, rtol=0, atol=0)
