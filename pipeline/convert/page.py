"""The page of a conversion: what went in and what came out, to hear, to see and in numbers.

Songs are read back from their files. Whole songs are measured, block by block; of a long one a part
is played and drawn.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile as sf

from pipeline.convert.metrics import (
    envelope_distance,
    follow_f0,
    long_term_envelope,
    measure_f0,
)
from pipeline.convert.result import Conversion
from pipeline.errors import UserError
from pipeline.reports.html import (
    Theme,
    data_uri,
    differs,
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
from pipeline.reports.mel_picture import TOP_DB, draw_mel, mel_power, power_db
from stages.decode import Decoder
from stages.errors import BadInput
from stages.f0.pitch import f0_to_pitch
from stages.flac import encode_flac
from stages.loudness import integrated_loudness
from stages.pcm import quantise
from stages.resample import ResampleConfig
from stages.types import Array, Samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PLAYED_S = 180.0  # of a song, at most
_PLAYED_IN_ALL_S = 600.0  # of all songs; a minute weighs 7 MB, input and output
_DRAWN_S = 60.0  # of a song: longer, and vibrato is narrower than a pixel
_DRAWN_COLUMNS = 1600
_MOST_SONGS = 20
_FULL_SCALE = 1 - 2**-15  # the largest sample of 16 bits
_READ_SAMPLES = 65536
_ENVELOPE_RATE = 16000  # Hz; of less there is no long-term envelope


def write_conversion_report(
    path: Path,
    conversions: Sequence[Conversion],
    settings: Mapping[str, object],
    about: Mapping[str, str],
    *,
    defaults: Mapping[str, object],
    decoder: Decoder,
    resample: ResampleConfig,
) -> None:
    """Write the page to `path`, whole or not at all.

    settings, defaults: by section.key, as `pipeline.settings.flatten` gives them. about: what else
    there is to say, such as the voice, by name. decoder, resample: as the songs were read.
    A song whose files cannot be read any more is named as such. Of many, 20 are shown.
    Raises: UserError where `path` is a folder, OSError of the storage.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file for the page, such as {path / 'a.html'}")
    shown = conversions[:_MOST_SONGS]
    played_s = min(_PLAYED_S, _PLAYED_IN_ALL_S / max(1, len(shown)))
    songs: list[_Song | _Unread] = []
    for conversion in shown:
        try:
            songs.append(_read(conversion, decoder, resample, played_s))
        except (BadInput, sf.LibsndfileError) as error:
            songs.append(_Unread(conversion, str(error)))
    title = f"{len(conversions)} converted songs"
    if len(conversions) == 1:
        title = conversions[0].song_id
    heading = f"<h1>{escaped_name(title)}</h1>{_about(about)}"
    sections = _sections(songs, len(conversions), settings, defaults)
    _write(path, html_page(title, heading, sections, style=_STYLE, script=_SCRIPT))


def _write(path: Path, parts: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(parts)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- reading ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sound:
    """A song, before or after; mono and at the voice's rate."""

    played: bytes  # FLAC of its beginning
    power: Array  # (M, C) mel power of the part that is drawn
    loudness_lufs: float


@dataclass(frozen=True)
class _Drawn:
    """The part of a song that is drawn."""

    first_frame: int
    frames: int
    column_s: float  # of the mel spectrograms, which hold fewer columns than frames


@dataclass(frozen=True)
class _Song:
    """A conversion, and what its files tell."""

    conversion: Conversion
    seconds: float
    played_s: float
    before: _Sound
    after: _Sound
    drawn: _Drawn
    f0_found: Array  # (F,) Hz in the output
    pitch: dict[str, float]  # as `follow_f0`
    envelope_db: float
    full_scale: int  # samples of the output, all channels


@dataclass(frozen=True)
class _Unread:
    """A conversion whose files cannot be read any more."""

    conversion: Conversion
    why: str


def _read(
    conversion: Conversion, decoder: Decoder, resample: ResampleConfig, played_s: float
) -> _Song:
    rate, hop = conversion.sample_rate, conversion.hop_length
    asked = conversion.f0_asked
    with (
        decoder.decode(conversion.source, rate, resample) as source,
        decoder.decode(conversion.output, rate, resample) as output,
    ):
        before, after = source.wav, output.wav
        played = min(len(before), round(played_s * rate))
        drawn = _choose(asked[: played // hop], played, rate, hop)
        found = measure_f0(after, rate, hop, len(asked), float(asked.max(initial=0.0)))
        return _Song(
            conversion=conversion,
            seconds=len(before) / rate,
            played_s=played / rate,
            before=_sound(before, played, drawn, conversion),
            after=_sound(after, played, drawn, conversion),
            drawn=drawn,
            f0_found=found,
            pitch=follow_f0(asked, found),
            envelope_db=_envelope_moved(before[:played], after[:played], rate),
            full_scale=_count_full_scale(conversion.output),
        )


def _choose(f0: Array, played: int, sample_rate: int, hop_length: int) -> _Drawn:
    """The minute of `f0` (F,) in which most is sung. played: samples."""
    frames = min(math.ceil(played / hop_length), round(_DRAWN_S * sample_rate / hop_length))
    sung = np.concatenate([[0], np.cumsum(f0 > 0)])
    first = int(np.argmax(sung[frames:] - sung[: len(sung) - frames])) if frames < len(sung) else 0
    group = max(1, math.ceil(frames / _DRAWN_COLUMNS))
    return _Drawn(first, frames, group * hop_length / sample_rate)


def _sound(wav: Samples, played: int, drawn: _Drawn, conversion: Conversion) -> _Sound:
    rate, hop = conversion.sample_rate, conversion.hop_length
    heard = wav[:played]
    piece = heard[drawn.first_frame * hop : (drawn.first_frame + drawn.frames) * hop]
    piece = np.pad(piece, (0, drawn.frames * hop - len(piece)))
    power = mel_power(piece, rate, hop)[:, : drawn.frames]
    group = round(drawn.column_s * rate / hop)
    starts = np.arange(0, power.shape[1], group)
    columns = np.add.reduceat(power, starts, axis=1) / np.diff([*starts, power.shape[1]])
    return _Sound(
        played=encode_flac(quantise(heard, "PCM_16"), rate, "PCM_16"),
        power=columns.astype(np.float32),
        loudness_lufs=integrated_loudness(wav, rate),
    )


def _envelope_moved(before: Array, after: Array, sample_rate: int) -> float:
    """dB; NaN where there is nothing to compare."""
    if sample_rate < _ENVELOPE_RATE:
        return math.nan
    return envelope_distance(
        long_term_envelope(before, sample_rate), long_term_envelope(after, sample_rate)
    )


def _count_full_scale(output: Path) -> int:
    with sf.SoundFile(output) as file:
        blocks = file.blocks(_READ_SAMPLES, dtype="float32")
        return sum(int(np.count_nonzero(np.abs(block) >= _FULL_SCALE)) for block in blocks)


# ---- the page -----------------------------------------------------------------------------------


def _sections(
    songs: Sequence[_Song | _Unread],
    count: int,
    settings: Mapping[str, object],
    defaults: Mapping[str, object],
) -> Iterator[str]:
    """One at a time, for they are large. count: of all songs, shown or not."""
    if count != 1:
        yield _overview(songs, count)
    for number, song in enumerate(songs, 1):
        yield _section(number, song, alone=count == 1)
    yield _settings(settings, defaults)


def _about(about: Mapping[str, str]) -> str:
    items = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped_name(value)}</dd></div>"
        for name, value in about.items()
    )
    return f'<dl class="about">{items}</dl>' if items else ""


def _overview(songs: Sequence[_Song | _Unread], count: int) -> str:
    rows = []
    for number, song in enumerate(songs, 1):
        name = f'<a href="#song-{number}">{escaped_name(song.conversion.song_id)}</a>'
        if isinstance(song, _Unread):
            rows.append([name, "", "", "", "", "cannot be read"])
            continue
        notices = len(song.conversion.notices)
        rows.append(
            [
                name,
                seconds_in_words(song.seconds),
                f"{song.conversion.wall_s / song.seconds:.2f}",
                _number(song.pitch["near"], ".0%"),
                _number(song.pitch["median_cents"], ".0f"),
                f"{notices}" if notices else "",
            ]
        )
    if count > len(songs):
        rows.append([f"and {count - len(songs)} more", "", "", "", "", ""])
    heads = ["song", "length", "real-time factor", "within 50 cents", "cents off", "notices"]
    return html_section("Songs", html_table("Songs", "overview", heads, rows))


def _section(number: int, song: _Song | _Unread, *, alone: bool) -> str:
    """alone: the page's heading names the song already."""
    conversion = song.conversion
    notices = list(conversion.notices)
    if isinstance(song, _Unread):
        notices.append(f"The files cannot be read any more: {song.why}")
        body = ""
    else:
        body = _players(number, song) + _picture(song) + html_numbers(_numbers(song))
    items = "".join(f"<li>{escaped(notice)}</li>" for notice in notices)
    alert = (
        f'<div class="alert" role="note"><h3>Notices</h3><ul>{items}</ul></div>' if items else ""
    )
    title = "" if alone else f"<h2>{escaped_name(conversion.song_id)}</h2>"
    files = " to ".join(escaped_name(path) for path in (conversion.source, conversion.output))
    return (
        f'<section class="song" id="song-{number}">{title}<p>{files}</p>{alert}{body}</section>\n'
    )


def _players(number: int, song: _Song) -> str:
    part = "all of it"
    if song.played_s < song.seconds:
        part = f"the first {seconds_in_words(song.played_s)} of {seconds_in_words(song.seconds)}"
    figures = "".join(
        f"<figure><h3>{name}</h3>"
        f'<audio controls="controls" preload="metadata" data-song="{number}" '
        f'aria-label="{name} of {escaped(song.conversion.song_id)}" '
        f'src="{data_uri("audio/flac", sound.played)}"></audio>'
        '<p class="mute" hidden="hidden">This browser does not play FLAC.</p>'
        f"<figcaption>{part}, mono, {song.conversion.sample_rate} Hz</figcaption></figure>"
        for name, sound in (("Input", song.before), ("Output", song.after))
    )
    return f'<div class="figures">{figures}</div>'


def _numbers(song: _Song) -> list[tuple[str, str, str]]:
    conversion, pitch = song.conversion, song.pitch
    peak_db = f"{20 * math.log10(conversion.peak):+.1f} dB" if conversion.peak > 0 else "silence"
    pieces = "piece" if conversion.pieces == 1 else "pieces"
    return [
        (_number(pitch["near"], ".0%"), "pitch within 50 cents", "of frames voiced in both"),
        (_number(pitch["median_cents"], ".0f"), "cents off", "median, from what was asked"),
        (_number(pitch["voicing_agreement"], ".0%"), "voicing agrees", "of all frames"),
        (_number(song.envelope_db, ".1f", " dB"), "timbre moved", "long-term envelope, RMS"),
        (
            _number(song.after.loudness_lufs, ".1f"),
            "LUFS",
            f"input {_number(song.before.loudness_lufs, '.1f')}",
        ),
        (f"{song.full_scale}", "samples at full scale", f"peak {peak_db}"),
        (
            seconds_in_words(song.seconds),
            "length",
            f"{conversion.pieces} {pieces}, gain {conversion.gain_db:+.1f} dB",
        ),
        (
            f"{conversion.wall_s / song.seconds:.2f}",
            "real-time factor",
            f"{seconds_in_words(conversion.wall_s)}, CPU {seconds_in_words(conversion.cpu_s)}",
        ),
    ]


def _number(value: float, form: str, unit: str = "") -> str:
    return format(value, form) + unit if math.isfinite(value) else "–"


def _settings(settings: Mapping[str, object], defaults: Mapping[str, object]) -> str:
    """Folded away; those that differ from their defaults first."""
    order = sorted(settings, key=lambda key: not differs(key, settings, defaults))
    table = html_settings({key: settings[key] for key in order}, defaults)
    changed = sum(differs(key, settings, defaults) for key in settings)
    words = f"{len(settings)} settings, {changed} of them not the default"
    return html_section("Settings", f"<details><summary>{words}</summary>{table}</details>")


# ---- the picture --------------------------------------------------------------------------------


def _picture(song: _Song) -> str:
    """Mel spectrograms of input and output over the contours, on one time axis."""
    conversion, drawn = song.conversion, song.drawn
    rate, frame_s = conversion.sample_rate, conversion.hop_length / conversion.sample_rate
    first_s = drawn.first_frame * frame_s
    last_s = first_s + drawn.frames * frame_s
    loudest = max(float(sound.power.max()) for sound in (song.before, song.after))
    mels = [power_db(sound.power, loudest) for sound in (song.before, song.after)]
    part = slice(drawn.first_frame, drawn.first_frame + drawn.frames)
    contours = [f0_to_pitch(f0[part]) for f0 in (conversion.f0, conversion.f0_asked, song.f0_found)]
    # A column's frames are drawn around their middle, a frame around its sample.
    middle_s = first_s + (drawn.column_s - frame_s) / 2

    def draw(figure: Figure, theme: Theme) -> None:
        panels = figure.subplots(3, 1, sharex=True, height_ratios=[1, 1, 1.1])
        for axes, mel_db, name in zip(panels, mels, ("input", "output"), strict=False):
            image = draw_mel(axes, mel_db, rate, drawn.column_s, middle_s)
            axes.set_title(name, loc="left", fontsize=9.0)
        bar = figure.colorbar(image, ax=list(panels[:2]), pad=0.01, aspect=40, shrink=0.9)
        bar.set_label("dB, 0 the loudest")
        bar.outline.set_visible(False)
        bar.set_ticks(list(range(-int(TOP_DB), 1, 20)))
        _draw_contours(panels[2], contours, first_s, frame_s, theme)
        panels[2].set_xlim(first_s, last_s)

    words = f"{first_s:.1f} to {last_s:.1f} s"
    alt = (
        f"Mel spectrograms of input and output of {conversion.song_id} from {words}, on one scale, "
        "and under them f0 of the input, f0 asked for and f0 found in the output"
    )
    less = ", where most is sung" if drawn.frames * frame_s < song.played_s - frame_s else ""
    return (
        f'<figure class="wide"><div role="region" aria-label="Spectrograms and f0" tabindex="0">'
        f"{picture(draw, alt, 11.2, 6.6)}</div>"
        f"<figcaption>{words}{less}. f0 of the output is found by Praat.</figcaption></figure>"
    )


def _draw_contours(
    axes: Axes, contours: Sequence[Any], first_s: float, frame_s: float, theme: Theme
) -> None:
    """contours: of the input, asked for and found, (F,) MIDI note numbers, NaN where unvoiced."""
    looks: list[tuple[str, dict[str, Any]]] = [
        ("input", {"color": theme.ink, "linewidth": 1.0, "linestyle": (0, (2, 2))}),
        ("asked for", {"color": theme.accent, "linewidth": 4.0, "alpha": 0.55}),
        ("output", {"color": theme.other, "linewidth": 1.2}),
    ]
    for pitch, (name, look) in zip(contours, looks, strict=True):
        at_s = first_s + np.arange(len(pitch)) * frame_s
        axes.plot(at_s, pitch, label=name, solid_capstyle="butt", **look)
    voiced = np.concatenate([pitch[np.isfinite(pitch)] for pitch in contours])
    low, high = (voiced.min() - 1, voiced.max() + 1) if len(voiced) else (48.0, 72.0)
    step = next((step for step in (1, 2, 3, 6) if (high - low) / step <= 7), 12)
    notes = np.arange(math.ceil(low / step) * step, high, step)
    axes.set_ylim(low, high)
    axes.set_yticks(notes, [f"{note_name(n)} {440 * 2 ** ((n - 69) / 12):.0f}" for n in notes])
    axes.set_ylabel("f0, Hz")
    axes.set_xlabel("s")
    axes.grid(axis="y", linewidth=0.7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False, borderaxespad=0.1
    )


_STYLE = """
.about { display: flex; flex-wrap: wrap; gap: .2rem 1.5rem; margin: .6rem 0 0; }
.about div { display: flex; gap: .4rem; min-width: 0; }
.about dt { color: var(--soft); }
.about dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
a { color: var(--accent); }
.song > * { margin-bottom: 1rem; }
.song h2 { overflow-wrap: anywhere; margin-bottom: .25rem; }
.song .numbers { grid-template-columns: repeat(4, 1fr); }
.alert h3 { color: var(--alert); }
.mute { color: var(--alert); }
.wide > div { overflow-x: auto; }
.wide > div:focus-visible { outline: 2px solid var(--accent); outline-offset: 4px; }
.wide img { min-width: 48rem; }
summary { cursor: pointer; }
details > div { margin-top: .75rem; }
@media (max-width: 44rem) {
  .song .numbers { grid-template-columns: 1fr 1fr; }
  .overview tbody th { grid-column: 1 / -1; }
  .overview td::before { content: attr(data-label) " "; color: var(--soft); font-size: .85rem; }
}
"""

# One player plays at a time; the other one of the song goes on from where the first was.
_SCRIPT = """
const players = [...document.querySelectorAll("audio")];
for (const player of players) {
  const known = () => { player.dataset.seconds = player.duration; };
  if (player.readyState) known(); else player.addEventListener("loadedmetadata", known);
  player.addEventListener("error", () => { player.nextElementSibling.hidden = false; });
  player.addEventListener("play", () => {
    for (const other of players) {
      if (other === player || other.paused) continue;
      other.pause();
      if (other.dataset.song === player.dataset.song) player.currentTime = other.currentTime;
    }
  });
}
"""
