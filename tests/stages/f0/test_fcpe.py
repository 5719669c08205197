"""f0 by FCPE: so-vits-svc's results, sample positions of frames, level, threshold."""

from __future__ import annotations

from pathlib import Path

import mir_eval
import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from stages.f0 import F0Config, estimate_clips, estimate_f0
from stages.f0.fcpe import fcpe
from stages.f0.sovits_compat import fill_unvoiced
from stages.types import Array
from tests.stages.f0.test_estimate import cents, harmonic

RATE = 44100
HOP = 512
FCPE = F0Config(method="fcpe")


@pytest.fixture(scope="module")
def five_seconds(golden: Path) -> Array:
    with np.load(golden / "preprocessing" / "inputs.npz") as arrays:
        return (arrays["vocadito_3to8s"] / 32768).astype(np.float32)


# What so-vits-svc computed: tests/golden/preprocessing/README.md


@pytest.fixture(scope="module")
def reference(golden: Path) -> dict[str, NDArray[np.float32]]:
    with np.load(golden / "preprocessing" / "f0.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def assert_as_peer(
    wav: Array,
    case: str,
    reference: dict[str, NDArray[np.float32]],
    hop_length: int = HOP,
    extra_frames: int = 0,
) -> None:
    cfg = F0Config(method="fcpe", hop_length=hop_length, align="peer")
    f0 = estimate_f0(wav, RATE, cfg, len(wav) // hop_length + extra_frames)
    voiced, filled = reference[f"{case}/fcpe/uv"] == 1, reference[f"{case}/fcpe/f0"]
    assert f0.shape == filled.shape
    assert np.mean((f0 > 0) == voiced) > 0.998
    np.testing.assert_allclose(fill_unvoiced(f0, RATE, hop_length), filled, rtol=1e-3)


@pytest.mark.parametrize(
    "hop_length, extra_frames, case",
    [
        (512, 0, "hop512_plenNone"),
        (512, 2, "hop512_plen+2"),
        (512, -2, "hop512_plen-2"),
        (441, 0, "hop441_plenNone"),
    ],
)
def test_reference_contours(
    hop_length: int,
    extra_frames: int,
    case: str,
    five_seconds: Array,
    reference: dict[str, NDArray[np.float32]],
) -> None:
    assert_as_peer(
        five_seconds, f"vocadito_3to8s/sr44100_{case}", reference, hop_length, extra_frames
    )


def test_reference_contour_of_the_whole_recording(
    real_audio: Path, reference: dict[str, NDArray[np.float32]]
) -> None:
    wav, _ = soundfile.read(real_audio / "vocadito_1.flac", dtype="float32")
    assert_as_peer(wav, "vocadito_full/sr44100_hop512_plenNone", reference)


@pytest.mark.parametrize("case", ["silence2s", "noise2s_-80dB", "len2048", "len600"])
def test_reference_contours_of_degenerate_clips(
    case: str, five_seconds: Array, reference: dict[str, NDArray[np.float32]]
) -> None:
    start = 220500 - 132300  # sample 220500 of the recording
    noise = np.random.default_rng(5).normal(size=2 * RATE) * 1e-4
    wav = {
        "silence2s": np.zeros(2 * RATE, np.float32),
        "noise2s_-80dB": noise.astype(np.float32),
        "len2048": five_seconds[start : start + 2048],
        "len600": five_seconds[start : start + 600],
    }[case]
    assert_as_peer(wav, f"{case}/sr44100_hop512_plenNone", reference)


# Where a value belongs


@pytest.mark.parametrize("sample_rate", [16000, 22050, 44100, 48000])
def test_frames_lie_every_ten_milliseconds_from_the_first_sample(sample_rate: int) -> None:
    wav = harmonic(np.full(sample_rate, 220.0), sample_rate)
    ((f0, positions),) = fcpe([wav], sample_rate, FCPE)
    np.testing.assert_allclose(positions, np.arange(101) * sample_rate / 100, rtol=1e-12)
    assert f0.shape == (101,)
    assert np.abs(cents(f0, np.float64(220))).max() < 10


@pytest.mark.parametrize("sample_rate, hop_length", [(44100, 441), (48000, 512), (16000, 160)])
def test_frame_i_is_the_pitch_at_sample_i_hop(sample_rate: int, hop_length: int) -> None:
    """Within a tenth of its 10 ms, on a vibrato of 5 Hz that moves by up to 5 Hz in that time."""
    samples = np.arange(2 * sample_rate)
    truth = 250 * 2 ** (np.sin(2 * np.pi * 5 * samples / sample_rate) / 12)
    cfg = F0Config(method="fcpe", hop_length=hop_length)
    f0 = estimate_f0(harmonic(truth, sample_rate), sample_rate, cfg).astype(np.float64)
    at = np.arange(len(f0)) * hop_length
    inner = slice(20, -20)
    assert (f0[inner] > 0).all()
    shifts_s = np.linspace(-0.005, 0.005, 41)
    errors = [
        np.std(np.interp(at[inner] + shift * sample_rate, samples, truth) - f0[inner])
        for shift in shifts_s
    ]
    assert abs(shifts_s[np.argmin(errors)]) < 0.001
    assert np.std(cents(f0[inner], truth[at[inner]])) < 3


def test_the_ends_of_a_clip_are_voiced() -> None:
    for num_samples in range(30 * HOP, 31 * HOP, 100):
        wav = harmonic(np.full(num_samples, 220.0), RATE)
        f0 = estimate_f0(wav, RATE, FCPE)
        assert (f0 > 0).all()
        assert np.abs(cents(f0, np.float64(220))).max() < 15


# Level, threshold, batches, devices


def test_level_changes_nothing(five_seconds: Array) -> None:
    f0 = estimate_f0(five_seconds, RATE, FCPE)
    quiet = five_seconds * np.float32(2**-12)  # its peak lies at -90 dBFS
    np.testing.assert_array_equal(estimate_f0(quiet, RATE, FCPE), f0)
    assert np.mean(f0 > 0) > 0.6


def test_default_threshold_on_real_singing(real_audio: Path) -> None:
    wav, _ = soundfile.read(real_audio / "vocadito_1.flac", dtype="float32")
    times, truth = np.loadtxt(real_audio / "vocadito_1_f0.csv", delimiter=",").T

    def scores(cfg: F0Config) -> dict[str, float]:
        f0 = estimate_f0(wav, RATE, cfg).astype(np.float64)
        return mir_eval.melody.evaluate(times, truth, np.arange(len(f0)) * HOP / RATE, f0)

    ours = scores(FCPE)
    packages = scores(F0Config(method="fcpe", voicing_threshold=0.006))
    assert ours["Voicing Recall"] > 0.98
    assert ours["Voicing False Alarm"] < 0.07
    assert packages["Voicing False Alarm"] > 0.2
    assert ours["Overall Accuracy"] > packages["Overall Accuracy"] + 0.05
    assert ours["Raw Pitch Accuracy"] > 0.975


def test_clips_do_not_depend_on_each_other(five_seconds: Array) -> None:
    clips = [five_seconds[start:][:length] for start, length in ((0, 9000), (3, 30000), (9, 50))]
    clips.append(five_seconds)
    for f0, clip in zip(estimate_clips(clips, RATE, FCPE), clips, strict=True):
        alone = estimate_f0(clip, RATE, FCPE)
        np.testing.assert_array_equal(f0 > 0, alone > 0)
        np.testing.assert_allclose(f0, alone, rtol=1e-5)


def test_a_clip_that_may_not_be_written(five_seconds: Array) -> None:
    wav = five_seconds[:16000].copy()
    wav.flags.writeable = False
    for align in ("sample", "peer"):
        cfg = F0Config(method="fcpe", align=align)  # type: ignore[arg-type]
        np.testing.assert_array_equal(
            estimate_f0(wav, 16000, cfg), estimate_f0(wav.copy(), 16000, cfg)
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_gpu_is_named(five_seconds: Array) -> None:
    with pytest.raises(ValueError, match=r"device is cuda"):
        estimate_f0(five_seconds, RATE, F0Config(method="fcpe", device="cuda"))
