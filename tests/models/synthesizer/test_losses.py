"""Losses: so-vits-svc's results, and parts that add up to the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from models.synthesizer.losses import (
    discriminator_loss,
    feature_loss,
    generator_loss,
    kl_divergence,
    kl_loss,
)
from tests.models.synthesizer.conftest import Reference

# Ten times what the peer's float32 is from float64; the numbers are about 5, and 300 of the last.
LOSS = 5e-6
DIVERGENCE = 5e-4

KL_ARGUMENTS = ("z_p", "logs_q", "m_p", "logs_p", "z_mask")


@pytest.fixture
def functions(reference: Reference) -> dict[str, Tensor]:
    return {
        name: torch.from_numpy(np.asarray(array))
        for name, array in reference("svc_functions").items()
        if name.startswith(("adv/", "kl/"))
    }


def scores(functions: dict[str, Tensor], kind: str) -> list[Tensor]:
    return [functions[f"adv/{kind}{i}"] for i in (0, 1)]


def features(functions: dict[str, Tensor], kind: str) -> list[list[Tensor]]:
    return [[functions[f"adv/{kind}{i}"] for i in row] for row in (("0_0", "0_1"), ("1_0",))]


def test_adversarial_losses(functions: dict[str, Tensor]) -> None:
    real, fake = scores(functions, "dr"), scores(functions, "dg")

    def expected(name: str) -> object:
        return pytest.approx(functions[f"adv/{name}"].tolist(), abs=LOSS)

    assert discriminator_loss(real, fake).item() == expected("discriminator_loss")
    assert generator_loss(fake).item() == expected("generator_loss")
    assert [generator_loss([score]).item() for score in fake] == expected("gen_each")
    perfect = torch.ones(2, 11)
    assert [discriminator_loss([s], [0 * perfect]).item() for s in real] == expected("disc_r")
    assert [discriminator_loss([perfect], [s]).item() for s in fake] == expected("disc_g")


def test_feature_loss(functions: dict[str, Tensor]) -> None:
    real, fake = features(functions, "fr"), features(functions, "fg")
    expected = functions["adv/feature_loss"].item()
    assert feature_loss(real, fake).item() == pytest.approx(expected, abs=LOSS)


def test_kl(functions: dict[str, Tensor]) -> None:
    arguments = [functions[f"kl/{name}"] for name in KL_ARGUMENTS]
    expected = functions["kl/loss"].item()
    assert kl_loss(*arguments).item() == pytest.approx(expected, abs=LOSS)
    prior_and_posterior = [functions[f"kl/{n}"] for n in ("m_p", "logs_p", "m_q", "logs_q")]
    found = kl_divergence(*prior_and_posterior)
    np.testing.assert_allclose(found, functions["kl/divergence"], rtol=0, atol=DIVERGENCE)


def test_parts_add_up_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    real, fake = [numbers(3, 7), numbers(3, 4)], [numbers(3, 7), numbers(3, 4)]
    maps, others = [[numbers(3, 2, 5)], [numbers(3, 6)]], [[numbers(3, 2, 5)], [numbers(3, 6)]]
    z_p, logs_q, m_p, logs_p = (numbers(3, 2, 6) for _ in range(4))
    mask = (torch.arange(6) < torch.tensor([[6], [1], [4]])).double().unsqueeze(1)

    def part(values: list[Tensor], index: slice) -> list[Tensor]:
        return [value[index] for value in values]

    def terms(index: slice, share: float, total_frames: float | None) -> Tensor:
        r, f = part(real, index), part(fake, index)
        m, o = [part(row, index) for row in maps], [part(row, index) for row in others]
        kl = part([z_p, logs_q, m_p, logs_p, mask], index)
        return torch.stack(
            [
                discriminator_loss(r, f) * share,
                generator_loss(f) * share,
                feature_loss(m, o) * share,
                kl_loss(*kl, total_frames=total_frames),
            ]
        )

    whole = terms(slice(None), 1.0, None)
    parts = terms(slice(0, 1), 1 / 3, 11) + terms(slice(1, 3), 2 / 3, 11)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


def test_features_of_originals_are_no_ones_to_change() -> None:
    real, fake = (torch.ones(2, 3, requires_grad=True) for _ in range(2))
    feature_loss([[real]], [[2 * fake]]).backward()
    assert real.grad is None
    assert fake.grad is not None and fake.grad.abs().sum() > 0


def test_half_precision_is_summed_up_in_single() -> None:
    score = torch.full((1, 4), 300.0, dtype=torch.float16)  # its square is infinite in float16
    for loss in (generator_loss([score]), discriminator_loss([score], [score])):
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss)
