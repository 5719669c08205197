"""Attention and its stacks, against the reference and a plain formulation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.synthesizer.blocks.attention import (
    FFN,
    FFT,
    LayerNorm,
    MultiHeadAttention,
    TransformerDecoder,
    TransformerEncoder,
)
from tests.models.synthesizer.conftest import Filled, Reference

# Float32 against the same networks in float64: 4e-6 at most; ten times that.
TOLERANCE = 4e-5
LENGTHS = ("T3", "T5", "T17")  # T3 is shorter than the window


def _pieces() -> dict[str, nn.Module]:
    return {
        "encoder": TransformerEncoder(12, 20, 2, 2, 3),
        "encoder_w2_k4": TransformerEncoder(12, 20, 3, 1, 4, window=2),
        "fft": FFT(12, 20, 2, 2, 3),
        "fft_flow": FFT(12, 20, 2, 3, 5, gin_channels=6),
        "fft_proximal": FFT(12, 20, 2, 2, 3, proximal_bias=True),
        "decoder": TransformerDecoder(12, 20, 2, 2, 3),
        "mha_plain": MultiHeadAttention(12, 14, 2),
        "mha_window": MultiHeadAttention(12, 12, 2, window=4),
        "mha_window_perhead": MultiHeadAttention(12, 12, 2, window=4, heads_share=False),
        "mha_block": MultiHeadAttention(12, 12, 2, block_length=2),
        "ffn": FFN(12, 9, 20, 3),
        "ffn_causal": FFN(12, 9, 20, 3, causal=True),
        "ffn_gelu_k4": FFN(12, 9, 20, 4, activation="gelu"),
        "ffn_k1": FFN(12, 9, 20, 1),
        "layernorm": LayerNorm(12),
    }


def _run(name: str, module: nn.Module, given: dict[str, Tensor]) -> Tensor:
    x, h, g, mask, h_mask = (given[key] for key in ("x", "h", "g", "mask", "h_mask"))
    if name == "layernorm":
        return module(x)
    if name == "decoder":
        return module(x, mask, h, h_mask)
    if name == "mha_plain":
        return module(x, h)
    if name == "mha_block":
        return module(x, x, causal=True)
    if name.startswith("mha"):
        return module(x, x, _pairs(mask, mask))
    return module(x, mask, g) if name == "fft_flow" else module(x, mask)


def _pairs(queries: Tensor, keys: Tensor) -> Tensor:
    """(B, 1, Q, K) of masks of frames: True where both are frames."""
    return queries.bool().unsqueeze(-1) & keys.bool().unsqueeze(2)


def _given(arrays: dict[str, np.ndarray], length: str) -> dict[str, Tensor]:
    return {
        key: torch.from_numpy(arrays[f"{length}/{key}"])
        for key in ("x", "h", "g", "mask", "h_mask")
    }


@pytest.fixture(scope="module")
def pieces(filled: Filled) -> dict[str, nn.Module]:
    return {name: filled(piece, f"piece.{name}.") for name, piece in _pieces().items()}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", _pieces())
def test_equals_the_reference(
    pieces: dict[str, nn.Module], reference: Reference, name: str, length: str
) -> None:
    arrays = reference("svc_attentions")
    made = _run(name, pieces[name], _given(arrays, length))
    torch.testing.assert_close(
        made, torch.from_numpy(arrays[f"{length}/{name}"]), atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_weights_equal_the_reference(
    pieces: dict[str, nn.Module], reference: Reference, length: str
) -> None:
    arrays = reference("svc_attentions")
    given, attention = _given(arrays, length), pieces["mha_window"]
    q, k = (attention._heads(conv(given["x"])) for conv in (attention.conv_q, attention.conv_k))
    made = attention.weights(q, k, _pairs(given["mask"], given["mask"]))
    torch.testing.assert_close(
        made, torch.from_numpy(arrays[f"{length}/mha_window/attn"]), atol=TOLERANCE, rtol=0
    )


def test_state_dicts_are_the_references(golden: Path) -> None:
    manifest = json.loads((golden / "synthesizers" / "svc_attentions_manifest.json").read_text())
    for name, piece in _pieces().items():
        shapes = {key: list(value.shape) for key, value in piece.state_dict().items()}
        expected = {key: entry["shape"] for key, entry in manifest[name]["keys"].items()}
        assert list(shapes.items()) == list(expected.items()), name


def _plain_attention(
    module: MultiHeadAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor
) -> Tensor:
    """Shaw et al., equations 3 and 4, with every pair's relative key and value written out."""
    frames = torch.arange(q.shape[2])
    distance = frames - frames[:, None]
    near = (distance.abs() <= module.window).unsqueeze(-1)
    place = (distance + module.window).clamp(0, 2 * module.window)
    rel_k, rel_v = (
        torch.where(near, rel[:, place], 0.0) for rel in (module.emb_rel_k, module.emb_rel_v)
    )  # (1 or N, Q, K, width)
    keys, values = k.unsqueeze(2) + rel_k, v.unsqueeze(2) + rel_v  # (B, N, Q, K, width)
    scores = (q.unsqueeze(3) * keys).sum(-1) / math.sqrt(q.shape[-1])
    weights = F.softmax(scores.masked_fill(~mask, -1e4), dim=-1)
    return (weights.unsqueeze(-1) * values).sum(3)


@pytest.mark.parametrize("heads_share", [True, False])
@pytest.mark.parametrize("frames", [1, 3, 5, 40])
def test_gradients_of_the_band_are_those_of_all_pairs(heads_share: bool, frames: int) -> None:
    torch.manual_seed(frames)
    attention = MultiHeadAttention(6, 6, 2, window=4, heads_share=heads_share).double()
    mask = torch.ones(2, 1, 1, frames, dtype=torch.bool)
    mask[1, ..., (frames + 1) // 2 :] = False
    of_rel = [attention.emb_rel_k, attention.emb_rel_v]
    found = []
    ways = (
        lambda q, k, v: attention._attend(q, k, v, mask, False),
        lambda q, k, v: _plain_attention(attention, q, k, v, mask),
    )
    for attend in ways:
        torch.manual_seed(0)
        qkv = [torch.randn(2, 2, frames, 3).double().requires_grad_() for _ in range(3)]
        out = attend(*qkv)
        aim = torch.randn(out.shape).double()
        found.append([out, *torch.autograd.grad((out * aim).sum(), [*qkv, *of_rel])])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-13, rtol=1e-12)
    assert found[0][-1].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["encoder", "fft", "fft_flow", "fft_proximal", "decoder"])
def test_padding_is_never_seen_and_examples_do_not_see_each_other(
    pieces: dict[str, nn.Module], name: str
) -> None:
    piece = pieces[name]
    torch.manual_seed(0)
    x, h, g = torch.randn(2, 12, 23), torch.randn(2, 12, 9), torch.randn(2, 6, 1)
    mask, h_mask = torch.ones(2, 1, 23), torch.ones(2, 1, 9)
    mask[1, :, 14:] = 0
    h_mask[1, :, 5:] = 0
    given = {"x": x, "h": h, "g": g, "mask": mask, "h_mask": h_mask}
    together = _run(name, piece, given)
    assert together[1, :, 14:].abs().max() == 0
    x[1, :, 14:] = 1e3 * torch.randn(9)
    h[1, :, 5:] = 1e3 * torch.randn(4)
    torch.testing.assert_close(_run(name, piece, given), together, atol=0, rtol=0)
    alone = {key: value[1:] for key, value in given.items()}
    for key, frames in (("x", 14), ("mask", 14), ("h", 5), ("h_mask", 5)):
        alone[key] = alone[key][..., :frames]
    torch.testing.assert_close(
        _run(name, piece, alone), together[1:, :, :14], atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("name", ["fft", "fft_flow", "fft_proximal", "decoder", "ffn_causal"])
def test_the_causal_ones_do_not_see_what_comes(pieces: dict[str, nn.Module], name: str) -> None:
    torch.manual_seed(0)
    mask = torch.ones(1, 1, 11)
    given = {"x": torch.randn(1, 12, 11), "h": torch.randn(1, 12, 5), "g": torch.randn(1, 6, 1)}
    given |= {"mask": mask, "h_mask": torch.ones(1, 1, 5)}
    before = _run(name, pieces[name], given)
    given["x"] = torch.cat([given["x"][..., :7], torch.randn(1, 12, 4)], dim=-1)
    after = _run(name, pieces[name], given)
    torch.testing.assert_close(after[..., :7], before[..., :7], atol=1e-6, rtol=0)
    assert (after[..., 7] - before[..., 7]).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"block_length": 2}])
def test_a_query_that_may_see_no_key_averages_over_all(options: dict[str, int]) -> None:
    torch.manual_seed(0)
    attention = MultiHeadAttention(4, 4, 2, **options).double()
    x = torch.randn(1, 4, 6).double()
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    mask[:, :, 2] = False
    made = attention(x, x, mask)[..., 2]
    mean = attention.conv_v(x).mean(dim=2, keepdim=True)
    if "window" in options:  # frame 2 has a place for each of the 6 frames, 2 before to 3 after it
        mean = mean + attention.emb_rel_v[:, 2:8].sum(1).repeat(1, 2).unsqueeze(-1) / 6
    torch.testing.assert_close(made, attention.conv_o(mean)[..., 0], atol=1e-12, rtol=0)


def test_pairs_of_frames_keep_only_one_number_per_head() -> None:
    """so-vits-svc keeps a second copy of the weights, padded to 2 * 300 - 1 positions."""
    attention = MultiHeadAttention(4, 4, 2, window=4)
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        x = torch.randn(1, 4, 300)
        attention(x, x, torch.ones(1, 1, 1, 300, dtype=torch.bool)).sum().backward()
    assert max(sizes) == 2 * 300 * 300


def test_learns_in_bfloat16() -> None:
    torch.manual_seed(0)
    mask = torch.ones(2, 1, 20)
    mask[1, :, 15:] = 0
    for piece in (
        TransformerEncoder(8, 12, 2, 3, 3, gin_channels=6),
        FFT(8, 12, 2, 2, 3, gin_channels=6),
    ):
        x, g = torch.randn(2, 8, 20), torch.randn(2, 6, 1)
        exact = piece.eval()(x, mask, g)
        piece.train()
        with torch.autocast("cpu", torch.bfloat16):
            made = piece(x, mask, g)
        torch.testing.assert_close(made.float(), exact, atol=0.1, rtol=0)
        made.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in piece.parameters())


def test_an_encoder_too_shallow_for_its_speaker_says_so() -> None:
    with pytest.raises(ValueError, match="needs 3 layers or more, not 2"):
        TransformerEncoder(8, 12, 2, 2, gin_channels=6)


def test_proximal_start_is_equal_queries_and_keys() -> None:
    attention = FFT(8, 12, 2).self_attn_layers[0]
    assert attention.conv_q.weight.equal(attention.conv_k.weight)
    assert attention.conv_q.weight.data_ptr() != attention.conv_k.weight.data_ptr()
