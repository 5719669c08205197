"""Every file layout gives the results of the program that wrote it; errors name the keys."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.checkpoint import (
    CheckpointError,
    load_foreign,
    read_safetensors,
    save_safetensors,
)
from models.encoders import Encoder, load_encoder
from models.encoders.encoder_names import NAMES
from models.encoders.layouts import (
    EncoderFile,
    parse_encoder_file,
    read_encoder,
    read_encoder_file,
    save_encoder_file,
)
from models.encoders.ssl import SslEncoder
from models.encoders.wav2vec2 import RelativeBias, Wav2Vec2, Wav2Vec2Config, relative_buckets
from models.torchaudio_compat import import_torchaudio

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "encoders"
TOLERANCE = 2e-5  # of outputs with standard deviation 1, in float32; the noise is about 5e-6


@cache
def fill() -> ModuleType:
    """Load the rule that made the goldens' weights."""
    spec = importlib.util.spec_from_file_location("fill", GOLDEN / "fill.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wav() -> Tensor:
    """3 s of singing, (1, T)."""
    return torch.from_numpy(np.load(GOLDEN / "audio_public.npz")["wav"])[None]


def network(parts: tuple[Wav2Vec2Config, dict[str, Tensor]]) -> Wav2Vec2:
    config, tensors = parts
    made = Wav2Vec2(config).eval()
    made.load_state_dict(tensors)
    return made


@torch.inference_mode()
def units(parts: tuple[Wav2Vec2Config, dict[str, Tensor]], wav: Tensor) -> np.ndarray[Any, Any]:
    """(F, D)"""
    return network(parts)(wav)[0].numpy()


def assert_close(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    """Both (F, D)."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < TOLERANCE


def frames_first(golden: np.ndarray[Any, Any], dim: int) -> np.ndarray[Any, Any]:
    """(F, D) of a golden that is (1, F, D) or (1, D, F)."""
    (rows,) = golden
    return rows if rows.shape[1] == dim else rows.T


def assert_golden(
    parts: tuple[Wav2Vec2Config, dict[str, Tensor]],
    wav: Tensor,
    golden: np.ndarray[Any, Any],
    batched: bool = True,
) -> None:
    """Check that the plain network and the packed, tiled encoder reproduce the golden.

    batched: also in a padded batch, as on a GPU.
    """
    made = network(parts)
    expected = frames_first(golden, made.config.dim)
    with torch.inference_mode():
        assert_close(made(wav)[0].numpy(), expected)
    encoder = SslEncoder("any", made)
    assert_encodes(encoder, wav, expected)
    if batched:
        encoder.one_by_one = False
        together = encoder.encode([wav[0, :20000], wav[0]])[1]
        assert_close(together.numpy(), expected)


def assert_encodes(encoder: Encoder, wav: Tensor, golden: np.ndarray[Any, Any]) -> None:
    """Check that the user's encoder reproduces the golden: (F, D), (1, F, D) or (1, D, F)."""
    expected = golden if golden.ndim == 2 else frames_first(golden, encoder.dim)
    (found,) = encoder.encode([wav[0]])
    assert_close(found.numpy(), expected)


# --- the goldens


@pytest.mark.parametrize(
    "file",
    [
        "tiny_hubert_base.pt",
        "tiny_hubert_base_args.pt",
        "tiny_hubert_base_dictconfig.pt",
        "tiny_hubert_base_dictconfig_nozip.pt",
        "tiny_hubert_large.pt",
    ],
)
def test_fairseq_hubert_at_every_layer(file: str, wav: Tensor) -> None:
    stem = "tiny_hubert_base" if "base" in file else Path(file).stem
    golden = np.load(GOLDEN / f"{stem}_out.npz")
    checkpoint = read_encoder_file(GOLDEN / file)
    assert checkpoint.family == "hubert"
    assert checkpoint.config.normalize_wav == ("large" in file)
    for layer in (1, 2, 3):
        part = checkpoint.take(layer, normalize_wav=False)
        assert_golden(part, wav, golden[f"layer{layer}"])
    assert_golden(checkpoint.take(normalize_wav=False), wav, golden["none"])
    assert_golden(checkpoint.take(normalize_wav=True), wav, golden["none_wavnorm"])
    assert_stem(network(checkpoint.take(normalize_wav=False)), wav, golden["conv"], golden["proj"])


@torch.inference_mode()
def assert_stem(
    whole: Wav2Vec2,
    wav: Tensor,
    conv_golden: np.ndarray[Any, Any],
    projected_golden: np.ndarray[Any, Any],
) -> None:
    conv = whole.features(wav, [wav.shape[1]])
    if whole.config.stem_scale:
        conv = conv * whole.stem_scale
    projected = whole.projection(whole.stem_out_norm(conv))
    for found, golden in ((conv[0], conv_golden), (projected[0], projected_golden)):
        assert_close(found.numpy(), frames_first(golden, found.shape[1]))


SOVITS = [
    ("contentvec256l9", "sovits_ContentVec256L9"),
    ("contentvec768l12", "sovits_ContentVec768L12"),
    ("cnhubertlarge", "sovits_CNHubertLarge"),
]


@pytest.mark.parametrize(
    ("file", "outputs"),
    [
        ("tiny_hubert_base.pt", "tiny_hubert_base"),
        ("tiny_hubert_base_fp16.pt", "tiny_hubert_base_fp16"),
        ("tiny_hubert_base_args.pt", "tiny_hubert_base"),
        ("tiny_hubert_base_dictconfig.pt", "tiny_hubert_base"),
        ("tiny_hubert_base_dictconfig_nozip.pt", "tiny_hubert_base"),
        ("tiny_hubert_large.pt", "tiny_hubert_large"),
    ],
)
@pytest.mark.parametrize(("name", "golden"), SOVITS)
def test_names_give_what_so_vits_gives(
    file: str, outputs: str, name: str, golden: str, wav: Tensor
) -> None:
    expected = np.load(GOLDEN / f"{outputs}_out.npz")[golden]
    assert_golden(read_encoder(name, GOLDEN / file), wav, expected)
    assert_encodes(load_encoder(name, str(GOLDEN / file)), wav, expected)


@pytest.mark.parametrize("stem", ["tiny_hubert_base", "tiny_hubert_large"])
def test_a_normalised_waveform_is_an_option(stem: str, wav: Tensor) -> None:
    encoder = load_encoder("cnhubertlarge", str(GOLDEN / f"{stem}.pt"), normalize_wav=True)
    assert_encodes(encoder, wav, np.load(GOLDEN / f"{stem}_out.npz")["none_wavnorm"])


@pytest.mark.parametrize("stem", ["tiny_wavlm", "tiny_wavlm_large"])
def test_wavlm_at_every_layer(stem: str, wav: Tensor) -> None:
    golden = np.load(GOLDEN / f"{stem}_out.npz")
    checkpoint = read_encoder_file(GOLDEN / f"{stem}.pt")
    assert checkpoint.family == "wavlm"
    for layer in (1, 2, 3):
        assert_golden(checkpoint.take(layer), wav, golden[f"layer{layer}"])
    name, file = "wavlm-base-plus", GOLDEN / f"{stem}.pt"
    assert_golden(read_encoder(name, file), wav, golden["out"])
    assert_encodes(load_encoder(name, str(file)), wav, golden["out"])
    bias = network(checkpoint.take()).position_bias(7)
    assert bias is not None
    assert np.abs(bias.detach().numpy() - golden["rel_bias_7x7"]).max() < 1e-7


def test_position_buckets_of_wavlm() -> None:
    golden = np.load(GOLDEN / "wavlm_buckets_320_800.npz")
    found = relative_buckets(torch.from_numpy(golden["rel"]).long(), RelativeBias(heads=12))
    assert np.array_equal(found.numpy(), golden["bucket"])
    frames = torch.arange(149)
    shape = RelativeBias(heads=4, buckets=40, max_distance=60)
    found = relative_buckets(frames - frames[:, None], shape)
    for stem in ("tiny_wavlm", "tiny_wavlm_large"):
        assert np.array_equal(found.numpy(), np.load(GOLDEN / f"{stem}_out.npz")["buckets_149"])


@pytest.mark.parametrize(
    ("stem", "family"),
    [
        ("tiny_dphubert", "dphubert"),
        ("tiny_dphubert_large", "dphubert"),
        ("tiny_dpwavlm", "dpwavlm"),
    ],
)
def test_pruned_students_at_every_layer(stem: str, family: str, wav: Tensor) -> None:
    golden = np.load(GOLDEN / f"{stem}_out.npz")
    checkpoint = read_encoder_file(GOLDEN / f"{stem}.pth")
    assert checkpoint.family == family
    assert_stem(network(checkpoint.take()), wav, golden["conv"], golden["feat0"])
    for layer in (1, 2, 3, 4):
        assert_golden(checkpoint.take(layer), wav, golden[f"feat{layer}"])
    file = GOLDEN / f"{stem}.pth"
    assert_golden(read_encoder("dphubert", file), wav, golden["out_eval"])
    assert_encodes(load_encoder("dphubert", str(file)), wav, golden["out_eval"])


def test_a_pruned_wavlm_without_attention_in_layer_0_has_no_position_bias() -> None:
    content = load_foreign(GOLDEN / "tiny_dpwavlm.pth")
    content["config"]["encoder_use_attention"][0] = False
    content["state_dict"] = {
        key: tensor
        for key, tensor in content["state_dict"].items()
        if not key.startswith("encoder.transformer.layers.0.attention.")
    }
    config, tensors = parse_encoder_file(Path("a.pth"), content).take()
    assert config.relative_bias is None and config.layers[0].heads == 0
    assert not any("bias_gate" in name for name in tensors)


FULL = [
    (
        "hubert_base",
        {
            "contentvec256l9": "ContentVec256L9",
            "contentvec768l9": "ContentVec768L9",
            "contentvec768l12": "ContentVec768L12",
        },
    ),
    ("hubert_soft", {"hubertsoft": "units"}),
    ("wavlm_base_plus", {"wavlm-base-plus": "out"}),
    ("hubert_large", {"cnhubertlarge": "CNHubertLarge"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("manifest", "outputs"), FULL, ids=[m for m, _ in FULL])
def test_published_sizes(manifest: str, outputs: dict[str, str], wav: Tensor) -> None:
    """Without a configuration everything comes from the shapes."""
    arrays = fill().from_manifest(GOLDEN / f"manifest_{manifest}.json")
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    checkpoint = parse_encoder_file(Path(manifest), {"model": tensors})
    files = list(GOLDEN.glob(f"{manifest}_full*.npz"))
    golden = np.load(files[0])
    for name, key in outputs.items():
        what = NAMES[name]
        assert checkpoint.family in what.families and checkpoint.config.width == what.width
        config, state = checkpoint.take(
            what.layers, project=what.project, normalize_wav=what.normalize_wav
        )
        assert config.dim == (what.dim or what.width if not what.project else 256)
        assert_golden((config, state), wav, golden[key], batched=False)
    if (key := "CNHubertLarge_wavnorm") in golden:
        assert_golden(checkpoint.take(normalize_wav=True), wav, golden[key], batched=False)


# --- transformers' folders


def transformers_model(kind: str, large: bool, **more: Any) -> Any:
    import_torchaudio()  # transformers imports it by itself
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        conv_dim=(32,) * 7,
        num_conv_pos_embeddings=128,
        feat_extract_norm="layer" if large else "group",
        do_stable_layer_norm=large,
        conv_bias=large,
        **more,
    )
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(np.array(fill().fill(name, tensor.shape))))
    return model


@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
@pytest.mark.parametrize("kind", ["Hubert", "WavLM"])
def test_transformers_folders_files_and_shards(
    kind: str, large: bool, wav: Tensor, tmp_path: Path
) -> None:
    more = {"num_buckets": 40, "max_bucket_distance": 60} if kind == "WavLM" else {}
    model = transformers_model(kind, large, **more)
    with torch.inference_mode():
        expected = model(wav, output_hidden_states=True)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", old)
    torch.save(old_names(model.state_dict(), f"{kind.lower()}."), old / "pytorch_model.bin")
    for path in ("whole", "sharded", "old", "whole/model.safetensors"):
        checkpoint = read_encoder_file(tmp_path / path)
        assert checkpoint.family == kind.lower()
        for layer in (1, 2):
            assert_close(
                units(checkpoint.take(layer, normalize_wav=False), wav),
                expected.hidden_states[layer][0].numpy(),
            )
        found = units(checkpoint.take(normalize_wav=False), wav)
        assert_close(found, expected.last_hidden_state[0].numpy())


def old_names(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename keys as transformers before 4.31 wrote them, in a model with a head."""
    renamed = {
        prefix
        + key.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for key, tensor in tensors.items()
    }
    return renamed | {"lm_head.weight": torch.zeros(2, 48), "lm_head.bias": torch.zeros(2)}


def test_content_vec_best_has_its_projection_beside_the_model(wav: Tensor, tmp_path: Path) -> None:
    """The same weights by fairseq's names and by transformers' are the same encoder."""
    source = load_foreign(GOLDEN / "tiny_hubert_base.pt")["model"]
    names = json.loads((GOLDEN / "map_tiny_hubert_base_to_transformers.json").read_text())
    tensors = {names.get(key, key): t.clone() for key, t in source.items()}
    del tensors["label_embs_concat"]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    config = {"model_type": "hubert", "num_attention_heads": 4, "do_stable_layer_norm": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    golden = np.load(GOLDEN / "tiny_hubert_base_out.npz")["sovits_ContentVec256L9"]
    assert_golden(read_encoder("contentvec256l9", tmp_path), wav, golden)


@pytest.mark.parametrize(
    ("stem", "names", "name", "output", "more"),
    [
        ("tiny_hubert_large", "tiny_hubert_large", "cnhubertlarge", "sovits_CNHubertLarge", {}),
        (
            "tiny_wavlm",
            "wavlm",
            "wavlm-base-plus",
            "out",
            {"model_type": "wavlm", "num_buckets": 40, "max_bucket_distance": 60},
        ),
    ],
)
def test_a_file_renamed_for_transformers(
    stem: str, names: str, name: str, output: str, more: dict[str, Any], wav: Tensor, tmp_path: Path
) -> None:
    source = load_foreign(GOLDEN / f"{stem}.pt")["model"]
    renamed = json.loads((GOLDEN / f"map_{names}_to_transformers.json").read_text())
    tensors = {renamed[key]: t.clone() for key, t in source.items() if key in renamed}
    assert len(tensors) > 50
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    large = {"do_stable_layer_norm": "large" in stem}
    config = {"model_type": "hubert", "num_attention_heads": 4, **large, **more}
    (tmp_path / "config.json").write_text(json.dumps(config))
    golden = np.load(GOLDEN / f"{stem}_out.npz")[output]
    assert_encodes(load_encoder(name, str(tmp_path)), wav, golden)


def test_a_glu_feed_forward_keeps_its_gate() -> None:
    content = load_foreign(GOLDEN / "tiny_wavlm.pt")
    content["cfg"]["activation_fn"] = "glu"
    for i in range(3):
        key = f"encoder.layers.{i}.fc1"
        for end in ("weight", "bias"):
            one = content["model"].pop(f"{key}.{end}")
            content["model"][f"{key}.linear.{end}"] = torch.cat([one, one])
    net = network(parse_encoder_file(Path("a.pt"), content).take())
    block = net.layers[0].feed_forward
    x = torch.randn(1, 2, 48)
    inner = torch.nn.functional.linear(x, block.fc1.weight[:96], block.fc1.bias[:96])
    expected = block.fc2(inner * torch.nn.functional.silu(inner))  # WavLM's GLU_Linear, "swish"
    assert torch.allclose(block(x), expected, atol=1e-6)


# --- HuBERT-Soft in both of its files


def soft(wrap: Callable[[dict[str, Tensor]], dict[str, Any]]) -> EncoderFile:
    manifest = json.loads((GOLDEN / "manifest_hubert_soft.json").read_text())
    small = {768: 64, 3072: 96, 2304: 192, 512: 32, 48: 4, 504: 8, 256: 16}
    tensors = {}
    for key, shape in manifest.items():
        if ".layers." not in key or ".layers.0." in key:
            tensors[key] = torch.from_numpy(
                np.array(fill().fill(key, [small.get(n, n) for n in shape]))
            )
    return parse_encoder_file(Path("hubert-soft.pt"), wrap(tensors))


def test_hubert_soft_in_its_old_and_its_new_file() -> None:
    old = soft(lambda tensors: {f"module.{key}": t for key, t in tensors.items()})
    new = soft(lambda tensors: {"hubert": tensors, "optimizer": {}, "step": 5})
    for checkpoint in (old, new):
        assert checkpoint.family == "hubert-soft"
        assert (checkpoint.config.pad, checkpoint.config.project_dim) == (40, 16)
    for name, tensor in old.take(project=True)[1].items():
        assert torch.equal(tensor, new.take(project=True)[1][name])


# --- strictness


def base() -> dict[str, Any]:
    return dict(load_foreign(GOLDEN / "tiny_hubert_base.pt"))


def misfit(change: Callable[[dict[str, Any]], object]) -> str:
    content = base()
    change(content)
    with pytest.raises(CheckpointError) as caught:
        parse_encoder_file(Path("file.pt"), content)
    assert "file.pt" in str(caught.value) and "fairseq HuBERT" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "encoder.layers.1.self_attn.k_proj.weight",
        "encoder.layers.2.fc2.weight",
        "encoder.pos_conv.0.weight_g",
        "layer_norm.bias",
        "final_proj.bias",
        "feature_extractor.conv_layers.3.0.weight",
    ],
)
def test_a_missing_key_is_named(key: str) -> None:
    assert f"lacks {key}" in misfit(lambda content: content["model"].pop(key))


@pytest.mark.parametrize(
    "key",
    ["encoder.layers.1.extra.weight", "encoder.layers.3.fc1.bias", "layer_proj.weight"],
)
def test_an_extra_key_is_named(key: str) -> None:
    message = misfit(lambda content: content["model"].update({key: torch.zeros(96)}))
    assert key in message and "has unknown keys" in message


@pytest.mark.parametrize(
    "key",
    ["encoder.layers.0.self_attn.q_proj.weight", "encoder.layer_norm.weight", "final_proj.weight"],
)
def test_a_misshapen_key_is_named_with_both_shapes(key: str) -> None:
    message = misfit(lambda content: content["model"].update({key: torch.zeros(7, 7)}))
    assert key in message and "[7, 7]" in message


def test_a_configuration_that_cannot_be_is_named() -> None:
    cfg = "cfg"
    assert "activation" in misfit_config("activation_fn", "mish")
    assert "lacks encoder.layers.3" in misfit(lambda c: c[cfg]["model"].update(encoder_layers=4))
    assert "layers.2" in misfit(lambda c: c[cfg]["model"].update(encoder_layers=2))
    assert "5 heads" in misfit(lambda c: c[cfg]["model"].update(encoder_attention_heads=5))
    assert "strides" in misfit(lambda c: c[cfg]["model"].update(conv_feature_layers="[(32,10,5)]"))


def misfit_config(key: str, value: Any) -> str:
    content = base()
    content["cfg"]["model"][key] = value
    with pytest.raises(CheckpointError) as caught:
        parse_encoder_file(Path("file.pt"), content)
    return str(caught.value)


def test_shapes_decide_where_the_configuration_lies(wav: Tensor, tmp_path: Path) -> None:
    """chinese-hubert-large's convolutions have no bias, although its configuration has one."""
    content = load_foreign(GOLDEN / "tiny_hubert_large.pt")
    assert content["cfg"]["model"]["conv_bias"] is True
    for i in range(7):
        del content["model"][f"feature_extractor.conv_layers.{i}.0.bias"]
    golden = np.load(GOLDEN / "tiny_hubert_large_noconvbias_out.npz")
    checkpoint = parse_encoder_file(Path("a.pt"), content)
    for layer in (1, 2, 3):
        part = checkpoint.take(layer, normalize_wav=False)
        assert_golden(part, wav, golden[f"layer{layer}"])
    assert_golden(checkpoint.take(normalize_wav=False), wav, golden["none"])
    assert_golden(checkpoint.take(normalize_wav=True), wav, golden["none_wavnorm"])
    whole = network(checkpoint.take(normalize_wav=False))
    assert_stem(whole, wav, golden["conv"], golden["proj"])

    torch.save(content, tmp_path / "a.pt")
    for name, key in SOVITS:
        assert_encodes(load_encoder(name, str(tmp_path / "a.pt")), wav, golden[key])


# --- names


@pytest.mark.parametrize(
    ("file", "name", "right"),
    [
        ("tiny_wavlm.pt", "contentvec256l9", "wavlm-base-plus"),
        ("tiny_hubert_base.pt", "dphubert", "contentvec768l12"),
        ("tiny_dphubert.pth", "hubertsoft", "dphubert"),
        ("tiny_whisper.pt", "cnhubertlarge", "whisper-ppg"),
        ("vec-tiny-layer-3.onnx", "contentvec256l9", "onnx"),
        ("tiny_dphubert_supernet.pth", "dphubert", "prune"),
    ],
)
def test_a_wrong_name_says_which_is_right(file: str, name: str, right: str) -> None:
    with pytest.raises(CheckpointError, match=right) as caught:
        read_encoder(name, GOLDEN / file)
    assert file in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (["enc_p.pre.weight", "emb_g.weight"], "voice model"),
        (["discriminators.0.convs.0.bias"], "discriminator"),
        (["unet.encoder.bn.weight"], "RMVPE"),
        (["post_extract_proj.weight", "quantizer.vars"], "wav2vec 2.0"),
        (["linear.weight"], "not a known encoder"),
    ],
)
def test_models_of_other_trades_are_named(keys: list[str], what: str) -> None:
    content = {"model": {key: torch.zeros(1) for key in keys}, "iteration": 1}
    with pytest.raises(CheckpointError, match=what):
        parse_encoder_file(Path("G_0.pth"), content)


def test_a_folder_of_another_model_is_named(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="type bert"):
        read_encoder_file(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="neither"):
        read_encoder_file(tmp_path)


def test_a_config_json_of_something_else_beside_a_file_does_not_matter(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "tiny_hubert_base.pt", tmp_path / "hubert.pt")
    (tmp_path / "config.json").write_text("// of a voice model\n{}")
    assert read_encoder_file(tmp_path / "hubert.pt").family == "hubert"


def test_a_projection_is_asked_for_in_words_where_there_is_none(tmp_path: Path) -> None:
    content = base()
    del content["model"]["final_proj.weight"], content["model"]["final_proj.bias"]
    torch.save({"model": content["model"], "cfg": content["cfg"]}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="no final projection"):
        read_encoder("contentvec256l9", tmp_path / "a.pt")
    read_encoder("contentvec768l9", tmp_path / "a.pt")


# --- our own format


@pytest.mark.parametrize(
    "file", ["tiny_hubert_large.pt", "tiny_wavlm.pt", "tiny_dphubert_large.pth", "tiny_dpwavlm.pth"]
)
def test_our_format_is_the_same_network(file: str, tmp_path: Path) -> None:
    source = read_encoder_file(GOLDEN / file)
    save_encoder_file(source, tmp_path / "a.safetensors")
    ours = read_encoder_file(tmp_path / "a.safetensors")
    assert (ours.config, ours.family) == (source.config, source.family)
    for layers in (2, None):
        config, expected = source.take(layers)
        assert ours.take(layers)[0] == config
        assert all(torch.equal(t, expected[name]) for name, t in ours.take(layers)[1].items())


def test_our_format_in_half_precision_loads_as_float32(tmp_path: Path) -> None:
    source = read_encoder_file(GOLDEN / "tiny_wavlm.pt")
    save_encoder_file(source, tmp_path / "a.safetensors", torch.float16)
    stored, _ = read_safetensors(tmp_path / "a.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    _, tensors = read_encoder_file(tmp_path / "a.safetensors").take()
    assert {t.dtype for t in tensors.values()} == {torch.float32}


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "bert"},
        {"family": ["hubert"]},
        {"config": "hubert"},
        {"config": {"stem": [[512, 10]], "layers": []}},
        {"config": {"stem": [], "layers": [12]}},
        {"config": {"stem": [["512", 10, 5]], "layers": []}},
    ],
    ids=str,
)
def test_a_damaged_header_of_ours_is_an_error_in_words(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_encoder_file(read_encoder_file(GOLDEN / "tiny_wavlm.pt"), path)
    tensors, metadata = read_safetensors(path)
    header = json.loads(metadata["cantor"]) | changes
    save_safetensors(path, tensors, {"cantor": json.dumps(header)})
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        read_encoder_file(path)


@pytest.mark.parametrize("file", ["a.pt", "a.safetensors"])
def test_layers_beyond_the_wanted_one_are_not_read(file: str, tmp_path: Path) -> None:
    """The file may be replaced, and its weights written to, once it is open."""
    source = GOLDEN / "tiny_hubert_base.pt"
    if file == "a.pt":
        shutil.copy(source, tmp_path / file)
    else:
        save_encoder_file(read_encoder_file(source), tmp_path / file)
    config, tensors = read_encoder_file(tmp_path / file).take(1)
    assert len(config.layers) == 1 and not any(name.startswith("layers.1") for name in tensors)
    save_encoder_file(read_encoder_file(GOLDEN / "tiny_wavlm.pt"), tmp_path / file)
    _, expected = read_encoder_file(source).take(1)
    assert all(torch.equal(t, expected[name]) for name, t in tensors.items())
    tensors["projection.bias"].zero_()
    assert read_encoder_file(tmp_path / file).take()[1]["projection.bias"].any()


def test_what_is_not_taken_is_not_brought_into_memory(tmp_path: Path) -> None:
    smaps = Path("/proc/self/smaps")
    if not smaps.is_file():
        pytest.skip("memory maps are listed on Linux alone")
    content = base() | {"last_optimizer_state": torch.zeros(16_000_000)}  # 64 MB
    path = tmp_path / "a.pt"
    torch.save({key: content[key] for key in ("cfg", "model", "last_optimizer_state")}, path)
    checkpoint = read_encoder_file(path)
    checkpoint.take(1)
    lines = smaps.read_text().splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.endswith(str(path)))
    resident = next(line for line in lines[at:] if line.startswith("Rss:"))
    assert int(resident.split()[1]) < 4000  # kB
