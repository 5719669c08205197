"""The sine source: so-vits-svc's waves, exact phases over long clips, and its noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.synthesizer.blocks.noise import KeyedNoise, NoNoise
from models.synthesizer.blocks.source import HARMONICS, SineSource, sines
from tests.models.synthesizer.conftest import Reference

PEER = 2e-5  # ten times what the peer's float32 sum of 40 frames is from the exact one
EXACT = 5e-7  # float32 of the sine, and of its argument


@pytest.mark.parametrize("rate, hop", [(44100, 512), (32000, 320)])
def test_waves_of_the_reference(rate: int, hop: int, reference: Reference) -> None:
    arrays = reference("svc_functions")
    name = f"sinegen/{rate}_{hop}"
    f0 = torch.from_numpy(arrays[f"{name}/f0_frames"]).unsqueeze(0)
    waves = SineSource(rate, hop).waves(f0, NoNoise())[:, :, ::8].transpose(1, 2)
    np.testing.assert_allclose(waves.numpy(), arrays[f"{name}/sine"], rtol=0, atol=PEER)
    voiced = arrays[f"{name}/uv"][0, :, 0] > 0
    assert voiced.any() and not voiced.all()
    assert not waves[0, ~voiced].any()


def test_phases_are_exact_however_long_the_clip() -> None:
    frames, hop = 3000, 512
    f0 = torch.rand(1, frames, generator=torch.Generator().manual_seed(0)) * 400 + 100
    initial = torch.tensor([[0.0, 0.3]])
    found = sines(f0, 44100, hop, initial)[0].numpy()
    for number in (1, 2):
        step = (f0[0].numpy() * np.float32(number)) / np.float32(44100) % np.float32(1)
        cycles = np.cumsum(np.repeat(step.astype(np.float64), hop)) + float(initial[0, number - 1])
        expected = np.sin(2 * np.pi * (cycles % 1))
        np.testing.assert_allclose(found[number - 1], expected, rtol=0, atol=EXACT)


def test_chance_shifts_the_overtones_alone() -> None:
    f0 = torch.full((1, 4), 441.0)  # a hundredth of a cycle a sample
    waves = SineSource(44100, 100).waves(f0, NoNoise(0.25))[0].double() * 10
    time = torch.arange(1, 401).double() / 100
    for i in range(HARMONICS):
        expected = torch.sin(2 * torch.pi * ((i + 1) * time + (0.25 if i else 0)))
        torch.testing.assert_close(waves[i], expected, rtol=0, atol=2e-4)


def test_noise_beside_and_in_place_of_sines() -> None:
    f0 = torch.tensor([[220.0, 0.0], [0.0, 330.0]])
    source = SineSource(44100, 4096)
    noise = source.waves(f0, KeyedNoise([1, 2])) - source.waves(f0, _OnlyUniform([1, 2]))
    deviation = noise.unflatten(2, (2, 4096)).std(dim=(1, 3))
    expected = torch.where(f0 > 0, 0.003, 0.1 / 3)
    torch.testing.assert_close(deviation, expected, rtol=0.02, atol=0)


class _OnlyUniform(KeyedNoise):
    def normal(self, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(like)


def test_neighbours_in_a_batch_change_nothing() -> None:
    f0 = torch.tensor([[220.0, 230.0, 0.0], [110.0, 0.0, 330.0]])
    source = SineSource(44100, 64)
    together = source(f0, KeyedNoise([5, 6]))
    assert together.shape == (2, 1, 192)
    for i, key in enumerate((5, 6)):
        alone = source(f0[i : i + 1], KeyedNoise([key]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-7)


def test_only_the_mixture_is_learnt() -> None:
    source = SineSource(44100, 64)
    source(torch.tensor([[220.0, 0.0]]), KeyedNoise([1])).sum().backward()
    assert {name for name, p in source.named_parameters() if p.grad is not None} == {
        "l_linear.weight",
        "l_linear.bias",
    }


def test_pieces_follow_each_other_where_their_phase_is_given() -> None:
    generator = torch.Generator().manual_seed(0)
    f0 = 200 + 50 * torch.rand(2, 9, generator=generator)
    phase = torch.rand(2, HARMONICS, dtype=torch.float64, generator=generator)
    source = SineSource(44100, 64)
    whole = source.waves(f0, NoNoise(), phase)
    numbers = torch.arange(1, HARMONICS + 1)
    later = phase + f0[:, :4].double().sum(1, keepdim=True) * 64 / 44100 * numbers
    pieces = [source.waves(f0[:, :4], NoNoise(), phase), source.waves(f0[:, 4:], NoNoise(), later)]
    torch.testing.assert_close(torch.cat(pieces, dim=2), whole, rtol=0, atol=1e-5)
    assert not torch.allclose(pieces[1], source.waves(f0[:, 4:], NoNoise()), atol=1e-2)
