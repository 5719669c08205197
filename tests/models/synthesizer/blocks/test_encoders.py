"""Posterior and prior encoder and the f0 predictor, against so-vits-svc's results."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.synthesizer.blocks.encoders import F0Predictor, PosteriorEncoder, PriorEncoder
from models.synthesizer.blocks.noise import KeyedNoise, NoNoise
from models.synthesizer.blocks.weight_norm import fold_weight_norm
from models.synthesizer.config import SynthesizerConfig
from tests.models.synthesizer.conftest import Filled, Reference
from tests.models.synthesizer.tiny import VARIANTS, config_of

TOLERANCE = 4e-5  # ten times what float32 is from float64 in the reference's modules

PREFIXES = {"enc_p.": PriorEncoder, "enc_q.": PosteriorEncoder, "f0_decoder.": F0Predictor}


def _close(made: Tensor, arrays: dict[str, np.ndarray], name: str) -> None:
    torch.testing.assert_close(made, torch.from_numpy(arrays[name]), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_the_reference(variant: str, reference: Reference, filled: Filled) -> None:
    arrays = reference(f"svc_tiny_{variant}")
    config = config_of(arrays)
    x, mask, g, spec, coarse = (
        torch.from_numpy(arrays[key]) for key in ("x", "x_mask", "g", "in/spec", "f0_coarse")
    )
    with torch.no_grad():
        m_p, logs_p = filled(PriorEncoder(config), "enc_p.")(x, mask, coarse)
        z, m_q, logs_q = filled(PosteriorEncoder(config), "enc_q.")(spec, mask, g, NoNoise())
    torch.testing.assert_close(mask, torch.from_numpy(arrays["enc_q/mask"]), atol=0, rtol=0)
    for name, made in {
        "p/z": m_p,  # without noise
        "p/m": m_p,
        "p/logs": logs_p,
        "q/z": z,
        "q/m": m_q,
        "q/logs": logs_q,
    }.items():
        _close(made, arrays, f"enc_{name}")
    if config.predict_f0:
        predictor = filled(F0Predictor(config), "f0_decoder.")
        _close(predictor(x, torch.from_numpy(arrays["norm_lf0"]), mask, g), arrays, "pred_lf0")


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dicts_are_so_vits_svcs(variant: str, reference: Reference, golden: Path) -> None:
    with gzip.open(golden / "synthesizers" / "svc_tiny_manifest.json.gz") as file:
        keys = json.load(file)[variant]["keys"]
    config = config_of(reference(f"svc_tiny_{variant}"))
    for prefix, module in PREFIXES.items():
        expected = [(k, entry["shape"]) for k, entry in keys.items() if k.startswith(prefix)]
        state = module(config).state_dict()
        if expected:
            assert [(prefix + k, list(v.shape)) for k, v in state.items()] == expected


@pytest.fixture
def config(reference: Reference) -> SynthesizerConfig:
    return config_of(reference("svc_tiny_base"))


def _ragged() -> tuple[Tensor, Tensor, Tensor]:
    """(anything (2, 16, 26), mask, speaker), the second clip of 15 frames."""
    torch.manual_seed(0)
    mask = torch.ones(2, 1, 26).double()
    mask[1, :, 15:] = 0
    return torch.randn(2, 16, 26).double(), mask, torch.randn(2, 12, 1).double()


def test_padding_is_never_seen(config: SynthesizerConfig, filled: Filled) -> None:
    x, mask, g = _ragged()
    prior = filled(PriorEncoder(config), "enc_p.").double()
    coarse = torch.randint(0, 256, (2, 26))
    posterior = filled(PosteriorEncoder(config), "enc_q.").double()
    spec = torch.rand(2, 129, 26).double()
    together = [*prior(x, mask, coarse), *posterior(spec, mask, g, NoNoise())]
    cut = slice(1, 2), slice(None), slice(15)
    alone = [
        *prior(x[cut], mask[cut], coarse[1:, :15]),
        *posterior(spec[cut], mask[cut], g[1:], NoNoise()),
    ]
    for one, both in zip(alone, together, strict=True):
        torch.testing.assert_close(one, both[cut], atol=1e-12, rtol=0)
        assert both[1, :, 15:].abs().max() == 0


def test_f0_predictor_sees_one_frame_over_the_end(
    config: SynthesizerConfig, filled: Filled
) -> None:
    """As in so-vits-svc, whose content is not 0 there; the next frame has no effect."""
    x, mask, g = _ragged()
    predictor = filled(F0Predictor(config), "f0_decoder.").double()
    lf0 = torch.randn(2, 1, 26).double() * mask
    before = predictor(x, lf0, mask, g)
    x[1, :, 16:] = 7
    torch.testing.assert_close(predictor(x, lf0, mask, g), before, atol=1e-12, rtol=0)
    x[1, :, 15] = 7
    changed = (predictor(x, lf0, mask, g) - before).abs().amax((0, 1))
    assert changed[14] > 1e-3
    assert changed[:14].max() < 1e-12


def test_f0_predictor_leaves_its_input_alone_and_does_not_teach_it(
    config: SynthesizerConfig,
) -> None:
    x, mask, g = (part.float() for part in _ragged())
    kept = x.clone()
    x.requires_grad_()
    g.requires_grad_()
    predictor = F0Predictor(config)
    for speaker in (None, g):
        predictor(x, torch.zeros(2, 1, 26), mask, speaker).sum().backward()
    assert x.equal(kept)
    assert x.grad is None
    assert g.grad.abs().max() > 0


def test_z_is_drawn_from_the_posterior(config: SynthesizerConfig, filled: Filled) -> None:
    _, mask, g = (part.float() for part in _ragged())
    encoder = filled(PosteriorEncoder(config), "enc_q.")
    spec = torch.rand(2, 129, 26)
    z, mean, log_deviation = encoder(spec, mask, g, KeyedNoise([3, 4]))
    drawn = (KeyedNoise([3, 4]).normal(mean) * log_deviation.exp() + mean) * mask
    torch.testing.assert_close(z, drawn, atol=1e-6, rtol=0)
    assert (z - mean)[0].std() > 0.1


def test_a_speaker_may_change_over_time(config: SynthesizerConfig, filled: Filled) -> None:
    x, mask, g = _ragged()
    spec, lf0 = torch.rand(2, 129, 26).double(), torch.zeros(2, 1, 26).double()
    posterior = filled(PosteriorEncoder(config), "enc_q.").double()
    predictor = filled(F0Predictor(config), "f0_decoder.").double()
    for ask in (
        lambda g: posterior(spec, mask, g, NoNoise())[1],
        lambda g: predictor(x, lf0, mask, g),
    ):
        torch.testing.assert_close(ask(g.expand(-1, -1, 26)), ask(g), atol=1e-12, rtol=0)


def _parts(config: SynthesizerConfig) -> dict[nn.Module, tuple[object, ...]]:
    x, mask, g = (part.float() for part in _ragged())
    return {
        PriorEncoder(config): (x, mask, torch.zeros(2, 26, dtype=torch.long)),
        PosteriorEncoder(config): (torch.rand(2, 129, 26), mask, g, NoNoise()),
        F0Predictor(config): (x, torch.zeros(2, 1, 26), mask, g),
    }


def test_learn_in_bfloat16(config: SynthesizerConfig) -> None:
    config = dataclasses.replace(config, dropout=0.0)
    for part, given in _parts(config).items():
        with torch.autocast("cpu", torch.bfloat16):
            made = part(*given)
        made = made[-1] if isinstance(made, tuple) else made
        exact = part(*given)
        exact = exact[-1] if isinstance(exact, tuple) else exact
        torch.testing.assert_close(made.float(), exact, atol=0.1, rtol=0)
        made.float().square().mean().backward()
        assert all(p.grad.isfinite().all() for p in part.parameters())


def test_folding_changes_rounding_alone(config: SynthesizerConfig, filled: Filled) -> None:
    _, mask, g = (part.float() for part in _ragged())
    encoder = filled(PosteriorEncoder(config), "enc_q.")
    spec = torch.rand(2, 129, 26)
    before = encoder(spec, mask, g, NoNoise())[1]
    after = fold_weight_norm(encoder)(spec, mask, g, NoNoise())[1]
    assert not any("weight_g" in key for key in encoder.state_dict())
    torch.testing.assert_close(after, before, atol=TOLERANCE, rtol=0)
