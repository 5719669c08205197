"""The file of a converted song: its rate and format, written whole or not at all."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from pipeline.convert.config import OutputConfig
from pipeline.errors import UserError
from pipeline.storage.atomic import sync_folder
from stages.decode import Decoded
from stages.pcm import quantise
from stages.resample import ResampleConfig, stream_resampler
from stages.types import Array

FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".mp3": "MP3"}
_LOSSY = {"OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}
_MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
# Writing a minute of Vorbis in one call overflows the stack of libsndfile.
_BLOCK_SAMPLES = 8192
_BYTES = {"PCM_16": 2, "PCM_24": 3, "FLOAT": 4}  # of a sample
_LARGEST_WAV = 2**32 - 2**20  # bytes; beyond it the header has no room for the length


def check_output(path: Path, cfg: OutputConfig, rate: int) -> None:
    """Refuse a path that cannot be written, or whose format does not allow the settings.

    rate: the voice's, in Hz.

    Raises: UserError: when it cannot.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path} has no known format; it must end in {', '.join(FORMATS)}")
    if kind == "FLAC" and cfg.subtype == "FLOAT":
        raise UserError(f"{path}: FLAC has no floats; set output.subtype to PCM_16 or PCM_24")
    rate = cfg.sample_rate or rate
    if kind == "MP3" and rate not in _MP3_RATES:
        raise UserError(
            f"{path}: MP3 has no {rate} Hz; set output.sample_rate to one of "
            f"{', '.join(map(str, _MP3_RATES))}"
        )
    if kind == "FLAC" and rate > 65535 and rate % 10:
        raise UserError(f"{path}: above 65535 Hz, FLAC takes only multiples of 10, not {rate}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file for the converted song")
    if len(os.fsencode(path.name)) > 255:
        raise UserError(f"the name {path.name} is longer than file systems allow")
    above = next((parent for parent in path.absolute().parents if parent.exists()), path)
    if not above.is_dir():
        raise UserError(f"{above} is a file, not a folder to write {path.name} into")
    if not os.access(above, os.W_OK):
        raise UserError(f"{above} is not writable; name another folder for {path.name}")


class SongFile:
    """A song written in blocks at the voice's rate; it gets its name when the block ends well.

    num_samples: length of the file, at its own rate: as many as the source has at that rate.
    peak: the largest magnitude written.

    Raises: UserError: when a sample is not finite.
    """

    def __init__(
        self, path: Path, cfg: OutputConfig, decoded: Decoded, resampling: ResampleConfig, rate: int
    ) -> None:
        check_output(path, cfg, rate)
        self.path, self.cfg = path, cfg
        self.rate = cfg.sample_rate or rate
        source = decoded.header.sample_rate
        self.num_samples = -(-decoded.source_samples * self.rate // source)
        self.peak = 0.0
        self.notices: list[str] = []
        self._stream = stream_resampler(rate, self.rate, resampling)
        self._left = self.num_samples
        self._over = 0
        self._temporary = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")

    def __enter__(self) -> SongFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kind = FORMATS[self.path.suffix.lower()]
        subtype = _LOSSY.get(kind, self.cfg.subtype)
        channels = 2 if self.cfg.channels == "dual" else 1
        if kind == "WAV" and self.num_samples * channels * _BYTES[subtype] > _LARGEST_WAV:
            kind = "RF64"
        with self._storing():
            self._file = sf.SoundFile(
                os.fsencode(self._temporary), "w", self.rate, channels, subtype, format=kind
            )
        return self

    def write(self, wav: Array) -> None:
        """Write the next samples (T,) at the voice's rate."""
        self._put(self._stream.push(wav, last=False))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            try:
                if kind is None:
                    self._put(self._stream.push(np.zeros(0, np.float32), last=True))
                    self._put(np.zeros(self._left, np.float32))
            finally:
                with self._storing():
                    self._file.close()
            if kind is None:
                self._commit()
        finally:
            self._temporary.unlink(missing_ok=True)

    def _put(self, wav: Array) -> None:
        wav = wav[: self._left]
        self._left -= len(wav)
        if len(wav):
            loud = np.abs(wav)
            highest = float(loud.max())
            if not math.isfinite(highest):
                raise UserError(
                    f"{self.path} is not written: the voice's output is not finite (a sample "
                    "exceeds the range of float32); its weights are unusable"
                )
            self.peak = max(self.peak, highest)
            self._over += int((loud > 1).sum())
        samples = _as_stored(wav, self._file.subtype)
        if self.cfg.channels == "dual":
            samples = np.stack([samples, samples], axis=1)
        with self._storing():
            for start in range(0, len(samples), _BLOCK_SAMPLES):
                self._file.write(samples[start : start + _BLOCK_SAMPLES])

    @contextmanager
    def _storing(self) -> Iterator[None]:
        """Turn an error of libsndfile, which names no cause, into one that names the file.

        Raises: OSError: when the file cannot be written.
        """
        try:
            yield
        except sf.LibsndfileError as error:
            self._temporary.unlink(missing_ok=True)
            raise OSError(
                f"{self.path} cannot be written ({error.error_string}); check the free space and "
                "the permissions"
            ) from error

    def _commit(self) -> None:
        if self._over and self._file.subtype != "FLOAT":
            self.notices.append(
                f"{self._over} samples exceed full scale and are clipped (the peak is at "
                f"{20 * np.log10(self.peak):+.1f} dB); a .wav with output.subtype=FLOAT keeps them"
            )
        with self._temporary.open("rb") as file:
            os.fsync(file.fileno())
        self._temporary.replace(self.path)
        sync_folder(self.path.parent)


def _as_stored(wav: Array, subtype: str) -> NDArray[Any]:
    """Return integers for formats that store integers: libsndfile would round floats down."""
    if subtype == "PCM_16":
        return quantise(wav, "PCM_16")
    if subtype == "PCM_24":
        return quantise(wav, "PCM_24") << 8  # libsndfile keeps the upper 24 of 32 bits
    return wav
