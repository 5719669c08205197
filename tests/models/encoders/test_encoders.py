"""Encoders: the contract of each, and Kaldi's results for those without weights."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.checkpoint import load_foreign
from models.encoders import ENCODERS, WITHOUT_WEIGHTS, Encoder, check_encoder, load_encoder

GOLDEN = Path(__file__).parents[2] / "golden" / "encoders"

# A small file for every encoder that needs one. hubertsoft's is made here: see `hubert_soft`.
CHECKPOINTS = {
    "contentvec256l9": "tiny_hubert_base.pt",
    "contentvec768l9": "tiny_hubert_base_fp16.pt",
    "contentvec256l12": "tiny_hubert_base_args.pt",
    "contentvec768l12": "tiny_hubert_base_dictconfig_nozip.pt",
    "cnhubertlarge": "tiny_hubert_large.pt",
    "wavlm-base-plus": "tiny_wavlm.pt",
    "wavlm-large": "tiny_wavlm_large.pt",
    "dphubert": "tiny_dpwavlm.pth",
    "whisper-ppg": "tiny_whisper.pt",
    "whisper-ppg-large": "tiny_whisper.pt",
    "contentvec256l9-onnx": "vec-tiny-proj-layer-2.onnx",
    "contentvec256l12-onnx": "vec-tiny-proj-layer-2.onnx",
    "contentvec768l9-onnx": "vec-tiny-layer-3.onnx",
    "contentvec768l12-onnx": "vec-tiny-layer-3.onnx",
}
NO_FILE_HERE = ("hubertsoft", "hubertsoft-onnx")  # tested at full size, and by test_onnx_encoders
NAMES = sorted(set(ENCODERS) - set(NO_FILE_HERE))


def load(name: str) -> Encoder:
    file = CHECKPOINTS.get(name)
    return load_encoder(name, None if file is None else str(GOLDEN / file))


@pytest.fixture(params=NAMES, scope="module")
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return load(request.param)


def num_frames(name: str, num_samples: int) -> int:
    """Return the frames by wav2vec 2.0's convolutions, or whole hops for Whisper."""
    if name.startswith("whisper"):
        return max(1, num_samples // 320)
    return max(1, 1 + (num_samples - 400) // 320)


def noise(num_samples: int, seed: int = 0) -> Tensor:
    return torch.randn(num_samples, generator=torch.Generator().manual_seed(seed)) * 0.1


# The contract of every encoder


def test_states_what_it_is(encoder: Encoder) -> None:
    assert ENCODERS.keys() >= {encoder.name}
    assert encoder.sample_rate / encoder.hop_length == 50


def test_shape_type_and_determinism(encoder: Encoder) -> None:
    wav = noise(encoder.sample_rate)
    before = wav.clone()
    (units,) = encoder.encode([wav])
    assert units.dtype == torch.float32
    assert units.device.type == "cpu"
    assert units.shape == (num_frames(encoder.name, 16000), encoder.dim)
    assert torch.isfinite(units).all()
    assert units.std(dim=0).min() > 0
    assert torch.equal(wav, before)
    assert torch.equal(units, encoder.encode([wav])[0])


def test_a_clip_does_not_depend_on_its_neighbours(encoder: Encoder) -> None:
    lengths = [16000, 401, 1, 48017, 16000, 7999]
    wavs = [noise(n, seed=i) for i, n in enumerate(lengths)]
    together = encoder.encode(wavs)
    for wav, units in zip(wavs, together, strict=True):
        assert torch.equal(units, encoder.encode([wav])[0])


def test_no_clips(encoder: Encoder) -> None:
    assert encoder.encode([]) == []


def test_silence(encoder: Encoder) -> None:
    (units,) = encoder.encode([torch.zeros(16000)])
    assert units.shape == (num_frames(encoder.name, 16000), encoder.dim)
    assert torch.isfinite(units).all()


@pytest.mark.parametrize("num_samples", [1, 2, 320, 399, 400, 401, 800])  # 800: 0.05 s
def test_a_short_clip_has_a_frame(encoder: Encoder, num_samples: int) -> None:
    (units,) = encoder.encode([noise(num_samples)])
    assert units.shape == (num_frames(encoder.name, num_samples), encoder.dim)
    assert torch.isfinite(units).all()


@pytest.mark.slow
def test_forty_seconds(encoder: Encoder) -> None:
    (units,) = encoder.encode([noise(40 * 16000)])
    assert units.shape == (num_frames(encoder.name, 40 * 16000), encoder.dim)
    assert torch.isfinite(units).all()


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_a_frame_depends_on_its_surroundings_not_on_its_place(name: str) -> None:
    encoder = load(name)
    wav = noise(40 * 16000)
    (units,) = encoder.encode([wav])
    (second_half,) = encoder.encode([wav[1000 * 320 :]])
    torch.testing.assert_close(units[1010:], second_half[10:], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("hz", [20.0, 7990.0])
def test_a_tone_at_either_end_of_the_band(encoder: Encoder, hz: float) -> None:
    wav = 0.5 * torch.sin(2 * math.pi * hz / 16000 * torch.arange(16000.0))
    tone, silence = encoder.encode([wav, torch.zeros(16000)])
    assert torch.isfinite(tone).all()
    assert not torch.allclose(tone, silence)


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_samples_that_are_not_finite_are_refused(encoder: Encoder, fault: float) -> None:
    broken = noise(16000)
    broken[5000] = fault
    with pytest.raises(ValueError, match="clip 1 has NaN or infinite"):
        encoder.encode([noise(16000), broken])


@pytest.mark.parametrize(
    "wav", [torch.zeros(0), torch.zeros(1, 100), torch.zeros(100, dtype=torch.float64)]
)
def test_what_is_not_a_clip_is_refused(encoder: Encoder, wav: Tensor) -> None:
    with pytest.raises(ValueError, match="clip 0"):
        encoder.encode([wav])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 20000), max_size=4), st.sampled_from(WITHOUT_WEIGHTS))
def test_frame_counts(lengths: list[int], name: str) -> None:
    """Frame counts equal those of wav2vec 2.0's seven convolutions."""
    units = load_encoder(name).encode([noise(n) for n in lengths])
    assert len(units) == len(lengths)
    for frames, length in zip(units, lengths, strict=True):
        expected = max(400, length)
        for kernel, stride in [(10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)]:
            expected = (expected - kernel) // stride + 1
        assert len(frames) == expected


# Loading


def test_an_unknown_name_is_answered_with_the_known() -> None:
    with pytest.raises(
        ValueError, match=r"'hubbert' is unknown; choose from cnhubertlarge, content"
    ):
        load_encoder("hubbert")


@pytest.mark.parametrize("name", ["mfcc", "log-mel"])
def test_a_checkpoint_for_what_has_no_weights_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no weights"):
        load_encoder(name, "weights.pt")


@pytest.mark.parametrize("name", sorted(set(ENCODERS) - set(WITHOUT_WEIGHTS)))
def test_an_encoder_with_weights_asks_for_them(name: str) -> None:
    with pytest.raises(ValueError, match=f"encoder.checkpoint is empty: {name} needs"):
        load_encoder(name)


def test_what_can_be_loaded_passes_the_check() -> None:
    for name, file in CHECKPOINTS.items():
        check_encoder(name, str(GOLDEN / file))
    check_encoder("mfcc")


def test_the_check_asks_for_what_loading_needs(tmp_path: Path) -> None:
    content = load_foreign(GOLDEN / "tiny_hubert_base.pt")
    content["model"] = {k: t for k, t in content["model"].items() if "final_proj" not in k}
    path = str(tmp_path / "cut.pt")
    torch.save({"cfg": content["cfg"], "model": content["model"]}, path)
    for ask in (load_encoder, check_encoder):
        ask("contentvec768l9", path)
        with pytest.raises(ValueError, match="no final projection"):
            ask("contentvec256l9", path)
    with pytest.raises(ValueError, match=r"int8 works with encoder\.dtype=float32"):
        check_encoder("contentvec768l9", path, int8=True, dtype="bfloat16")


def test_an_option_that_an_encoder_lacks_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"encoder\.int8 is set, but mfcc does not have this option"
    ):
        load_encoder("mfcc", int8=True)


@pytest.mark.parametrize("name", ["contentvec768l12", "whisper-ppg"])
def test_a_dtype_that_is_none_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"encoder\.dtype is 'half'; choose from float32, float16"):
        load_encoder(name, "weights.pt", dtype="half")


@pytest.mark.parametrize(
    "name, file, right",
    [
        ("hubertsoft", "tiny_hubert_base.pt", "contentvec"),
        ("contentvec768l12", "tiny_wavlm.pt", "wavlm"),
        ("wavlm-large", "tiny_dphubert.pth", "dphubert"),
        ("contentvec256l9", "tiny_whisper.pt", "whisper-ppg"),
        ("whisper-ppg", "tiny_hubert_base.pt", "contentvec"),
        ("contentvec768l12", "vec-tiny-layer-3.onnx", "onnx"),
        ("contentvec768l12-onnx", "tiny_hubert_base.pt", "not an ONNX graph"),
    ],
)
def test_a_wrong_name_for_a_file_is_answered_with_the_right(
    name: str, file: str, right: str
) -> None:
    for ask in (load_encoder, check_encoder):
        with pytest.raises(ValueError, match=right) as caught:
            ask(name, str(GOLDEN / file))
        assert file in str(caught.value)


@pytest.mark.parametrize("device, words", [("gpu", "write cpu, cuda"), ("cuda", "no CUDA device")])
def test_a_device_that_is_not_there_is_named(device: str, words: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=words):
        load_encoder("mfcc", device=device)


# Numbers


@pytest.mark.parametrize("name", ["mfcc", "log-mel"])
def test_equals_kaldi(name: str, golden: Path) -> None:
    with np.load(golden / "preprocessing" / "f0.npz") as arrays:
        wav = torch.from_numpy(arrays["seed003/vocadito_3to8s/wav16k_soxrhq"])
    with np.load(golden / "preprocessing" / "units.npz") as arrays:
        expected = arrays[name]
    (units,) = load_encoder(name).encode([wav])
    np.testing.assert_allclose(units.numpy(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("n_mels", [20, 80])
def test_a_tone_lights_its_band(n_mels: int) -> None:
    def mel(hz: float) -> float:
        return 1127 * math.log1p(hz / 700)

    encoder = load_encoder("log-mel", n_mels=n_mels)
    assert encoder.dim == n_mels
    for hz in (300.0, 1000.0, 5000.0):
        wav = 0.3 * torch.sin(2 * math.pi * hz / 16000 * torch.arange(16000.0))
        (units,) = encoder.encode([wav])
        position = (mel(hz) - mel(20)) / (mel(8000) - mel(20)) * (n_mels + 1)
        assert abs(float(units.mean(dim=0).argmax()) + 1 - position) <= 1


def test_bands_finer_than_the_spectrum_are_refused() -> None:
    with pytest.raises(ValueError, match="n_mels=200 is too high"):
        load_encoder("log-mel", n_mels=200)


def test_loudness_moves_only_the_zeroth_cepstrum() -> None:
    wav = noise(16000)
    loud, quiet = load_encoder("mfcc").encode([wav, wav / 2])
    change = (loud - quiet)[5:-5]
    assert torch.allclose(change[:, 0], torch.tensor(math.log(4) * math.sqrt(23)), atol=1e-3)
    assert change[:, 1:].abs().max() < 1e-3


def test_differences_are_slopes() -> None:
    """The same 20 ms over and over, growing by e a second: level rises steadily, nothing else."""
    wav = noise(320).repeat(100) * torch.exp(torch.arange(32000.0) / 16000)
    (units,) = load_encoder("mfcc").encode([wav])
    inner = units[4:-4]  # away from the repeated ends
    rise = 2 * 0.02 * math.sqrt(23)  # of the energy's logarithm in a frame, through the DCT
    torch.testing.assert_close(inner[:, 0].diff(), torch.full((90,), rise), atol=1e-3, rtol=0)
    torch.testing.assert_close(inner[:, 13], torch.full((91,), rise), atol=1e-3, rtol=0)
    assert inner[:, 14:].abs().max() < 1e-3
