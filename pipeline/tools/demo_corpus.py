"""`demo-corpus`: a small, deterministic corpus of sung phrases with known f0, for demo and tests.

FOLDER/bass/song-01.flac ...      three speakers; 44.1, 48 and 22.05 kHz; mono and stereo;
FOLDER/alto/...                   wav, flac and ogg
FOLDER/bass/damaged.flac          truncated, with noise in place of a frame
FOLDER/soprano/silent.wav         no voice
FOLDER/.truth/bass/song-01.csv    time_s,f0_hz every 5 ms, 0 = unvoiced
FOLDER/.truth/corpus.json         how this folder was made, and the hash of every file
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf

from models.input_file import read_json
from pipeline.errors import UserError
from pipeline.tools.formant_singer import VOICES, FormantSong, FormantVoice, sing
from stages.types import Array

_MARKER = ".truth/corpus.json"
_VERSION = 1  # raise when the songs change
_LONGEST_SONG_S = 40.0
_RATES = (44100, 48000, 22050)
_FORMATS: tuple[tuple[str, str], ...] = (("flac", "PCM_16"), ("wav", "PCM_24"), ("ogg", "VORBIS"))
# One soundfile call with a minute of Vorbis overflows the stack of libsndfile.
_OGG_BLOCK_SAMPLES = 8192
_OGG_SERIAL = 0x43414E54


@dataclass(frozen=True)
class _Song:
    voice: FormantVoice
    number: int  # from 1, in its speaker's folder
    duration_s: float
    sample_rate: int
    channels: int
    suffix: str
    subtype: str
    seed: int

    @property
    def song_id(self) -> str:
        return f"{self.voice.name}/song-{self.number:02d}.{self.suffix}"


def make_demo_corpus(folder: Path, minutes: float = 3.0, seed: int = 0) -> Path:
    """Write the corpus with `minutes` of singing; the same arguments give the same bytes.

    A folder that already has exactly this corpus is left alone, so its files keep their times.
    Another demo corpus is replaced.
    Raises: UserError: when `folder` has a file that this function did not write.
    """
    if not 0.2 <= minutes <= 600:
        raise UserError(f"--minutes is {minutes}; it must lie in 0.2 to 600")
    if seed < 0:
        raise UserError(f"--seed is {seed}; it must be 0 or more")
    recipe = {
        "made_by": "cantor demo-corpus",
        "version": _VERSION,
        "minutes": minutes,
        "seed": seed,
        "numpy": np.__version__,
        "libsndfile": sf.__libsndfile_version__,
    }
    if _is_made(folder, recipe):
        return folder
    _clear(folder)
    songs = _songs(minutes, seed)
    names = [song.song_id for song in songs] + [_truth_name(song.song_id) for song in songs]
    names += ["bass/damaged.flac", "soprano/silent.wav"]
    # The marker comes first, so that an incomplete folder can be cleared and made again.
    _write(folder / _MARKER, _marker(recipe, dict.fromkeys(sorted(names))))
    sha256 = {}
    for name, data in _files(songs, seed):
        _write(folder / name, data)
        sha256[name] = hashlib.sha256(data).hexdigest()
    _write(folder / _MARKER, _marker(recipe, dict(sorted(sha256.items()))))
    return folder


def read_truth(
    folder: Path, song_id: str
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.float64]]]:
    """Return times in s and f0 in Hz (0 = unvoiced), both (N,), of a song of a demo corpus."""
    table = np.loadtxt(folder / _truth_name(song_id), delimiter=",", skiprows=1, ndmin=2)
    return table[:, 0], table[:, 1]


def _truth_name(song_id: str) -> str:
    return f".truth/{song_id.rpartition('.')[0]}.csv"


def _songs(minutes: float, seed: int) -> list[_Song]:
    """Plan the songs: every format at every rate among the first nine, mono and stereo in turn."""
    each_s = minutes * 60 / len(VOICES)
    count = max(len(_FORMATS), math.ceil(each_s / _LONGEST_SONG_S))
    rng = np.random.default_rng(seed)
    songs = []
    for place, voice in enumerate(VOICES):
        shares = rng.uniform(0.8, 1.2, count)
        for i, share in enumerate(shares / shares.sum()):
            suffix, subtype = _FORMATS[i % 3]
            songs.append(
                _Song(
                    voice,
                    number=i + 1,
                    duration_s=max(1.0, float(each_s * share)),
                    sample_rate=_RATES[(place + i) % 3],
                    channels=1 + (place * count + i) % 2,
                    suffix=suffix,
                    subtype=subtype,
                    seed=int(rng.integers(2**31)),
                )
            )
    return songs


def _files(songs: list[_Song], seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of all files except the marker."""
    rng = np.random.default_rng([seed, 1])
    damaged = b""
    for song in songs:
        rate = song.sample_rate
        sung = sing(song.voice, song.duration_s, rate, song.seed, hop_length=rate // 200)
        wav = sung.wav if song.channels == 1 else _stereo(sung.wav, rate)
        data = _encode(wav, rate, song.suffix, song.subtype)
        if song.song_id == "bass/song-01.flac":
            damaged = data
        yield song.song_id, data
        yield _truth_name(song.song_id), _truth_csv(sung)
    kept = len(damaged) * 2 // 3
    hole = slice(kept // 2, kept // 2 + 2048)
    cut = bytearray(damaged[:kept])
    cut[hole] = rng.bytes(len(cut[hole]))
    yield "bass/damaged.flac", bytes(cut)
    silence = 1e-4 * rng.standard_normal(8 * 44100, dtype=np.float32)  # 8 s at -80 dBFS
    yield "soprano/silent.wav", _encode(silence, 44100, "wav", "PCM_16")


def _stereo(wav: Array, sample_rate: int) -> Array:
    """Turn (T,) into (T, 2): the voice in the centre, and soft early reflections on each side.

    The reflections of a side sum to at most a tenth of the voice's level, so the mean of both
    channels has the pitch of the voice.
    """
    sides = []
    for delays_ms in ((11.0, 23.0), (14.0, 19.0)):
        side = wav.copy()
        for delay_ms, gain in zip(delays_ms, (0.06, 0.04), strict=True):
            late = round(delay_ms * sample_rate / 1000)
            side[late:] += np.float32(gain) * wav[:-late]
        sides.append(side)
    return np.stack(sides, axis=1)


def _truth_csv(sung: FormantSong) -> bytes:
    lines = ["time_s,f0_hz"]
    step_s = sung.hop_length / sung.sample_rate
    lines += [f"{i * step_s:.6f},{hz:.3f}" for i, hz in enumerate(sung.f0.tolist())]
    return ("\n".join(lines) + "\n").encode()


def _encode(wav: Array, sample_rate: int, suffix: str, subtype: str) -> bytes:
    """Encode wav, (T,) or (T, channels), as a file of the format `suffix`."""
    buffer = io.BytesIO()
    channels = 1 if wav.ndim == 1 else wav.shape[1]
    with sf.SoundFile(buffer, "w", sample_rate, channels, subtype, format=suffix.upper()) as file:
        for start in range(0, len(wav), _OGG_BLOCK_SAMPLES):
            file.write(wav[start : start + _OGG_BLOCK_SAMPLES])
    data = buffer.getvalue()
    return _with_ogg_serial(data, _OGG_SERIAL) if suffix == "ogg" else data


def _with_ogg_serial(data: bytes, serial: int) -> bytes:
    """Set the serial number of an Ogg stream; libsndfile takes one from the clock.

    RFC 3533, section 6: pages of 27 bytes, a table of segment lengths and the segments; the serial
    number is at byte 14, a CRC of the page with zeros in its place at byte 22.
    """
    out = bytearray(data)
    start = 0
    while start < len(out):
        segments = out[start + 26]
        length = 27 + segments + sum(out[start + 27 : start + 27 + segments])
        struct.pack_into("<I", out, start + 14, serial)
        struct.pack_into("<I", out, start + 22, 0)
        page = bytes(out[start : start + length])
        struct.pack_into("<I", out, start + 22, _ogg_crc(page))
        start += length
    return bytes(out)


_BITS_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_crc(page: bytes) -> int:
    """Return the CRC-32 of polynomial 0x04c11db7, most significant bit first, without inversion.

    zlib's is the same with all bits reversed, and inverted at the start and the end.
    """
    mirrored = zlib.crc32(page.translate(_BITS_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)


def _marker(recipe: dict[str, Any], sha256: dict[str, Any]) -> bytes:
    return (json.dumps({**recipe, "sha256": sha256}, indent=1) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _read_marker(folder: Path) -> dict[str, Any] | None:
    path = folder / _MARKER
    if not path.is_file():
        return None
    try:
        marker = read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged; delete {folder} to make a new corpus") from error
    listed = isinstance(marker, dict) and isinstance(marker.get("sha256"), dict)
    return marker if listed else None


def _present(folder: Path) -> list[str]:
    """Return the paths of all files under `folder`, relative to it."""
    paths: list[str] = []
    for parent, _, names in os.walk(folder):
        paths += [(Path(parent) / name).relative_to(folder).as_posix() for name in names]
    return sorted(paths)


def _is_made(folder: Path, recipe: dict[str, Any]) -> bool:
    marker = _read_marker(folder)
    if marker is None or any(marker.get(key) != value for key, value in recipe.items()):
        return False
    return all(
        (folder / name).is_file()
        and hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256
        for name, sha256 in marker["sha256"].items()
    )


def _clear(folder: Path) -> None:
    """Empty `folder` if it has nothing but a demo corpus.

    Raises: UserError: when it has another file, or is one.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder for the demo corpus")
    marker = _read_marker(folder)
    known = {_MARKER, *marker["sha256"]} if marker else set()
    present = _present(folder)
    strange = sorted(set(present) - known)
    if strange:
        raise UserError(
            f"{folder} has {strange[0]}, which is not part of a demo corpus; name another folder"
        )
    for name in sorted(present, key=lambda name: name == _MARKER):  # the marker last
        (folder / name).unlink()
