"""Rational-quadratic splines: Bert-VITS2's results, and properties of every spline."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from models.synthesizer.text.splines import rational_quadratic_spline, tailed_spline
from tests.models.synthesizer.conftest import Reference

# Ten times what the peer's float32 is from the same spline in float64: (y, log slope).
TAILED = {"fwd": (1.1e-4, 2.4e-4), "inv": (1.7e-4, 1.7e-3)}
UNIT = {"fwd": (5.3e-6, 3.4e-4), "inv": (1.4e-5, 9.8e-4)}


@pytest.fixture
def pieces(reference: Reference) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in reference("bv2_pieces").items()}


def close(found: tuple[Tensor, Tensor], expected: list[Tensor], atol: tuple[float, float]) -> None:
    for ours, theirs, tolerance in zip(found, expected, atol, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("way", ["fwd", "inv"])
def test_the_references_splines(way: str, pieces: dict[str, Tensor]) -> None:
    widths, heights = pieces["spline/w"], pieces["spline/h"]
    found = tailed_spline(
        pieces["spline/x"], widths, heights, pieces["spline/d"], bound=5.0, inverse=way == "inv"
    )
    close(found, [pieces[f"spline/{way}"], pieces[f"spline/{way}_logdet"]], TAILED[way])
    found = rational_quadratic_spline(
        pieces["spline/u"], widths, heights, pieces["spline/d11"], inverse=way == "inv"
    )
    close(found, [pieces[f"spline/unit_{way}"], pieces[f"spline/unit_{way}_logdet"]], UNIT[way])


def random_spline(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Widths, heights and slopes of 7 bins, in float64."""
    generator = torch.Generator().manual_seed(3)
    return tuple(  # type: ignore[return-value]
        2 * torch.randn(*shape, count, dtype=torch.float64, generator=generator)
        for count in (7, 7, 6)
    )


def test_there_and_back() -> None:
    x = torch.linspace(-4, 4, 200, dtype=torch.float64).expand(3, -1)
    shape = random_spline(3, 200)
    y, log_slope = tailed_spline(x, *shape, bound=3.0)
    back, log_slope_back = tailed_spline(y, *shape, bound=3.0, inverse=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(log_slope_back, -log_slope, rtol=0, atol=1e-8)


def test_the_slope_is_the_derivative_and_the_ends_stay() -> None:
    x = torch.linspace(-3, 3, 1001, dtype=torch.float64, requires_grad=True)
    shape = [part.expand(1001, -1) for part in random_spline()]
    y, log_slope = tailed_spline(x, *shape, bound=3.0)
    (derivative,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_slope.exp(), derivative, rtol=1e-9, atol=0)
    assert (y.diff() > 0).all()
    torch.testing.assert_close(y[[0, -1]], x[[0, -1]], rtol=0, atol=1e-12)


def test_beyond_the_bound_nothing_moves_and_nothing_is_learnt() -> None:
    x = torch.tensor([-1e6, -3.01, 3.01, 1e6], dtype=torch.float64)
    shape = [part.requires_grad_() for part in random_spline(4)]
    for inverse in (False, True):
        y, log_slope = tailed_spline(x, *shape, bound=3.0, inverse=inverse)
        assert torch.equal(y, x)
        assert not log_slope.any()
        for gradient in torch.autograd.grad((y + log_slope).sum(), shape):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_half_precision_is_computed_in_float32() -> None:
    x = torch.linspace(-2, 2, 50)
    shape = [part.float() for part in random_spline(50)]
    halved = [part.bfloat16() for part in shape]
    y, _ = tailed_spline(x, *halved, bound=3.0)
    expected, _ = tailed_spline(x, *(part.float() for part in halved), bound=3.0)
    assert torch.equal(y, expected)
