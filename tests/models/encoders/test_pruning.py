"""Gates and pruning against the published code and the definition of pruning."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.checkpoint import CheckpointError
from models.encoders.pruning import (
    GATE_KINDS,
    GateKind,
    HardConcrete,
    add_gates,
    expected_parameters,
    gates,
    l0_norm,
    prune,
    read_gated,
)
from models.encoders.wav2vec2 import LayerShape, RelativeBias, Wav2Vec2, Wav2Vec2Config

TOLERANCE = 2e-5
SMALL_STEM = tuple((16, k, s) for k, s in ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)))


def small_network(**settings: object) -> Wav2Vec2:
    torch.manual_seed(0)
    layers = (LayerShape(heads=4, head_dim=8, feed_forward=24),) * 2
    fields = {"stem": SMALL_STEM, "width": 32, "layers": layers, **settings}
    return Wav2Vec2(Wav2Vec2Config(**fields)).eval()


def set_gates(network: Wav2Vec2, log_alpha: float) -> None:
    for gate in gates(network).values():
        torch.nn.init.constant_(gate.log_alpha, log_alpha)


@torch.no_grad()
def spread_gates(network: Wav2Vec2, spread: float = 4.0) -> None:
    """Some gates open, some closed, none of those of whole blocks and of the last convolution."""
    for name, gate in gates(network).items():
        torch.nn.init.normal_(gate.log_alpha, 0.5, spread)
        if len(gate.log_alpha) == 1 or name == f"stem.{len(network.stem) - 1}.gate":
            torch.nn.init.constant_(gate.log_alpha, 9.0)


def size(network: Wav2Vec2) -> int:
    return sum(p.numel() for p in network.parameters())


@torch.no_grad()
def difference(a: Wav2Vec2, b: Wav2Vec2) -> float:
    wavs = torch.randn(2, 6000, generator=torch.Generator().manual_seed(1)) * 0.1
    x, y = (n(wavs, [6000, 4800]) for n in (a, b))
    frames = a.config.num_frames(4800)
    return max(float((x[0] - y[0]).abs().max()), float((x[1] - y[1])[:frames].abs().max()))


# HardConcrete


@pytest.mark.parametrize("case", range(6))
def test_gate_gives_the_published_values_and_gradients(golden: Path, case: int) -> None:
    expected = np.load(golden / "encoders" / "hardconcrete.npz")

    def check(found: Tensor, name: str) -> None:
        np.testing.assert_allclose(found.detach(), expected[name], rtol=0, atol=TOLERANCE)

    log_alpha = torch.from_numpy(expected[f"log_alpha{case}"])
    gate = HardConcrete(len(log_alpha))
    gate.load_state_dict({"log_alpha": log_alpha})
    check(gate.eval()(), f"mask{case}")
    sample = gate.sample(torch.from_numpy(expected[f"u{case}"]))
    check(sample, f"sample{case}")
    check(torch.autograd.grad(sample.sum(), gate.log_alpha)[0], f"dsum_dlogalpha{case}")
    check(gate.l0_norm(), f"l0_{case}")
    check(torch.autograd.grad(gate.l0_norm(), gate.log_alpha)[0], f"dl0_dlogalpha{case}")


def test_gate_draws_anew_in_training_and_not_in_evaluation() -> None:
    gate = HardConcrete(64)
    torch.manual_seed(0)
    first, second = gate(), gate()
    assert not torch.equal(first, second)
    assert 0 <= first.min() and first.max() <= 1
    assert (first == 0).any() and (first == 1).any()
    torch.manual_seed(0)
    assert torch.equal(gate(), first)
    assert torch.equal(gate.eval()(), gate())


def test_mask_follows_the_weights_at_once() -> None:
    gate = HardConcrete(8, closed=0.01).eval()
    assert gate().count_nonzero() == 8
    torch.nn.init.constant_(gate.log_alpha, -20.0)
    assert gate().count_nonzero() == 0


def test_a_new_gate_has_the_share_asked_for() -> None:
    for closed in (0.01, 0.5, 0.9):
        gate = HardConcrete(1000, closed)
        assert torch.sigmoid(gate.log_alpha).mean().item() == pytest.approx(1 - closed, abs=0.01)


# The published supernets


@pytest.mark.parametrize("keeps_last", [False, True], ids=["", "keeplast"])
@pytest.mark.parametrize("name", ["dphubert", "dpwavlm"])
def test_prunes_as_published(golden: Path, name: str, keeps_last: bool) -> None:
    folder = golden / "encoders"
    network = read_gated(folder / f"tiny_{name}_supernet.pth")
    last = network.stem[-1].gate
    assert last is not None
    if keeps_last:
        torch.nn.init.constant_(last.log_alpha, 8.0)
    stem = f"tiny_{name}_supernet{'_keeplast' * keeps_last}"
    outputs = np.load(folder / f"{stem}_out.npz")
    facts = json.loads((folder / f"{stem}_prune.json").read_text())
    wavs = torch.from_numpy(np.load(folder / "audio_public.npz")["wav"])[None]

    for ours, gate in gates(network).items():
        theirs = published_name(ours)
        mask = gate.mask().detach()
        np.testing.assert_allclose(mask, outputs[f"mask:{theirs}"], rtol=0, atol=TOLERANCE)
        assert mask.count_nonzero() == facts["mask_nonzeros"][theirs]
    assert len(gates(network)) == len(facts["mask_nonzeros"])

    pruned = prune(network)
    with torch.no_grad():
        before, after = network(wavs), pruned(wavs)
    np.testing.assert_allclose(before, outputs["before"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(after, outputs["after"], rtol=0, atol=TOLERANCE)
    if keeps_last:
        np.testing.assert_allclose(after, before, rtol=0, atol=TOLERANCE)

    published = expected_parameters(network, as_published=True).item()
    assert published == facts["num_params_before"]
    published = expected_parameters(pruned, as_published=True).item()
    assert published == facts["num_params_after_rebuilt"]
    # They keep the weight norm's magnitudes apart, one for each place of the kernel.
    assert size(pruned) == facts["tensors_after"] - network.config.position_kernel
    check_config(pruned.config, facts["pruned_config"])


def published_name(ours: str) -> str:
    part, _, gate = ours.rpartition(".")
    if part.startswith("stem"):
        return f"feature_extractor.conv_layers.{part.removeprefix('stem.')}.hard_concrete"
    name = {
        "head_gate": "hard_concrete_for_heads",
        "inner_gate": "hard_concrete_for_intermediate",
        "gate": "hard_concrete_for_layer",
    }[gate]
    return f"encoder.transformer.{part}.{name}"


def check_config(config: Wav2Vec2Config, published: dict[str, list]) -> None:
    assert [list(shape) for shape in config.stem] == published["extractor_conv_layer_config"]
    for i, shape in enumerate(config.layers):
        assert bool(shape.heads) == published["encoder_use_attention"][i]
        assert bool(shape.feed_forward) == published["encoder_use_feed_forward"][i]
        if shape.feed_forward:
            assert shape.feed_forward == published["encoder_ff_interm_features"][i]
        if shape.heads and "encoder_remaining_heads" in published:
            kept = shape.kept_heads or range(shape.heads)
            assert list(kept) == published["encoder_remaining_heads"][i]
        elif shape.heads:
            assert shape.heads == published["encoder_num_heads"][i]


def test_a_file_without_gates_is_refused(golden: Path) -> None:
    for name in ("tiny_dphubert.pth", "tiny_hubert_base.pt"):
        with pytest.raises(CheckpointError, match=f"{name} is not a DPHuBERT with gates"):
            read_gated(golden / "encoders" / name)


# What pruning means, for shapes that nobody published

VARIANTS: dict[str, dict[str, object]] = {
    "post-norm": {},
    "pre-norm": {"pre_norm": True, "final_norm": True},
    "pre-norm-cut": {"pre_norm": True},
    "wavlm": {"relative_bias": RelativeBias(buckets=12, max_distance=20, heads=4)},
    "glu": {"activation": "glu-swish"},
    "soft": {"project_dim": 12, "pad": 40, "stem_bias": True},
    "scaled": {"stem_scale": True, "normalize_wav": True},
    "pruned-before": {
        "relative_bias": RelativeBias(buckets=12, max_distance=20, heads=4),
        "layers": (
            LayerShape(heads=2, head_dim=8, feed_forward=24, kept_heads=(1, 3)),
            LayerShape(heads=0, head_dim=8, feed_forward=24),
            LayerShape(heads=4, head_dim=8, feed_forward=0),
        ),
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_pruned_is_smaller_and_computes_the_same(variant: str) -> None:
    network = small_network(**VARIANTS[variant])
    full = size(network)
    assert expected_parameters(network).item() == full
    add_gates(network)
    network.eval()
    spread_gates(network)
    pruned = prune(network)
    assert gates(pruned) == {}
    assert size(pruned) < 0.9 * full
    assert difference(network, pruned) < 5e-6
    assert expected_parameters(pruned).item() == size(pruned)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gates_that_are_decided_predict_the_size(variant: str) -> None:
    network = small_network(**VARIANTS[variant])
    add_gates(network)
    spread_gates(network, spread=30.0)  # sure of nearly all
    with torch.no_grad():
        for gate in gates(network).values():
            gate.log_alpha.copy_(torch.where(gate.log_alpha > 0, 30.0, -30.0))
            gate.log_alpha[0] = 30.0
    expected = expected_parameters(network).item()
    assert size(prune(network)) == pytest.approx(expected, rel=1e-5)


def test_removed_blocks_are_gone() -> None:
    for pre_norm in (False, True):
        network = small_network(pre_norm=pre_norm)
        add_gates(network)
        set_gates(network.eval(), 9.0)
        torch.nn.init.constant_(network.layers[0].attention.gate.log_alpha, -9.0)
        torch.nn.init.constant_(network.layers[1].feed_forward.gate.log_alpha, -9.0)
        pruned = prune(network)
        assert [(s.heads, s.feed_forward) for s in pruned.config.layers] == [(0, 24), (4, 0)]
        assert difference(network, pruned) < 5e-6


def test_wavlm_keeps_its_bias_where_the_first_attention_goes() -> None:
    network = small_network(relative_bias=RelativeBias(buckets=12, max_distance=20, heads=4))
    torch.nn.init.normal_(network.relative_bias.weight, 0.0, 3.0)
    add_gates(network)
    set_gates(network.eval(), 9.0)
    torch.nn.init.constant_(network.layers[0].attention.gate.log_alpha, -9.0)
    assert difference(network, prune(network)) < 5e-6
    torch.nn.init.constant_(network.layers[1].attention.gate.log_alpha, -9.0)
    pruned = prune(network)
    assert pruned.relative_bias is None
    assert difference(network, pruned) < 5e-6


def test_an_open_block_with_nothing_in_it_stays_a_constant() -> None:
    network = small_network()
    add_gates(network)
    set_gates(network.eval(), 9.0)
    torch.nn.init.constant_(network.layers[0].attention.head_gate.log_alpha, -9.0)
    torch.nn.init.constant_(network.layers[1].feed_forward.inner_gate.log_alpha, -9.0)
    pruned = prune(network)
    assert [(s.heads, s.feed_forward) for s in pruned.config.layers] == [(1, 24), (4, 1)]
    assert difference(network, pruned) < 5e-6


def test_a_convolution_needs_a_channel() -> None:
    network = small_network()
    add_gates(network, ["stem"])
    torch.nn.init.constant_(network.stem[2].gate.log_alpha, -9.0)
    with pytest.raises(ValueError, match="every channel of convolution 2 is closed"):
        prune(network)


def test_pruning_leaves_the_gated_network_alone() -> None:
    network = small_network()
    add_gates(network)
    spread_gates(network)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()
    prune(network)
    assert network.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_gates_of_one_kind_only(kind: GateKind) -> None:
    network = small_network()
    add_gates(network, [kind])
    counts = {"stem": 7, "heads": 2, "attention": 2, "inner": 2, "feed_forward": 2}
    assert len(gates(network)) == counts[kind]
    set_gates(network, 30.0)
    parts = {"stem": 7 * 16, "heads": 8, "attention": 2, "inner": 48, "feed_forward": 2}
    assert l0_norm(network).item() == pytest.approx(parts[kind])
    assert difference(network.eval(), prune(network)) < 5e-6


def test_training_reaches_every_weight_and_gate() -> None:
    network = small_network(relative_bias=RelativeBias(buckets=12, max_distance=20, heads=4))
    torch.nn.init.normal_(network.relative_bias.weight)
    add_gates(network)
    for gate in gates(network).values():  # in reach of a draw that is neither 0 nor 1
        torch.nn.init.constant_(gate.log_alpha, 0.0)
    network.train()
    torch.manual_seed(3)
    out = network(torch.randn(4, 6000), [6000, 5000, 6000, 4000])
    (out.square().mean() + expected_parameters(network) * 1e-6).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
