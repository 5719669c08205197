"""DATASET/report.html: what is in a dataset, on one page that needs nothing but a browser.

Shards are read one after the other, scalar columns and contours only; what is kept of them are
histograms and a few numbers a clip. Audio is read for the clips that the page plays.
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile as sf
from numpy.typing import NDArray

from pipeline.dataset.account import Account, balance_dataset
from pipeline.dataset.ledger import SongEntry
from pipeline.dataset.schema import QUALITY_COLUMNS
from pipeline.dataset.shards import (
    Footer,
    has_xvectors,
    iter_shards,
    read_dataset_info,
    read_footers,
    require_current,
    units_in_words,
)
from pipeline.errors import UserError
from pipeline.reports.html import (
    Theme,
    data_uri,
    escaped,
    escaped_name,
    html_numbers,
    html_page,
    html_section,
    html_settings,
    html_table,
    note_name,
    picture,
    seconds_in_words,
)
from pipeline.reports.mel_picture import draw_mel, mel_height, mel_power, power_db
from pipeline.songs.balance import FILTERED, KEPT, QUARANTINED
from pipeline.songs.plan import load_plan
from pipeline.storage.atomic import commit_file
from stages.types import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = ["clip_id", "song_id", "speaker", "num_samples", "f0", "loudness_lufs", "gain_db"]
_CLIPS_SHOWN = 3
_CLIP_SHOWN_S = 6.0  # clips near this length are shown
_MOST_SPEAKERS = 50
_MOST_SONGS = 200
_BINS_PER_SEMITONE = 4  # pitch histograms: MIDI note numbers 0 to 128 in quarter semitones
_PITCH_BINS = 128 * _BINS_PER_SEMITONE

Floats = NDArray[np.float64]


@dataclass
class _Speaker:
    """What the rows of all shards say of one speaker."""

    clips: int = 0
    samples: int = 0
    pitch: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_PITCH_BINS, np.int64))
    best: list[_Candidate] = field(default_factory=list)


@dataclass(frozen=True, order=True)
class _Candidate:
    """A clip that may be shown; the smallest is the first choice."""

    distance: int  # samples from the length that shows well
    clip_id: str
    song_id: str
    shard: str
    row: int


@dataclass
class _Contents:
    """Everything the page needs to know of the shards."""

    info: dict[str, Any]
    account: Account
    speakers: dict[str, _Speaker]
    lengths_s: Floats  # (clips,)
    loudness_lufs: Floats
    gain_db: Floats
    environments: list[dict[str, str]]


def write_report(dataset: Path, defaults: Mapping[str, Any] | None = None) -> Path:
    """Write `dataset/report.html` and return its path; the same dataset gives the same page.

    defaults: default settings by key; the page points out settings that differ from them.

    Raises: UserError when `dataset` is not one of ours, or of another format.
    """
    contents = _read(dataset)
    clips = []
    for speaker, candidate in _choose(contents.speakers):
        try:
            clips.append(_read_clip(dataset, speaker, candidate))
        except (pa.ArrowException, sf.LibsndfileError) as error:
            contents.account.problems.append(f"{candidate.clip_id} cannot be read: {error}")
    page = _page(dataset.absolute().name, contents, clips, defaults or {})
    return commit_file(dataset, "report.html", lambda file: file.write(page.encode()))


# ---- reading ------------------------------------------------------------------------------------


def _read(dataset: Path) -> _Contents:
    info = read_dataset_info(dataset)
    require_current(dataset, info)
    tasks = load_plan(dataset)
    speakers: dict[str, _Speaker] = defaultdict(_Speaker)
    lengths: list[Floats] = []
    loudness: list[Floats] = []
    gains: list[Floats] = []
    footers: list[tuple[Footer, int]] = []
    environments: list[dict[str, str]] = []
    problems: list[str] = []
    for path, footer in read_footers(iter_shards(dataset)):
        if isinstance(footer, UserError):
            problems.append(str(footer))
            continue
        try:
            table = pq.read_table(path, columns=_COLUMNS, partitioning=None)
        except (pa.ArrowException, OSError) as error:
            problems.append(f"{path.name} cannot be read: {error}")
            continue
        _tally(table, path.name, footer.sample_rate, speakers)
        lengths.append(_floats(table["num_samples"]) / footer.sample_rate)
        loudness.append(_floats(table["loudness_lufs"]))
        gains.append(_floats(table["gain_db"]))
        footers.append((footer, table.num_rows))
        if footer.environment not in environments:
            environments.append(footer.environment)
    account = balance_dataset(list(tasks.values()), footers)
    account.problems = problems + account.problems
    return _Contents(
        info,
        account,
        dict(speakers),
        np.concatenate([np.zeros(0), *lengths]),
        np.concatenate([np.zeros(0), *loudness]),
        np.concatenate([np.zeros(0), *gains]),
        environments,
    )


def _floats(column: pa.ChunkedArray) -> Floats:
    return np.asarray(column.to_numpy(), dtype=np.float64)


def _tally(table: pa.Table, shard: str, sample_rate: int, speakers: dict[str, _Speaker]) -> None:
    """Add one shard to what is known of its speakers."""
    if table.num_rows == 0:
        return
    names = table["speaker"].to_pylist()
    samples = _floats(table["num_samples"]).astype(np.int64)
    contours = table["f0"].combine_chunks()
    f0 = np.asarray(contours.flatten(), dtype=np.float64)
    frames = np.asarray(contours.value_lengths())
    for name in sorted(set(names)):
        mine = np.array([other == name for other in names])
        speaker = speakers[name]
        speaker.clips += int(mine.sum())
        speaker.samples += int(samples[mine].sum())
        hz = f0[np.repeat(mine, frames)]
        midi = 69 + 12 * np.log2(hz[hz > 0] / 440)
        bins = np.clip(np.rint(midi * _BINS_PER_SEMITONE), 0, _PITCH_BINS - 1).astype(np.int64)
        speaker.pitch += np.bincount(bins, minlength=_PITCH_BINS)
        distance = np.abs(samples - int(_CLIP_SHOWN_S * sample_rate))
        rows = [int(row) for row in np.flatnonzero(mine)]
        for row in sorted(rows, key=lambda row: distance[row])[:_CLIPS_SHOWN]:
            clip_id, song_id = table["clip_id"][row].as_py(), table["song_id"][row].as_py()
            speaker.best.append(_Candidate(int(distance[row]), clip_id, song_id, shard, row))
        speaker.best = sorted(speaker.best)[:_CLIPS_SHOWN]


def _choose(speakers: dict[str, _Speaker]) -> list[tuple[str, _Candidate]]:
    """Clips to show: of the speakers with most audio, one each before any gives two."""
    order = _by_length(speakers)
    rounds = [
        (name, speakers[name].best[turn])
        for turn in range(_CLIPS_SHOWN)
        for name in order
        if turn < len(speakers[name].best)
    ]
    return rounds[:_CLIPS_SHOWN]


def _by_length(speakers: dict[str, _Speaker]) -> list[str]:
    return sorted(speakers, key=lambda name: (-speakers[name].samples, name))


@dataclass(frozen=True)
class _Clip:
    """A clip that the page plays and draws."""

    clip_id: str
    speaker: str
    flac: bytes
    wav: Array  # (T,)
    sample_rate: int
    f0: Array  # (F,)
    hop_length: int
    row: dict[str, Any]


def _read_clip(dataset: Path, speaker: str, candidate: _Candidate) -> _Clip:
    path = dataset / "data" / candidate.shard
    columns = ["audio", "sample_rate", "f0", "loudness_lufs", "gain_db", *QUALITY_COLUMNS]
    with pq.ParquetFile(path) as file:
        footer = Footer.from_json(file.metadata.metadata[b"cantor"].decode())
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if candidate.row < first + rows:
                table = file.read_row_group(group, columns=columns)
                break
            first += rows
        else:
            raise UserError(f"{path} changed while it was read; run report again")
    row = table.slice(candidate.row - first, 1).to_pylist()[0]
    flac = row["audio"]["bytes"]
    wav, sample_rate = sf.read(io.BytesIO(flac), dtype="float32")
    f0 = np.asarray(row["f0"], dtype=np.float32)
    return _Clip(candidate.clip_id, speaker, flac, wav, sample_rate, f0, footer.hop_length, row)


# ---- pictures -----------------------------------------------------------------------------------


def _histogram(axes: Axes, values: Floats, theme: Theme, label: str) -> None:
    """Counts of `values` in at most 40 bins between their extremes."""
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


def _histogram_picture(
    values: Floats, label: str, alt: str, mark: tuple[float, str] | None = None
) -> str:
    """mark: a value to point at, and its name."""

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        _histogram(axes, values, theme, label)
        if mark is not None:
            axes.margins(y=0.18)
            axes.axvline(mark[0], color=theme.ink, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                mark[1], (mark[0], 1), xycoords=("data", "axes fraction"), xytext=(4, -2),
                textcoords="offset points", va="top",
            )  # fmt: skip

    return picture(draw, alt, 4.4, 2.5)


def _clip_picture(clip: _Clip) -> str:
    """Waveform, and f0 over a mel spectrogram, on one time axis."""
    power = mel_power(clip.wav, clip.sample_rate, clip.hop_length)
    mel_db = power_db(power, float(power.max()))
    seconds = len(clip.wav) / clip.sample_rate
    times_s = np.arange(len(clip.f0)) * clip.hop_length / clip.sample_rate
    contour = np.where(clip.f0 > 0, mel_height(np.maximum(clip.f0, 1.0)), np.nan)
    peak = max(0.01, float(np.abs(clip.wav).max(initial=0.0)))
    columns = min(len(clip.wav), 1200)
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
        bottom.set_xlim(0, seconds)
        bottom.set_xlabel("s")
        for axes in (top, bottom):
            axes.tick_params(length=2 if axes is bottom else 0)
            axes.spines[:].set_visible(False)

    voiced = clip.f0[clip.f0 > 0]
    span = f"f0 from {voiced.min():.0f} to {voiced.max():.0f} Hz" if len(voiced) else "no f0"
    alt = f"Waveform and mel spectrogram of clip {clip.clip_id}, {seconds:.1f} s, {span}"
    return picture(draw, alt, 4.4, 3.6)


# ---- words --------------------------------------------------------------------------------------


def _words(reason: str) -> str:
    return reason.replace("_", " ")


def _hz(midi: float) -> float:
    return float(440 * 2 ** ((midi - 69) / 12))


def _pitch_percentiles(pitch: NDArray[np.int64], percents: Sequence[float]) -> list[float]:
    """MIDI note numbers that those percentages of the voiced frames do not exceed."""
    cumulated = np.cumsum(pitch)
    at = np.searchsorted(cumulated, np.array(percents) / 100 * cumulated[-1])
    return [float(index) / _BINS_PER_SEMITONE for index in at]


# ---- the page -----------------------------------------------------------------------------------


def _page(name: str, contents: _Contents, clips: list[_Clip], defaults: Mapping[str, Any]) -> str:
    sections = [
        _problems(contents.account),
        _headline(contents),
        _speakers(contents),
        _charts(contents),
        _clips(clips),
        _drops(contents.account),
        _settings(contents, defaults),
    ]
    title = f"{name}: dataset report"
    heading = f"<h1>{escaped_name(name)}</h1><p>{_lead(contents.info)}</p>"
    return "".join(html_page(title, heading, sections, style=_STYLE))


def _lead(info: dict[str, Any]) -> str:
    encoders = ", ".join(units_in_words(info))
    vectors = "; an x-vector for each clip" if has_xvectors(info) else ""
    return (
        f"Singing clips at {info['sample_rate']} Hz; f0 by {escaped(info['f0_method'])} every "
        f"{info['hop_length']} samples; units by {escaped(encoders)}{vectors}."
    )


def _problems(account: Account) -> str:
    if not account.problems:
        return ""
    most = 20
    items = "".join(f"<li>{escaped(problem)}</li>" for problem in account.problems[:most])
    more = len(account.problems) - most
    items += f"<li>and {more} more</li>" if more > 0 else ""
    return (
        '<section class="alert" role="note"><h2>This dataset is not whole</h2>'
        f"<ul>{items}</ul></section>"
    )


def _headline(contents: _Contents) -> str:
    account = contents.account
    hours_in, hours_kept = account.hours_in, account.hours_kept
    share = f"{hours_kept / hours_in:.0%} of what was read" if hours_in else "nothing was read"
    numbers = [
        (f"{account.count(KEPT)}", "songs kept", f"of {account.planned} planned"),
        (f"{account.count(FILTERED)}", "filtered", "fine, but left out by a setting"),
        (f"{account.count(QUARANTINED)}", "quarantined", "the file is at fault"),
        (seconds_in_words(3600 * hours_in), "audio in", f"{hours_in:.3f} h"),
        (seconds_in_words(3600 * hours_kept), "audio kept", f"{hours_kept:.3f} h, {share}"),
        (f"{len(contents.lengths_s)}", "clips", f"of {len(contents.speakers)} speakers"),
        (f"{account.shards}", "shards", f"schema {contents.info['schema_version']}"),
    ]
    return f'<section aria-label="In numbers">{html_numbers(numbers)}</section>'


def _speakers(contents: _Contents) -> str:
    rate = contents.info["sample_rate"]
    planned: Counter[str] = Counter(e.speaker for e in contents.account.entries.values())
    kept = Counter(e.speaker for e in contents.account.entries.values() if e.status == KEPT)
    everyone = {name: contents.speakers.get(name, _Speaker()) for name in planned}
    everyone |= contents.speakers
    if not everyone:
        return ""
    order = _by_length(everyone)
    longest = max(1, everyone[order[0]].samples)
    shown = order[:_MOST_SPEAKERS]
    scale = _pitch_scale([everyone[name].pitch for name in shown])
    rows = [
        [
            escaped_name(name),
            f"{kept[name]} of {planned[name]}",
            str(everyone[name].clips),
            _bar(everyone[name].samples / longest)
            + seconds_in_words(everyone[name].samples / rate),
            *_pitch_cells(everyone[name].clips, everyone[name].pitch, scale),
        ]
        for name in shown
    ]
    rest = order[_MOST_SPEAKERS:]
    if rest:
        clips = sum(everyone[name].clips for name in rest)
        samples = sum(everyone[name].samples for name in rest)
        rows.append(
            [f"and {len(rest)} more", "", str(clips), seconds_in_words(samples / rate), "", ""]
        )
    heads = ["speaker", "songs kept", "clips", "audio kept", "pitch range"]
    note = (
        "<p>Pitch of the voiced frames: line from the 5th to the 95th percentile, "
        "bar over the middle half, mark at the median.</p>"
    )
    return html_section(
        "Speakers", html_table("Speakers", "speakers", heads, rows, _octave_marks(scale)) + note
    )


def _octave_marks(scale: tuple[float, float]) -> str:
    marks = "".join(
        f'<i style="left:{_place(12.0 * octave, scale):.1f}%">C{octave - 1}</i>'
        for octave in range(11)
        if scale[0] <= 12 * octave <= scale[1]
    )
    return (
        f'<span class="axis" aria-hidden="true">{marks}</span>'
        '<span class="unseen">picture of the pitch range</span>'
    )


def _pitch_scale(histograms: Iterable[NDArray[np.int64]]) -> tuple[float, float]:
    """Whole octaves (MIDI note numbers) around the pitches of everyone shown."""
    total = sum(histograms, start=np.zeros(_PITCH_BINS, np.int64))
    if not total.any():
        return 36.0, 84.0
    low, high = _pitch_percentiles(total, (0.5, 99.5))
    return 12.0 * np.floor(low / 12), 12.0 * np.ceil(max(high, low + 1) / 12)


def _place(midi: float, scale: tuple[float, float]) -> float:
    """Percent of the way along the scale."""
    return float(np.clip((midi - scale[0]) / (scale[1] - scale[0]), 0, 1)) * 100


def _bar(share: float) -> str:
    return f'<span class="bar" aria-hidden="true"><i style="width:{100 * share:.1f}%"></i></span>'


def _pitch_cells(
    clips: int, pitch: NDArray[np.int64], scale: tuple[float, float]
) -> tuple[str, str]:
    """The pitch range in words and as a picture; nothing where there is no clip."""
    if not pitch.any():
        return "no voiced frame" if clips else "", ""
    low, lower, median, upper, high = _pitch_percentiles(pitch, (5, 25, 50, 75, 95))
    at = [_place(midi, scale) for midi in (low, lower, median, upper, high)]
    octaves = (scale[1] - scale[0]) / 12
    return (
        f"{note_name(low)} to {note_name(high)}<small>{_hz(low):.0f} to {_hz(high):.0f} Hz, "
        f"median {_hz(median):.0f}</small>",
        f'<span class="range" aria-hidden="true" style="--octave:{100 / octaves:.3f}%">'
        f'<i class="line" style="left:{at[0]:.1f}%;width:{at[4] - at[0]:.1f}%"></i>'
        f'<i class="box" style="left:{at[1]:.1f}%;width:{at[3] - at[1]:.1f}%"></i>'
        f'<i class="median" style="left:{at[2]:.1f}%"></i></span>',
    )


def _charts(contents: _Contents) -> str:
    if not len(contents.lengths_s):
        return html_section(
            "Clips", "<p>No clip was kept, so there is nothing to measure or hear.</p>"
        )
    settings = contents.info["settings"]
    lengths = contents.lengths_s
    figures: list[tuple[str, Floats, str, str, tuple[float, str] | None]] = [
        (
            "Clip lengths",
            lengths,
            "seconds",
            f"{lengths.min():.1f} to {lengths.max():.1f} s, median {np.median(lengths):.1f} s",
            None,
        )
    ]
    target = None
    if settings.get("loudness.mode") == "lufs":
        target = (float(settings["loudness.target_lufs"]), "target")
    heard = contents.loudness_lufs[np.isfinite(contents.loudness_lufs)]
    unheard = len(contents.loudness_lufs) - len(heard)
    if len(heard):
        words = f"{heard.min():.1f} to {heard.max():.1f} LUFS, median {np.median(heard):.1f}"
        words += f"; no reading for {unheard} clips" if unheard else ""
        figures.append(("Loudness before the gain", heard, "LUFS", words, target))
    gains = contents.gain_db[np.isfinite(contents.gain_db)]
    if len(gains):
        words = f"{gains.min():+.1f} to {gains.max():+.1f} dB, median {np.median(gains):+.1f} dB"
        figures.append(("Gain applied", gains, "dB", words, None))
    pictures = "".join(
        f"<figure><h3>{title}</h3>"
        f"{_histogram_picture(values, label, f'Histogram of {title.lower()}: {words}', mark)}"
        f"<figcaption>{words}</figcaption></figure>"
        for title, values, label, words, mark in figures
    )
    return html_section("Clips", f'<div class="figures">{pictures}</div>')


def _clips(clips: list[_Clip]) -> str:
    if not clips:
        return ""
    cards = []
    for clip in clips:
        seconds = len(clip.wav) / clip.sample_rate
        facts = [
            f"{seconds:.1f} s",
            f"{clip.row['voiced_ratio']:.0%} voiced, "
            f"{clip.row['f0_low_hz']:.0f} to {clip.row['f0_high_hz']:.0f} Hz",
            f"second voice {clip.row['second_voice']:.2f}",
            f"SNR {clip.row['snr_db']:.0f} dB",
            f"99 % of energy below {clip.row['bandwidth_hz'] / 1000:.1f} kHz",
            f"gain {clip.row['gain_db']:+.1f} dB",
        ]
        cards.append(
            f"<figure><h3>{escaped_name(clip.speaker)}</h3>"
            f'<p class="clip-id">{escaped_name(clip.clip_id)}</p>'
            f"{_clip_picture(clip)}"
            f'<audio controls="controls" aria-label="Clip {escaped(clip.clip_id)}" '
            f'src="{data_uri("audio/flac", clip.flac)}"></audio>'
            f"<figcaption>{' · '.join(facts)}</figcaption></figure>"
        )
    return html_section("To hear", f'<div class="figures clips">{"".join(cards)}</div>')


def _drops(account: Account) -> str:
    songs: dict[str, Counter[str]] = defaultdict(Counter)
    clips: Counter[str] = Counter()
    seconds: dict[str, float] = defaultdict(float)
    for entry in account.entries.values():
        if entry.status != KEPT:
            songs[entry.reason or ""][entry.status] += 1
        for drop in entry.dropped:
            clips[drop.reason] += drop.clips
            seconds[drop.reason] += drop.seconds
    reasons = sorted({*songs, *clips}, key=lambda r: (-sum(songs[r].values()), -seconds[r], r))
    if not reasons:
        return html_section("Left out", "<p>Nothing: every sample of every song is in a clip.</p>")
    rows = [
        [
            escaped(_words(reason)),
            str(songs[reason][QUARANTINED] or ""),
            str(songs[reason][FILTERED] or ""),
            str(clips[reason] or ""),
            seconds_in_words(seconds[reason]) if seconds[reason] else "",
        ]
        for reason in reasons
    ]
    heads = ["reason", "songs quarantined", "songs filtered", "stretches left out", "audio"]
    summary = html_table("Reasons", "counts", heads, rows)
    return html_section("Left out", summary + _left_out_songs(account) + _duplicates(account))


def _left_out_songs(account: Account) -> str:
    left: list[SongEntry] = [e for e in account.entries.values() if e.status != KEPT]
    if not left:
        return ""
    left.sort(key=lambda entry: (entry.status != QUARANTINED, entry.song_id))
    rows = [
        [
            escaped_name(e.song_id),
            e.status,
            escaped(_words(e.reason or "")),
            escaped_name(e.detail or ""),
        ]
        for e in left[:_MOST_SONGS]
    ]
    more = ""
    if len(left) > _MOST_SONGS:
        more = (
            f"<p>and {len(left) - _MOST_SONGS} more; "
            "<code>verify DATASET --export ledger.csv</code> lists all.</p>"
        )
    title = "Songs that gave no clip"
    heads = ["song", "status", "reason", "detail"]
    return f"<h3>{title}</h3>" + html_table(title, "songs", heads, rows) + more


def _duplicates(account: Account) -> str:
    groups = account.duplicates()
    if not groups:
        return ""
    items = "".join(
        f"<li>{', '.join(map(escaped_name, group))}</li>" for group in groups[:_MOST_SONGS]
    )
    return f"<h3>Same content under several names</h3><ul>{items}</ul>"


def _settings(contents: _Contents, defaults: Mapping[str, Any]) -> str:
    settings = {key: value for key, value in contents.info["settings"].items() if "." in key}
    made_with = "".join(
        "<p>" + ", ".join(f"{escaped(k)} {escaped(v)}" for k, v in environment.items()) + "</p>"
        for environment in contents.environments[:5]
    )
    return html_section(
        "Settings",
        html_settings(settings, defaults)
        + f"<h3>Made with</h3>{made_with or '<p>no shard yet</p>'}"
        + f"<p>Fingerprint <code>{escaped(contents.info['fingerprint'])}</code></p>",
    )


_STYLE = """
.speakers td { white-space: nowrap; }
.speakers td:last-child, .speakers th:last-child { width: 34%; min-width: 13rem; padding-right: 0; }
.bar { display: block; width: 8rem; height: .5rem; margin: .4rem 0 .1rem; background: var(--line);
  border-radius: 2px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--accent); }
.axis, .range { display: block; position: relative; }
.axis { height: 1.2em; }
.axis i { position: absolute; transform: translateX(-50%); font-style: normal; }
.axis i:first-child { transform: none; }
.axis i:last-child { transform: translateX(-100%); }
.range { height: 2rem; background: repeating-linear-gradient(to right, var(--line) 0 1px,
  transparent 1px var(--octave)); border-right: 1px solid var(--line); }
.range i { position: absolute; }
.range .line { top: calc(50% - 1px); height: 2px; background: var(--accent); }
.range .box { top: 25%; height: 50%; background: var(--accent); border-radius: 2px; }
.range .median { top: 18%; height: 64%; width: 3px; margin-left: -1.5px; background: var(--card);
  outline: 1px solid var(--ink); }
.clip-id { margin: 0 0 .5rem; font-size: .875rem; color: var(--soft); }
.songs th { min-width: 11rem; }
.songs td:last-child { min-width: 16rem; overflow-wrap: anywhere; }
@media (max-width: 44rem) {
  .speakers tbody th, .speakers td:nth-last-child(-n+2), .counts tbody th, .songs tbody th,
  .songs td:last-child { grid-column: 1 / -1; width: auto; min-width: 0; }
  .speakers > tbody > tr { grid-template-columns: 1fr 1fr; }
  .speakers td:not(:last-child)::before, .counts td::before { content: attr(data-label) " ";
    color: var(--soft); font-size: .85rem; }
  .bar { width: 100%; }
}
"""
