"""f0 of a task's clips, its measures, and the clips that they filter out.

Estimators without a network run where songs are sliced, song by song. Networks run where units are
computed, on the GPU if there is one, on all clips of a task at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.decoded_clips import DecodedClips
from pipeline.dataset.ledger import SongEntry
from pipeline.dataset.schema import PITCH_SCHEMA, clip_name
from pipeline.errors import name_song_in_errors
from pipeline.extract.job import ExtractJob
from pipeline.extract.model_checks import name_setting_while_loading
from pipeline.songs.balance import FILTERED
from pipeline.storage.weight_files import require_unchanged
from stages.chain import StageClock, why_empty
from stages.errors import Dropped
from stages.f0 import F0Config, estimate_clips, load_networks
from stages.f0.post import interpolate_gaps
from stages.quality import measure_pitch, unwanted_pitch
from stages.types import Array


class Pitch:
    """Adds f0 and its measures as columns, and filters out clips beyond the limits of `quality`."""

    def __init__(self, job: ExtractJob) -> None:
        self.config = job.config
        self.version = job.schema_version
        self.weights = job.weights.get("f0.checkpoint")
        # Clips of another dataset all stay: its audio is taken over as it is.
        self.filters = job.taken_over is None

    def add(
        self, clips: pa.Table, ledger: Sequence[SongEntry], clock: StageClock
    ) -> tuple[pa.Table, list[SongEntry]]:
        """Return `clips` with the columns of PITCH_SCHEMA, and `ledger` without filtered clips."""
        config = self.config
        wavs = DecodedClips(clips["audio"], config.audio.subtype)
        rate, hop = config.audio.sample_rate, config.f0.hop_length
        with clock.stage("f0"):
            contours = self._estimate(wavs, clips["song_id"].to_pylist())
        with clock.stage("quality"):
            measured = [
                measure_pitch(wav, rate, f0, hop, self.version)
                for wav, f0 in zip(wavs, contours, strict=True)
            ]
        if config.f0.interpolate:
            contours = [interpolate_gaps(f0) for f0 in contours]
        clips = _with_columns(clips, contours, measured)
        if not self.filters:
            return clips, list(ledger)
        return _without(
            clips, ledger, [unwanted_pitch(values, config.quality) for values in measured]
        )

    def _estimate(self, wavs: DecodedClips, song_ids: Sequence[str]) -> list[Array]:
        """Return contours with their gaps, which the measures need."""
        rate = self.config.audio.sample_rate
        cfg = replace(self.config.f0, interpolate=False)
        if not cfg.networks:
            return self._one_by_one(wavs, song_ids, cfg)
        try:
            return list(estimate_clips(wavs, rate, cfg))
        except Exception:
            self._one_by_one(wavs, song_ids, cfg)  # names the song, where a clip alone fails too
            raise
        finally:  # the file is looked at again for every group of clips
            if self.weights is not None:
                require_unchanged("f0.checkpoint", self.weights)

    def _one_by_one(
        self, wavs: DecodedClips, song_ids: Sequence[str], cfg: F0Config
    ) -> list[Array]:
        contours: list[Array] = []
        for wav, song_id in zip(wavs, song_ids, strict=True):
            with name_song_in_errors(song_id):
                contours += estimate_clips([wav], self.config.audio.sample_rate, cfg)
        return contours


def load_pitch(job: ExtractJob) -> Pitch:
    """Load the networks that estimate f0.

    Raises: UserError: when their weights changed since the run began, or do not load.
    """
    if "f0.checkpoint" in job.weights:
        require_unchanged("f0.checkpoint", job.weights["f0.checkpoint"])
    with name_setting_while_loading("f0"):
        load_networks(job.config.f0)
    return Pitch(job)


def _with_columns(
    clips: pa.Table, contours: Sequence[Array], measured: Sequence[Mapping[str, float]]
) -> pa.Table:
    rows = [{"f0": f0, **values} for f0, values in zip(contours, measured, strict=True)]
    for field in PITCH_SCHEMA:
        values = [row[field.name] for row in rows]
        clips = clips.append_column(field, pa.array(values, field.type))
    return clips


def _without(
    clips: pa.Table, ledger: Sequence[SongEntry], reasons: Sequence[str | None]
) -> tuple[pa.Table, list[SongEntry]]:
    """Return the clips without a reason, renumbered within their songs, and their ledger."""
    if not any(reasons):
        return clips, list(ledger)
    gone: dict[str, Counter[str]] = {}  # samples of each song, by reason
    clips_gone: Counter[tuple[str, str]] = Counter()
    names = zip(clips["song_id"].to_pylist(), clips["num_samples"].to_pylist(), strict=True)
    for (song_id, num_samples), reason in zip(names, reasons, strict=True):
        if reason is not None:
            gone.setdefault(song_id, Counter())[reason] += num_samples
            clips_gone[song_id, reason] += 1
    rate = clips["sample_rate"][0].as_py()
    entries = [
        _without_dropped(
            entry,
            [
                Dropped(reason, clips_gone[entry.song_id, reason], samples / rate)
                for reason, samples in gone.get(entry.song_id, Counter()).items()
            ],
        )
        for entry in ledger
    ]
    kept = clips.filter(pa.array([reason is None for reason in reasons], pa.bool_()))
    return _numbered(kept), entries


def _without_dropped(entry: SongEntry, dropped: Sequence[Dropped]) -> SongEntry:
    if not dropped:
        return entry
    left = entry.clips - sum(drop.clips for drop in dropped)
    all_dropped = sorted([*entry.dropped, *dropped], key=lambda drop: drop.reason)
    entry = replace(
        entry,
        clips=left,
        kept_s=entry.kept_s - sum(drop.seconds for drop in dropped) if left else 0.0,
        dropped=all_dropped,
    )
    if left:
        return entry
    reason, detail = why_empty(all_dropped, entry.duration_s)
    return replace(entry, status=FILTERED, reason=reason, detail=detail)


def _numbered(clips: pa.Table) -> pa.Table:
    """Renumber the clips of each song, which are together and in order, from 0."""
    songs = clips["song_id"].to_pylist()
    counts = Counter(songs)
    seen: Counter[str] = Counter()
    columns: dict[str, list[Any]] = {name: [] for name in ("clip_id", "clip_index", "clip_count")}
    audio = []
    for song_id, data in zip(songs, pc.struct_field(clips["audio"], "bytes"), strict=True):
        clip_id = clip_name(song_id, seen[song_id])
        columns["clip_id"].append(clip_id)
        columns["clip_index"].append(seen[song_id])
        columns["clip_count"].append(counts[song_id])
        audio.append({"bytes": data.as_py(), "path": f"{clip_id}.flac"})
        seen[song_id] += 1
    for name, values in {**columns, "audio": audio}.items():
        place = clips.schema.get_field_index(name)
        field = clips.schema.field(place)
        clips = clips.set_column(place, field, pa.array(values, field.type))
    return clips
