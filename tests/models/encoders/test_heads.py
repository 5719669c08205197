"""Heads against transformers, clip by clip, and clips in a batch against single clips."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoint import CheckpointError
from models.encoders.heads import AdditiveMarginSoftmax, LayerSum, load_head
from models.encoders.xvector import load_xvector
from models.torchaudio_compat import import_torchaudio

import_torchaudio()

from transformers.models.wavlm.modeling_wavlm import AMSoftmaxLoss  # noqa: E402

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_labels": 5,
    "vocab_size": 11,
    "classifier_proj_size": 12,
    "tdnn_dim": [24, 24, 20, 20, 28],
    "xvector_output_dim": 18,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
}
FLAVOURS = {
    "base": {"feat_extract_norm": "group", "do_stable_layer_norm": False},
    "large": {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
}
MODELS = [
    "WavLMForXVector",
    "WavLMForAudioFrameClassification",
    "WavLMForSequenceClassification",
    "WavLMForCTC",
    "HubertForSequenceClassification",
    "HubertForCTC",
]
LENGTHS = [12000, 7001, 16400, 9123]  # samples


def peer_model(golden: Path, name: str, **settings: Any) -> transformers.PreTrainedModel:
    """Make a tiny transformers network with the goldens' weights."""
    spec = importlib.util.spec_from_file_location("fill", golden / "encoders" / "fill.py")
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**TINY | settings))
    model.load_state_dict(
        {k: torch.from_numpy(fill.fill(k, t.shape)) for k, t in model.state_dict().items()}
    )
    return model.eval()


def saved(model: transformers.PreTrainedModel, folder: Path, normalize: bool = False) -> Path:
    model.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize).save_pretrained(folder)
    return folder


def noise(num_samples: int, seed: int = 0) -> Tensor:
    return torch.randn(num_samples, generator=torch.Generator().manual_seed(seed)) * 0.3


def batch() -> tuple[list[Tensor], Tensor]:
    """Make clips and their padded batch, with random values in the padding."""
    wavs = [noise(n, seed=i) for i, n in enumerate(LENGTHS)]
    rows = torch.full((len(wavs), max(LENGTHS)), 7.0)
    for row, wav in zip(rows, wavs, strict=True):
        row[: len(wav)] = wav
    return wavs, rows


def results(output: Any, i: int, num_frames: int) -> Tensor:
    """Return a head's results for clip `i`, limited to its own frames."""
    if isinstance(output, tuple):  # CTC
        output, frames = output
        num_frames = frames[i]
    return output[i, :num_frames] if output.ndim == 3 else output[i]


@pytest.fixture(params=sorted(FLAVOURS))
def flavour(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("name", MODELS)
def test_a_head_gives_what_transformers_gives(
    golden: Path, tmp_path: Path, name: str, flavour: str
) -> None:
    layer_sum = flavour == "base" and not name.endswith("CTC")  # "large": the test after this one
    settings = FLAVOURS[flavour] | {"use_weighted_layer_sum": layer_sum}
    peer = peer_model(golden, name, **settings)
    model = load_head(saved(peer, tmp_path))
    assert isinstance(model.network, LayerSum) == layer_sum
    wavs, rows = batch()
    with torch.inference_mode():
        together = model(rows, LENGTHS)
        for i, wav in enumerate(wavs):
            expected = peer(wav[None])
            expected = expected.embeddings if name == "WavLMForXVector" else expected.logits
            n = model.network.config.num_frames(len(wav))
            alone = results(model(wav[None]), 0, n)
            torch.testing.assert_close(alone, expected[0], rtol=0, atol=2e-5)
            torch.testing.assert_close(results(together, i, n), alone, rtol=0, atol=1e-5)


def test_the_sum_over_layers_has_the_final_norm_in_a_pre_norm_network(
    golden: Path, tmp_path: Path
) -> None:
    """Older transformers had the norm when the checkpoints were made; version 5 omits it."""
    peer = peer_model(golden, "WavLMForXVector", **FLAVOURS["large"], use_weighted_layer_sum=True)
    model = load_head(saved(peer, tmp_path))
    wav = noise(12000)[None]
    with torch.inference_mode():
        output = peer.wavlm(wav, output_hidden_states=True)
        states = torch.stack([*output.hidden_states[:-1], output.last_hidden_state], dim=1)
        shares = peer.layer_weights.softmax(-1)
        expected = (states * shares.view(-1, 1, 1)).sum(dim=1)
        torch.testing.assert_close(model.network(wav), expected, rtol=0, atol=2e-5)


def test_hidden_states_are_those_of_transformers(
    golden: Path, tmp_path: Path, flavour: str
) -> None:
    peer = peer_model(golden, "WavLMForCTC", **FLAVOURS[flavour])
    network = load_head(saved(peer, tmp_path)).network
    wav = noise(12000)[None]
    with torch.inference_mode():
        output = peer.wavlm(wav, output_hidden_states=True)
        states = network.hidden_states(network.features(wav, [12000]), [37])
    expected = [*output.hidden_states[:-1], output.last_hidden_state]
    assert len(states) == len(expected) == 3
    for ours, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_ctc_with_an_adapter(golden: Path, tmp_path: Path) -> None:
    peer = peer_model(golden, "WavLMForCTC", add_adapter=True, output_hidden_size=20)
    model = load_head(saved(peer, tmp_path))
    wavs, rows = batch()
    with torch.inference_mode():
        together, frames = model(rows, LENGTHS)
        for i, wav in enumerate(wavs):
            expected = peer(wav[None]).logits[0]
            assert frames[i] == len(expected)
            torch.testing.assert_close(together[i, : frames[i]], expected, rtol=0, atol=2e-5)


# Losses


def test_the_additive_margin_softmax_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    peer = AMSoftmaxLoss(18, 7, scale=20.0, margin=0.3)
    loss = AdditiveMarginSoftmax(18, 7, scale=20.0, margin=0.3)
    loss.load_state_dict(peer.state_dict())
    vectors, speakers = torch.randn(9, 18), torch.randint(7, (9,))
    for module in (loss, peer):
        module(vectors, speakers).backward()
    torch.testing.assert_close(loss(vectors, speakers), peer(vectors, speakers))
    torch.testing.assert_close(loss.weight.grad, peer.weight.grad)
    default = AdditiveMarginSoftmax(18, 7)
    assert (default.scale, default.margin) == (30.0, 0.4)


def test_the_loss_of_an_x_vector_is_that_of_transformers(golden: Path, tmp_path: Path) -> None:
    peer = peer_model(golden, "WavLMForXVector")
    model = load_head(saved(peer, tmp_path))
    wavs = torch.stack([noise(12000, seed) for seed in range(3)])
    speakers = torch.tensor([4, 0, 2])
    loss = model.head.loss(model(wavs), speakers)
    torch.testing.assert_close(loss, peer(wavs, labels=speakers).loss, rtol=0, atol=2e-5)


def test_a_constant_feature_leaves_the_gradient_finite(golden: Path, tmp_path: Path) -> None:
    """ReLU often gives 0 throughout a clip, and a deviation of 0 has no slope."""
    model = load_head(saved(peer_model(golden, "WavLMForXVector"), tmp_path))
    model.head.tdnn[-1].kernel.bias.data -= 100
    model.head.loss(model(noise(12000)[None]), torch.tensor([1])).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_of_ctc_is_that_of_transformers(
    golden: Path, tmp_path: Path, reduction: str
) -> None:
    # The stem's norm over channels: there transformers is exact in a batch, but for its masks.
    peer = peer_model(
        golden, "WavLMForCTC", **FLAVOURS["large"], ctc_loss_reduction=reduction, pad_token_id=3
    )
    model = load_head(saved(peer, tmp_path))
    wavs, rows = batch()
    labels = torch.tensor([[1, 2, 2, 5], [4, -100, -100, -100], [7, 8, 9, 10], [6, 6, -100, -100]])
    losses = [
        peer(wav[None], labels=label[None]).loss for wav, label in zip(wavs, labels, strict=True)
    ]
    loss = model.head.loss(*model(rows, LENGTHS), labels)
    expected = torch.stack(losses).sum() / (len(wavs) if reduction == "mean" else 1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=2e-5)


def test_training_masks_what_transformers_masks(golden: Path, tmp_path: Path) -> None:
    settings = {"mask_time_prob": 0.4, "mask_time_length": 4, "mask_feature_prob": 0.1}
    settings["mask_feature_min_masks"] = 0  # which transformers' own defaults lack
    peer = peer_model(golden, "WavLMForCTC", **settings).train()
    model = load_head(saved(peer, tmp_path), seed=9).train()
    wav = noise(12000)[None]
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(9)  # noqa: NPY002
    expected = peer(wav).logits
    np.random.set_state(state)  # noqa: NPY002
    logits, _ = model(wav)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    assert not torch.allclose(model.eval()(wav)[0], expected)


# Folders


def old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weight norm as in transformers before 4.35."""
    new = {".parametrizations.weight.original0": ".weight_g"}
    new[".parametrizations.weight.original1"] = ".weight_v"
    renamed = {}
    for key, tensor in tensors.items():
        for end, old in new.items():
            key = key.removesuffix(end) + old if key.endswith(end) else key
        renamed[key] = tensor
    return renamed


@pytest.mark.parametrize("layout", ["sharded", "bin", "sharded bin"])
def test_every_layout_of_a_folder(golden: Path, tmp_path: Path, layout: str) -> None:
    saved(peer_model(golden, "WavLMForXVector"), tmp_path)
    expected = load_head(tmp_path).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    ending = "safetensors" if layout == "sharded" else "bin"
    stem = "model" if layout == "sharded" else "pytorch_model"
    if layout == "bin":
        torch.save(old_names(tensors), tmp_path / "pytorch_model.bin")
    else:
        names = [f"{stem}-0000{i}-of-00002.{ending}" for i in (1, 2)]
        places = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
        for name in names:
            part = {key: tensors[key] for key, place in places.items() if place == name}
            if layout == "sharded":
                save_file(part, tmp_path / name)
            else:
                torch.save(part, tmp_path / name)
        index = tmp_path / f"{stem}.{ending}.index.json"
        index.write_text(json.dumps({"weight_map": places}))
    state = load_head(tmp_path).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("tdnn.2.kernel.bias"), "tdnn.2.kernel.bias"),
        (lambda t: t.pop("objective.weight"), "objective.weight"),
        (lambda t: t.pop("layer_weights"), "layer_weights"),
        (lambda t: t.pop("wavlm.encoder.layers.1.layer_norm.bias"), "layers.1.layer_norm.bias"),
        (lambda t: t.update({"tdnn.9.bias": torch.zeros(3)}), "tdnn.9.bias"),
        (lambda t: t.update({"wavlm.odd.bias": torch.zeros(3)}), "odd.bias"),
        (lambda t: t.update({"classifier.bias": torch.zeros(3)}), "classifier.bias"),
        (lambda t: t.update({"layer_weights": torch.zeros(4)}), "layer_weights"),
        (lambda t: t.update({"tdnn.0.kernel.weight": torch.zeros(4)}), "invalid shape"),
        (lambda t: t.update({"tdnn.5.kernel.weight": torch.zeros(4, 4)}), "6 time-delay layers"),
        (lambda t: t.update({"odd.bias": torch.zeros(3)}), "odd.bias"),
        (lambda t: [t.pop(k) for k in list(t) if not k.startswith("wavlm.")], "no head"),
    ],
)
def test_a_folder_with_other_parameters_is_refused(
    golden: Path, tmp_path: Path, change: Any, message: str
) -> None:
    saved(peer_model(golden, "WavLMForXVector", use_weighted_layer_sum=True), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_head(tmp_path)


def test_normalisation_must_be_known(golden: Path, tmp_path: Path) -> None:
    saved(peer_model(golden, "WavLMForXVector"), tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json is missing"):
        load_head(tmp_path)
    assert load_head(tmp_path, normalize_wav=True).normalize_wav


# The x-vector of clips


@pytest.mark.parametrize("normalize", [False, True])
def test_vectors_are_those_of_transformers(golden: Path, tmp_path: Path, normalize: bool) -> None:
    peer = peer_model(golden, "WavLMForXVector", use_weighted_layer_sum=True)
    folder = saved(peer, tmp_path, normalize)
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    xvector = load_xvector(folder)
    assert (xvector.sample_rate, xvector.dim) == (16000, 18)
    volumes = [1, 0.01, 3, 0.1]
    wavs = [volume * noise(n) + 0.1 for n, volume in zip(LENGTHS, volumes, strict=True)]
    before = [wav.clone() for wav in wavs]
    vectors = xvector.embed(wavs)
    for wav, vector in zip(wavs, vectors, strict=True):
        values = extractor(wav.numpy(), sampling_rate=16000, return_tensors="pt").input_values
        with torch.inference_mode():
            expected = peer(values).embeddings[0]
        assert vector.dtype == torch.float32
        torch.testing.assert_close(vector, expected, rtol=0, atol=2e-5)
    assert all(torch.equal(wav, old) for wav, old in zip(wavs, before, strict=True))
    assert xvector.embed([]) == []


def test_vectors_in_padded_batches_are_those_alone(
    golden: Path, tmp_path: Path, flavour: str
) -> None:
    """Run the GPU's code path on the CPU."""
    peer = peer_model(golden, "WavLMForXVector", **FLAVOURS[flavour], use_weighted_layer_sum=True)
    xvector = load_xvector(saved(peer, tmp_path, normalize=True))
    wavs = [noise(n, i) for i, n in enumerate([*LENGTHS, 300])]
    alone = xvector.embed(wavs)
    xvector.frames.one_by_one = False
    for vector, expected in zip(xvector.embed(wavs), alone, strict=True):
        torch.testing.assert_close(vector, expected, rtol=0, atol=1e-5)


def test_a_short_clip_is_followed_by_zeros(golden: Path, tmp_path: Path) -> None:
    xvector = load_xvector(saved(peer_model(golden, "WavLMForXVector"), tmp_path))
    assert xvector.shortest == 400 + 15 * 320  # 0.325 s
    for n in (1, 399, 5199, 5200):
        (vector,) = xvector.embed([noise(n)])
        (padded,) = xvector.embed([torch.nn.functional.pad(noise(n), (0, 5200 - n))])
        assert torch.isfinite(vector).all()
        assert torch.equal(vector, padded)


def test_a_head_refuses_a_clip_without_a_deviation(golden: Path, tmp_path: Path) -> None:
    model = load_head(saved(peer_model(golden, "WavLMForXVector"), tmp_path))
    with pytest.raises(ValueError, match="needs 16 frames, but a clip has 15"):
        model(noise(400 + 14 * 320)[None])


def test_a_long_clip_is_seen_whole(golden: Path, tmp_path: Path) -> None:
    """The network runs in windows. Without attention, distant frames are independent,
    so the vector must equal that of the clip in one piece."""
    peer = peer_model(golden, "WavLMForXVector", num_hidden_layers=1, num_attention_heads=1)
    for layer in peer.wavlm.encoder.layers:
        layer.attention.out_proj.weight.data.zero_()
    folder = saved(peer, tmp_path)
    wav = noise(70 * 16000)
    (vector,) = load_xvector(folder).embed([wav])
    model = load_head(folder)
    with torch.inference_mode():
        whole, first = model(wav[None])[0], model(wav[None, : 60 * 16000])[0]
    torch.testing.assert_close(vector, whole, rtol=0, atol=1e-5)
    assert (first - whole).abs().max() > 1e-4


def test_another_head_gives_no_vectors(golden: Path, tmp_path: Path) -> None:
    folder = saved(peer_model(golden, "WavLMForCTC"), tmp_path)
    with pytest.raises(CheckpointError, match="not an x-vector model: it has a CtcHead"):
        load_xvector(folder)
