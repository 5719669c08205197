"""`codebook`: k-means over the units of a dataset, in as much memory as a few batches take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from models.encoders.codebook import MAX_CLUSTERS, Codebook, save_codebooks
from models.encoders.kmeans import KMeans, spread_out
from pipeline.cluster.bar import show_bar
from pipeline.cluster.device import choose_device
from pipeline.dataset.unit_frames import UnitFrames, find_units
from pipeline.errors import UserError
from pipeline.extract.from_dataset import read_source
from pipeline.storage.weight_files import require_safetensors
from stages.units import EncoderSettings

_BATCH = 8192  # frames; below about 16 a centre, k-means by batches is noisy
_MOST_SPREAD = 2048  # clusters; k-means++ takes time with their number times the sample
_SAMPLE = (16384, 65536)  # least and most frames that the first centres are chosen from


@dataclass(frozen=True, kw_only=True)
class CodebookOptions:
    """What `codebook` can be told.

    epochs: passes of minibatches; a pass of Lloyd's algorithm follows. device: "auto" is CUDA where
    there is any.
    """

    encoder: str | None = None
    clusters: int = 500
    split: str = "train"
    speaker: str | None = None
    per_speaker: bool = False
    epochs: int = 3
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if not 1 <= self.clusters <= MAX_CLUSTERS:
            raise UserError(
                f"--clusters is {self.clusters}; ids are 16 bits, so 1 to {MAX_CLUSTERS}"
            )
        if self.epochs < 0:
            raise UserError(f"--epochs is {self.epochs}; it must be 0 or more")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}; it must be 0 or more")
        if self.per_speaker and self.speaker is not None:
            raise UserError("give --speaker or --per-speaker, not both")


@dataclass(frozen=True)
class Fit:
    """A codebook and how well it fits the frames that it was made of.

    inertia: mean squared distance of a frame to its centre. variance: that to the mean frame.
    """

    codebook: Codebook
    frames: int
    used: int
    inertia: float
    variance: float


def make_codebook(
    dataset: Path, out: Path, options: CodebookOptions, console: Console
) -> list[Fit]:
    """Write the codebook of `dataset` to `out`: one, or with per_speaker one a speaker.

    The same seed, dataset and options give the same file on the same kind of machine.
    Raises: UserError when there is nothing to cluster, or less than `clusters` frames.
    """
    device = choose_device(options.device)
    require_safetensors(out)
    units = find_units(dataset, options.encoder, options.split)
    if options.per_speaker:
        parts = [units.of(speaker) for speaker in units.speakers]
    else:
        parts = [units if options.speaker is None else units.of(options.speaker)]
    _refuse_few(parts, options)
    fits = [fit_codebook(part, options, device, console) for part in parts]
    frames = sum(f.frames for f in fits)
    inertia = sum(f.inertia * f.frames for f in fits) / frames
    notes = {
        "seed": options.seed,
        "epochs": options.epochs,
        "split": options.split,
        "frames": frames,
        "inertia": float(f"{inertia:.6g}"),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_codebooks(out, [f.codebook for f in fits], notes)
    return fits


def fit_codebook(units: UnitFrames, options: CodebookOptions, device: str, console: Console) -> Fit:
    """k-means of `units`: k-means++ on a sample, minibatches, one pass of Lloyd, one of counting.

    Up to 2048 clusters start by k-means++; more start on frames drawn at random.
    """
    generator = torch.Generator().manual_seed(options.seed)
    least, most = _SAMPLE
    size = max(options.clusters, min(most, max(least, 64 * options.clusters)))
    sample = torch.from_numpy(units.sample(size, options.seed))
    title = f"clusters of {units.speaker or units.encoder.name}"
    passes = options.epochs + 2
    with show_bar(console, title, passes * units.total) as advance:
        if options.clusters <= _MOST_SPREAD:
            first = spread_out(sample, options.clusters, generator, device)
        else:
            order = torch.randperm(len(sample), generator=generator)
            first = sample[order[: options.clusters]].clone()
        kmeans = KMeans(first, device)
        rng = np.random.default_rng(options.seed)
        for _ in range(options.epochs):
            kmeans.start_pass()
            for batch in units.batches(rng, _BATCH):
                kmeans.minibatch(torch.from_numpy(batch))
                advance(len(batch))
            kmeans.reseed((kmeans.counts == 0).nonzero().squeeze(1), sample, generator)
        for last in (False, True):
            kmeans.start_pass()
            for block in units.blocks():
                kmeans.collect(torch.from_numpy(block))
                advance(len(block))
            if not last:
                kmeans.finish_lloyd()
    encoder = units.encoder
    return Fit(
        Codebook(
            encoder.name,
            encoder.checkpoint_sha256,
            kmeans.centroids,
            units.speaker,
            _settings(units).meaning(),
        ),
        frames=units.total,
        used=int((kmeans.counts > 0).sum()),
        inertia=kmeans.inertia / units.total,
        variance=float(sample.double().var(0, correction=0).sum()),
    )


def _settings(units: UnitFrames) -> EncoderSettings:
    """With which the dataset's units were made."""
    encoders = read_source(units.dataset).config.all_encoders.values()
    by_name = {encoder.name: encoder for encoder in encoders}
    return by_name[units.encoder.name]


def _refuse_few(parts: list[UnitFrames], options: CodebookOptions) -> None:
    for part in parts:
        if part.total < options.clusters:
            of = f" of speaker '{part.speaker}'" if part.speaker is not None else ""
            raise UserError(
                f"{part.dataset} has {part.total} frames{of}, too few for {options.clusters} "
                f"clusters; give --clusters {part.total} or less"
            )


def show_fits(console: Console, fits: list[Fit], out: Path) -> None:
    """What `codebook` did: frames, ids used, how much of the variance the centres explain."""
    for f in fits:
        of = f"{f.codebook.speaker}: " if f.codebook.speaker is not None else ""
        clusters = len(f.codebook.centroids)
        explained = 1 - f.inertia / f.variance if f.variance > 0 else 1.0
        console.print(
            f"{of}{f.frames} frames, {f.used} of {clusters} ids used, mean squared distance "
            f"{f.inertia:.4g} ({explained:.1%} of the variance explained)",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"codebook at {out}", markup=False, highlight=False, soft_wrap=True)
