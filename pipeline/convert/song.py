"""A song in, the same song in another voice out: one song, in memory that does not grow with it.

    decode + resample -> slice -> loudness -> pieces -> quantise -> f0          (all of the song)
    quantise -> units -> controls -> synthesizer -> enhancer -> join -> file    (piece by piece)

The stages are those of extraction, with the settings that made the voice's own clips.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from models.encoders import Encoder
from models.synthesizer.blocks.noise import KeyedNoise, Noise, PlacedNoise
from models.synthesizer.blocks.segments import expand_units, volume_of
from models.synthesizer.blocks.source import first_phase, phase_after
from models.synthesizer.config import SynthesizerConfig
from models.synthesizer.enhancer import Enhancer, automatic_key
from models.synthesizer.voice import Voice
from pipeline.convert.config import ConvertConfig
from pipeline.convert.output_file import SongFile
from pipeline.convert.result import Conversion
from pipeline.convert.speaker_mix import SpeakerMix
from pipeline.convert.unit_blend import UnitControls
from pipeline.errors import UserError
from stages.conversion_controls import EnvelopeMix, protect, semitones_between, transpose
from stages.decode import Decoded, Decoder
from stages.f0 import estimate_f0
from stages.f0.sovits_compat import fill_unvoiced
from stages.loudness import apply_gain, measure_loudness
from stages.pcm import dequantise, quantise
from stages.pieces import Joiner, Piece, plan_pieces, read_frames, stretches
from stages.resample import resample
from stages.slice import is_silent, slice_silence
from stages.types import Array
from stages.units import UnitStatistics, encode_units, pack_units, unpack_units

HIGHEST_HZ = 1100.0  # of what so-vits-svc's networks tell apart
LEVELS_APART_DB = 6.0  # of song and voice, beyond which it is said
Progress = Callable[[float], None]  # is told seconds of the song


class Singing(Protocol):
    """A synthesizer, whatever runs it."""

    config: SynthesizerConfig

    def infer(
        self,
        units: Tensor,
        f0: Tensor,
        voiced: Tensor,
        speaker: Tensor,
        *,
        noise: Noise,
        noise_scale: float,
        predict_f0: bool,
        volume: Tensor | None,
        phase: Tensor | None,
    ) -> tuple[Tensor, Tensor]: ...

    def predict_f0(
        self, units: Tensor, f0: Tensor, voiced: Tensor, speaker: Tensor, volume: Tensor | None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Models:
    """What a conversion needs loaded. target_hz: the middle of what the speaker sings, if known."""

    voice: Voice
    network: Singing
    encoder: Encoder
    mix: SpeakerMix
    controls: UnitControls
    enhancer: Enhancer | None
    target_hz: float | None
    device: str


@dataclass
class _Stretch:
    """Pieces without silence between them, and contours from the first that is read to the last.

    f0: Hz of the song, 0 = unvoiced. asked: Hz that is to be sung, 0 = unvoiced.
    """

    pieces: list[Piece]
    f0: Array
    asked: Array

    @property
    def start(self) -> int:
        return self.pieces[0].read_start

    def of(self, piece: Piece, contour: Array) -> Array:
        return contour[piece.read_start - self.start : piece.read_stop - self.start]


class Converter:
    """Converts songs with one voice and one set of settings."""

    def __init__(self, models: Models, config: ConvertConfig) -> None:
        self.models, self.config = models, config
        self.sample_rate = config.audio.sample_rate
        self.hop_length = config.f0.hop_length

    def convert(
        self,
        song_id: str,
        source: Path,
        output: Path,
        decoder: Decoder,
        progress: Progress = lambda seconds: None,
    ) -> Conversion:
        """Write `output`, whole or not at all.

        Raises: BadInput for a source that cannot be read, OSError of the storage, UserError where
        the settings do not suit the song.
        """
        begun, cpu = time.perf_counter(), time.process_time()
        with decoder.decode(source, self.sample_rate, self.config.resample) as decoded:
            task = _Task(self, decoded, progress)
            with SongFile(
                output, self.config.output, decoded, self.config.resample, self.sample_rate
            ) as file:
                for sound in task.sing():
                    file.write(sound)
            return Conversion(
                song_id=song_id,
                source=source,
                output=output,
                sample_rate=self.sample_rate,
                hop_length=self.hop_length,
                num_samples=file.num_samples,
                f0=task.contour(lambda stretch: stretch.f0),
                f0_asked=task.contour(lambda stretch: stretch.asked),
                notices=(*task.notices, *file.notices),
                pieces=len(task.pieces),
                gain_db=task.gain_db,
                peak=file.peak,
                wall_s=time.perf_counter() - begun,
                cpu_s=time.process_time() - cpu,
            )


class _Task:
    """One song while it is converted."""

    def __init__(self, converter: Converter, decoded: Decoded, progress: Progress) -> None:
        self.progress = progress
        self.models, self.config = converter.models, converter.config
        self.rate, self.hop = converter.sample_rate, converter.hop_length
        self.song = decoded.wav
        self.notices: list[str] = []
        self.pieces = self._plan()
        reading = measure_loudness(self.song, self.rate, self.config.loudness)
        self.gain_db = reading.gain_db if self.config.loudness.per == "song" else 0.0
        if not self.pieces:
            self.notices.append("the song is silent throughout")
        found = [(pieces, self._f0(pieces)) for pieces in stretches(self.pieces)]
        semitones = self._semitones([f0 for _, f0 in found])
        self.stretches = [_Stretch(p, f0, transpose(f0, semitones)) for p, f0 in found]
        self.key = self._vocoder_key()
        self.statistics = self._statistics()
        self._warn_of_height()

    def sing(self) -> Iterator[Array]:
        """The converted song at the voice's rate, as long as the song, in order."""
        joiner = Joiner(self.hop)
        energies = np.zeros(2)  # of the song, and of what is sung in its place
        envelope = EnvelopeMix(self.config.output.envelope, self.rate)
        given = 0
        for stretch in self.stretches:
            for piece, wav in self._sing_stretch(stretch):
                sound = joiner.add(piece, wav)[: len(self.song) - given]
                song = self.song[given : given + len(sound)]
                energies += [np.square(each, dtype=np.float64).sum() for each in (song, sound)]
                yield envelope.push(sound, song)
                given += len(sound)
                self._done_half(piece)
        rest = joiner.finish(len(self.song))[: max(0, len(self.song) - given)]
        yield envelope.push(rest, self.song[given:])
        yield envelope.finish()
        self._warn_of_level(*energies)

    def contour(self, of: Callable[[_Stretch], Array]) -> Array:
        """(F,) of the whole song, 0 where it is silent or unvoiced."""
        frames = -(-len(self.song) // self.hop)
        contour = np.zeros(frames, np.float32)
        for stretch in self.stretches:
            first, last = stretch.pieces[0].start, stretch.pieces[-1].stop
            contour[first:last] = of(stretch)[first - stretch.start : last - stretch.start]
        return contour

    def _done_half(self, piece: Piece) -> None:
        """Pieces are worked on twice: their f0 is found, and they are sung."""
        self.progress((piece.stop - piece.start) * self.hop / self.rate / 2)

    def _plan(self) -> list[Piece]:
        join = self.config.join
        spans = [
            span._replace(silent=span.silent or self._is_silent(span.start, span.stop))
            for span in slice_silence(self.song, self.rate, self.config.slice)
        ]
        pad, fade = (ms * self.rate // 1000 for ms in (join.pad_ms, join.crossfade_ms))
        return plan_pieces(spans, len(self.song), self.hop, pad, fade)

    def _is_silent(self, start: int, stop: int) -> bool:
        return is_silent(self.song[start:stop], self.rate, self.config.slice)

    def _gain_of(self, piece: Piece) -> float:
        if self.config.loudness.per == "song":
            return self.gain_db
        own = read_frames(self.song, piece.start, piece.stop, self.hop)
        return measure_loudness(own, self.rate, self.config.loudness).gain_db

    def _heard(self, piece: Piece, gain_db: float, context: bool = True) -> Array:
        """The samples that f0 and units are made of, as a shard would have them."""
        start = piece.read_start if context else piece.start
        stop = piece.read_stop if context else piece.stop
        wav = apply_gain(read_frames(self.song, start, stop, self.hop), gain_db)
        return self._quantised(wav)

    def _quantised(self, wav: Array) -> Array:
        subtype = self.config.audio.subtype
        return dequantise(quantise(wav, subtype), subtype)

    def _f0(self, pieces: Sequence[Piece]) -> Array:
        base = pieces[0].read_start
        contour = np.zeros(pieces[-1].read_stop - base, np.float32)
        for piece in pieces:
            heard = self._heard(piece, self._gain_of(piece))
            f0 = estimate_f0(heard, self.rate, self.config.f0, piece.frames)
            first = piece.start if piece.joined else piece.read_start
            contour[first - base : piece.read_stop - base] = f0[first - piece.read_start :]
            self._done_half(piece)
        return contour

    def _semitones(self, contours: Sequence[Array]) -> float:
        asked = self.config.pitch.transpose
        if asked != "auto":
            return float(asked)
        if self.models.target_hz is None:
            why = "several speakers sing" if self.config.voice.mix else "the voice does not know"
            raise UserError(
                f"pitch.transpose is auto, but how high is not known: {why}; give a number of "
                "semitones"
            )
        sung = np.concatenate([*contours, np.zeros(0, np.float32)])
        if not (sung > 0).any():
            return 0.0
        semitones = semitones_between(sung, self.models.target_hz)
        self.notices.append(f"transposed by {semitones:+d} semitones")
        return semitones

    def _vocoder_key(self) -> float:
        """Semitones that the enhancer sings lower by: the same for all of the song."""
        key = self.config.enhancer.adaptive_key
        if key is not None:
            return key
        highest = max((float(each.asked.max()) for each in self.stretches), default=0.0)
        return automatic_key(torch.tensor([highest]))

    def _statistics(self) -> UnitStatistics | None:
        """Of the song's units, where the voice learnt from units of mean 0 and variance 1."""
        if self.config.encoder.normalize != "song":
            return None
        statistics = UnitStatistics()
        for piece in self.pieces:
            statistics.add(self._encode(self._heard(piece, self._gain_of(piece), context=False)))
        return statistics

    def _warn_of_height(self) -> None:
        asked = np.concatenate([each.asked for each in self.stretches] + [np.zeros(1, np.float32)])
        share = (asked > HIGHEST_HZ).sum() / max(1, (asked > 0).sum())
        if share > 0:
            self.notices.append(
                f"{100 * share:.2g} % of the voiced frames lie above {HIGHEST_HZ:.0f} Hz, where "
                "the networks do not tell pitches apart; transpose downwards"
            )

    def _warn_of_level(self, song: float, sung: float) -> None:
        decibels = 10 * np.log10(sung / song) if min(song, sung) > 0 else 0.0
        if abs(decibels) > LEVELS_APART_DB and self.config.output.envelope == 0:
            than = "softer" if decibels < 0 else "louder"
            self.notices.append(
                f"the voice sings {abs(decibels):.0f} dB {than} than the song; output.envelope "
                "draws it to the song's loudness"
            )

    def _sing_stretch(self, stretch: _Stretch) -> Iterator[tuple[Piece, Array]]:
        """The sound of all that each piece reads, its gain undone."""
        asked = stretch.asked.astype(np.float64)
        filled = fill_unvoiced(asked, self.rate, self.hop).astype(np.float32)
        melody = filled.copy()
        voiced = (asked > 0).astype(np.float32)
        chance = KeyedNoise([zlib.crc32(f"{self.config.voice.seed} {stretch.start}".encode())])
        phase = vocoder_phase = first_phase(torch.zeros(1, 1), chance).double()
        reached = stretch.start
        for piece in stretch.pieces:
            gain_db = self._gain_of(piece)
            heard = self._heard(piece, gain_db)
            inputs = self._inputs(piece, heard, stretch.of(piece, voiced))
            if self.config.pitch.predict:
                self._predict(stretch, piece, inputs, filled, melody)
            between = melody[reached - stretch.start : piece.read_start - stretch.start]
            phase = phase_after(torch.from_numpy(between)[None], self._source_rate, self.hop, phase)
            if self.models.enhancer is not None:
                vocoder_phase = self.models.enhancer.phase_after(
                    torch.from_numpy(between), self.rate, self.hop, self.key, vocoder_phase
                )
            reached = piece.read_start
            f0 = stretch.of(piece, melody)
            wav = self._sing(piece, inputs, f0, phase)
            if self.config.units.second_pass:
                again = self._inputs(piece, self._quantised(wav), stretch.of(piece, voiced))
                wav = self._sing(piece, again, f0, phase)
            if self.models.enhancer is not None:
                wav = self._enhance(self.models.enhancer, piece, wav, f0, vocoder_phase)
            yield piece, apply_gain(wav, -gain_db)

    @property
    def _source_rate(self) -> int:
        return self.models.network.config.source_rate

    def _inputs(self, piece: Piece, heard: Array, voiced: Array) -> _Inputs:
        plain = self._encode(heard)
        if self.statistics is not None:
            plain = self.statistics.apply(plain)
        plain = unpack_units(pack_units(plain), plain.shape[1])  # what a shard keeps of them
        blended = self.models.controls.blend(plain)
        expand = self.models.voice.expand
        units = expand_units(blended, piece.frames, expand)
        if blended is not plain:
            own = expand_units(plain, piece.frames, expand)
            units = protect(units, own, voiced > 0, self.config.units.protect)
        mix = self.models.mix.weights(piece.read_start, piece.frames, self.rate / self.hop)
        device = self.models.device
        return _Inputs(
            units=torch.from_numpy(np.ascontiguousarray(units.T))[None].to(device),
            voiced=torch.from_numpy(voiced)[None].to(device),
            volume=torch.from_numpy(volume_of(heard, self.hop))[None].to(device),
            speaker=torch.from_numpy(mix)[None].to(device),
        )

    def _encode(self, heard: Array) -> Array:
        """Units (F, D), before the song's mean and variance are made 0 and 1."""
        cfg = replace(self.config.encoder, normalize="none")
        encoder, resampling = self.models.encoder, self.config.resample
        (units,) = encode_units([heard], [""], self.rate, encoder, cfg, resampling)
        return units

    def _predict(
        self, stretch: _Stretch, piece: Piece, inputs: _Inputs, filled: Array, melody: Array
    ) -> None:
        """Put the voice's own guess into `melody`, from where the last piece ended on."""
        given = torch.from_numpy(stretch.of(piece, filled))[None].to(self.models.device)
        found = self.models.network.predict_f0(
            inputs.units, given, inputs.voiced, inputs.speaker, inputs.volume_of(self.models)
        )
        first = piece.start if piece.joined else piece.read_start
        there = slice(first - stretch.start, piece.read_stop - stretch.start)
        melody[there] = found[0].cpu().numpy()[first - piece.read_start :]
        stretch.asked[there] = np.where(stretch.asked[there] > 0, melody[there], 0)

    def _sing(self, piece: Piece, inputs: _Inputs, f0: Array, phase: Tensor) -> Array:
        device = self.models.device
        wav, _ = self.models.network.infer(
            inputs.units,
            torch.from_numpy(f0)[None].to(device),
            inputs.voiced,
            inputs.speaker,
            noise=PlacedNoise(
                self.config.voice.seed, piece.read_start, piece.frames, self.hop, device
            ),
            noise_scale=self.config.voice.noise_scale,
            predict_f0=False,
            volume=inputs.volume_of(self.models),
            phase=phase.to(device),
        )
        return wav[0].float().cpu().numpy()

    def _enhance(
        self, enhancer: Enhancer, piece: Piece, wav: Array, f0: Array, phase: Tensor
    ) -> Array:
        silent_s = self.config.enhancer.silence_front - piece.read_start * self.hop / self.rate
        name = f"{self.config.voice.seed} {piece.read_start} vocoder"
        sung, rate = enhancer.enhance(
            torch.from_numpy(wav),
            self.rate,
            torch.from_numpy(f0),
            self.hop,
            self.key,
            max(0.0, silent_s),
            noise=KeyedNoise([zlib.crc32(name.encode())], self.models.device),
            phase=phase,
        )
        out = resample(sung.cpu().numpy(), rate, self.rate, self.config.resample)[: len(wav)]
        return np.pad(out, (0, len(wav) - len(out)))


@dataclass(frozen=True)
class _Inputs:
    """What a network sings a piece from, on its device, but for the pitch."""

    units: Tensor  # (1, D, F)
    voiced: Tensor  # (1, F)
    volume: Tensor  # (1, F)
    speaker: Tensor  # (1, S), or (1, F, S) over time

    def volume_of(self, models: Models) -> Tensor | None:
        return self.volume if models.network.config.volume_embedding else None
