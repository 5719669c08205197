"""The enhancer: so-vits-svc's audio, keys and silence, and continuous phases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.synthesizer.blocks.noise import KeyedNoise, NoNoise
from models.synthesizer.blocks.source import HARMONICS, phase_after
from models.synthesizer.enhancer import Enhancer, automatic_key
from models.synthesizer.vocoder import Vocoder, load_vocoder
from models.torchaudio_compat import import_torchaudio
from tests.models.synthesizer.conftest import Reference
from tests.models.synthesizer.test_vocoder import write_vocoder

# Ten times what the peer's float32 is from float64.
SOUND = 1e-5
RESAMPLED = 4e-6


@pytest.fixture(scope="module")
def vocoder(tmp_path_factory: pytest.TempPathFactory) -> Vocoder:
    return load_vocoder(write_vocoder(tmp_path_factory.mktemp("vocoder"), "tiny"))


@pytest.fixture
def enhancer(vocoder: Vocoder) -> Enhancer:
    return Enhancer(vocoder)


def tone(frames: int = 60, hop: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """wav (T,) and f0 (F,) of a rising tone at 44100 Hz."""
    f0 = torch.linspace(200, 400, frames)
    cycles = torch.cumsum(f0.double().repeat_interleave(hop) / 44100, 0)
    return torch.sin(2 * torch.pi * cycles).float() * 0.3, f0


@pytest.mark.parametrize("case", range(4))
def test_as_the_reference(case: int, enhancer: Enhancer, reference: Reference) -> None:
    arrays = reference("enhancer_tiny")
    rate, hop, key, silence, out_rate = arrays[f"case{case}/params"].tolist()
    f0 = torch.from_numpy(arrays[f"case{case}/f0"][0, :, 0])
    given = f0.clone()
    wav = torch.from_numpy(arrays[f"case{case}/audio"][0])
    sung, found = enhancer.enhance(wav, int(rate), f0, int(hop), key, silence, noise=NoNoise())
    assert found == out_rate
    np.testing.assert_allclose(sung.numpy(), arrays[f"case{case}/out"], rtol=0, atol=SOUND)
    assert torch.equal(f0, given)  # into which the peer writes


@pytest.mark.parametrize(
    "rates",
    ["44100_55600_128", "55600_44100_128", "48000_44100_128", "44100_16000_6", "32000_44100_6"],
)
def test_torchaudio_resamples_as_it_did(rates: str, reference: Reference) -> None:
    arrays = reference("enhancer_tiny")
    rate, target, width = map(int, rates.split("_"))
    transforms = import_torchaudio().transforms
    resampled = transforms.Resample(rate, target, lowpass_filter_width=width)(
        torch.from_numpy(arrays[f"resample/{rates}/in"])
    )
    expected = arrays[f"resample/{rates}/out"]
    np.testing.assert_allclose(resampled.numpy(), expected, rtol=0, atol=RESAMPLED)


@pytest.mark.parametrize(
    "highest, key", [(0.0, 0), (300.0, 0), (760.0, 0), (761.0, 1), (800.0, 1), (1100.0, 7)]
)
def test_the_automatic_key_brings_the_highest_note_into_range(highest: float, key: int) -> None:
    assert automatic_key(torch.tensor([0.0, highest / 2, highest])) == key
    assert highest / 2 ** (key / 12) <= 760


def test_automatic_is_the_key_that_it_finds(enhancer: Enhancer) -> None:
    wav, f0 = tone()
    f0 = f0 * 2.5  # up to 1000 Hz
    automatic, _ = enhancer.enhance(wav, 44100, f0, 64, "auto")
    stated, _ = enhancer.enhance(wav, 44100, f0, 64, 5)
    assert torch.equal(automatic, stated)
    other, _ = enhancer.enhance(wav, 44100, f0, 64, 4)
    assert not torch.allclose(other[:3000], stated[:3000], atol=1e-3)


@pytest.mark.parametrize("key", [-25, 25, float("nan"), float("inf")])
def test_a_key_out_of_range_is_refused(key: float, enhancer: Enhancer) -> None:
    wav, f0 = tone()
    with pytest.raises(ValueError, match=r"key is .*; it must be in -24 to 24 semitones"):
        enhancer.enhance(wav, 44100, f0, 64, key)


@pytest.mark.parametrize("key", [-5.0, 0.0, 7.0])
@pytest.mark.parametrize("rate, hop", [(44100, 64), (32000, 320)])
def test_as_long_as_before_but_for_a_frame(
    rate: int, hop: int, key: float, enhancer: Enhancer
) -> None:
    wav, f0 = tone(20, hop)
    sung, own_rate = enhancer.enhance(wav, rate, f0, hop, key)
    expected = len(wav) * 44100 / rate
    assert own_rate == 44100
    assert expected - 64 * 2 ** (5 / 12) - 1 <= len(sung) <= expected + 1
    assert torch.isfinite(sung).all()


def test_silence_in_front(enhancer: Enhancer) -> None:
    wav, f0 = tone()
    whole, _ = enhancer.enhance(wav, 44100, f0, 64, silence_front=0.02)  # 13.8 frames
    rest, _ = enhancer.enhance(wav[13 * 64 :], 44100, f0[13:], 64)
    assert not whole[: 13 * 64].any()
    assert torch.equal(whole[13 * 64 :], rest)


def test_a_piece_shorter_than_the_silence_is_silent(enhancer: Enhancer) -> None:
    wav, f0 = tone()
    sung, rate = enhancer.enhance(wav, 22050, f0, 64, silence_front=1.0)
    assert (len(sung), rate) == (2 * len(wav), 44100)
    assert not sung.any()


def test_the_same_each_time_but_for_other_noise(enhancer: Enhancer) -> None:
    wav, f0 = tone()
    first, _ = enhancer.enhance(wav, 44100, f0, 64)
    assert torch.equal(first, enhancer.enhance(wav, 44100, f0, 64)[0])
    other, _ = enhancer.enhance(wav, 44100, f0, 64, noise=KeyedNoise([1]))
    assert not torch.equal(first, other)


# phases


def phases(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, HARMONICS, dtype=torch.float64, generator=generator)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Cycles between two phases, at most."""
    difference = one - other
    return float((difference - difference.round()).abs().max())


def test_a_phase_is_heard(enhancer: Enhancer) -> None:
    wav, f0 = tone()
    one, _ = enhancer.enhance(wav, 44100, f0, 64, noise=NoNoise(), phase=phases(0))
    other, _ = enhancer.enhance(wav, 44100, f0, 64, noise=NoNoise(), phase=phases(1))
    assert not torch.allclose(one, other, atol=1e-4)


def test_phases_go_on_through_silence(enhancer: Enhancer) -> None:
    wav, f0 = tone()
    whole, _ = enhancer.enhance(
        wav, 44100, f0, 64, silence_front=0.02, noise=NoNoise(), phase=phases()
    )
    reached = phase_after(f0[None, :13], 44100, 64, phases())
    rest, _ = enhancer.enhance(wav[13 * 64 :], 44100, f0[13:], 64, noise=NoNoise(), phase=reached)
    torch.testing.assert_close(whole[13 * 64 :], rest, rtol=0, atol=1e-6)


def test_phases_after_a_piece_are_the_sources(enhancer: Enhancer) -> None:
    _, f0 = tone()
    found = enhancer.phase_after(f0, 44100, 64, 0.0, phases())
    assert apart(found, phase_after(f0[None], 44100, 64, phases())) < 1e-6


@pytest.mark.parametrize("key", [-3.0, 4.0, "auto"])
@pytest.mark.parametrize("rate, hop", [(44100, 64), (32000, 320)])
def test_phases_after_a_steady_note_are_those_of_its_cycles(
    rate: int, hop: int, key: float, enhancer: Enhancer
) -> None:
    f0 = torch.full((57,), 820.0)
    found = enhancer.phase_after(f0, rate, hop, key, phases())
    cycles = 820.0 * 57 * hop / rate * torch.arange(1, HARMONICS + 1).double()
    assert apart(found, phases() + cycles) < 1e-3


def test_pieces_that_overlap_are_in_phase(enhancer: Enhancer) -> None:
    """The second half, from the phase after the first, has the sines of the whole."""
    _, f0 = tone(400)
    at = 211
    reached = enhancer.phase_after(f0[:at], 44100, 64, 4.0, phases())
    end = enhancer.phase_after(f0[at:], 44100, 64, 4.0, reached)
    assert apart(end, enhancer.phase_after(f0, 44100, 64, 4.0, phases())) < 0.02
