"""Discriminators: so-vits-svc's state dict, scores and features."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.synthesizer.blocks.discriminators import MultiPeriodDiscriminator, PeriodDiscriminator
from models.synthesizer.losses import discriminator_loss, feature_loss, generator_loss
from tests.models.synthesizer.conftest import Filled, Reference

# Ten times what the peer's float32 is from float64 (measured: scores 9.2e-7, features 7.2e-7).
SCORES = 9e-6
FEATURES = 7e-6
LOSSES = 5e-6


@pytest.fixture(scope="module")
def network(filled: Filled) -> nn.Module:
    return filled(MultiPeriodDiscriminator())


@pytest.mark.parametrize("variant", ["default", "spectral_norm"])
def test_names(variant: str, golden: Path) -> None:
    with gzip.open(golden / "synthesizers" / "svc_D_manifest.json.gz") as file:
        keys = json.load(file)[variant]["keys"]
    with torch.device("meta"):
        network = MultiPeriodDiscriminator(spectral_norm=variant == "spectral_norm")
    parameters = dict(network.named_parameters())
    found = [
        (name, list(tensor.shape), "param" if name in parameters else "buffer")
        for name, tensor in network.state_dict().items()
    ]
    assert found == [(name, key["shape"], key["kind"]) for name, key in keys.items()]


@pytest.mark.slow
def test_judges_as_the_reference(network: nn.Module, reference: Reference) -> None:
    arrays = reference("svc_discriminator")
    both = torch.from_numpy(np.concatenate([arrays["in/y"], arrays["in/y_hat"]]))
    with torch.no_grad():
        scores, features = network(both)
    assert len(scores) == len(features) == 6
    for i, (score, layers) in enumerate(zip(scores, features, strict=True)):
        assert len(layers) == (7 if i == 0 else 6)
        for part, kind in enumerate(("real", "fake")):
            _close(score[part : part + 1], arrays[f"d{i}/{kind}"], SCORES)
            for j, layer in enumerate(layers):
                _assert_summary(layer[part : part + 1], arrays, f"d{i}/fmap_{kind}{j}")

    real, fake = zip(*(score.chunk(2) for score in scores), strict=True)
    halves = [list(zip(*(layer.chunk(2) for layer in row), strict=True)) for row in features]
    matched = feature_loss([row[0] for row in halves], [row[1] for row in halves])
    assert discriminator_loss(real, fake).item() == expected(arrays, "discriminator_loss")
    assert generator_loss(fake).item() == expected(arrays, "generator_loss")
    assert matched.item() == expected(arrays, "feature_loss")


def expected(arrays: dict[str, np.ndarray], name: str) -> object:
    return pytest.approx(float(arrays[name]), abs=LOSSES)


def _close(found: Tensor, wanted: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=0, atol=tolerance)


def _assert_summary(found: Tensor, arrays: dict[str, np.ndarray], key: str) -> None:
    assert list(found.shape) == arrays[f"{key}/shape"].tolist()
    wide = found.double()
    stat = torch.stack([wide.mean(), wide.std(correction=0), wide.abs().max()])
    _close(stat, arrays[f"{key}/stat"], FEATURES)
    first = arrays[f"{key}/first"]
    _close(found.flatten()[:16], first[: found.numel()], FEATURES)


@pytest.fixture(scope="module", params=[False, True], ids=["weight_norm", "spectral_norm"])
def of_three(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return PeriodDiscriminator(3, spectral_norm=request.param).double().eval()


@pytest.mark.slow
def test_columns_are_convolved(of_three: nn.Module) -> None:
    """Scores and all gradients are those of convolutions of width 1 over the folded wav."""
    wav = torch.randn(2, 1, 500, dtype=torch.float64, requires_grad=True)
    parameters = [wav, *of_three.parameters()]
    scores, features = of_three(wav)
    gradients = torch.autograd.grad(_sum(features), parameters)

    x = F.pad(wav, (0, 1), mode="reflect").view(2, 1, 167, 3)
    convolved = []
    for layer in (*of_three.convs, of_three.conv_post):
        x = F.conv2d(x, _weight(layer), layer.bias, layer.stride, layer.padding)
        x = x if layer is of_three.conv_post else F.leaky_relu(x, 0.1)
        convolved.append(x)
    torch.testing.assert_close(scores, x.flatten(1))
    for found, wanted in zip(features, convolved, strict=True):
        torch.testing.assert_close(found, wanted)
    wanted_gradients = torch.autograd.grad(_sum(convolved), parameters)
    for gradient, wanted in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted)


def _sum(features: list[Tensor]) -> Tensor:
    """Compute a sum with a different weight for each value."""
    weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype) for x in features]
    return torch.stack([x.flatten() @ w for x, w in zip(features, weights, strict=True)]).sum()


def _weight(layer: nn.Module) -> Tensor:
    if hasattr(layer, "weight_g"):
        length = layer.weight_v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return layer.weight_v * layer.weight_g / length
    weight = layer.weight_orig
    return weight / (layer.weight_u @ weight.flatten(1) @ layer.weight_v)


def test_spectral_norm_finds_the_largest_stretch() -> None:
    torch.manual_seed(0)
    network = PeriodDiscriminator(2, spectral_norm=True)
    for _ in range(15):  # of training, each one step of the power iteration
        network(torch.randn(1, 1, 20))
    assert torch.linalg.matrix_norm(network.convs[1].weight.flatten(1), 2).item() == pytest.approx(
        1, abs=0.05
    )


def test_frozen_weights_let_gradients_through(network: nn.Module) -> None:
    wav = torch.randn(1, 1, 300, requires_grad=True)
    network.requires_grad_(False)
    scores, _ = network(wav)
    network.requires_grad_(True)
    torch.stack([score.sum() for score in scores]).sum().backward()
    assert wav.grad is not None and wav.grad.abs().sum() > 0
    assert all(p.grad is None for p in network.parameters())
