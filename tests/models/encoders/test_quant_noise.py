"""Quantization noise and gated linear units, against fairseq's modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.encoders.quant_noise import quant_noise, with_quant_noise, without_quant_noise
from models.encoders.wav2vec2 import FeedForward, LayerShape, Wav2Vec2, Wav2Vec2Config

P, BLOCK = 0.3, 4


def noisy_weight(weight: Tensor, p: float, block: int) -> Tensor:
    """Compute the weight that fairseq's hook stores for the forward pass, with its draws."""
    if weight.ndim > 2 and weight[0, 0].numel() > 1:
        gone = torch.zeros(weight.shape[:2]).bernoulli_(p)
        gone = gone.view(*gone.shape, *[1] * (weight.ndim - 2)).expand_as(weight)
    else:
        gone = torch.zeros(weight[:, :, *[0] * (weight.ndim - 2)].numel() // block).bernoulli_(p)
        gone = gone.repeat_interleave(block, -1).view_as(weight)
    return 1 / (1 - p) * weight.masked_fill(gone.bool(), 0)


MODULES = {
    "linear": (lambda: nn.Linear(16, 12), torch.zeros(2, 16)),
    "embedding": (lambda: nn.Embedding(9, 8), torch.arange(9)),
    "conv2d 1x1": (lambda: nn.Conv2d(8, 6, 1), torch.zeros(1, 8, 3, 3)),
    "conv2d": (lambda: nn.Conv2d(5, 6, (2, 4)), torch.zeros(1, 5, 5, 5)),
    "conv1d 1": (lambda: nn.Conv1d(8, 6, 1), torch.zeros(1, 8, 3)),
    "conv1d": (lambda: nn.Conv1d(5, 6, 4), torch.zeros(1, 5, 9)),
}


@pytest.fixture(params=sorted(MODULES))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = MODULES[request.param]
    return build(), torch.randn_like(shape) if shape.is_floating_point() else shape


def test_the_forward_pass_sees_the_noise_of_the_seed(case: tuple[nn.Module, Tensor]) -> None:
    module, x = case
    peer = copy.deepcopy(module)
    torch.manual_seed(7)
    quant_noise(module, P, BLOCK)
    passes = [module(x) for _ in range(2)]
    torch.manual_seed(7)
    stored = peer.weight.data
    for out in passes:
        peer.weight.data = noisy_weight(stored, P, BLOCK)
        assert (peer.weight == 0).any()
        assert torch.equal(out, peer(x))
    assert not torch.equal(*passes)


def test_what_is_stored_stays(case: tuple[nn.Module, Tensor]) -> None:
    module, x = case
    before, plain = copy.deepcopy(module.state_dict()), module(x)
    quant_noise(module, P, BLOCK)
    module(x)
    assert torch.equal(module.eval()(x), plain)
    assert without_quant_noise(module) is module
    assert torch.equal(module.train()(x), plain)
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


def test_the_gradient_is_that_of_the_noisy_weight(case: tuple[nn.Module, Tensor]) -> None:
    module, x = case
    peer = copy.deepcopy(module)
    quant_noise(module, P, BLOCK)
    torch.manual_seed(7)
    module(x).square().sum().backward()
    torch.manual_seed(7)
    peer.weight.data = noisy_weight(peer.weight.data, P, BLOCK)
    peer(x).square().sum().backward()
    without_quant_noise(module)
    assert torch.equal(module.weight.grad, peer.weight.grad)


def test_a_share_of_the_blocks_is_gone_and_the_mean_stays() -> None:
    module = quant_noise(nn.Linear(800, 200, bias=False), 0.2, 8)
    nn.init.ones_(module.parametrizations.weight.original)
    blocks = module.weight.detach().view(200, 100, 8)
    assert torch.equal(blocks.amin(2), blocks.amax(2))
    assert blocks.mean().item() == pytest.approx(1, abs=0.02)
    assert set(blocks.unique().tolist()) == {0.0, 1.25}


def test_no_noise_leaves_the_module_alone() -> None:
    module = nn.Linear(16, 12)
    assert quant_noise(module, 0, BLOCK) is module
    assert list(module.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize(
    ("module", "p", "message"),
    [
        (nn.Linear(10, 12), 0.1, "blocks of 4 do not divide the 10 inputs"),
        (nn.Embedding(4, 6), 0.1, "blocks of 4 do not divide the 6 inputs"),
        (nn.Conv2d(6, 4, 1), 0.1, "blocks of 4 do not divide the 6 inputs"),
        (nn.Conv2d(4, 4, 3), 0.1, "blocks of 4 do not divide the 9 values of the kernel"),
        (nn.Conv1d(4, 4, 3), 0.1, "blocks of 4 do not divide the 3 values of the kernel"),
        (nn.LayerNorm(8), 0.1, "not LayerNorm"),
        (nn.Linear(8, 8), 1.0, "is 1.0; it must be in 0 to below 1"),
        (nn.Linear(8, 8), -0.1, "is -0.1; it must be in 0 to below 1"),
    ],
)
def test_what_cannot_be_is_refused_in_words(module: nn.Module, p: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quant_noise(module, p, BLOCK)


def test_a_network_trains_with_noise_and_is_plain_again() -> None:
    torch.manual_seed(0)
    shapes = ((2, 8, 16), (2, 8, 0), (0, 0, 24))
    network = Wav2Vec2(
        Wav2Vec2Config(
            stem=((8, 10, 5), (8, 4, 4)),
            width=16,
            position_kernel=4,
            position_groups=2,
            layers=tuple(LayerShape(heads=h, head_dim=d, feed_forward=f) for h, d, f in shapes),
            activation="glu-swish",
        )
    )
    wavs = torch.randn(2, 1000)
    before, plain = copy.deepcopy(network.state_dict()), network(wavs)
    with_quant_noise(network.train(), 0.2, 8)
    noisy_keys = [key for key in network.state_dict() if key.endswith("original")]
    assert len(noisy_keys) == 8  # two layers with qkv and out, two with fc1 and fc2
    assert not torch.allclose(network(wavs), plain)
    assert torch.equal(network.eval()(wavs), plain)
    without_quant_noise(network)
    assert network.state_dict().keys() == before.keys()
    assert torch.equal(network.train()(wavs), plain)


@pytest.mark.parametrize("gate", ["sigmoid", "swish", "relu", "gelu", "bilinear"])
def test_a_gated_feed_forward_is_that_of_the_seed(gate: str) -> None:
    torch.manual_seed(0)
    block = FeedForward(6, 10, f"glu-{gate}")
    assert block.fc1.weight.shape == (20, 6)
    x = torch.randn(2, 7, 6)
    act = {
        "sigmoid": torch.sigmoid,
        "swish": lambda z: z * torch.sigmoid(z),
        "relu": F.relu,
        "gelu": F.gelu,
        "bilinear": lambda z: z,
    }[gate]
    inner = F.linear(x, block.fc1.weight, block.fc1.bias)
    inner = inner[:, :, 0:10] * act(inner[:, :, 10:20])
    expected = F.linear(inner, block.fc2.weight, block.fc2.bias)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-6)
