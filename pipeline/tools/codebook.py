"""`codebook`: k-means over the units of a dataset, in the memory of a few batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from models.encoders.codebook import MAX_CLUSTERS, Codebook, save_codebooks
from models.encoders.kmeans import KMeans, kmeans_plus_plus
from models.synthesizer.config import require_at_least
from pipeline.cluster.bar import show_bar
from pipeline.cluster.device import choose_device
from pipeline.dataset.unit_frames import UnitDataConfig, UnitFrames, find_units
from pipeline.errors import UserError
from pipeline.extract.from_dataset import read_source
from pipeline.reports.command_summary import Summary
from pipeline.storage.weight_files import require_safetensors
from stages.units import EncoderSettings

_BATCH = 8192  # frames; with less than about 16 per centre, minibatch k-means is noisy
_MOST_SPREAD = 2048  # clusters; the time of k-means++ grows with clusters times sample size
_SAMPLE = (16384, 65536)  # least and most frames that the initial centres are chosen from


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """Settings of k-means. epochs: passes of minibatches; one pass of Lloyd's algorithm follows.

    per_speaker: one codebook for each speaker, in one file.
    """

    clusters: int = 500
    per_speaker: bool = False
    epochs: int = 3
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if not 1 <= self.clusters <= MAX_CLUSTERS:
            raise ValueError(
                f"codebook.clusters is {self.clusters}; it must lie in 1 to {MAX_CLUSTERS}, "
                "because ids have 16 bits"
            )
        require_at_least(0, "codebook.epochs", self.epochs)
        require_at_least(0, "codebook.seed", self.seed)


@dataclass(frozen=True, kw_only=True)
class CodebookSettings:
    """Every setting of `codebook`."""

    data: UnitDataConfig = field(default_factory=UnitDataConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)

    def __post_init__(self) -> None:
        if self.codebook.per_speaker and self.data.speaker is not None:
            raise ValueError("data.speaker and codebook.per_speaker are both set; give one of them")


@dataclass(frozen=True)
class Fit:
    """A codebook and its fit to the frames that it was made from.

    used: centres with at least one frame. inertia: mean squared distance of a frame to its centre.
    variance: mean squared distance of a frame to the mean frame.
    """

    codebook: Codebook
    frames: int
    used: int
    inertia: float
    variance: float


def make_codebook(
    dataset: Path, out: Path, settings: CodebookSettings, console: Console
) -> list[Fit]:
    """Write the codebook of `dataset` to `out`; with `codebook.per_speaker`, one for each speaker.

    The same seed, dataset and settings give the same file on the same kind of machine.
    Raises: UserError: when there is nothing to cluster, or fewer frames than clusters.
    """
    cfg, data = settings.codebook, settings.data
    device = choose_device(cfg.device, "codebook.device")
    require_safetensors(out)
    units = find_units(dataset, data.encoder, data.split)
    if cfg.per_speaker:
        parts = [units.of(speaker) for speaker in units.speakers]
    else:
        parts = [units if data.speaker is None else units.of(data.speaker)]
    _refuse_few(parts, cfg.clusters)
    fits = [fit_codebook(part, cfg, device, console) for part in parts]
    frames = sum(f.frames for f in fits)
    inertia = sum(f.inertia * f.frames for f in fits) / frames
    notes = {
        "seed": cfg.seed,
        "epochs": cfg.epochs,
        "split": data.split,
        "frames": frames,
        "inertia": float(f"{inertia:.6g}"),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_codebooks(out, [f.codebook for f in fits], notes)
    return fits


def fit_codebook(units: UnitFrames, cfg: CodebookConfig, device: str, console: Console) -> Fit:
    """Fit k-means: k-means++ on a sample, minibatches, one pass of Lloyd, one pass of counting.

    Up to 2048 clusters start from k-means++; more start from frames drawn at random.
    """
    generator = torch.Generator().manual_seed(cfg.seed)
    least, most = _SAMPLE
    size = max(cfg.clusters, min(most, max(least, 64 * cfg.clusters)))
    sample = torch.from_numpy(units.sample(size, cfg.seed))
    title = f"clusters of {units.speaker or units.encoder.name}"
    passes = cfg.epochs + 2
    with show_bar(console, title, passes * units.total) as advance:
        if cfg.clusters <= _MOST_SPREAD:
            first = kmeans_plus_plus(sample, cfg.clusters, generator, device)
        else:
            order = torch.randperm(len(sample), generator=generator)
            first = sample[order[: cfg.clusters]].clone()
        kmeans = KMeans(first, device)
        for epoch in range(cfg.epochs):
            kmeans.start_pass()
            for batch in units.batches(_BATCH, cfg.seed, epoch):
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
    """Return the encoder settings that the dataset's units were made with."""
    encoders = read_source(units.dataset).config.all_encoders.values()
    by_name = {encoder.name: encoder for encoder in encoders}
    return by_name[units.encoder.name]


def _refuse_few(parts: list[UnitFrames], clusters: int) -> None:
    for part in parts:
        if part.total < clusters:
            of = f" of speaker '{part.speaker}'" if part.speaker is not None else ""
            raise UserError(
                f"{part.dataset} has {part.total} frames{of}, too few for {clusters} clusters; "
                f"set codebook.clusters={part.total} or less"
            )


def codebook_summary(fits: list[Fit], out: Path) -> Summary:
    """Return frames, ids used and the share of the variance that the centres explain."""
    figures = [
        {
            "speaker": f.codebook.speaker,
            "encoder": f.codebook.encoder,
            "frames": f.frames,
            "clusters": len(f.codebook.centroids),
            "used": f.used,
            "inertia": f.inertia,
            "variance_explained": 1 - f.inertia / f.variance if f.variance > 0 else 1.0,
        }
        for f in fits
    ]
    lines = [
        f"{'' if f['speaker'] is None else str(f['speaker']) + ': '}{f['frames']} frames, "
        f"{f['used']} of {f['clusters']} ids used, mean squared distance {f['inertia']:.4g} "
        f"({f['variance_explained']:.1%} of the variance explained)"
        for f in figures
    ]
    return Summary(
        parts=[*lines, f"codebook at {out}"], figures={"file": str(out), "codebooks": figures}
    )
