"""Masking, the quantizer and the adapter, against transformers with the same weights and seeds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from models.encoders.adapter import Adapter
from models.encoders.masking import SpecAugment, SpecAugmentConfig, compute_mask_indices
from models.encoders.quantizer import GumbelVectorQuantizer
from models.encoders.wav2vec2 import LayerShape, Wav2Vec2, Wav2Vec2Config
from models.torchaudio_compat import import_torchaudio

import_torchaudio()

from transformers import Wav2Vec2Config as PeerConfig  # noqa: E402
from transformers import WavLMConfig, WavLMModel  # noqa: E402
from transformers.models.wav2vec2.modeling_wav2vec2 import (  # noqa: E402
    Wav2Vec2Adapter,
    Wav2Vec2GumbelVectorQuantizer,
)
from transformers.models.wavlm.modeling_wavlm import (  # noqa: E402
    WavLMAdapter,
    WavLMGumbelVectorQuantizer,
    _compute_mask_indices,
)


@pytest.fixture(autouse=True)
def _numpy_as_it_was() -> Iterator[None]:
    """Restore numpy's global state, from which transformers draws."""
    state = np.random.get_state()  # noqa: NPY002
    yield
    np.random.set_state(state)  # noqa: NPY002


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention_mask(lengths: list[int], n: int) -> Tensor:
    return (torch.arange(n) < torch.tensor(lengths)[:, None]).long()


# Masking


def test_masks_are_those_of_transformers() -> None:
    cases = itertools.product(
        [[50, 50, 50], [50, 31, 9], [50, 1, 10]], [0.0, 0.05, 0.3, 0.9], [1, 4, 10, 50], [0, 2]
    )
    masked = 0
    for seed, (lengths, probability, length, min_masks) in enumerate(cases):
        np.random.seed(seed)  # noqa: NPY002
        expected = _compute_mask_indices(
            (3, 50), probability, length, attention_mask(lengths, 50), min_masks
        )
        mask = compute_mask_indices(
            (3, 50),
            probability,
            length,
            rng=np.random.RandomState(seed),
            lengths=lengths,
            min_masks=min_masks,
        )
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, expected)
        masked += mask.sum()
    assert masked > 1000


def test_masks_without_lengths_take_every_position() -> None:
    np.random.seed(3)  # noqa: NPY002
    expected = _compute_mask_indices((4, 200), 0.4, 7)
    rng = np.random.RandomState(3)
    np.testing.assert_array_equal(compute_mask_indices((4, 200), 0.4, 7, rng=rng), expected)
    assert not np.array_equal(compute_mask_indices((4, 200), 0.4, 7, rng=rng), expected)


@pytest.mark.parametrize("length", [0, 11])
def test_a_span_that_does_not_fit_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"span of {length} does not fit into 10"):
        compute_mask_indices((1, 10), 0.5, length, rng=np.random.RandomState(0))


def peer_masking(cfg: SpecAugmentConfig) -> WavLMModel:
    return WavLMModel(
        WavLMConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            conv_dim=[8] * 7,
            mask_time_prob=cfg.time_probability,
            mask_time_length=cfg.time_length,
            mask_time_min_masks=cfg.time_min_masks,
            mask_feature_prob=cfg.feature_probability,
            mask_feature_length=cfg.feature_length,
            mask_feature_min_masks=cfg.feature_min_masks,
        )
    ).train()


def test_masked_frames_and_features_are_those_of_transformers() -> None:
    cfg = SpecAugmentConfig(
        time_probability=0.3, time_length=4, feature_probability=0.2, feature_length=3
    )
    peer = peer_masking(cfg)
    masking = SpecAugment(cfg, 32, np.random.RandomState(5)).train()
    masking.embedding.data = peer.masked_spec_embed.data
    x, frames = random(3, 40, 32), [40, 22, 13]
    np.random.seed(5)  # noqa: NPY002
    expected = peer._mask_hidden_states(x.clone(), attention_mask=attention_mask(frames, 40))
    before = x.clone()
    masked = masking(x, frames)
    assert torch.equal(masked, expected)
    assert torch.equal(x, before)
    assert (masked != x).any(dim=1).any()
    assert torch.equal(masking.eval()(x, frames), x)


def test_a_network_is_masked_in_training_only() -> None:
    torch.manual_seed(0)
    network = Wav2Vec2(
        Wav2Vec2Config(
            stem=((8, 10, 5), (8, 4, 4)),
            width=16,
            position_kernel=4,
            position_groups=2,
            layers=(LayerShape(heads=2, head_dim=8, feed_forward=16),),
        )
    )
    wavs = random(2, 1000)
    plain = network(wavs, [1000, 700])
    cfg = SpecAugmentConfig(time_probability=0.5, time_length=3)
    network.masking = SpecAugment(cfg, 16, np.random.RandomState(0))
    assert not torch.allclose(network.train()(wavs, [1000, 700]), plain)
    network(wavs, [1000, 700]).sum().backward()
    assert network.masking.embedding.grad.abs().sum() > 0
    assert torch.equal(network.eval()(wavs, [1000, 700]), plain)


# The quantizer


def quantizers(training: bool) -> tuple[GumbelVectorQuantizer, Wav2Vec2GumbelVectorQuantizer]:
    peer = Wav2Vec2GumbelVectorQuantizer(
        PeerConfig(
            conv_dim=[12] * 7,
            num_codevector_groups=3,
            num_codevectors_per_group=10,
            codevector_dim=24,
        )
    )
    quantizer = GumbelVectorQuantizer(12, groups=3, entries=10, dim=24)
    peer.load_state_dict(quantizer.state_dict())
    peer.temperature = quantizer.temperature = 1.3
    return quantizer.train(training), peer.train(training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_quantizer_is_that_of_transformers(training: bool, masked: bool) -> None:
    quantizer, peer = quantizers(training)
    x = random(2, 9, 12)
    counted = random(2, 9, seed=1) > 0 if masked else None
    torch.manual_seed(1)
    expected, expected_perplexity = peer(x, counted)
    torch.manual_seed(1)
    vectors, perplexity = quantizer(x, counted)
    assert vectors.shape == (2, 9, 24)
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(perplexity, expected_perplexity, rtol=1e-6, atol=0)


def test_the_quantizer_is_that_of_wavlm() -> None:
    config = WavLMConfig(conv_dim=[12] * 7, num_codevectors_per_group=10, codevector_dim=24)
    peer = WavLMGumbelVectorQuantizer(config).eval()
    quantizer = GumbelVectorQuantizer(12, entries=10, dim=24).eval()
    peer.load_state_dict(quantizer.state_dict())
    for ours, expected in zip(quantizer(random(2, 9, 12)), peer(random(2, 9, 12)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_the_gradient_goes_straight_through_the_choice() -> None:
    quantizer, peer = quantizers(training=True)
    for network in (quantizer, peer):
        torch.manual_seed(1)
        vectors, perplexity = network(random(2, 9, 12))
        (vectors.square().sum() + perplexity).backward()
    gradient = quantizer.weight_proj.weight.grad
    assert gradient.abs().max() > 0.1
    torch.testing.assert_close(gradient, peer.weight_proj.weight.grad, rtol=0, atol=1e-4)


def test_a_width_that_groups_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="the width 256 is not a multiple of the 3 groups"):
        GumbelVectorQuantizer(12, groups=3)


# The adapter


def adapters(
    dim: int, kernel: int = 3, stride: int = 2, layer_drop: float = 0.0
) -> tuple[Adapter, WavLMAdapter]:
    torch.manual_seed(0)
    adapter = Adapter(
        16, dim, kernel=kernel, stride=stride, layer_drop=layer_drop, rng=np.random.RandomState(2)
    )
    config = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "add_adapter": True,
        "output_hidden_size": dim,
        "adapter_kernel_size": kernel,
        "adapter_stride": stride,
        "layerdrop": layer_drop,
    }
    peer = WavLMAdapter(WavLMConfig(**config))
    peer.load_state_dict(adapter.state_dict())
    Wav2Vec2Adapter(PeerConfig(**config)).load_state_dict(adapter.state_dict())
    return adapter.eval(), peer.eval()


@pytest.mark.parametrize(("dim", "kernel", "stride"), [(16, 3, 2), (10, 3, 2), (16, 5, 3)])
def test_the_adapter_is_that_of_transformers(dim: int, kernel: int, stride: int) -> None:
    adapter, peer = adapters(dim, kernel, stride)
    for n in (40, 41, 47):
        out, frames = adapter(random(2, n, 16), [n, n])
        torch.testing.assert_close(out, peer(random(2, n, 16)), rtol=0, atol=1e-6)
        assert frames == [out.shape[1]] * 2 == [adapter.num_frames(n)] * 2


def test_the_adapter_leaves_out_the_layers_that_transformers_does() -> None:
    adapter, peer = adapters(16, layer_drop=0.5)
    adapter.train(), peer.train()
    np.random.seed(2)  # noqa: NPY002
    shapes = set()
    for _ in range(8):
        out, frames = adapter(random(2, 40, 16), [40, 40])
        torch.testing.assert_close(out, peer(random(2, 40, 16)), rtol=0, atol=1e-6)
        assert frames == [out.shape[1]] * 2
        shapes.add(out.shape[1])
    assert len(shapes) > 1


def test_clips_in_the_adapters_batch_are_what_each_is_alone() -> None:
    adapter, _ = adapters(10)
    x, frames = random(3, 40, 16), [40, 17, 26]
    out, out_frames = adapter(x, frames)
    for i, n in enumerate(frames):
        alone, (n_out,) = adapter(x[i : i + 1, :n], [n])
        assert out_frames[i] == n_out == alone.shape[1]
        torch.testing.assert_close(out[i, :n_out], alone[0], rtol=0, atol=1e-6)
