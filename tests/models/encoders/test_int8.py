"""Integer products: results, loss of accuracy, and refusal where not supported."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.encoders.int8 import Int8Linear, require_int8
from models.encoders.ssl import SslEncoder
from tests.models.encoders.test_ssl import VARIANTS, network, song

try:
    require_int8(torch.device("cpu"), torch.float32)
except ValueError as error:
    pytest.skip(str(error), allow_module_level=True)


def by_hand(linear: nn.Linear, x: Tensor) -> Tensor:
    """Compute the same rounding in float64."""
    weight, x = linear.weight.double(), x.double()
    scale = weight.abs().amax(1, keepdim=True) / 127
    lo = x.amin(-1, keepdim=True)
    step = (x.amax(-1, keepdim=True) - lo) / 255
    x = lo + step * ((x - lo) / step).round()
    return F.linear(x, scale * (weight / scale).round(), linear.bias.double())


@pytest.mark.parametrize("shape", [(1, 64), (250, 64), (2, 3, 64)])
@torch.inference_mode()
def test_it_is_the_arithmetic_that_it_says(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 24), 3 * torch.randn(shape) + 1
    expected = by_hand(linear, x)
    found = Int8Linear(linear.weight, linear.bias)(x)
    # A number that lies on the border of two steps may go either way: a step of 0.08 and a weight.
    off = (found - expected).abs()
    assert off.max() < 0.02
    assert off.median() < 1e-5
    gelu = Int8Linear(linear.weight, linear.bias, gelu=True)(x)
    torch.testing.assert_close(gelu, F.gelu(found), rtol=0, atol=1e-6)


@torch.inference_mode()
def test_the_error_of_a_layer() -> None:
    """Two roundings to one part in 127 of the largest: about 1 % of the output's norm."""
    torch.manual_seed(0)
    linear, x = nn.Linear(768, 768), torch.randn(50, 768)
    found, expected = Int8Linear(linear.weight, linear.bias)(x), linear(x)
    assert 0.001 < (found - expected).norm() / expected.norm() < 0.012


@torch.inference_mode()
def test_rows_do_not_know_each_other() -> None:
    """A loud neighbour takes no bit of precision away."""
    torch.manual_seed(0)
    layer = Int8Linear(torch.randn(24, 64), torch.randn(24))
    x = torch.randn(5, 64)
    loud = torch.cat([x, 1000 * torch.randn(3, 64)])
    assert torch.equal(layer(loud)[:5], layer(x))


@pytest.mark.parametrize("value", [0.0, 0.3, -1e6])
@torch.inference_mode()
def test_a_row_of_one_value(value: float) -> None:
    """A step of zero: digital silence after a layer norm."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 24)
    x = torch.full((2, 64), value)
    found = Int8Linear(linear.weight, linear.bias)(x)
    expected = by_hand_weights(linear, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def by_hand_weights(linear: nn.Linear, x: Tensor) -> Tensor:
    scale = linear.weight.abs().amax(1, keepdim=True) / 127
    return F.linear(x, scale * (linear.weight / scale).round(), linear.bias)


@torch.inference_mode()
def test_an_output_without_weights_and_no_bias() -> None:
    weight = torch.randn(4, 64)
    weight[2] = 0
    found = Int8Linear(weight, None)(torch.randn(3, 64))
    assert torch.isfinite(found).all()
    assert (found[:, 2] == 0).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_units_are_near_the_exact_ones(name: str) -> None:
    wav = song(48000)
    (exact,) = SslEncoder("any", network(VARIANTS[name])).encode([wav])
    (units,) = SslEncoder("any", network(VARIANTS[name]), int8=True).encode([wav])
    assert units.shape == exact.shape
    assert 1e-4 < (units - exact).norm() / exact.norm() < 0.05
    assert F.cosine_similarity(units, exact).min() > 0.99


def test_a_clip_does_not_depend_on_its_neighbours() -> None:
    encoder = SslEncoder("any", network(VARIANTS["base"]), int8=True)
    wavs = [song(n, seed=n) for n in (48000, 7, 16000, 401)]
    for wav, units in zip(wavs, encoder.encode(wavs), strict=True):
        assert torch.equal(encoder.encode([wav])[0], units)


def test_silence_is_finite() -> None:
    encoder = SslEncoder("any", network(VARIANTS["large"]), int8=True)
    (units,) = encoder.encode([torch.zeros(16000)])
    assert torch.isfinite(units).all()


def test_it_is_refused_on_a_gpu_and_in_another_dtype() -> None:
    with pytest.raises(ValueError, match="works only on a CPU, not on cuda"):
        require_int8(torch.device("cuda"), torch.float32)
    with pytest.raises(ValueError, match="not with bfloat16"):
        SslEncoder("any", network(VARIANTS["base"]), dtype="bfloat16", int8=True)


REFUSED = """
import torch
from models.encoders.int8 import require_int8
try:
    require_int8(torch.device("cpu"), torch.float32)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN's x86 levels")
def test_it_is_refused_where_sums_saturate() -> None:
    """oneDNN limited to AVX2, whose 8-bit sums saturate at 16 bits."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSED],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "8-bit dot products" in done.stdout
