"""TensorBoard and validation of a run.

Fixed clips are resynthesised and compared with the original, in numbers, pictures and sound.

A clip is resynthesised on two paths. Through the posterior, from its own spectrogram: the quality
of the decoder. Through the prior, from units and f0 alone: the sound of a conversion.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile as sf
import torch
from torch import Tensor

from models.synthesizer.batch import Batch
from models.synthesizer.blocks.noise import KeyedNoise
from models.synthesizer.config import MelConfig, SynthesizerConfig
from models.synthesizer.mel import mel_of, spectrogram
from models.synthesizer.sovits.networks import Synthesizer
from models.synthesizer.step import LOSSES
from pipeline.dataset.examples import collate
from stages.f0 import F0Config, estimate_f0
from stages.types import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import

    from pipeline.dataset.shard_dataset import ShardDataset

PATHS = ("posterior", "prior")
LONGEST_S = 10.0  # of a clip, so that validation takes little time beside the steps
CENTS = 50.0  # largest error of a pitch that counts as right


@dataclass(frozen=True)
class ValidationSound:
    """A clip, original or resynthesised."""

    wav: Array  # (T,) float32
    mel: Array  # (M, F) natural logarithm
    f0: Array  # (F,) Hz estimated from `wav`, 0 where unvoiced


class Metrics:
    """Writer of RUN/tensorboard and RUN/validation. Steps count from 1; 0 is before training.

    clips: one example each, cut to 10 s. step: the last one that is done when a run resumes.
    Entries of later steps are discarded.
    """

    def __init__(
        self,
        run: Path,
        clips: Sequence[Batch],
        synthesizer: SynthesizerConfig,
        mel: MelConfig,
        *,
        step: int = 0,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = run / "validation"
        self.sample_rate, self.hop_length = synthesizer.sample_rate, synthesizer.hop_length
        self.mel = mel
        self.clips = [self._cut(clip) for clip in clips]
        self.originals = [self._sound(clip.wav) for clip in self.clips]
        self._fresh = step == 0
        first = 0 if self._fresh else step + 1
        self.writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=first)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the measures of a step: losses, gradient norms, the learning rate, ..."""
        for name, value in values.items():
            self.writer.add_scalar(_tag(name), value, step)

    def validate(self, step: int, generator: Synthesizer) -> dict[str, float]:
        """Resynthesise the clips, write pictures and sound, and return `measure_clips` of them.

        Draws no global random number and restores the mode of the generator. {} when there are no
        clips.
        """
        resynthesized: dict[str, list[ValidationSound]] = {path: [] for path in PATHS}
        with _evaluating(generator):
            for clip in self.clips:
                for path, wav in resynthesize(generator, clip, self.mel).items():
                    resynthesized[path].append(self._sound(wav))
        numbers = measure_clips(self.clips, self.originals, resynthesized)
        for name, value in numbers.items():
            self.writer.add_scalar(f"validation/{name}", value, step)
        for i, clip in enumerate(self.clips):
            sounds = {path: resynthesized[path][i] for path in PATHS}
            self._show(step, i, clip.clip_ids[0], {"original": self.originals[i], **sounds})
        self.writer.flush()
        self._fresh = False
        return numbers

    def close(self) -> None:
        """Write what is buffered and close the files."""
        self.writer.close()

    def _cut(self, clip: Batch) -> Batch:
        frames = min(int(clip.lengths[0]), int(LONGEST_S * self.sample_rate / self.hop_length))
        return replace(
            clip,
            units=clip.units[:, :, :frames],
            f0=clip.f0[:, :frames],
            voiced=clip.voiced[:, :frames],
            volume=clip.volume[:, :frames],
            wav=clip.wav[:, : frames * self.hop_length],
            lengths=torch.full_like(clip.lengths, frames),
        )

    def _sound(self, wav: Tensor) -> ValidationSound:
        """Analyse wav (1, T)."""
        spec = spectrogram(wav, self.mel, self.hop_length)
        mel = mel_of(spec, self.mel, self.sample_rate)[0].cpu().numpy()
        # A run that diverged is stopped by the checks of its losses and of its checkpoints.
        finite = np.nan_to_num(wav[0].cpu().numpy(), posinf=0.0, neginf=0.0)
        settings = F0Config(
            method="praat", hop_length=self.hop_length, f0_max=min(1100.0, 0.45 * self.sample_rate)
        )
        f0 = estimate_f0(finite, self.sample_rate, settings, n_frames=mel.shape[1])
        return ValidationSound(finite, mel, f0)

    def _show(
        self, step: int, number: int, clip_id: str, sounds: Mapping[str, ValidationSound]
    ) -> None:
        figure = draw_spectrograms(sounds, f"{clip_id}, step {step}", self.mel, self.sample_rate,
                      self.hop_length)  # fmt: skip
        name, picture = f"clip {number + 1}", _pixels(figure)
        self.writer.add_image(f"mel/{name}", picture, step, dataformats="HWC")
        for path, sound in sounds.items():
            if path != "original" or self._fresh:
                self.writer.add_audio(
                    f"{path}/{name}", sound.wav.clip(-1, 1), step, sample_rate=self.sample_rate
                )
        if number == 0:
            self._write(step, picture, sounds)

    def _write(self, step: int, picture: Array, sounds: Mapping[str, ValidationSound]) -> None:
        from matplotlib.image import imsave

        self.folder.mkdir(parents=True, exist_ok=True)
        imsave(picture_path(self.folder.parent, step), picture)
        for path, sound in sounds.items():
            name = "original" if path == "original" else f"step-{step:08d}-{path}"
            sf.write(self.folder / f"{name}.wav", sound.wav.clip(-1, 1), self.sample_rate)


def fixed_clips(validation: ShardDataset, training: ShardDataset, count: int) -> list[Batch]:
    """Return `count` clips for `Metrics`, always the same ones, spread over the held-out clips.

    They are spread over the training clips where none are held out.
    """
    dataset = validation if len(validation) else training
    places = np.linspace(0, len(dataset) - 1, min(count, len(dataset)))
    return [collate([dataset[round(place)]]) for place in places]


def picture_path(run: Path, step: int) -> Path:
    """Return the path of the picture of the first clip."""
    return run / "validation" / f"step-{step:08d}.png"


def resynthesize(generator: Synthesizer, clip: Batch, mel: MelConfig) -> dict[str, Tensor]:
    """Return the clip on each of `PATHS`: wav (1, T). The noise is the same each time."""
    clip = clip.to(next(generator.parameters()).device)
    key = zlib.crc32(clip.clip_ids[0].encode())
    spec = spectrogram(clip.wav, mel, generator.config.hop_length)
    posterior = generator.resynthesize(
        spec, clip.lengths, clip.f0, clip.speaker, noise=KeyedNoise([key])
    )
    prior, _ = generator.infer(
        clip.units, clip.f0, clip.voiced, clip.speaker, noise=KeyedNoise([key]), volume=clip.volume
    )
    return {"posterior": posterior, "prior": prior}


def measure_clips(
    clips: Sequence[Batch],
    originals: Sequence[ValidationSound],
    resynthesized: Mapping[str, Sequence[ValidationSound]],
) -> dict[str, float]:
    """Return measures of all clips together, by path: mel_PATH and those of `compare_pitch`_PATH.

    mel: mean absolute distance of the log mels. mel_distance: the mean over the paths, by which the
    best checkpoint is chosen. `..._original` compares the pitch estimated from the original with
    the dataset's f0: a limit that no resynthesis can be expected to beat.
    """
    if not clips:
        return {}
    numbers: dict[str, float] = {}
    for path, sounds in resynthesized.items():
        pairs = zip(sounds, originals, strict=True)
        distances = [np.abs(sound.mel - original.mel).ravel() for sound, original in pairs]
        numbers[f"mel_{path}"] = float(np.concatenate(distances).mean())
    numbers["mel_distance"] = float(np.mean(list(numbers.values())))
    truth = np.concatenate([(clip.f0 * clip.voiced)[0].cpu().numpy() for clip in clips])
    for path, sounds in [*resynthesized.items(), ("original", originals)]:
        estimated = np.concatenate([sound.f0 for sound in sounds])
        for name, value in compare_pitch(truth, estimated).items():
            numbers[f"{name}_{path}"] = value
    return numbers


def compare_pitch(truth: Array, estimate: Array) -> dict[str, float]:
    """Compare two contours (F,) in Hz, 0 where unvoiced.

    voicing_error: share of frames in which one is voiced and the other is not.
    pitch_accuracy: share of the truth's voiced frames that are voiced and within 50 cents; absent
    where nothing is voiced in the truth.
    f0_rmse_cents: over the frames that are voiced in both; absent where there are none.
    """
    voiced, both = truth > 0, (truth > 0) & (estimate > 0)
    cents = 1200 * np.log2(estimate[both].astype(np.float64) / truth[both])
    numbers = {"voicing_error": float(np.mean(voiced != (estimate > 0)))}
    if voiced.any():
        numbers["pitch_accuracy"] = float(np.sum(np.abs(cents) <= CENTS) / np.sum(voiced))
    if both.any():
        numbers["f0_rmse_cents"] = float(np.sqrt(np.mean(cents**2)))
    return numbers


def describe_measures(numbers: Mapping[str, float]) -> str:
    """Return a line for the console; "" where nothing was measured."""
    if not numbers:
        return ""

    def pair(name: str, form: str) -> str:
        values = (numbers.get(f"{name}_{path}") for path in PATHS)
        return " / ".join("–" if value is None else format(value, form) for value in values)

    return (
        f"posterior / prior: mel distance {pair('mel', '.2f')}, "
        f"right pitch {pair('pitch_accuracy', '.0%')}, "
        f"off by {pair('f0_rmse_cents', '.0f')} cents, voicing wrong {pair('voicing_error', '.0%')}"
    )


def draw_spectrograms(
    sounds: Mapping[str, ValidationSound],
    title: str,
    mel: MelConfig,
    sample_rate: int,
    hop_length: int,
) -> Figure:
    """Draw the log mels side by side, in the colour range of the first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4 * len(sounds), 3.4), dpi=100)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, len(sounds), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.06, right=0.91, bottom=0.15, top=0.84, wspace=0.05)
    first = next(iter(sounds.values())).mel
    for each, (name, sound) in zip(axes, sounds.items(), strict=True):
        seconds = sound.mel.shape[1] * hop_length / sample_rate
        image = each.imshow(
            sound.mel, origin="lower", aspect="auto", cmap="magma", interpolation="nearest",
            vmin=first.min(), vmax=first.max(), extent=(0, seconds, -0.5, len(sound.mel) - 0.5),
        )  # fmt: skip
        each.set_title(name, fontsize=10)
        each.set_xlabel("time (s)")
        each.xaxis.set_major_locator(MaxNLocator(6, prune="upper"))  # the next panel has a 0 there
    axes[0].set_yticks(*_ticks(mel, sample_rate))
    axes[0].set_ylabel("frequency (Hz), mel scale")
    legend = figure.add_axes((0.925, 0.15, 0.012, 0.69))
    figure.colorbar(image, cax=legend, label="log magnitude")
    return figure


def _ticks(mel: MelConfig, sample_rate: int) -> tuple[list[int], list[str]]:
    """Return some mel bands and labels with their centres in Hz."""
    import librosa

    f_max = sample_rate / 2 if mel.f_max is None else mel.f_max
    middles = librosa.mel_frequencies(mel.n_mels + 2, fmin=mel.f_min, fmax=f_max)[1:-1]
    wanted = [hz for hz in (200, 500, 1000, 2000, 4000, 8000, 16000) if mel.f_min < hz < f_max]
    return [int(np.abs(middles - hz).argmin()) for hz in wanted], [f"{hz}" for hz in wanted]


def _pixels(figure: Figure) -> Array:
    """Return the pixels (height, width, 3), 0 to 255."""
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _tag(name: str) -> str:
    """Return the name of a measure in TensorBoard."""
    if name.startswith("grad_norm"):
        return f"gradient/{name}"
    return f"loss/{name}" if name in LOSSES else f"train/{name}"


@contextmanager
def _evaluating(generator: Synthesizer) -> Iterator[None]:
    """Turn off dropout and gradients."""
    training = generator.training
    generator.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        generator.train(training)
