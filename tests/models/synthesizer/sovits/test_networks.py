"""The whole synthesizer against so-vits-svc's with the same weights and inputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.synthesizer.blocks.noise import KeyedNoise, NoNoise
from models.synthesizer.blocks.pitch import normalize_f0
from models.synthesizer.sovits.networks import Synthesizer, mel_f0
from tests.models.synthesizer.conftest import Filled, Reference
from tests.models.synthesizer.tiny import VARIANTS, batch_of, config_of

# Ten times what float32 is from float64 in the peer (README of the references).
MODULES = 4e-5
INFER = {"snake": 8e-5}
INFER_PREDICTED = {"snake": 1e-3}
PREDICTED_HZ = 6e-3  # the reference's contour is 6.3e-4 Hz from float64


def close(found: Tensor, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=tolerance)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def require_infer(network: Any, arrays: dict[str, np.ndarray], variant: str) -> None:
    """Check so-vits-svc's infer: plain, with a predicted melody, and with a mix over time."""
    batch = batch_of(arrays)

    def infer(speaker: Tensor, predict_f0: bool = False) -> tuple[Tensor, Tensor]:
        return network.infer(
            batch.units,
            batch.f0,
            batch.voiced,
            speaker,
            noise=NoNoise(),
            predict_f0=predict_f0,
            volume=batch.volume,
        )

    wav, f0 = infer(batch.speaker)
    close(wav, arrays["infer/audio"][:, 0], INFER.get(variant, 1e-5))
    close(f0, arrays["infer/f0"], 0)
    if network.config.predict_f0:
        wav, f0 = infer(batch.speaker, predict_f0=True)
        close(wav, arrays["infer_predf0/audio"][:, 0], INFER_PREDICTED.get(variant, 2e-4))
        close(f0, arrays["infer_predf0/f0"], PREDICTED_HZ)
    if "in/spk_mix" in arrays:
        wav, _ = infer(torch.from_numpy(arrays["in/spk_mix"])[None].float())
        close(wav, arrays["infer_mix/audio"][:, 0], 1e-5)


def test_infers_as_the_reference(variant: str, reference: Reference, filled: Filled) -> None:
    arrays = reference(f"svc_tiny_{variant}")
    network = filled(Synthesizer(config_of(arrays)))
    require_infer(network, arrays, variant)


def test_trains_on_what_the_reference_trains_on(
    variant: str, reference: Reference, filled: Filled
) -> None:
    arrays = reference(f"svc_tiny_{variant}")
    if "train/y_hat" not in arrays:
        pytest.skip("the references have no training pass of it")
    network = filled(Synthesizer(config_of(arrays)))
    noise = NoNoise(float(arrays["train/rand"]))
    spec = torch.from_numpy(arrays["in/spec"])
    out = network(batch_of(arrays), spec, noise, segment_frames=8)
    np.testing.assert_array_equal(out.starts.numpy(), arrays["train/ids_slice"])
    for name in ("z_p", "m_p", "logs_p", "m_q", "logs_q"):
        close(getattr(out, name), arrays[f"train/{name}"], MODULES)
    close(out.wav, arrays["train/y_hat"], INFER.get(variant, 1e-5))
    if out.lf0_hat is not None:
        close(out.lf0_hat, arrays["train/pred_lf0"], MODULES)


def test_scaled_log_f0_is_the_references(variant: str, reference: Reference) -> None:
    arrays = reference(f"svc_tiny_{variant}")
    batch, mask = batch_of(arrays), torch.from_numpy(arrays["x_mask"])
    log_f0 = mel_f0(batch.f0).unsqueeze(1)
    close(log_f0, arrays["lf0"], MODULES)
    centred = normalize_f0(log_f0, mask, batch.voiced)
    for name in ("norm_lf0", "train/norm_lf0"):
        if name in arrays:
            close(centred, arrays[name], MODULES)


def test_an_example_does_not_depend_on_its_neighbours(reference: Reference, filled: Filled) -> None:
    arrays = reference("svc_tiny_base")
    network = filled(Synthesizer(config_of(arrays)))
    batch = batch_of(arrays)
    twice = torch.cat([batch.units, batch.units.flip(2)])
    f0, voiced = batch.f0.repeat(2, 1), batch.voiced.repeat(2, 1)
    speakers = torch.tensor([2, 4])
    both, _ = network.infer(twice, f0, voiced, speakers, noise=KeyedNoise([5, 6]))
    for i, key in enumerate((5, 6)):
        one = slice(i, i + 1)
        alone, _ = network.infer(
            twice[one], f0[one], voiced[one], speakers[one], noise=KeyedNoise([key])
        )
        close(alone, both[one].numpy(), 1e-5)


@pytest.mark.parametrize("variant", ["base", "transflow_share", "vol"])
def test_training_on_a_short_clip_ignores_padding_and_neighbours(
    variant: str, reference: Reference, filled: Filled
) -> None:
    """It does not write to its inputs. f0 has gaps, 1500 Hz, and an unvoiced clip."""
    arrays = reference(f"svc_tiny_{variant}")
    network = filled(Synthesizer(config_of(arrays)))
    whole, short = batch_of(arrays), 15
    inside = (torch.arange(whole.f0.shape[1]) < short).float()
    hop = network.config.hop_length
    f0 = whole.f0.clone()
    f0[:, 3:6], f0[:, 8] = 0, 1500
    both = dataclasses.replace(
        whole,
        clip_ids=("long", "short"),
        units=torch.cat([whole.units, whole.units.flip(1) * inside]),
        f0=torch.cat([whole.f0, f0 * inside]),
        voiced=torch.cat([whole.voiced, torch.zeros_like(whole.voiced)]),
        volume=torch.cat([whole.volume, whole.volume * inside]),
        wav=torch.cat([whole.wav, whole.wav * inside.repeat_interleave(hop)]),
        speaker=torch.tensor([1, 4]),
        lengths=torch.tensor([len(inside), short]),
        noise_keys=(0, 1),
    )
    spec = torch.from_numpy(arrays["in/spec"]).repeat(2, 1, 1)
    given = {name: value for name, value in vars(both).items() if isinstance(value, Tensor)}
    before = {name: value.clone() for name, value in given.items()}
    together = network(both, spec, NoNoise(0.5), segment_frames=8)
    assert all(torch.equal(value, before[name]) for name, value in given.items())
    assert together.starts.tolist() == [(len(inside) - 8 + 1) // 2, 4]

    cut = {name: given[name][1:, ..., :short] for name in ("units", "f0", "voiced", "volume")} | {
        "speaker": both.speaker[1:],
        "lengths": both.lengths[1:],
        "wav": both.wav[1:],
    }
    alone = network(dataclasses.replace(both, **cut), spec[1:, :, :short], NoNoise(0.5), 8)
    for name in ("z_p", "m_p", "logs_p", "m_q", "logs_q"):
        found = getattr(together, name)[1:]
        close(found[..., :short], getattr(alone, name).detach().numpy(), MODULES)
        assert not found[..., short:].any(), name
    close(together.wav[1:], alone.wav.detach().numpy(), INFER.get(variant, 1e-5))


def test_a_mix_of_one_speaker_is_the_speaker(reference: Reference, filled: Filled) -> None:
    arrays = reference("svc_tiny_base")
    network = filled(Synthesizer(config_of(arrays)))
    batch = batch_of(arrays)
    inputs = (batch.units, batch.f0, batch.voiced)
    alone, _ = network.infer(*inputs, torch.tensor([3]), noise=NoNoise())
    mix = torch.eye(5)[3][None]
    for weights in (mix, mix[:, None].expand(1, batch.f0.shape[1], 5)):
        mixed, _ = network.infer(*inputs, weights, noise=NoNoise())
        close(mixed, alone.numpy(), 1e-5)
    with pytest.raises(ValueError, match="weights for 4 speakers, but this voice has 5"):
        network.infer(*inputs, mix[:, :4], noise=NoNoise())


def test_refuses_what_the_voice_cannot(reference: Reference) -> None:
    arrays = reference("svc_tiny_noautof0")
    batch = batch_of(arrays)
    inputs = (batch.units, batch.f0, batch.voiced, batch.speaker)
    with pytest.raises(ValueError, match="has no pitch predictor"):
        Synthesizer(config_of(arrays)).infer(*inputs, noise=NoNoise(), predict_f0=True)
    with pytest.raises(ValueError, match="needs the volume"):
        Synthesizer(config_of(reference("svc_tiny_vol"))).infer(*inputs, noise=NoNoise())
