"""Decoding in tiles equals decoding the whole, for any length and position of tiles."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from models.synthesizer import tiles
from models.synthesizer.blocks.decoder import Generator, prepare_for_inference
from models.synthesizer.blocks.noise import KeyedNoise, NoNoise
from models.synthesizer.blocks.source import HARMONICS, SineSource
from models.synthesizer.sovits.networks import Synthesizer
from tests.models.synthesizer.conftest import Filled, Reference
from tests.models.synthesizer.tiny import config_of

# Of float32, where the order of sums differs; the snakes' references themselves are 8e-6 away.
ROUNDING = {"base": 1e-6, "snake": 8e-6, "resblock2": 1e-6, "oddrates": 1e-6}
EXACT = 1e-12  # of float64: whatever is more has lost or gained a neighbour somewhere


@pytest.fixture(params=ROUNDING)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def decoder(variant: str, reference: Reference, filled: Filled) -> nn.Module:
    return filled(Generator(config_of(reference(f"svc_tiny_{variant}"))), "dec.")


@pytest.fixture
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest there are."""
    monkeypatch.setattr(tiles, "_VALUES", 1)
    monkeypatch.setattr(tiles, "_REACHES", 2)


def inputs(frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """z, an f0 that changes and pauses, and a speaker of each frame; two examples."""
    generator = torch.Generator().manual_seed(frames)
    z = torch.randn(2, 20, frames, generator=generator)
    f0 = 100 + 300 * torch.rand(2, frames, generator=generator)
    f0[:, frames // 3 : frames // 2] = 0
    return z, f0, torch.randn(2, 12, frames, generator=generator)


@pytest.mark.parametrize("frames", [1, 19, 60])
@pytest.mark.usefixtures("short_tiles")
def test_short_tiles_are_the_whole(decoder: nn.Module, frames: int) -> None:
    decoder.double()
    z, f0, g = (x.double() for x in inputs(frames))
    with torch.no_grad():
        whole = decoder(z, f0, g, KeyedNoise([1, 2]))
    tiled = decoder.infer(z, f0, g, KeyedNoise([1, 2]))
    torch.testing.assert_close(tiled, whole, rtol=0, atol=EXACT)


@pytest.mark.parametrize("values", [1 << 10, tiles._VALUES])
@pytest.mark.parametrize("steady", [False, True])
def test_in_float32(
    decoder: nn.Module, variant: str, values: int, steady: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_VALUES", values)
    monkeypatch.setattr(tiles, "_REACHES", 4)
    z, f0, g = inputs(50)
    if steady:
        g = g[:, :, :1]
    with torch.no_grad():
        whole = decoder(z, f0, g, KeyedNoise([1, 2]))
    for _ in range(2):
        tiled = decoder.infer(z, f0, g, KeyedNoise([1, 2]))
        torch.testing.assert_close(tiled, whole, rtol=0, atol=ROUNDING[variant])
        prepare_for_inference(decoder)


@pytest.mark.usefixtures("short_tiles")
def test_a_tile_is_bounded_however_long_the_song(
    decoder: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def longest(frames: int) -> int:
        widths = []
        with monkeypatch.context() as patched:
            window = tiles._Window
            patched.setattr(
                tiles, "_Window", lambda x, *rest: widths.append(x.shape[-1]) or window(x, *rest)
            )
            decoder.infer(*inputs(frames), NoNoise())
        return max(widths)

    assert longest(60) == longest(100) < 100


def test_prepared_for_singing(reference: Reference, filled: Filled) -> None:
    arrays = reference("svc_tiny_base")
    network = filled(Synthesizer(config_of(arrays)))
    units, f0, voiced = (torch.from_numpy(arrays[f"in/{name}"]) for name in ("c", "f0", "uv"))
    speaker = torch.from_numpy(arrays["in/spk"])[:, 0]
    before, _ = network.infer(units, f0, voiced, speaker, noise=NoNoise())
    assert prepare_for_inference(network) is network
    after, _ = network.infer(units, f0, voiced, speaker, noise=NoNoise())
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    assert not any(name.endswith("weight_v") for name in network.state_dict())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    for conv in network.dec.resblocks.modules():
        if isinstance(conv, nn.Conv1d):  # nothing is copied when it sings
            assert tiles._flat_weight(conv).data_ptr() == conv.weight.data_ptr()


def test_training_has_no_tiles(decoder: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_windows", None)
    decoder(*inputs(5), NoNoise()).sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


@pytest.mark.parametrize("frames", [1, 64, 65, 200])
def test_the_source_in_pieces(frames: int) -> None:
    source = SineSource(44100, 16)
    _, f0, _ = inputs(frames)
    phase = torch.rand(2, HARMONICS, generator=torch.Generator().manual_seed(1))
    for given in (None, phase):
        with torch.no_grad():
            whole = source(f0, KeyedNoise([1, 2]), given)
        pieces = source.infer(f0, KeyedNoise([1, 2]), given)
        torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-6)


def test_resblocks_of_one_kernel(reference: Reference, filled: Filled) -> None:
    config = dataclasses.replace(
        config_of(reference("svc_tiny_base")),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1,),),
    )
    decoder = filled(Generator(config), "dec.")
    z, f0, g = inputs(40)
    with torch.no_grad():
        whole = decoder(z, f0, g, NoNoise())
    torch.testing.assert_close(decoder.infer(z, f0, g, NoNoise()), whole, rtol=0, atol=1e-6)
