"""WaveNet's gated convolutions, against the reference."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from models.synthesizer.blocks.wavenet import WN, gate
from models.synthesizer.blocks.weight_norm import fold_weight_norm
from tests.models.synthesizer.conftest import Filled, Reference

TOLERANCE = 4e-5  # ten times what float32 is from float64 in the reference's modules
TOLERANCE_OF_GATE = 6e-7  # the same, 6e-8


def test_gate_equals_the_reference(reference: Reference) -> None:
    arrays = reference("svc_functions")
    x, condition = (torch.from_numpy(arrays[key]) for key in ("kl/m_p", "kl/logs_p"))
    expected = torch.from_numpy(arrays["gate/out"])
    torch.testing.assert_close(gate(x, condition), expected, atol=TOLERANCE_OF_GATE, rtol=0)
    torch.testing.assert_close(gate(x + condition), expected, atol=TOLERANCE_OF_GATE, rtol=0)


@pytest.mark.parametrize("folded", [False, True])
def test_equals_the_reference(reference: Reference, filled: Filled, folded: bool) -> None:
    arrays = {key: torch.from_numpy(value) for key, value in reference("bv2_pieces").items()}
    wn = filled(WN(8, 5, 2, 3, gin_channels=6), "piece.wn.")
    if folded:
        fold_weight_norm(wn)
    x, mask, g = arrays["x"], arrays["mask"], arrays["g"]
    torch.testing.assert_close(wn(x, mask), arrays["wn/out"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(wn(x, mask, g), arrays["wn/out_g"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", ["base", "depthwise"])
def test_state_dict_is_so_vits_svcs(golden: Path, variant: str) -> None:
    with gzip.open(golden / "synthesizers" / "svc_tiny_manifest.json.gz") as file:
        keys = json.load(file)[variant]["keys"]
    state = WN(16, 5, 1, 16, gin_channels=12, depthwise=variant == "depthwise").state_dict()
    expected = {key: entry["shape"] for key, entry in keys.items() if "enc_q.enc." in key}
    assert {f"enc_q.enc.{key}": list(value.shape) for key, value in state.items()} == expected


@pytest.mark.parametrize("depthwise", [False, True])
def test_padding_is_never_seen(depthwise: bool) -> None:
    torch.manual_seed(0)
    wn = WN(8, 5, 2, 3, gin_channels=6, depthwise=depthwise).double()
    x, g = torch.randn(2, 8, 21).double(), torch.randn(2, 6, 1).double()
    mask = torch.ones(2, 1, 21).double()
    mask[1, :, 13:] = 0
    together = wn(x * mask, mask, g)
    assert together[1, :, 13:].abs().max() == 0
    alone = wn(x[1:, :, :13], mask[1:, :, :13], g[1:])
    torch.testing.assert_close(alone, together[1:, :, :13], atol=1e-12, rtol=0)


def test_learns_in_bfloat16() -> None:
    torch.manual_seed(0)
    wn = WN(8, 5, 2, 3, gin_channels=6)
    x, mask, g = torch.randn(2, 8, 20), torch.ones(2, 1, 20), torch.randn(2, 6, 1)
    with torch.autocast("cpu", torch.bfloat16):
        made = wn(x, mask, g)
    torch.testing.assert_close(made.float(), wn(x, mask, g), atol=0.05, rtol=0)
    made.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wn.parameters())
