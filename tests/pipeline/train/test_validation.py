"""Validation and TensorBoard. The networks are untrained; the clips are tones of known pitch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.synthesizer.batch import Batch
from models.synthesizer.config import MelConfig, SynthesizerConfig
from models.synthesizer.sovits.networks import Synthesizer
from pipeline.train.validation import (
    PATHS,
    Metrics,
    compare_pitch,
    describe_measures,
    draw_spectrograms,
    measure_clips,
    picture_path,
)

RATE, HOP = 16000, 160
MEL = MelConfig(n_fft=512, win_length=512, n_mels=20)
CONFIG = SynthesizerConfig(
    units_dim=4,
    n_speakers=2,
    sample_rate=RATE,
    n_fft=512,
    inter_channels=8,
    hidden_channels=8,
    filter_channels=16,
    n_layers=1,
    resblock="2",
    resblock_kernel_sizes=(3,),
    resblock_dilation_sizes=((1, 3),),
    upsample_rates=(8, 5, 4),
    upsample_initial_channel=16,
    upsample_kernel_sizes=(16, 11, 8),
    gin_channels=8,
)


def clip(seconds: float = 1.0, hz: float = 220.0, name: str = "ann/a.wav#000000") -> Batch:
    """A tone, voiced from the start to the end."""
    frames = int(seconds * RATE / HOP)
    t = torch.arange(frames * HOP) / RATE
    wav = sum(0.2 / k * torch.sin(2 * torch.pi * k * hz * t) for k in (1, 2, 3))
    ones = torch.ones(1, frames)
    return Batch(
        clip_ids=(name,),
        units=torch.ones(1, 4, frames),
        f0=hz * ones,
        voiced=ones,
        volume=0.2 * ones,
        wav=torch.as_tensor(wav)[None],
        speaker=torch.tensor([1]),
        lengths=torch.tensor([frames]),
        noise_keys=(7,),
    )


@pytest.fixture(scope="module")
def network() -> Synthesizer:
    torch.manual_seed(0)
    return Synthesizer(CONFIG)


Begin = Callable[..., Metrics]


@pytest.fixture
def begin(tmp_path: Path) -> Begin:
    def of(*clips: Batch, step: int = 0) -> Metrics:
        return Metrics(tmp_path, clips, CONFIG, MEL, step=step)

    return of


def events(run: Path) -> EventAccumulator:
    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    return read.Reload()


def test_contours_that_are_equal_shifted_and_unvoiced() -> None:
    truth = np.array([0, 200, 200, 400, 0], np.float32)
    assert compare_pitch(truth, truth) == {
        "voicing_error": 0.0,
        "pitch_accuracy": 1.0,
        "f0_rmse_cents": 0.0,
    }
    up = np.array([100, 200 * 2 ** (40 / 1200), 200 * 2 ** (-60 / 1200), 0, 0], np.float32)
    measures = compare_pitch(truth, up)
    assert measures["voicing_error"] == pytest.approx(2 / 5)
    assert measures["pitch_accuracy"] == pytest.approx(1 / 3)
    assert measures["f0_rmse_cents"] == pytest.approx(np.sqrt((40**2 + 60**2) / 2), abs=1e-3)
    assert compare_pitch(truth, 0 * truth) == {"voicing_error": 3 / 5, "pitch_accuracy": 0.0}
    assert compare_pitch(0 * truth, truth) == {"voicing_error": 3 / 5}


def test_the_distance_to_the_original_is_known(begin: Begin) -> None:
    metrics = begin(clip(hz=220.0), clip(hz=330.0))
    softer = [metrics._sound(each.wav / 2) for each in metrics.clips]
    measures = measure_clips(
        metrics.clips, metrics.originals, {"posterior": metrics.originals, "prior": softer}
    )
    assert measures["mel_posterior"] == 0
    loud = metrics.originals[0].mel > -5  # above the floors of spectrogram and logarithm
    assert np.median((metrics.originals[0].mel - softer[0].mel)[loud]) == pytest.approx(
        np.log(2), abs=1e-3
    )
    assert 0 < measures["mel_prior"] <= np.log(2) + 1e-6
    assert measures["mel_distance"] == pytest.approx(measures["mel_prior"] / 2)
    for path in (*PATHS, "original"):
        assert measures[f"pitch_accuracy_{path}"] > 0.95
        assert measures[f"f0_rmse_cents_{path}"] < 5
        assert measures[f"voicing_error_{path}"] < 0.05
    line = describe_measures(measures)
    assert "mel distance 0.00 / 0." in line and "right pitch" in line


def test_nothing_to_measure_is_nothing(begin: Begin, network: Synthesizer) -> None:
    assert begin().validate(1, network) == {} and describe_measures({}) == ""
    assert "right pitch – / –" in describe_measures({"mel_posterior": 1.0, "mel_prior": 1.0})


def test_validation_leaves_no_trace_in_the_training(begin: Begin, network: Synthesizer) -> None:
    metrics = begin(clip())
    network.train()
    network.dec.eval()  # a part that was at rest
    torch.manual_seed(3)
    before, weights = torch.get_rng_state(), [p.clone() for p in network.parameters()]
    first = metrics.validate(1, network)
    assert torch.equal(torch.get_rng_state(), before)
    assert network.training and network.enc_p.training
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, network.parameters(), strict=True))
    torch.rand(5)
    network.eval()
    assert metrics.validate(2, network) == first  # the same noise, no dropout
    assert not network.training
    assert first["mel_posterior"] > 0 and first["mel_prior"] > 0


def test_long_clips_are_cut(begin: Begin, network: Synthesizer) -> None:
    metrics = begin(clip(seconds=12.0))
    (kept,) = metrics.clips
    assert kept.wav.shape[1] == 10 * RATE and kept.units.shape[2] == kept.lengths[0] == 1000
    assert metrics.originals[0].mel.shape == (20, 1000) and len(metrics.originals[0].f0) == 1000


@pytest.mark.slow
def test_pictures_and_sound_lie_beside_each_other(
    tmp_path: Path, begin: Begin, network: Synthesizer
) -> None:
    begin(clip(0.5), clip(0.7)).validate(20, network)
    names = {path.name for path in (tmp_path / "validation").iterdir()}
    assert names == {
        "step-00000020.png",
        "step-00000020-posterior.wav",
        "step-00000020-prior.wav",
        "original.wav",
    }
    assert picture_path(tmp_path, 20).read_bytes().startswith(b"\x89PNG")
    wav, rate = sf.read(tmp_path / "validation" / "original.wav", dtype="float32")
    assert rate == RATE
    assert np.abs(wav - clip(0.5).wav[0].numpy()).max() <= 1 / 32768
    seen = events(tmp_path)
    assert set(seen.Tags()["images"]) == {"mel/clip 1", "mel/clip 2"}
    assert set(seen.Tags()["audio"]) == {
        f"{path}/clip {i}" for i in (1, 2) for path in ("original", *PATHS)
    }


def test_one_scale_of_colours_and_named_axes(begin: Begin) -> None:
    metrics = begin(clip(0.5))
    (original,) = metrics.originals
    louder = metrics._sound(3 * metrics.clips[0].wav)
    figure = draw_spectrograms({"original": original, "prior": louder}, "title", MEL, RATE, HOP)
    panels = figure.axes[:2]
    assert [axes.get_title() for axes in panels] == ["original", "prior"]
    assert all(axes.get_xlabel() == "time (s)" for axes in panels)
    assert panels[0].get_ylabel().startswith("frequency")
    limits = [axes.images[0].get_clim() for axes in panels]
    assert limits[0] == limits[1] == (original.mel.min(), original.mel.max())
    labels = [int(label.get_text()) for label in panels[0].get_yticklabels()]
    assert labels == [200, 500, 1000, 2000, 4000]


def test_steps_done_again_count_once(tmp_path: Path, begin: Begin, network: Synthesizer) -> None:
    first = begin(clip(0.3))
    for step in range(1, 6):
        first.log(step, {"mel": 10.0 + step, "grad_norm_g": 1.0, "learning_rate": 1e-4})
    first.validate(5, network)
    first.close()
    again = begin(clip(0.3), step=3)  # the checkpoint that the run resumes from
    for step in range(4, 7):
        again.log(step, {"mel": 20.0 + step})
    again.close()
    seen = events(tmp_path)
    assert [(e.step, e.value) for e in seen.Scalars("loss/mel")] == [
        (1, 11.0), (2, 12.0), (3, 13.0), (4, 24.0), (5, 25.0), (6, 26.0),
    ]  # fmt: skip
    assert [e.step for e in seen.Scalars("gradient/grad_norm_g")] == [1, 2, 3]
    assert [e.step for e in seen.Scalars("train/learning_rate")] == [1, 2, 3]
    assert "validation/mel_prior" not in [
        tag for tag in seen.Tags()["scalars"] if seen.Scalars(tag)
    ]


def test_step_0_counts_once_where_the_first_start_left_no_checkpoint(
    tmp_path: Path, begin: Begin, network: Synthesizer
) -> None:
    for _ in range(2):
        metrics = begin(clip(0.3))
        metrics.validate(0, network)
        metrics.close()
    seen = events(tmp_path)
    assert [e.step for e in seen.Scalars("validation/mel_prior")] == [0]
    assert [e.step for e in seen.Audio("original/clip 1")] == [0]
