"""Weight-normalised and separable convolutions, against torch's own and the reference."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from models.synthesizer.blocks.weight_norm import (
    Conv1d,
    Conv2d,
    ConvTranspose1d,
    SeparableConv1d,
    SeparableConvTranspose1d,
    fold_weight_norm,
)
from tests.models.synthesizer.conftest import Filled, Reference

TOLERANCE = 4e-5  # ten times what float32 is from float64 in the reference's modules

PAIRS = {
    "conv1d": (Conv1d, nn.Conv1d, (4, 6, 3), {"dilation": 2, "groups": 2}, (2, 4, 11)),
    "conv2d": (Conv2d, nn.Conv2d, (4, 6, (5, 1)), {"stride": (3, 1)}, (2, 4, 11, 3)),
    "up": (ConvTranspose1d, nn.ConvTranspose1d, (4, 6, 8), {"stride": 4, "padding": 2}, (2, 4, 11)),
    "odd up": (
        ConvTranspose1d,
        nn.ConvTranspose1d,
        (4, 6, 5),
        {"stride": 3, "output_padding": 1, "bias": False},
        (2, 4, 11),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_is_torchs_weight_norm(name: str) -> None:
    """The same state dict, output and gradients; a new one equals its convolution."""
    ours, theirs, args, options, shape = PAIRS[name]
    torch.manual_seed(0)
    conv = ours(*args, **options, dtype=torch.float64)
    torch.manual_seed(0)
    plain = theirs(*args, **options, dtype=torch.float64)
    x = torch.randn(shape).double()
    torch.testing.assert_close(conv(x), plain(x), atol=1e-12, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        normed = nn.utils.weight_norm(plain)
    assert list(conv.state_dict()) == list(normed.state_dict())
    state = {key: torch.randn_like(value) for key, value in conv.state_dict().items()}
    conv.load_state_dict(state)
    normed.load_state_dict(state)
    aim = torch.randn_like(conv(x))
    for module in (conv, normed):
        (module(x) * aim).sum().backward()
    torch.testing.assert_close(conv(x), normed(x), atol=1e-12, rtol=0)
    for key, parameter in normed.named_parameters():
        torch.testing.assert_close(
            conv.get_parameter(key).grad, parameter.grad, atol=1e-12, rtol=1e-12
        )


@pytest.mark.parametrize("name", PAIRS)
def test_folding_keeps_the_sound(name: str) -> None:
    ours, theirs, args, options, shape = PAIRS[name]
    torch.manual_seed(0)
    conv = ours(*args, **options)
    conv.weight_g.data *= 1 + torch.rand_like(conv.weight_g)
    network = nn.Sequential(conv, nn.ReLU())
    x = torch.randn(shape)
    before = network(x)
    assert fold_weight_norm(network) is network
    assert type(network[0]) is theirs
    assert set(network.state_dict()) <= {"0.weight", "0.bias"}
    # Only the order of multiplication changes: a rounding or two of numbers below 4.
    torch.testing.assert_close(network(x), before, atol=2e-6, rtol=0)
    torch.testing.assert_close(copy.deepcopy(network)(x), network(x), atol=0, rtol=0)


def test_folding_meets_a_shared_network_once() -> None:
    shared = SeparableConv1d(4, 4, 3, padding=1)
    network = nn.ModuleDict({"first": shared, "second": nn.Sequential(shared), "alone": shared})
    x = torch.randn(1, 4, 9)
    before = shared(x)
    fold_weight_norm(network)
    assert network["second"][0].depth_conv is shared.depth_conv
    assert not any("weight_g" in key for key in network.state_dict())
    torch.testing.assert_close(shared(x), before, atol=1e-6, rtol=0)


def _separable(weight_norm: bool) -> dict[str, nn.Module]:
    suffix, options = ("_wn" if weight_norm else ""), {"weight_norm": weight_norm}
    return {
        f"ds_conv{suffix}": SeparableConv1d(6, 10, 5, padding=4, dilation=2, **options),
        f"ds_conv_stride{suffix}": SeparableConv1d(6, 4, 3, stride=2, bias=False, **options),
        f"ds_tconv{suffix}": SeparableConvTranspose1d(6, 5, 8, stride=4, padding=2, **options),
        f"ds_tconv_op{suffix}": SeparableConvTranspose1d(
            6, 5, 5, stride=3, padding=1, output_padding=1, **options
        ),
    }


@pytest.mark.parametrize("weight_norm", [False, True])
def test_separable_ones_equal_the_reference(
    weight_norm: bool, reference: Reference, filled: Filled, golden: Path
) -> None:
    arrays = reference("svc_attentions")
    manifest = json.loads((golden / "synthesizers" / "svc_attentions_manifest.json").read_text())
    x = torch.from_numpy(arrays["ds/x"])
    for name, module in _separable(weight_norm).items():
        assert list(module.state_dict()) == list(manifest[name]["keys"])
        made = filled(module, f"piece.{name}.")(x)
        expected = torch.from_numpy(arrays[f"ds/{name}"])
        torch.testing.assert_close(made, expected, atol=TOLERANCE, rtol=0)


def test_runs_in_bfloat16() -> None:
    conv = Conv1d(4, 6, 3)
    x = torch.randn(1, 4, 9)
    with torch.autocast("cpu", torch.bfloat16):
        made = conv(x)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made.float(), conv(x), atol=0.05, rtol=0)
