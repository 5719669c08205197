"""Durations: Bert-VITS2's results, and properties of a distribution of durations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.synthesizer.blocks.noise import KeyedNoise, NoNoise
from models.synthesizer.text.durations import (
    ConvFlow,
    ConvReluNorm,
    DDSConv,
    DurationDiscriminator,
    DurationPredictor,
    ElementwiseAffine,
    Log,
    StochasticDurationPredictor,
)
from tests.models.synthesizer.conftest import Filled, Reference

# Ten times what the peer's float32 is from the same network in float64.
PIECES = 4e-5
LOG_DET = 6.1e-5  # of 18
LIKELIHOOD = 1.3e-2  # of 550: the slopes of a spline's pieces span many powers of ten


class Given:
    """Noise that always returns one tensor."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def normal(self, like: Tensor) -> Tensor:
        return self.noise.expand_as(like)

    def uniform(self, like: Tensor) -> Tensor:
        raise NotImplementedError

    def between(self, like: Tensor, low: float, high: float) -> Tensor:
        raise NotImplementedError


@pytest.fixture
def pieces(reference: Reference) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in reference("bv2_pieces").items()}


def close(found: Tensor, expected: Tensor | np.ndarray, tolerance: float = PIECES) -> None:
    np.testing.assert_allclose(found.detach().numpy(), np.asarray(expected), rtol=0, atol=tolerance)


def test_separable_convolutions(pieces: dict[str, Tensor], filled: Filled) -> None:
    convs = filled(DDSConv(8, 3, 3), "piece.ddsconv.")
    close(convs(pieces["x"], pieces["mask"]), pieces["ddsconv/out"])
    close(convs(pieces["x"], pieces["mask"], pieces["gf"]), pieces["ddsconv/out_g"])


def test_convolutions_with_norms(pieces: dict[str, Tensor], filled: Filled) -> None:
    convs = filled(ConvReluNorm(8, 10, 8, 5, 3), "piece.convrelunorm.")
    close(convs(pieces["x"], pieces["mask"]), pieces["convrelunorm/out"])


def test_a_spline_of_convolutions(pieces: dict[str, Tensor], filled: Filled) -> None:
    flow = filled(ConvFlow(2, 8, 3, 3), "piece.convflow.")
    x, mask, g = pieces["x2"], pieces["mask"], pieces["gf"]
    y, log_det = flow(x, mask, g)
    close(y, pieces["convflow/fwd"])
    close(log_det, pieces["convflow/logdet"], LOG_DET)
    close(flow(x, mask, g, reverse=True), pieces["convflow/rev"])
    close(flow(y, mask, g, reverse=True), pieces["convflow/roundtrip"])


def test_a_scale_and_a_shift(pieces: dict[str, Tensor], filled: Filled) -> None:
    flow = filled(ElementwiseAffine(2), "piece.affine.")
    x, mask = pieces["x2"], pieces["mask"]
    y, log_det = flow(x, mask)
    close(y, pieces["affine/fwd"])
    close(log_det, pieces["affine/logdet"])
    close(flow(x, mask, reverse=True), pieces["affine/rev"])


def test_the_logarithm(pieces: dict[str, Tensor]) -> None:
    x, mask = pieces["x2"], pieces["mask"]
    y, log_det = Log()(x.abs(), mask)
    close(y, pieces["log/fwd"])
    close(log_det, pieces["log/logdet"])
    close(Log()(x, mask, reverse=True), pieces["log/rev"])


def test_the_references_duration_discriminator(pieces: dict[str, Tensor], filled: Filled) -> None:
    judge = filled(DurationDiscriminator(8, 10, 3, 0.1, gin_channels=6), "piece.durdisc.")
    x, mask = pieces["x"], pieces["mask"]
    both = (pieces["durdisc/dur_r"], pieces["durdisc/dur_hat"])
    real, hat = judge(x, mask, both, pieces["g"])
    close(real, pieces["durdisc/prob_r"])
    close(hat, pieces["durdisc/prob_hat"])
    close(judge(x, mask, both)[0], pieces["durdisc/prob_r_nog"])


TINY = ["base", "resflow", "refenc", "resblock2"]


@pytest.mark.parametrize("variant", TINY)
def test_the_references_predictors(variant: str, reference: Reference, filled: Filled) -> None:
    arrays = reference(f"bv2_tiny_{variant}")
    tensors = {k: torch.from_numpy(v) for k, v in arrays.items() if v.dtype == np.float32}
    x, mask, g = tensors["enc_p/x"], tensors["enc_p/mask"], tensors["g"]

    plain = filled(DurationPredictor(16, 256, 3, 0.5, gin_channels=12), "dp.")
    close(plain(x, mask, g), tensors["dp/logw"])

    drawn = filled(StochasticDurationPredictor(16, 3, 0.5, gin_channels=12), "sdp.")
    for name, noise in (("zero", NoNoise()), ("e", Given(tensors["in/e"]))):
        close(drawn(x, mask, tensors["in/w"], g, noise), tensors[f"sdp/nll_{name}"], LIKELIHOOD)
        close(drawn.sample(x, mask, g, noise, 0.8), tensors[f"sdp/logw_{name}"])


def small_predictor(filled: Filled) -> StochasticDurationPredictor:
    network = filled(StochasticDurationPredictor(6, 3, 0.5, gin_channels=4), "small.")
    assert isinstance(network, StochasticDurationPredictor)
    return network.double()


def symbols(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, mask, durations and speaker of one example."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 6, count, generator=generator, dtype=torch.float64)
    durations = torch.randint(1, 9, (1, 1, count), generator=generator).double()
    g = torch.randn(1, 4, 1, generator=generator, dtype=torch.float64)
    return x, torch.ones(1, 1, count, dtype=torch.float64), durations, g


def test_padding_and_neighbours_do_not_count(filled: Filled) -> None:
    network = small_predictor(filled)
    noise = torch.randn(1, 2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    short, long = symbols(5, seed=1), symbols(9, seed=2)
    padded = [nn.functional.pad(part, (0, 4)) for part in short[:3]]
    padded[0][..., 5:] = 3.0  # not even what stands in it
    together = [torch.cat(pair) for pair in zip((*padded, short[3]), long, strict=True)]

    found = network(*together, Given(noise))
    for i, (alone, end) in enumerate(((short, 5), (long, 9))):
        torch.testing.assert_close(found[i : i + 1], network(*alone, Given(noise[..., :end])))


def test_no_gradient_goes_to_text_and_speaker(filled: Filled) -> None:
    x, mask, durations, g = symbols(7, seed=3)
    x.requires_grad_()
    g.requires_grad_()
    network = small_predictor(filled)
    loss = network(x, mask, durations, g, KeyedNoise([1])).sum()
    loss.backward()
    assert x.grad is None
    assert g.grad is None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_the_probabilities_of_all_durations_add_up_to_one(filled: Filled) -> None:
    """A duration's probability is the mean of exp(-nll) over the noise: here an integral."""
    network = filled(StochasticDurationPredictor(6, 3, 0.5), "small.")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "flows" in name and name.endswith((".m", ".logs", ".proj.weight", ".proj.bias")):
                parameter.mul_(0.2)  # a smooth integrand, and few durations that count
        network.flows[0].logs[0], network.flows[0].m[0] = 0.7, -0.7

    longest, steps, edge = 12, 24, 5.0
    width = 2 * edge / steps
    middles = torch.arange(steps) * width + width / 2 - edge
    noise = torch.cartesian_prod(middles, middles)
    weight = torch.exp(-noise.square().sum(1) / 2) / (2 * math.pi) * width**2
    durations = torch.arange(1.0, longest + 1).repeat_interleave(len(noise))

    many = len(durations)
    x = torch.tensor([0.3, -1, 0.5, 2, 0, 1]).view(1, 6, 1).expand(many, -1, 1)
    mask = torch.ones(many, 1, 1)
    given = Given(noise.repeat(longest, 1).unsqueeze(2))
    with torch.no_grad():
        nll = network(x, mask, durations.view(-1, 1, 1), None, given)
    each = torch.exp(-nll).view(longest, -1) @ weight
    assert each[-1] < 1e-3
    assert each.sum() == pytest.approx(1, abs=0.1)  # as near as this grid comes
