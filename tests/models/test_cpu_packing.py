"""The CPU's inference kernels equal plain PyTorch."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.cpu_packing import PackedLinear
from models.encoders.cpu_packing import PackedPosition, TiledStem, attend, pack
from models.encoders.wav2vec2 import (
    LayerShape,
    PositionConvolution,
    RelativeBias,
    Wav2Vec2,
    Wav2Vec2Config,
)
from tests.models.encoders.test_ssl import VARIANTS, network, song

TILE_FRAMES = 4
STEMS = {
    "group": {},
    "group with a bias": {"stem_bias": True},
    "layer": {"stem_norm": "layer"},
    "layer with a bias": {"stem_norm": "layer", "stem_bias": True},
    "padded": {"pad": 40},
    "normalised": {"normalize_wav": True},
    "uneven": {"stem": ((11, 10, 5), (7, 3, 2), (24, 2, 2)), "normalize_wav": True, "pad": 3},
}


def stem_config(**options: object) -> Wav2Vec2Config:
    narrow = {"stem": VARIANTS["base"].stem, "width": 48, "layers": ()}
    return Wav2Vec2Config(**(narrow | options))


# The stem


@pytest.mark.parametrize("options", STEMS.values(), ids=STEMS)
@torch.inference_mode()
def test_the_tiled_stem_is_the_stem(options: dict[str, object]) -> None:
    """At every number of frames up to three tiles, with no sample and with all but one for more."""
    net = network(stem_config(**options))
    tiled = TiledStem(net)
    tiled.frames = TILE_FRAMES
    hop, shortest = net.config.hop_length, net.config.reach - 2 * net.config.pad
    for frames in range(1, 3 * TILE_FRAMES + 2):
        for rest in (0, 1, hop - 1):
            wav = song(shortest + (frames - 1) * hop + rest)
            expected = net.features(wav[None], [len(wav)])[0]
            assert len(expected) == frames
            torch.testing.assert_close(tiled(wav), expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_a_tile_of_the_usual_size() -> None:
    net = network(stem_config())
    tiled = TiledStem(net)
    for frames in (tiled.frames - 1, tiled.frames, tiled.frames + 1, 5 * tiled.frames):
        wav = song(400 + 320 * (frames - 1))
        expected = net.features(wav[None], [len(wav)])[0]
        torch.testing.assert_close(tiled(wav), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("level", [1e-4, 1.0])
@torch.inference_mode()
def test_statistics_survive_an_offset(level: float) -> None:
    """The variance of a quiet voice on top of a constant, where moments could cancel."""
    net = network(stem_config())
    wav = 0.5 + level * song(16000)
    expected = copy.deepcopy(net).double().features(wav.double()[None], [len(wav)])[0]
    plain = net.features(wav[None], [len(wav)])[0]
    error = (TiledStem(net)(wav) - expected).abs().max()
    assert error <= max(1e-5, 2 * (plain - expected).abs().max())


LONG_CLIP = """
import resource, torch
from models.encoders.cpu_packing import TiledStem
from models.encoders.wav2vec2 import Wav2Vec2, Wav2Vec2Config
shape = ((64, 10, 5), *((64, 3, 2),) * 4, *((64, 2, 2),) * 2)
net = Wav2Vec2(Wav2Vec2Config(stem=shape, layers=()))
stem = TiledStem(net)
wav = torch.zeros(20 * 60 * 16000)
wav[::100] = 0.5
with torch.inference_mode():
    stem(wav[:160000])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stem(wav)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_of_a_long_clip() -> None:
    """20 minutes, whose first layer alone would be 980 MB here; the waveform is 77 MB."""
    done = subprocess.run(
        [sys.executable, "-c", LONG_CLIP], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 250


# Products


@pytest.mark.parametrize("shape", [(1, 7), (3, 5, 7), (2, 0, 7)])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_a_packed_linear_layer(shape: tuple[int, ...], gelu: bool, bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(7, 13, bias), torch.randn(shape)
    expected = F.gelu(linear(x)) if gelu else linear(x)
    found = PackedLinear(linear.weight, linear.bias, gelu)(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kernel", "groups"), [(128, 16), (7, 3), (4, 1)])
@torch.inference_mode()
def test_the_position_convolution(kernel: int, groups: int) -> None:
    torch.manual_seed(0)
    plain = PositionConvolution(48, kernel, groups).eval()
    for frames in (1, 2, kernel - 1, 50):
        x = torch.randn(2, frames, 48)
        found = PackedPosition(plain)(x)
        torch.testing.assert_close(found, plain(x), rtol=0, atol=1e-5)


def attention_masks() -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    seen = torch.arange(9)[None, None, None] < torch.tensor([9, 5])[:, None, None, None]
    bias = torch.randn(2, 3, 9, 9)
    return {
        "none": None,
        "frames that are there": seen,
        "bias": bias,
        "bias of one clip for all": bias[:1],
        "both": bias.masked_fill(~seen, -torch.inf),
    }


@pytest.mark.parametrize("mask", attention_masks().values(), ids=attention_masks())
@torch.inference_mode()
def test_attention(mask: Tensor | None) -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 9, 3, 3, 8).permute(2, 0, 3, 1, 4)  # as views of one matrix
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(attend(q, k, v, attn_mask=mask), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_a_packed_network_equals_the_plain_one(name: str) -> None:
    """Every layer that can be packed is packed, and the results stay."""
    plain, packed = network(VARIANTS[name]), pack(network(VARIANTS[name]))
    assert not any(isinstance(module, nn.Linear) for module in packed.modules())
    for seconds in (0.5, 3.0):
        wavs = torch.stack([song(int(16000 * seconds), seed) for seed in (0, 1)])
        expected = plain(wavs)
        assert expected.std() > 0.3
        torch.testing.assert_close(packed(wavs), expected, rtol=0, atol=1e-5)


def test_weights_are_stored_once() -> None:
    """Packing replaces the layers' weights; only the stem keeps its own besides the tiles'."""
    config = Wav2Vec2Config(
        stem=((8, 10, 5), (8, 64, 64)),
        width=256,
        layers=(LayerShape(heads=4, head_dim=64, feed_forward=1024),) * 2,
        relative_bias=RelativeBias(heads=4),
    )
    packed = pack(Wav2Vec2(config).requires_grad_(False))
    left = sum(p.numel() for name, p in packed.named_parameters() if not name.startswith("stem"))
    assert left < 0.01 * sum(p.numel() for p in Wav2Vec2(config).parameters())
