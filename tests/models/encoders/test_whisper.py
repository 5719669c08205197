"""Whisper as an encoder: so-vits-svc's results, windows, and every layout of its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import unpickler
from models.batching import Batcher
from models.checkpoint import CheckpointError, save_safetensors
from models.encoders.whisper import (
    WINDOW_SAMPLES,
    WhisperEncoder,
    header,
    load_whisper,
    read_whisper,
    whisper_log_mel,
    whisper_mel_filters,
)
from models.torchaudio_compat import import_torchaudio

TOLERANCE = 2e-5  # float32 noise of the peer is 5e-6


def noise(num_samples: int, seed: int = 0) -> Tensor:
    return torch.randn(num_samples, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture(scope="module")
def checkpoint(golden: Path) -> Path:
    return golden / "encoders" / "tiny_whisper.pt"


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> WhisperEncoder:
    return load_whisper("whisper-ppg", str(checkpoint))


@pytest.fixture(scope="module")
def singing(golden: Path) -> Tensor:
    with np.load(golden / "encoders" / "audio_public.npz") as arrays:
        return torch.from_numpy(arrays["wav"])


@pytest.fixture
def content(checkpoint: Path) -> dict[str, Any]:
    """Return the content of the golden checkpoint, to be changed."""
    return torch.load(checkpoint, weights_only=True)


# Numbers


def test_equals_the_reference(encoder: WhisperEncoder, singing: Tensor, golden: Path) -> None:
    with np.load(golden / "encoders" / "tiny_whisper_out.npz") as arrays:
        expected = arrays["ppg"][0].T
    (units,) = encoder.encode([singing])
    np.testing.assert_allclose(units.numpy(), expected, rtol=0, atol=TOLERANCE)


def test_spectrum_equals_the_reference(singing: Tensor, golden: Path) -> None:
    filters = whisper_mel_filters(80)
    mel = whisper_log_mel(F.pad(singing, (0, WINDOW_SAMPLES - len(singing)))[None], filters)[
        0
    ].numpy()
    assert mel.shape == (80, 3000)
    with np.load(golden / "encoders" / "tiny_whisper_out.npz") as arrays:
        np.testing.assert_array_equal(filters.numpy(), arrays["mel_filters"])
        np.testing.assert_allclose(mel[:, :308], arrays["mel"], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(mel[:, -1:], arrays["mel_floor"], rtol=0, atol=TOLERANCE)


# The contract


@pytest.mark.parametrize(
    ("num_samples", "frames"), [(1, 1), (319, 1), (320, 1), (639, 1), (640, 2), (37123, 116)]
)
def test_frame_counts(encoder: WhisperEncoder, num_samples: int, frames: int) -> None:
    (units,) = encoder.encode([noise(num_samples)])
    assert units.shape == (frames, encoder.dim) == (frames, 48)
    assert units.dtype == torch.float32
    assert units.device.type == "cpu"
    assert torch.isfinite(units).all()


def test_it_is_deterministic_and_leaves_the_clip_alone(encoder: WhisperEncoder) -> None:
    wav = noise(16000)
    before = wav.clone()
    (units,) = encoder.encode([wav])
    assert torch.equal(units, encoder.encode([wav])[0])
    assert torch.equal(wav, before)


def test_silence_and_no_clips(encoder: WhisperEncoder) -> None:
    (units,) = encoder.encode([torch.zeros(16000)])
    assert units.shape == (50, 48)
    assert torch.isfinite(units).all()
    assert encoder.encode([]) == []


def test_samples_that_are_not_finite_are_refused(encoder: WhisperEncoder) -> None:
    broken = noise(16000)
    broken[5000] = torch.nan
    with pytest.raises(ValueError, match="clip 1 has NaN"):
        encoder.encode([noise(16000), broken])


@pytest.mark.parametrize("at_once", [1, 5])
def test_batches_are_exact(checkpoint: Path, at_once: int) -> None:
    encoder = load_whisper("whisper-ppg", str(checkpoint))
    lengths = [8000, 320000, 1, 700000, 48017, 16000]
    wavs = [noise(n, seed=i) for i, n in enumerate(lengths)]
    alone = [encoder.encode([wav])[0] for wav in wavs]
    encoder.batcher = Batcher(1500 * at_once)
    for units, expected in zip(encoder.encode(wavs), alone, strict=True):
        torch.testing.assert_close(units, expected, rtol=0, atol=1e-5 if at_once > 1 else 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(
    checkpoint: Path, encoder: WhisperEncoder, singing: Tensor, dtype: Any
) -> None:
    (units,) = load_whisper("whisper-ppg", str(checkpoint), dtype=dtype).encode([singing])
    (expected,) = encoder.encode([singing])
    assert units.dtype == torch.float32
    difference = (units - expected).square().mean().sqrt()
    assert 0 < difference < 0.05 * expected.std()


# Clips longer than 30 s


def test_nothing_of_a_long_clip_is_lost(encoder: WhisperEncoder) -> None:
    wav = noise(95 * 16000 + 100)
    (units,) = encoder.encode([wav])
    assert units.shape == (4750, 48)
    (first,) = encoder.encode([wav[:WINDOW_SAMPLES]])
    assert torch.equal(units[:1375], first[:1375])
    (second,) = encoder.encode([wav[400000:][:WINDOW_SAMPLES]])
    assert torch.equal(units[1375:2625], second[125:1375])
    (last,) = encoder.encode([wav[(4750 - 1500) * 320 : 4750 * 320]])
    assert torch.equal(units[3625:], last[375:])


@pytest.mark.parametrize(
    ("num_samples", "frames"), [(480000, 1500), (480319, 1500), (480320, 1501), (880000, 2750)]
)
def test_where_windows_begin(encoder: WhisperEncoder, num_samples: int, frames: int) -> None:
    (units,) = encoder.encode([noise(num_samples)])
    assert units.shape == (frames, 48)
    assert torch.isfinite(units).all()


def test_a_seam_is_no_louder_than_the_place_in_a_window(encoder: WhisperEncoder) -> None:
    """Frames at a seam differ no more than two windows differ on the same sound."""
    t = torch.arange(55 * 16000) / 16000
    wav = 0.3 * torch.sin(2 * torch.pi * 220 * t) + noise(len(t)) * 0.1
    (units,) = encoder.encode([wav])
    (early,) = encoder.encode([wav[:WINDOW_SAMPLES]])
    (late,) = encoder.encode([wav[400000:][:WINDOW_SAMPLES]])
    usual = units.diff(dim=0).norm(dim=1).median()
    step = (units[1375] - units[1374]).norm()
    assert step <= (early[1375] - late[125]).norm() + 3 * usual
    assert step < 2 * (early[1250:] - late[:250]).norm(dim=1).mean() + usual


# Checkpoints


def save(content: Any, path: Path) -> str:
    torch.save(content, path)
    return str(path)


def same_units(encoder: WhisperEncoder, other: WhisperEncoder, singing: Tensor) -> bool:
    return torch.equal(encoder.encode([singing])[0], other.encode([singing])[0])


def test_half_precision_files_become_float32(
    content: dict[str, Any], tmp_path: Path, singing: Tensor
) -> None:
    state = content["model_state_dict"]
    content["model_state_dict"] = {k: v.half() for k, v in state.items()}
    half = load_whisper("whisper-ppg", save(content, tmp_path / "half.pt"))
    content["model_state_dict"] = {k: v.half().float() for k, v in state.items()}
    cast = load_whisper("whisper-ppg", save(content, tmp_path / "cast.pt"))
    assert half.network.positions.dtype == torch.float32
    assert same_units(half, cast, singing)


def test_our_own_format(
    checkpoint: Path, encoder: WhisperEncoder, tmp_path: Path, singing: Tensor
) -> None:
    config, tensors = read_whisper(checkpoint)
    save_safetensors(tmp_path / "own.safetensors", tensors, header(config))
    own = load_whisper("whisper-ppg", str(tmp_path / "own.safetensors"))
    assert same_units(own, encoder, singing)
    assert not any("decoder" in key for key in tensors)

    del tensors["layers.1.attention.qkv.bias"]
    save_safetensors(tmp_path / "own.safetensors", tensors, header(config))
    with pytest.raises(CheckpointError, match=r"lacks layers\.1\.attention\.qkv\.bias"):
        load_whisper("whisper-ppg", str(tmp_path / "own.safetensors"))


@pytest.fixture(scope="module")
def hugging_face() -> Callable[..., Any]:
    """A network of transformers with random weights: (class name, **config) -> it."""
    import_torchaudio()
    import transformers

    def build(kind: str, **changes: Any) -> Any:
        shapes = {
            "d_model": 64,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_layers": 1,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 64,
            "vocab_size": 70,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        }
        torch.manual_seed(1)
        model = getattr(transformers, kind)(transformers.WhisperConfig(**shapes | changes)).eval()
        for name, tensor in model.named_parameters():
            if "embed_positions" not in name:
                torch.nn.init.normal_(tensor.data, std=0.2)
        return model

    return build


def their_units(model: Any, wav: Tensor, n_mels: int = 80) -> Tensor:
    mel = whisper_log_mel(
        F.pad(wav, (0, WINDOW_SAMPLES - len(wav)))[None], whisper_mel_filters(n_mels)
    )
    with torch.no_grad():
        return model.get_encoder()(mel).last_hidden_state[0, : len(wav) // 320]


@pytest.mark.parametrize("kind", ["WhisperModel", "WhisperForConditionalGeneration"])
def test_a_hugging_face_folder(
    hugging_face: Callable[..., Any], kind: str, tmp_path: Path, singing: Tensor
) -> None:
    model = hugging_face(kind)
    model.save_pretrained(tmp_path)
    expected = their_units(model, singing)
    for checkpoint in (tmp_path, tmp_path / "model.safetensors"):
        (units,) = load_whisper("whisper-ppg", str(checkpoint)).encode([singing])
        torch.testing.assert_close(units, expected, rtol=0, atol=TOLERANCE)


def test_a_hugging_face_folder_in_parts(
    hugging_face: Callable[..., Any], tmp_path: Path, singing: Tensor
) -> None:
    model = hugging_face("WhisperModel")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert not (tmp_path / "model.safetensors").exists()
    (units,) = load_whisper("whisper-ppg", str(tmp_path)).encode([singing])
    torch.testing.assert_close(units, their_units(model, singing), rtol=0, atol=TOLERANCE)


def test_a_hugging_face_pickle_and_128_mels(
    hugging_face: Callable[..., Any], tmp_path: Path, singing: Tensor
) -> None:
    """128 mel bins: large-v3."""
    model = hugging_face("WhisperModel", num_mel_bins=128)
    model.config.save_pretrained(tmp_path)
    save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (units,) = load_whisper("whisper-ppg", str(tmp_path)).encode([singing])
    expected = their_units(model, singing, n_mels=128)
    torch.testing.assert_close(units, expected, rtol=0, atol=TOLERANCE)


def test_weights_alone_show_their_shapes(
    hugging_face: Callable[..., Any], tmp_path: Path, singing: Tensor
) -> None:
    model = hugging_face("WhisperModel", d_model=128, encoder_attention_heads=2)
    checkpoint = save(model.state_dict(), tmp_path / "alone.bin")
    (units,) = load_whisper("whisper-ppg", checkpoint).encode([singing])
    torch.testing.assert_close(units, their_units(model, singing), rtol=0, atol=TOLERANCE)

    narrow = hugging_face("WhisperModel", d_model=48).state_dict()
    with pytest.raises(CheckpointError, match=r"needs its config\.json"):
        load_whisper("whisper-ppg", save(narrow, tmp_path / "narrow.bin"))


@pytest.fixture
def as_if_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow `published` files the memory of the real ones, whose storages they lack."""
    monkeypatch.setattr(unpickler, "_ALLOWANCE", 8 << 30)


def published(size: str, golden: Path) -> dict[str, Any]:
    """Make a real file's keys and shapes, all tensors views of one short storage.

    Unused decoders are one number each.
    """
    manifest = json.loads((golden / "encoders" / f"manifest_whisper_{size}.json").read_text())
    shapes = {k: [1] if "decoder." in k else s for k, s in manifest["tensors"].items()}
    numbers = torch.zeros(max(map(math.prod, shapes.values())), dtype=torch.float16)
    state = {key: numbers[: math.prod(shape)].view(shape) for key, shape in shapes.items()}
    return {"dims": manifest["dims"], "model_state_dict": state}


@pytest.mark.usefixtures("as_if_whole")
@pytest.mark.parametrize("size", ["medium", "large_v2"])
def test_published_files_fit_key_by_key(size: str, golden: Path, tmp_path: Path) -> None:
    """All keys and shapes of the real file, and one more: only that one is reported."""
    content = published(size, golden)
    content["model_state_dict"]["encoder.blocks.0.attn.key.bias"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"unknown key encoder\.blocks\.0\.attn\.key\.bias"):
        read_whisper(save(content, tmp_path / "all.pt"))


@pytest.mark.usefixtures("as_if_whole")
@pytest.mark.parametrize(
    ("size", "right", "wrong"),
    [
        ("medium", "whisper-ppg", "whisper-ppg-large"),
        ("large_v2", "whisper-ppg-large", "whisper-ppg"),
    ],
)
def test_the_other_name_is_told(
    size: str, right: str, wrong: str, golden: Path, tmp_path: Path
) -> None:
    content = published(size, golden)
    content["dims"]["n_audio_layer"] = 1  # enough to tell them apart
    content["model_state_dict"] = {
        key: tensor
        for key, tensor in content["model_state_dict"].items()
        if not key.startswith("encoder.blocks.") or key.startswith("encoder.blocks.0.")
    }
    path = save(content, tmp_path / "one_layer.pt")
    with pytest.raises(CheckpointError, match=f"its encoder.name is {right}, not {wrong}"):
        load_whisper(wrong, path)
    assert load_whisper(right, path).dim == content["dims"]["n_audio_state"]


def test_a_key_too_few(content: dict[str, Any], tmp_path: Path) -> None:
    del content["model_state_dict"]["encoder.blocks.2.mlp.0.bias"]
    with pytest.raises(CheckpointError, match=r"lacks encoder\.blocks\.2\.mlp\.0\.bias"):
        read_whisper(save(content, tmp_path / "broken.pt"))


def test_a_key_too_many(content: dict[str, Any], tmp_path: Path) -> None:
    content["model_state_dict"]["encoder.blocks.3.mlp.0.bias"] = torch.zeros(192)
    with pytest.raises(CheckpointError, match=r"unknown key encoder\.blocks\.3\.mlp\.0\.bias"):
        read_whisper(save(content, tmp_path / "broken.pt"))


def test_a_misshapen_key(content: dict[str, Any], tmp_path: Path) -> None:
    content["model_state_dict"]["encoder.positional_embedding"] = torch.zeros(448, 48)
    message = r"encoder\.positional_embedding is \[448, 48\]; it must be \[1500, 48\]"
    with pytest.raises(CheckpointError, match=message):
        read_whisper(save(content, tmp_path / "broken.pt"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": {"n_mels": 80}}, "does not state the encoder's shape"),
        ({"dims": None}, "does not state the encoder's shape"),
        ({"model_state_dict": [1, 2]}, "not a dict of tensors"),
    ],
)
def test_a_file_that_does_not_fit(
    content: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_whisper(save(content | change, tmp_path / "broken.pt"))


def test_shapes_that_no_network_has(content: dict[str, Any], tmp_path: Path) -> None:
    content["dims"]["n_audio_head"] = 5
    with pytest.raises(CheckpointError, match="states an invalid shape"):
        read_whisper(save(content, tmp_path / "broken.pt"))


def test_what_is_no_whisper(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a Whisper: it is a WavLM, for wavlm"):
        read_whisper(golden / "encoders" / "tiny_wavlm.pt")
    with pytest.raises(CheckpointError, match="seems to be a vocoder"):
        read_whisper(save({"ups.0.weight": torch.zeros(1)}, tmp_path / "vocoder.pt"))
    with pytest.raises(
        CheckpointError, match=r"neither OpenAI's keys dims and model_state_dict.*has a, b"
    ):
        read_whisper(save({"b": torch.zeros(1), "a": 1}, tmp_path / "none.pt"))
    with pytest.raises(CheckpointError, match="has a list, not a network"):
        read_whisper(save([1, 2], tmp_path / "list.pt"))
    with pytest.raises(CheckpointError, match=r"nowhere\.pt does not exist"):
        read_whisper(tmp_path / "nowhere.pt")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        read_whisper(tmp_path)
    with pytest.raises(ValueError, match=r"encoder\.checkpoint is empty"):
        load_whisper("whisper-ppg", None)
    other = tmp_path / "other.safetensors"
    save_safetensors(other, {"x": torch.zeros(1)}, {"cantor": json.dumps({"kind": "wav2vec2"})})
    with pytest.raises(CheckpointError, match="is a wav2vec2 encoder, not a Whisper"):
        read_whisper(other)
