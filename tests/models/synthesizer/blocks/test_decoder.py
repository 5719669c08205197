"""HiFi-GAN with and without a source: the references' state dicts and results."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.synthesizer.blocks.decoder import Generator, PlainGenerator, ResBlock1, ResBlock2
from models.synthesizer.blocks.noise import KeyedNoise, NoNoise
from models.synthesizer.blocks.snake import Snake
from models.synthesizer.blocks.weight_norm import fold_weight_norm
from models.synthesizer.config import ModelConfig, SynthesizerConfig
from tests.models.synthesizer.conftest import Filled, Reference
from tests.models.synthesizer.tiny import VARIANTS, config_of

# Ten times what the peers' float32 is from float64 (README of the references; the same nets in
# float64 are 1e-6 from them, with snakes 5e-6).
MODULES = 4e-5
SOURCE = 2e-5

TEMPLATE = SynthesizerConfig(units_dim=768, n_speakers=200)
PLAIN = ModelConfig(upsample_kernel_sizes=(16, 16, 8, 2, 2), gin_channels=256)
TINY_PLAIN = ModelConfig(
    inter_channels=20,
    resblock_kernel_sizes=(3, 7),
    resblock_dilation_sizes=((1, 3, 5), (1, 3, 5)),
    upsample_rates=(8, 8),
    upsample_initial_channel=32,
    upsample_kernel_sizes=(16, 16),
    gin_channels=12,
)
PLAIN_VARIANTS = {
    "base": TINY_PLAIN,
    "resflow": TINY_PLAIN,
    "refenc": TINY_PLAIN,
    "resblock2": dataclasses.replace(
        TINY_PLAIN,
        resblock="2",
        resblock_dilation_sizes=((1, 3), (1, 3)),
        upsample_kernel_sizes=(16, 8),
    ),
}


def close(found: Tensor, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=tolerance)


# state dicts


def manifest(golden: Path, name: str) -> dict[str, Any]:
    with gzip.open(golden / "synthesizers" / f"{name}_manifest.json.gz") as file:
        return json.load(file)  # type: ignore[no-any-return]


def assert_names_and_shapes(network: nn.Module, keys: dict[str, Any]) -> None:
    parameters = dict(network.named_parameters())
    found = [
        (f"dec.{name}", list(tensor.shape), "param" if name in parameters else "buffer")
        for name, tensor in network.state_dict().items()
    ]
    expected = [(n, k["shape"], k["kind"]) for n, k in keys.items() if n.startswith("dec.")]
    assert found == expected


@pytest.mark.parametrize("variant", ["template", "snake", "vec256l9"])
def test_names_of_so_vits_svc(variant: str, golden: Path) -> None:
    config = {
        "template": TEMPLATE,
        "snake": dataclasses.replace(TEMPLATE, decoder="nsf-snake-hifigan"),
        "vec256l9": dataclasses.replace(TEMPLATE, gin_channels=256),
    }[variant]
    with torch.device("meta"):
        network = Generator(config)
    assert_names_and_shapes(network, manifest(golden, "svc_G")["variants"][variant]["keys"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_of_small_ones(variant: str, golden: Path, reference: Reference) -> None:
    network = Generator(config_of(reference(f"svc_tiny_{variant}")))
    assert_names_and_shapes(network, manifest(golden, "svc_tiny")[variant]["keys"])


def test_names_of_bert_vits2(golden: Path) -> None:
    variants = manifest(golden, "bv2")["variants"]
    with torch.device("meta"):
        assert_names_and_shapes(PlainGenerator(PLAIN), variants["config"]["keys"])
    for name, config in PLAIN_VARIANTS.items():
        assert_names_and_shapes(PlainGenerator(config), variants[f"tiny_{name}"]["keys"])


# numbers


@pytest.mark.parametrize("variant", VARIANTS)
def test_sounds_as_the_reference(variant: str, reference: Reference, filled: Filled) -> None:
    arrays = reference(f"svc_tiny_{variant}")
    network = filled(Generator(config_of(arrays)), "dec.")
    found = _kept(network)
    z, f0, g = (torch.from_numpy(arrays[name]) for name in ("in/z", "in/f0", "g"))
    with torch.no_grad():
        wav = network(z, f0, g, NoNoise())
    close(wav, arrays["dec/out"], MODULES)
    close(found["m_source"].transpose(1, 2), arrays["dec/har_source"], SOURCE)
    close(found["conv_pre"], arrays["dec/conv_pre"], MODULES)
    close(found["conv_post"], arrays["dec/conv_post"], MODULES)
    summaries = {key[4:-6] for key in arrays if key.startswith("dec/") and key.endswith("/shape")}
    assert summaries == {f"{part}.{i}" for part in ("ups", "noise_convs") for i in (0, 1)}
    for name in summaries:
        _assert_summary(found[name], arrays, f"dec/{name}")
    assert torch.equal(z, torch.from_numpy(arrays["in/z"]))


def _kept(network: nn.Module) -> dict[str, Tensor]:
    """Record what each module of the network returns when the network is called."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        # A copy: what follows may add to it in place.
        return lambda module, given, returned: kept.__setitem__(name, returned.clone())

    for name, module in network.named_modules():
        if name:
            module.register_forward_hook(keep(name))
    return kept


def _assert_summary(found: Tensor, arrays: dict[str, np.ndarray], key: str) -> None:
    assert list(found.shape) == arrays[f"{key}/shape"].tolist()
    wide = found.double()
    stat = torch.stack([wide.mean(), wide.std(correction=0), wide.abs().max()])
    close(stat, arrays[f"{key}/stat"], MODULES)
    close(found.flatten()[:16], arrays[f"{key}/first"], MODULES)


@pytest.mark.parametrize("variant", PLAIN_VARIANTS)
def test_sounds_as_bert_vits2(variant: str, reference: Reference, filled: Filled) -> None:
    arrays = reference(f"bv2_tiny_{variant}")
    network = filled(PlainGenerator(PLAIN_VARIANTS[variant]), "dec.")
    with torch.no_grad():
        wav = network(torch.from_numpy(arrays["in/z"]), torch.from_numpy(arrays["g"]))
    close(wav, arrays["dec/out"], MODULES)


@pytest.mark.parametrize("name, block", [("resblock1", ResBlock1), ("resblock2", ResBlock2)])
def test_blocks(name: str, block: Any, reference: Reference, filled: Filled) -> None:
    arrays = reference("bv2_pieces")
    network = filled(block(8, 3), f"piece.{name}.")
    x, mask = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["mask"])
    close(network(x), arrays[f"{name}/out"], MODULES)
    close(network(x, mask), arrays[f"{name}/out_mask"], MODULES)


# beyond the references


@pytest.fixture(params=["base", "snake", "resblock2"])
def small(request: pytest.FixtureRequest, reference: Reference, filled: Filled) -> nn.Module:
    return filled(Generator(config_of(reference(f"svc_tiny_{request.param}"))), "dec.")


def inputs(frames: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 20, frames, generator=generator)
    f0 = 100 + 300 * torch.rand(2, frames, generator=generator)
    return z, f0, torch.randn(2, 12, 1, generator=generator)


def test_a_speaker_of_each_frame(small: nn.Module) -> None:
    z, f0, g = inputs()
    steady = small(z, f0, g, KeyedNoise([1, 2]))
    assert steady.shape == (2, 1, 5 * 64)
    torch.testing.assert_close(small(z, f0, g.expand(-1, -1, 5), KeyedNoise([1, 2])), steady)
    changing = g.repeat(1, 1, 5)
    changing[:, :, 3:] *= -1
    assert not torch.allclose(small(z, f0, changing, KeyedNoise([1, 2])), steady)


def test_without_weight_norm_it_sounds_the_same(small: nn.Module) -> None:
    z, f0, g = inputs()
    expected = small(z, f0, g, KeyedNoise([1, 2]))
    names = dict(fold_weight_norm(small).named_parameters())
    assert not any(name.endswith("weight_v") for name in names)
    torch.testing.assert_close(small(z, f0, g, KeyedNoise([1, 2])), expected, rtol=0, atol=1e-6)


def test_gradients_are_those_of_finite_differences() -> None:
    blocks = {"1": ResBlock1(2, 3, (1, 2)), "2": ResBlock2(2, 3, (1, 2), Snake)}
    x = torch.randn(1, 2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    for block in blocks.values():
        assert torch.autograd.gradcheck(block.double(), (x,))


def test_every_parameter_learns(small: nn.Module) -> None:
    small.train()
    small(*inputs(), KeyedNoise([1, 2])).square().sum().backward()
    assert [n for n, p in small.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_snake_folds_less_back() -> None:
    """sin^2 doubles the frequency of a tone; beyond the band that aliases."""
    snake, time = Snake(1), torch.arange(400)

    def bent(frequency: float) -> tuple[Tensor, Tensor]:
        tone = torch.sin(2 * torch.pi * frequency * time).view(1, 1, -1)
        with torch.no_grad():
            return snake(tone)[0, 0, 50:350], (tone + torch.sin(tone) ** 2)[0, 0, 50:350]

    found, plain = bent(0.02)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-3)
    found, plain = (torch.fft.rfft(x).abs() for x in bent(0.35))
    assert found[90] < 0.25 * plain[90]  # 0.7 of the rate, heard at 0.3


def test_kernels_must_fit_their_rates() -> None:
    with pytest.raises(ValueError, match=r"upsample_kernel_sizes has 11 for the rate 8"):
        dataclasses.replace(TINY_PLAIN, upsample_kernel_sizes=(16, 11))
