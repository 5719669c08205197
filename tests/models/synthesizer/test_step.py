"""A training step: so-vits-svc's losses, gradients and weights after real steps."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from models.synthesizer.batch import Batch
from models.synthesizer.blocks.discriminators import MultiPeriodDiscriminator
from models.synthesizer.blocks.noise import KeyedNoise, Noise, NoNoise
from models.synthesizer.blocks.segments import slice_segments
from models.synthesizer.losses import discriminator_loss, generator_loss
from models.synthesizer.mel import mel_of, spectrogram
from models.synthesizer.sovits.networks import Synthesizer
from models.synthesizer.step import GanStep, LossWeights, Totals
from tests.models.synthesizer.conftest import Filled, Reference
from tests.models.synthesizer.tiny import MEL, VARIANTS, batch_of, config_of

WEIGHTS = LossWeights(mel=45.0, kl=1.0, segment_frames=8)

# The references in float32 differ from the same steps in float64 by up to 2.5e-5 in a loss, 1.5e-4
# in the norm of a gradient, and 5.6e-4 in that of one parameter; ten times that would be allowed.
LOSS, GRADIENT = 1e-4, 1e-3


Steps = Callable[..., GanStep]


@pytest.fixture(scope="module")
def discriminator(filled: Filled) -> MultiPeriodDiscriminator:
    """Make a discriminator of 47 million parameters, slow to fill; do not change it."""
    return filled(MultiPeriodDiscriminator())


@pytest.fixture
def step_of(filled: Filled, discriminator: MultiPeriodDiscriminator) -> Steps:
    def make(
        arrays: dict[str, np.ndarray], learning_rate: float = 1e-4, narrow: bool = False
    ) -> GanStep:
        """Make a step. narrow: with small, fast discriminators."""
        judge = filled(MultiPeriodDiscriminator(channels=64)) if narrow else discriminator
        network = filled(Synthesizer(config_of(arrays)))
        return step_with((network, copy.deepcopy(judge)), learning_rate)

    return make


def step_with(
    networks: tuple[Synthesizer, MultiPeriodDiscriminator], learning_rate: float
) -> GanStep:
    optimizers = [
        torch.optim.AdamW(each.parameters(), learning_rate, betas=(0.8, 0.99), eps=1e-9, fused=True)
        for each in networks
    ]
    return GanStep(*networks, *optimizers, MEL, WEIGHTS)


def totals_of(batch: Batch) -> Totals:
    return Totals(len(batch), int(batch.lengths.sum()))


@pytest.mark.parametrize("variant", ["base", "snake", "transflow_share"])
def test_four_steps_of_the_reference(variant: str, reference: Reference, step_of: Steps) -> None:
    arrays = reference(f"svc_train3_{variant}")
    step = step_of(arrays)
    step.spec_of = lambda part: torch.from_numpy(arrays["in/spec"])
    batch = batch_of(arrays)
    noise = NoNoise(float(arrays["rand"]))
    columns = [str(name) for name in arrays["columns"]]
    for number, expected in enumerate(arrays["steps"]):
        found = step([batch], totals_of(batch), lambda part: noise)
        for name, value in zip(columns, expected, strict=True):
            assert found[name] == pytest.approx(value, rel=LOSS), f"{name} of step {number}"


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "oddrates"])
def test_gradients_of_the_reference(variant: str, reference: Reference, step_of: Steps) -> None:
    """Of both networks, from the same weights: a learning rate of 0 leaves D as it is."""
    arrays = reference(f"svc_tiny_{variant}")
    step = step_of(arrays, learning_rate=0.0)
    step.spec_of = lambda part: torch.from_numpy(arrays["in/spec"])
    batch = batch_of(arrays)
    noise = NoNoise(float(arrays["train/rand"]))
    norms: dict[str, dict[str, float]] = {}
    for side, network in (("g", step.generator), ("d", step.discriminator)):
        keep_norms(network, norms.setdefault(side, {}))
    found = step([batch], totals_of(batch), lambda part: noise)
    for name in ("disc", "gen", "fm", "mel", "kl", "lf0", "total"):
        if f"train/loss_{name}" in arrays:
            assert found[name] == pytest.approx(float(arrays[f"train/loss_{name}"]), rel=1e-5)
    for side, of in norms.items():
        names = [str(name) for name in arrays[f"train/{side}_grad_names"]]
        for name, expected in zip(names, arrays[f"train/{side}_grad_norm"], strict=True):
            if expected < 0:
                assert name not in of, f"{name} has a gradient"
            else:
                assert of.get(name, 0.0) == pytest.approx(expected, rel=GRADIENT, abs=1e-5), name


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "oddrates"])
def test_each_discriminators_losses_and_the_mels_of_the_reference(
    variant: str, reference: Reference, filled: Filled, discriminator: MultiPeriodDiscriminator
) -> None:
    arrays = reference(f"svc_tiny_{variant}")
    batch, spec = batch_of(arrays), torch.from_numpy(arrays["in/spec"])
    network = filled(Synthesizer(config_of(arrays)))
    hop, rate = network.config.hop_length, network.config.sample_rate
    with torch.no_grad():
        out = network(batch, spec, NoNoise(float(arrays["train/rand"])), WEIGHTS.segment_frames)
        wav = slice_segments(batch.wav.unsqueeze(1), out.starts * hop, out.wav.shape[-1])
        real, fake = (discriminator(each)[0] for each in (wav, out.wav))

    zeros, ones = torch.zeros(1, 1), torch.ones(1, 1)
    found = {
        "losses_disc_r": [discriminator_loss([score], [zeros]) for score in real],
        "losses_disc_g": [discriminator_loss([ones], [score]) for score in fake],
        "losses_gen": [generator_loss([score]) for score in fake],
    }
    for name, values in found.items():
        np.testing.assert_allclose(torch.stack(values), arrays[f"train/{name}"], rtol=1e-5)

    mel = mel_of(spec, MEL, rate)
    of_segment = mel_of(slice_segments(spec, out.starts, WEIGHTS.segment_frames), MEL, rate)
    of_made = mel_of(spectrogram(out.wav.squeeze(1), MEL, hop), MEL, rate)
    for name, value in {"mel": mel, "y_mel": of_segment, "y_hat_mel": of_made}.items():
        np.testing.assert_allclose(value, arrays[f"train/{name}"], rtol=0, atol=1e-5, err_msg=name)


def keep_norms(network: torch.nn.Module, norms: dict[str, float]) -> None:
    def keep(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        norms[name] = float(parameter.grad.double().norm())

    for name, parameter in network.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: keep(name, p))


def two_clips(arrays: dict[str, np.ndarray]) -> Batch:
    """Two clips of different length, of the inputs."""
    one = batch_of(arrays)
    frames, hop = one.units.shape[-1], one.wav.shape[-1] // one.units.shape[-1]
    short = 15
    inside = (torch.arange(frames) < short).float()
    repeated = {
        name: torch.cat([value, value.flip(-1) * inside])
        for name in ("units", "f0", "voiced", "volume")
        if isinstance(value := getattr(one, name), Tensor)
    }
    wav = torch.cat([one.wav, one.wav.flip(-1) * inside.repeat_interleave(hop)])
    return dataclasses.replace(
        one,
        clip_ids=("a", "b"),
        wav=wav,
        speaker=torch.tensor([0, 3]),
        lengths=torch.tensor([frames, short]),
        noise_keys=(11, 12),
        **repeated,
    )


def keyed(part: Batch) -> Noise:
    return KeyedNoise(part.noise_keys)


def test_parts_add_up_to_the_batch(reference: Reference, step_of: Steps) -> None:
    """Gradients of a batch and of its halves, one after the other, are the same."""
    arrays = reference("svc_tiny_base")
    batch = doubled(two_clips(arrays))
    found = {}
    for parts in (1, 2):
        step = step_of(arrays, learning_rate=0.0, narrow=True)
        step.generator.double()
        step.discriminator.double()
        gradients: dict[str, Tensor] = {}
        keep_gradients(step, gradients)
        pieces = [batch.part(i, parts) for i in range(parts)]
        found[parts] = (step(pieces, totals_of(batch), keyed), gradients)
    for name, value in found[1][0].items():
        assert found[2][0][name] == pytest.approx(value, rel=1e-6), name
    for name, gradient in found[1][1].items():
        assert torch.allclose(found[2][1][name], gradient, rtol=1e-6, atol=1e-6), name


def doubled(batch: Batch) -> Batch:
    """In float64."""
    names = ("units", "f0", "voiced", "volume", "wav")
    return dataclasses.replace(batch, **{name: getattr(batch, name).double() for name in names})


def keep_gradients(step: GanStep, gradients: dict[str, Tensor]) -> None:
    """Keep the gradients with which an optimizer takes its step."""
    for side, network, optimizer in (
        ("g", step.generator, step.optim_g),
        ("d", step.discriminator, step.optim_d),
    ):

        def keep(*_: object, side: str = side, network: torch.nn.Module = network) -> None:
            for name, parameter in network.named_parameters():
                if parameter.grad is not None:
                    gradients[f"{side}.{name}"] = parameter.grad.clone()

        optimizer.register_step_pre_hook(keep)


def test_the_discriminator_learns_nothing_from_the_generators_turn(
    reference: Reference, step_of: Steps
) -> None:
    arrays = reference("svc_tiny_base")
    step = step_of(arrays, narrow=True)
    batch = batch_of(arrays)
    step([batch], totals_of(batch), lambda part: NoNoise())
    assert all(p.grad is None and p.requires_grad for p in step.discriminator.parameters())


def test_long_gradients_are_cut(reference: Reference, step_of: Steps) -> None:
    arrays = reference("svc_tiny_base")
    step = step_of(arrays, narrow=True)
    step.clip_norm = 1e-3
    gradients: dict[str, Tensor] = {}
    keep_gradients(step, gradients)
    batch = batch_of(arrays)
    found = step([batch], totals_of(batch), lambda part: NoNoise())
    total = torch.stack([g.norm() for name, g in gradients.items() if name[0] == "g"]).norm()
    assert found["grad_norm_g"] > 1
    assert float(total) == pytest.approx(1e-3, rel=1e-3)


def test_bfloat16_is_near_float32(reference: Reference, step_of: Steps) -> None:
    arrays = reference("svc_tiny_base")
    batch = batch_of(arrays)
    exact = step_of(arrays, narrow=True)([batch], totals_of(batch), lambda part: NoNoise())
    rough = step_of(arrays, narrow=True)
    rough.dtype = torch.bfloat16
    found = rough([batch], totals_of(batch), lambda part: NoNoise())
    for name in ("disc", "gen", "fm", "mel", "total"):
        assert found[name] == pytest.approx(exact[name], rel=0.05), name
    assert all(p.dtype == torch.float32 for p in rough.generator.parameters())


def test_discriminators_can_begin_later(reference: Reference, step_of: Steps) -> None:
    arrays = reference("svc_tiny_base")
    batch = batch_of(arrays)
    step = step_of(arrays, narrow=True)
    step.weights = dataclasses.replace(WEIGHTS, adversarial_from=1)
    before = {name: p.detach().clone() for name, p in step.discriminator.named_parameters()}
    first = step([batch], totals_of(batch), keyed, 0)
    assert first["disc"] == first["gen"] == first["fm"] == first["grad_norm_d"] == 0
    assert first["total"] == pytest.approx(first["mel"] + first["kl"] + first["lf0"])
    assert all(torch.equal(p, before[n]) for n, p in step.discriminator.named_parameters())
    assert step([batch], totals_of(batch), keyed, 1)["disc"] > 0
    assert any(not torch.equal(p, before[n]) for n, p in step.discriminator.named_parameters())
