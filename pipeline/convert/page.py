"""The page of a conversion: input and output to play, as pictures and in numbers.

The words are in pipeline/reports/templates/conversion.html; this module prepares its data.
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
from numpy.typing import NDArray

from pipeline.convert.comparison import ComparedSong, compare_song
from pipeline.convert.result import Conversion
from pipeline.errors import UserError
from pipeline.reports.figures import Picture, Theme, draw_picture
from pipeline.reports.html import Setting, list_settings, render_page
from pipeline.reports.mel_picture import TOP_DB, draw_mel, power_db
from pipeline.reports.words import midi_to_hz, note_name
from stages.decode import Decoder
from stages.errors import BadInput
from stages.f0.pitch import f0_to_pitch
from stages.resample import ResampleConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_SONGS = 20
_MOST_PLAYED_S = 180.0  # per song
_MOST_PLAYED_IN_ALL_S = 600.0  # all songs together; a minute adds 7 MB, input and output
_SILENT_PITCH = (48.0, 72.0)  # axis of a song without f0


@dataclass(frozen=True)
class _Page:
    """Data of the template. count: all songs, shown or not. sections: drawn one at a time."""

    title: str
    about: Mapping[str, str]
    count: int
    songs: Sequence[_Song]
    sections: Iterator[tuple[_Song, Picture | None]]
    settings: Sequence[Setting]


@dataclass(frozen=True)
class _Song:
    """A song of the page. compared: None when its files cannot be read, for the reason `error`."""

    number: int
    conversion: Conversion
    compared: ComparedSong | None
    error: str | None


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
    """Write the page to `path` atomically; it shows the first 20 songs.

    settings, defaults: by section.key, from `pipeline.settings.flatten`. about: further facts by
    name, such as the voice. decoder, resample: the ones that read the songs for conversion.
    A song whose files can no longer be read is named with the reason.

    Raises: UserError: when `path` is a folder; OSError: when the storage fails.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file for the page, such as {path / 'a.html'}")
    shown = conversions[:_MOST_SONGS]
    most_played_s = min(_MOST_PLAYED_S, _MOST_PLAYED_IN_ALL_S / max(1, len(shown)))
    songs = [
        _read(number, conversion, decoder, resample, most_played_s)
        for number, conversion in enumerate(shown, 1)
    ]
    count = len(conversions)
    page = _Page(
        title=conversions[0].song_id if count == 1 else f"{count} converted songs",
        about=about,
        count=count,
        songs=songs,
        sections=((song, _picture(song.compared) if song.compared else None) for song in songs),
        settings=list_settings(settings, defaults),
    )
    _write(path, render_page("conversion.html", page))


def _read(
    number: int,
    conversion: Conversion,
    decoder: Decoder,
    resample: ResampleConfig,
    most_played_s: float,
) -> _Song:
    try:
        compared = compare_song(conversion, decoder, resample, most_played_s)
    except (BadInput, sf.LibsndfileError) as error:
        return _Song(number, conversion, None, str(error))
    return _Song(number, conversion, compared, None)


def _write(path: Path, parts: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(parts)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- the picture --------------------------------------------------------------------------------


def _picture(song: ComparedSong) -> Picture:
    """Draw mel spectrograms of input and output above the f0 contours, on one time axis."""
    conversion, drawn = song.conversion, song.drawn
    rate, frame_s = conversion.sample_rate, conversion.hop_length / conversion.sample_rate
    first_s, last_s = song.drawn_s
    loudest = max(float(sound.power.max()) for sound in (song.before, song.after))
    mels = [power_db(sound.power, loudest) for sound in (song.before, song.after)]
    part = slice(drawn.first_frame, drawn.first_frame + drawn.frames)
    contours = [
        f0_to_pitch(f0[part]) for f0 in (conversion.f0, conversion.target_f0, song.output_f0)
    ]
    # A column's frames are drawn around their middle, a frame around its sample.
    middle_s = first_s + (drawn.column_s - frame_s) / 2

    def draw(figure: Figure, theme: Theme) -> None:
        panels = figure.subplots(3, 1, sharex=True, height_ratios=[1, 1, 1.1])
        for axes, mel_db, name in zip(panels, mels, ("input", "output"), strict=False):
            image = draw_mel(axes, mel_db, rate, drawn.column_s, middle_s)
            axes.set_title(name, loc="left", fontsize=9.0)
        bar = figure.colorbar(image, ax=list(panels[:2]), pad=0.01, aspect=40, shrink=0.9)
        bar.set_label("dB, loudest = 0")
        bar.outline.set_visible(False)
        bar.set_ticks(list(range(-int(TOP_DB), 1, 20)))
        _draw_contours(panels[2], contours, first_s, frame_s, theme)
        panels[2].set_xlim(first_s, last_s)

    return draw_picture(draw, 11.2, 6.6)


def _draw_contours(
    axes: Axes, contours: Sequence[NDArray[Any]], first_s: float, frame_s: float, theme: Theme
) -> None:
    """Draw input, target and output f0, (F,) MIDI note numbers each, NaN where unvoiced."""
    looks: list[tuple[str, dict[str, Any]]] = [
        ("input", {"color": theme.ink, "linewidth": 1.0, "linestyle": (0, (2, 2))}),
        ("target", {"color": theme.accent, "linewidth": 4.0, "alpha": 0.55}),
        ("output", {"color": theme.other, "linewidth": 1.2}),
    ]
    for pitch, (name, look) in zip(contours, looks, strict=True):
        at_s = first_s + np.arange(len(pitch)) * frame_s
        axes.plot(at_s, pitch, label=name, solid_capstyle="butt", **look)
    voiced = np.concatenate([pitch[np.isfinite(pitch)] for pitch in contours])
    low, high = (voiced.min() - 1, voiced.max() + 1) if len(voiced) else _SILENT_PITCH
    step = next((step for step in (1, 2, 3, 6) if (high - low) / step <= 7), 12)
    notes = np.arange(math.ceil(low / step) * step, high, step)
    axes.set_ylim(low, high)
    axes.set_yticks(notes, [f"{note_name(note)} {midi_to_hz(note):.0f}" for note in notes])
    axes.set_ylabel("f0, Hz")
    axes.set_xlabel("s")
    axes.grid(axis="y", linewidth=0.7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False, borderaxespad=0.1
    )
