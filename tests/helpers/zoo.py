"""Files of every known kind of bad or odd input, with the expected outcome of each.

A folder per speaker, so that it is also a corpus. The expectations are those of a whole extraction
with default settings.
"""

from __future__ import annotations

import os
import struct
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from stages.errors import Reason

RATE = 22050
SECONDS = 3.0


@dataclass(frozen=True)
class Expectation:
    """Expected outcome of a song at the end of the pipeline; no reason when it is kept."""

    status: Literal["kept", "filtered", "quarantined"]
    reason: Reason | None = None


KEPT = Expectation("kept")


def sung(seconds: float = SECONDS, sample_rate: int = RATE, seed: int = 0) -> NDArray[np.float32]:
    """(T,) a vowel-like tone with vibrato, loud enough for every default threshold."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * sample_rate)) / sample_rate
    f0 = rng.uniform(110, 330) * (1 + 0.01 * np.sin(2 * np.pi * 5.5 * t))
    phase = 2 * np.pi * np.cumsum(f0) / sample_rate
    wav = sum(np.sin(k * phase) / k for k in range(1, 8)) * 0.15
    return (wav + 1e-4 * rng.standard_normal(len(t))).astype(np.float32)


def write_audio(
    path: Path, wav: NDArray[np.float32], sample_rate: int, subtype: str, kind: str
) -> None:
    """Write (T,) or (T, C) in blocks of a second: libsndfile crashes on a minute of Ogg at once."""
    channels = 1 if wav.ndim == 1 else wav.shape[1]
    with (
        open(path, "w+b") as raw,
        sf.SoundFile(raw, "w", sample_rate, channels, subtype, format=kind) as file,
    ):
        for start in range(0, len(wav), sample_rate):
            file.write(wav[start : start + sample_rate])


def make_zoo(folder: Path, seed: int = 0) -> dict[str, Expectation]:
    """Fill `folder` with SPEAKER/FILE. Keys: `os.fsdecode` of the path relative to it."""
    zoo: dict[str, Expectation] = {}

    def path_for(name: str | bytes, expected: Expectation) -> Path:
        relative = os.fsdecode(name)
        zoo[relative] = expected
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def bad(reason: Reason) -> Expectation:
        return Expectation("quarantined", reason)

    def wav(name: str | bytes, expected: Expectation, samples: NDArray[np.float32]) -> Path:
        path = path_for(name, expected)
        write_audio(path, samples, RATE, "FLOAT", "WAV")
        return path

    song = sung(seed=seed)

    # Cut short in transit.
    for suffix, subtype, kind in (
        ("wav", "PCM_16", "WAV"),
        ("aiff", "PCM_24", "AIFF"),
        ("flac", "PCM_16", "FLAC"),
        ("ogg", "VORBIS", "OGG"),
        ("mp3", "MPEG_LAYER_III", "MP3"),
    ):
        path = path_for(f"cut/truncated.{suffix}", bad(Reason.TRUNCATED))
        write_audio(path, sung(4 * SECONDS, seed=seed), RATE, subtype, kind)
        os.truncate(path, path.stat().st_size * 6 // 10)

    # Nothing, or not audio, or not what the header says.
    path_for("lies/zero_bytes.wav", bad(Reason.EMPTY)).write_bytes(b"")
    wav("lies/header_only.wav", bad(Reason.EMPTY), song[:0])
    path_for("lies/text.wav", bad(Reason.UNREADABLE)).write_text("This is not a song.\n" * 100)
    noise = np.random.default_rng(seed).bytes(50_000)
    path_for("lies/noise.mp3", bad(Reason.UNREADABLE)).write_bytes(b"\0" + noise)
    write_audio(path_for("lies/flac_inside.wav", KEPT), song, RATE, "PCM_16", "FLAC")
    path = wav("lies/ten_times_longer.wav", bad(Reason.TRUNCATED), song)
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", 10 * 4 * len(song))
    path.write_bytes(data)

    # Samples that no encoder can use.
    for name, value in (("nan", np.nan), ("inf", np.inf), ("minus_inf", -np.inf)):
        broken = song.copy()
        broken[[1000, 30_000]] = value
        wav(f"samples/{name}.wav", bad(Reason.NOT_FINITE), broken)
    silent = Expectation("filtered", Reason.SILENT)
    wav("samples/dc_only.wav", silent, np.full_like(song, 0.25))
    wav("samples/all_zeros.wav", silent, np.zeros_like(song))
    wav("samples/one_sample.wav", Expectation("filtered", Reason.TOO_SHORT), song[:1])

    # Valid at the edges.
    crowd = np.repeat(song[: RATE // 2, None], 200, axis=1)
    wav("edges/200_channels.wav", bad(Reason.TOO_MANY_CHANNELS), crowd)
    for rate in (8000, 384_000):
        path = path_for(f"edges/{rate}_hz.wav", KEPT)
        write_audio(path, sung(sample_rate=rate, seed=seed), rate, "PCM_24", "WAV")
    wav("edges/six_channels.wav", KEPT, np.repeat(song[:, None], 6, axis=1))

    # Names.
    for name in (
        b"names/not utf-8 \xff\xfe.wav",
        unicodedata.normalize("NFC", "names/composed é å 한.wav"),
        unicodedata.normalize("NFD", "names/decomposed ü ñ 각.wav"),
        "names/ two  spaces .wav",
        "names/'single' \"double\" `back`.wav",
        "names/#hash %41 & $HOME; *.wav",
        "names/line\nbreak\ttab.wav",
        "names/-rf.wav",
        f"names/{'x' * 246}.wav",
        f"歌手 {'é' * 5}/歌.wav",
    ):
        wav(name, KEPT, song)
    return zoo


def make_three_hours(path: Path, sung_of_thirty: int, sample_rate: int = RATE) -> None:
    """A FLAC of three hours: of every thirty minutes so many are sung, the others near-silent."""
    minute = sung(60, sample_rate)
    with sf.SoundFile(path, "w", sample_rate, 1, "PCM_16", format="FLAC") as file:
        for number in range(180):
            file.write(minute if number % 30 < sung_of_thirty else minute * 1e-3)
