"""DATASET/report.html: the contents of a dataset on one page that needs nothing but a browser.

The words are in templates/dataset.html; this module prepares its data.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset.account import Account
from pipeline.dataset.shards import has_xvectors, units_in_words
from pipeline.fingerprint import with_settings_off
from pipeline.reports.dataset_statistics import (
    PITCH_BINS,
    DatasetStatistics,
    Floats,
    PlayedClip,
    SpeakerStatistics,
    by_length,
    pitch_percentiles,
    read_played_clips,
    read_statistics,
)
from pipeline.reports.figures import Picture, Theme, draw_picture
from pipeline.reports.html import Setting, list_settings, render_page
from pipeline.reports.mel_picture import draw_mel, mel_height, mel_power, power_db
from pipeline.settings import flatten
from pipeline.songs.balance import FILTERED, KEPT, QUARANTINED
from pipeline.storage.atomic import commit_file
from stages.quality import MEASURES, PITCH_MEASURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_PROBLEMS = 20
_MOST_SPEAKERS = 50
_MOST_SONGS = 200
_MOST_ENVIRONMENTS = 5
_MOST_COLUMNS = 1200  # of a waveform


def write_report(dataset: Path, defaults: object | None = None) -> Path:
    """Write `dataset/report.html` and return its path; the same dataset gives the same page.

    defaults: the default settings, a dataclass; the page points out settings that differ from them.

    Raises: UserError: when `dataset` is not a dataset or has a schema that is not supported.
    """
    statistics = read_statistics(dataset)
    clips = read_played_clips(dataset, statistics)
    page = _page(dataset.absolute().name, statistics, clips, defaults)
    parts = render_page("dataset.html", page)
    return commit_file(
        dataset, "report.html", lambda file: file.writelines(part.encode() for part in parts)
    )


# ---- the template's data ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Page:
    """Data of templates/dataset.html."""

    name: str
    sample_rate: int
    hop_length: int
    f0_method: str
    encoders: Sequence[str]
    xvectors: bool
    problems: Sequence[str]
    more_problems: int
    headline: _Headline
    speakers: _Speakers | None
    charts: Sequence[_Chart]
    measures: Sequence[_Measure]
    clips: Sequence[tuple[PlayedClip, Picture]]
    reasons: Sequence[_Reason]
    songs: Sequence[_Song]
    more_songs: int
    duplicates: Sequence[Sequence[str]]
    settings: Sequence[Setting]
    environments: Sequence[Mapping[str, str]]
    fingerprint: str


@dataclass(frozen=True)
class _Headline:
    """Numbers of the dataset as a whole."""

    planned: int
    kept: int
    filtered: int
    quarantined: int
    read_s: float
    kept_s: float
    clips: int
    speakers: int
    shards: int
    schema_version: int


@dataclass(frozen=True)
class _Speakers:
    """The table of speakers. octaves: (name of the C, percent of the way along the axis)."""

    rows: Sequence[_Speaker]
    octaves: Sequence[tuple[str, float]]
    octave_percent: float  # width of an octave
    more: int
    more_clips: int
    more_s: float


@dataclass(frozen=True)
class _Speaker:
    """A row of the table of speakers. percent: of the longest speaker's audio."""

    name: str
    planned: int
    kept: int
    clips: int
    seconds: float
    percent: float
    pitch: _PitchRange | None


@dataclass(frozen=True)
class _PitchRange:
    """The 5th, 25th, 50th, 75th and 95th percentile of pitch.

    midi: note numbers. percent: of the way along the axis.
    """

    midi: Sequence[float]
    percent: Sequence[float]


@dataclass(frozen=True)
class _Chart:
    """A histogram. form: how its values are written. unmeasured: clips without a value."""

    title: str
    unit: str
    form: str
    low: float
    median: float
    high: float
    unmeasured: int
    picture: Picture


@dataclass(frozen=True)
class _Measure:
    """A row of the table of measures. low, median, high: 5th, 50th and 95th percentile of clips.

    limits: those that are set, "min_snr_db 20".
    """

    name: str
    unit: str
    meaning: str
    low: float
    median: float
    high: float
    limits: Sequence[str]


@dataclass(frozen=True)
class _Reason:
    """A row of the table of reasons.

    measures: names of those whose limits give this reason. segments, seconds: dropped from
    readable songs.
    """

    reason: str
    measures: Sequence[str]
    quarantined: int
    filtered: int
    segments: int
    seconds: float


@dataclass(frozen=True)
class _Song:
    """A song without clips."""

    song_id: str
    status: str
    reason: str
    detail: str


def _page(
    name: str,
    statistics: DatasetStatistics,
    clips: Sequence[PlayedClip],
    defaults: object | None,
) -> _Page:
    info, account = statistics.info, statistics.account
    songs = _songs_without_clips(account)
    return _Page(
        name=name,
        sample_rate=info["sample_rate"],
        hop_length=info["hop_length"],
        f0_method=info["f0_method"],
        encoders=units_in_words(info),
        xvectors=has_xvectors(info),
        problems=account.problems[:_MOST_PROBLEMS],
        more_problems=max(0, len(account.problems) - _MOST_PROBLEMS),
        headline=_headline(statistics),
        speakers=_speakers(statistics),
        charts=_charts(statistics),
        measures=_measures(statistics),
        clips=[(clip, _clip_picture(clip)) for clip in clips],
        reasons=_reasons(account),
        songs=songs[:_MOST_SONGS],
        more_songs=max(0, len(songs) - _MOST_SONGS),
        duplicates=account.duplicates()[:_MOST_SONGS],
        settings=_settings(info["settings"], defaults),
        environments=statistics.environments[:_MOST_ENVIRONMENTS],
        fingerprint=info["fingerprint"],
    )


def _settings(recorded: Mapping[str, Any], defaults: object | None) -> tuple[Setting, ...]:
    """Return the settings of a dataset; those that are off are not recorded."""
    recorded = {key: value for key, value in recorded.items() if "." in key}
    if defaults is None:
        return list_settings(recorded, {})
    return list_settings(with_settings_off(recorded, defaults), flatten(defaults))


def _headline(statistics: DatasetStatistics) -> _Headline:
    account = statistics.account
    return _Headline(
        planned=account.planned,
        kept=account.count(KEPT),
        filtered=account.count(FILTERED),
        quarantined=account.count(QUARANTINED),
        read_s=3600 * account.hours_in,
        kept_s=3600 * account.hours_kept,
        clips=len(statistics.lengths_s),
        speakers=len(statistics.speakers),
        shards=account.shards,
        schema_version=statistics.info["schema_version"],
    )


def _speakers(statistics: DatasetStatistics) -> _Speakers | None:
    entries = statistics.account.entries.values()
    planned = Counter(entry.speaker for entry in entries)
    kept = Counter(entry.speaker for entry in entries if entry.status == KEPT)
    speakers = {name: SpeakerStatistics() for name in planned} | statistics.speakers
    if not speakers:
        return None
    rate = statistics.info["sample_rate"]
    order = by_length(speakers)
    shown, rest = order[:_MOST_SPEAKERS], order[_MOST_SPEAKERS:]
    longest = max(1, speakers[order[0]].samples)
    scale = _pitch_scale([speakers[name].pitch for name in shown])
    rows = [
        _Speaker(
            name=name,
            planned=planned[name],
            kept=kept[name],
            clips=speakers[name].clips,
            seconds=speakers[name].samples / rate,
            percent=100 * speakers[name].samples / longest,
            pitch=_pitch_range(speakers[name].pitch, scale),
        )
        for name in shown
    ]
    octaves = [octave for octave in range(11) if scale[0] <= 12 * octave <= scale[1]]
    return _Speakers(
        rows=rows,
        octaves=[(f"C{octave - 1}", _percent(12.0 * octave, scale)) for octave in octaves],
        octave_percent=100 * 12 / (scale[1] - scale[0]),
        more=len(rest),
        more_clips=sum(speakers[name].clips for name in rest),
        more_s=sum(speakers[name].samples for name in rest) / rate,
    )


def _pitch_scale(histograms: Sequence[NDArray[np.int64]]) -> tuple[float, float]:
    """Return whole octaves (MIDI note numbers) that contain the pitches of all speakers."""
    total = sum(histograms, start=np.zeros(PITCH_BINS, np.int64))
    if not total.any():
        return 36.0, 84.0
    low, high = pitch_percentiles(total, (0.5, 99.5))
    return 12.0 * np.floor(low / 12), 12.0 * np.ceil(max(high, low + 1) / 12)


def _pitch_range(pitch: NDArray[np.int64], scale: tuple[float, float]) -> _PitchRange | None:
    if not pitch.any():
        return None
    midi = pitch_percentiles(pitch, (5, 25, 50, 75, 95))
    return _PitchRange(midi, [_percent(note, scale) for note in midi])


def _measures(statistics: DatasetStatistics) -> list[_Measure]:
    """Return a row for each measure that the shards have, and for each other one with a limit."""
    settings = statistics.info["settings"]
    rows = []
    for measure in MEASURES:
        values = _measured(measure.name, statistics.measures)
        low, median, high = np.percentile(values, (5, 50, 95)) if len(values) else (np.nan,) * 3
        limits = [
            f"{limit.key} {settings[f'quality.{limit.key}']:g}"
            for limit in measure.limits
            if settings.get(f"quality.{limit.key}") is not None
        ]
        if len(values) or limits:
            unit, meaning = measure.unit, measure.meaning
            rows.append(_Measure(measure.name, unit, meaning, low, median, high, limits))
    return rows


def _measured(name: str, columns: Mapping[str, Floats]) -> Floats:
    """Return the values of a measure, without the clips that do not have it.

    A clip without a voiced frame has no pitch; its measures of pitch are 0.
    """
    values = columns.get(name, np.zeros(0))
    pitch = {measure.name for measure in PITCH_MEASURES} - {"voiced_ratio"}
    if name in pitch and "voiced_ratio" in columns and len(values):
        values = values[columns["voiced_ratio"] != 0]
    return values[np.isfinite(values)]


def _percent(midi: float, scale: tuple[float, float]) -> float:
    """Return the percentage of the way along the scale."""
    return float(np.clip((midi - scale[0]) / (scale[1] - scale[0]), 0, 1)) * 100


def _reasons(account: Account) -> list[_Reason]:
    songs: dict[str, Counter[str]] = defaultdict(Counter)
    segments: Counter[str] = Counter()
    seconds: dict[str, float] = defaultdict(float)
    for entry in account.entries.values():
        if entry.status != KEPT:
            songs[entry.reason or ""][entry.status] += 1
        for drop in entry.dropped:
            segments[drop.reason] += drop.clips
            seconds[drop.reason] += drop.seconds
    measures: dict[str, list[str]] = defaultdict(list)
    for measure in MEASURES:
        measures[measure.reason].append(measure.name)
    order = sorted({*songs, *segments}, key=lambda r: (-sum(songs[r].values()), -seconds[r], r))
    return [
        _Reason(r, measures[r], songs[r][QUARANTINED], songs[r][FILTERED], segments[r], seconds[r])
        for r in order
    ]


def _songs_without_clips(account: Account) -> list[_Song]:
    entries = [entry for entry in account.entries.values() if entry.status != KEPT]
    entries.sort(key=lambda entry: (entry.status != QUARANTINED, entry.song_id))
    return [_Song(e.song_id, e.status, e.reason or "", e.detail or "") for e in entries]


# ---- pictures -----------------------------------------------------------------------------------


def _charts(statistics: DatasetStatistics) -> list[_Chart]:
    settings = statistics.info["settings"]
    target = None
    if settings.get("loudness.mode") == "lufs":
        target = float(settings["loudness.target_lufs"])
    charts = [
        _chart("Clip length", statistics.lengths_s, "s", ".1f"),
        _chart("Loudness before the gain", statistics.loudness_lufs, "LUFS", ".1f", target),
        _chart("Gain applied", statistics.gain_db, "dB", "+.1f"),
    ]
    return [chart for chart in charts if chart is not None]


def _chart(
    title: str, values: Floats, unit: str, form: str, target: float | None = None
) -> _Chart | None:
    """Return a histogram of the finite values; None when there is none."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    return _Chart(
        title=title,
        unit=unit,
        form=form,
        low=float(finite.min()),
        median=float(np.median(finite)),
        high=float(finite.max()),
        unmeasured=len(values) - len(finite),
        picture=_histogram_picture(finite, unit, target),
    )


def _histogram_picture(values: Floats, label: str, target: float | None) -> Picture:
    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        _histogram(axes, values, theme, label)
        if target is not None:
            axes.margins(y=0.18)
            axes.axvline(target, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                "target", (target, 1), xycoords=("data", "axes fraction"), xytext=(4, -2),
                textcoords="offset points", va="top",
            )  # fmt: skip

    return draw_picture(draw, 4.4, 2.5)


def _histogram(axes: Axes, values: Floats, theme: Theme, label: str) -> None:
    """Draw counts of `values` in at most 40 bins between their extremes."""
    from matplotlib.ticker import MaxNLocator

    low, high = float(values.min()), float(values.max())
    if high - low < 1e-3:
        low, high = low - 0.5, high + 0.5
    axes.hist(values, bins=int(np.clip(np.sqrt(len(values)) * 2, 8, 40)), range=(low, high),
              color=theme.accent, rwidth=0.92)  # fmt: skip
    axes.grid(axis="y", linewidth=0.7)
    axes.tick_params(length=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.set_xlabel(label)
    axes.set_ylabel("clips")
    axes.spines["left"].set_visible(False)


def _clip_picture(clip: PlayedClip) -> Picture:
    """Draw the waveform, and f0 over a mel spectrogram, on one time axis."""
    power = mel_power(clip.wav, clip.sample_rate, clip.hop_length)
    mel_db = power_db(power, float(power.max()))
    times_s = np.arange(len(clip.f0)) * clip.hop_length / clip.sample_rate
    contour = np.where(clip.f0 > 0, mel_height(np.maximum(clip.f0, 1.0)), np.nan)
    peak = max(0.01, float(np.abs(clip.wav).max(initial=0.0)))
    columns = min(len(clip.wav), _MOST_COLUMNS)
    edges = np.linspace(0, len(clip.wav), columns, endpoint=False).astype(np.int64)

    def draw(figure: Figure, theme: Theme) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, 3.2])
        if columns:
            bounds = np.minimum.reduceat(clip.wav, edges), np.maximum.reduceat(clip.wav, edges)
            at_s = edges / clip.sample_rate
            top.fill_between(at_s, *bounds, color=theme.accent, linewidth=0.3)
        top.set_ylim(-peak, peak)
        top.set_yticks([-peak, peak], [f"−{peak:.2f}", f"{peak:.2f}"])
        draw_mel(bottom, mel_db, clip.sample_rate, clip.hop_length / clip.sample_rate)
        bottom.plot(times_s, contour, color="#101018", linewidth=2.6)
        bottom.plot(times_s, contour, color="#5ee6ff", linewidth=1.2)
        bottom.set_xlim(0, clip.seconds)
        bottom.set_xlabel("s")
        for axes in (top, bottom):
            axes.tick_params(length=2 if axes is bottom else 0)
            axes.spines[:].set_visible(False)

    return draw_picture(draw, 4.4, 3.6)
