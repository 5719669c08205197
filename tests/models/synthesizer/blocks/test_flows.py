"""Coupling flows: the reference's results, and inversion."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.synthesizer.blocks.attention import FFT, TransformerEncoder
from models.synthesizer.blocks.flows import (
    CouplingBlock,
    CouplingLayer,
    Flip,
    ResidualCouplingBlock,
    TransformerCouplingBlock,
)
from models.synthesizer.blocks.wavenet import WN
from models.synthesizer.blocks.weight_norm import fold_weight_norm
from models.synthesizer.config import SynthesizerConfig
from tests.models.synthesizer.conftest import Filled, Reference
from tests.models.synthesizer.tiny import VARIANTS, config_of

TOLERANCE = 4e-5  # ten times what float32 is from float64 in the reference's modules


def _coupling(kind: str, mean_only: bool) -> CouplingLayer:
    enc = {
        "coupling": lambda: WN(12, 5, 1, 2, gin_channels=6),
        "tcoupling": lambda: TransformerEncoder(12, 16, 2, 3, 5, gin_channels=6),
    }[kind]()
    return CouplingLayer(8, 12, enc, mean_only)


def _block(config: SynthesizerConfig) -> CouplingBlock:
    kinds = {"residual": ResidualCouplingBlock, "transformer": TransformerCouplingBlock}
    return kinds[config.flow](config)


@pytest.mark.parametrize("mean_only", [True, False])
@pytest.mark.parametrize("kind", ["coupling", "tcoupling"])
def test_layer_equals_the_reference(
    kind: str, mean_only: bool, reference: Reference, filled: Filled
) -> None:
    arrays = {key: torch.from_numpy(value) for key, value in reference("bv2_pieces").items()}
    layer = filled(_coupling(kind, mean_only), f"piece.{kind}{int(mean_only)}.")
    x, mask, g = arrays["x"], arrays["mask"], arrays["g"]
    name = f"{kind}_mean{int(mean_only)}"
    y, logdet = layer(x, mask, g)
    torch.testing.assert_close(y, arrays[f"{name}/fwd"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(logdet, arrays[f"{name}/logdet"], atol=TOLERANCE, rtol=0)
    back = layer(x, mask, g, reverse=True)
    torch.testing.assert_close(back, arrays[f"{name}/rev"], atol=TOLERANCE, rtol=0)


def test_flip_equals_the_reference(reference: Reference) -> None:
    arrays = {key: torch.from_numpy(value) for key, value in reference("bv2_pieces").items()}
    y, logdet = Flip()(arrays["x2"], arrays["mask"])
    torch.testing.assert_close(y, arrays["flip/fwd"], atol=0, rtol=0)
    torch.testing.assert_close(logdet, arrays["flip/logdet"], atol=0, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_block_equals_the_reference(variant: str, reference: Reference, filled: Filled) -> None:
    arrays = reference(f"svc_tiny_{variant}")
    z, mask, g = (torch.from_numpy(arrays[key]) for key in ("in/z", "x_mask", "g"))
    flow = filled(_block(config_of(arrays)), "flow.")
    with torch.no_grad():
        forth, back = flow(z, mask, g), flow(z, mask, g, reverse=True)
    torch.testing.assert_close(forth, torch.from_numpy(arrays["flow/fwd"]), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(back, torch.from_numpy(arrays["flow/rev"]), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_is_so_vits_svcs(variant: str, reference: Reference, golden: Path) -> None:
    with gzip.open(golden / "synthesizers" / "svc_tiny_manifest.json.gz") as file:
        keys = json.load(file)[variant]["keys"]
    state = _block(config_of(reference(f"svc_tiny_{variant}"))).state_dict()
    assert [(f"flow.{key}", list(value.shape)) for key, value in state.items()] == [
        (key, entry["shape"]) for key, entry in keys.items() if key.startswith("flow.")
    ]


def test_a_shared_network_has_its_parameters_once(reference: Reference) -> None:
    flow = _block(config_of(reference("svc_tiny_share")))
    assert all(layer.enc is flow.wn for layer in flow.flows if isinstance(layer, CouplingLayer))
    z, mask, g = torch.randn(1, 20, 9), torch.ones(1, 1, 9), torch.randn(1, 12, 1)
    for layer in flow.flows[::2]:
        nn.init.normal_(layer.post.weight)
    before = flow(z, mask, g)
    fold_weight_norm(flow)
    assert flow.wn is flow.flows[2].enc
    torch.testing.assert_close(flow(z, mask, g), before, atol=TOLERANCE, rtol=0)


def _ragged() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    z, g = torch.randn(2, 20, 26).double(), torch.randn(2, 12, 1).double()
    mask = torch.ones(2, 1, 26).double()
    mask[1, :, 15:] = 0
    return z, mask, g


@pytest.mark.parametrize("variant", ["base", "depthwise", "transflow", "transflow_share"])
def test_block_is_undone_and_sees_no_padding(
    variant: str, reference: Reference, filled: Filled
) -> None:
    flow = filled(_block(config_of(reference(f"svc_tiny_{variant}"))), "flow.").double()
    z, mask, g = _ragged()
    z = z * mask
    forth = flow(z, mask, g)
    torch.testing.assert_close(flow(forth, mask, g, reverse=True), z, atol=1e-12, rtol=0)
    assert (forth - z).abs().max() > 0.1
    assert forth[1, :, 15:].abs().max() == 0
    alone = flow(z[1:, :, :15], mask[1:, :, :15], g[1:])
    torch.testing.assert_close(alone, forth[1:, :, :15], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["coupling", "tcoupling"])
def test_log_determinant_is_that_of_the_jacobian(kind: str, filled: Filled) -> None:
    layer = filled(_coupling(kind, mean_only=False), "layer.").double()
    torch.manual_seed(0)
    x, g = torch.randn(1, 8, 5).double(), torch.randn(1, 6, 1).double()
    mask = torch.ones(1, 1, 5).double()
    y, logdet = layer(x, mask, g)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x, mask, g)[0], x)
    expected = torch.linalg.slogdet(jacobian.reshape(40, 40)).logabsdet
    torch.testing.assert_close(logdet, expected.unsqueeze(0), atol=1e-10, rtol=0)
    torch.testing.assert_close(layer(y, mask, g, reverse=True), x, atol=1e-12, rtol=0)


def test_a_fresh_coupling_is_the_identity() -> None:
    layer = CouplingLayer(8, 12, FFT(12, 16, 2), mean_only=False)
    x = torch.randn(1, 8, 5)
    y, logdet = layer(x, torch.ones(1, 1, 5))
    torch.testing.assert_close(y, x, atol=0, rtol=0)
    assert logdet.tolist() == [0]


@pytest.mark.parametrize("variant", ["base", "transflow"])
def test_learns_in_bfloat16(variant: str, reference: Reference, filled: Filled) -> None:
    flow = filled(_block(config_of(reference(f"svc_tiny_{variant}"))), "flow.")
    z, mask, g = (x.float() for x in _ragged())
    with torch.no_grad():
        exact = flow(z, mask, g)
    with torch.autocast("cpu", torch.bfloat16):
        made = flow.train()(z, mask, g)
    if variant == "base":  # the transformer's dropout changes the numbers
        torch.testing.assert_close(made.float(), exact, atol=0.2, rtol=0)
    made.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
