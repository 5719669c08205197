"""Conversion of one song to another voice, in memory that does not grow with the song.

    decode + resample -> slice -> loudness -> pieces -> quantise -> f0          (all of the song)
    quantise -> units -> controls -> synthesizer -> enhancer -> join -> file    (piece by piece)

The stages are those of extraction, with the settings that made the voice's own clips.

Tested by tests/pipeline/convert/test_command.py.
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
from pipeline.convert.config import AUTOMATIC, ConvertConfig
from pipeline.convert.output_file import SongFile
from pipeline.convert.result import Conversion
from pipeline.convert.speaker_mix import SpeakerMix
from pipeline.convert.unit_blend import UnitControls
from pipeline.errors import UserError
from stages.chain import why_silent
from stages.conversion_controls import EnvelopeMix, protect, semitones_between, transpose
from stages.decode import Decoded, Decoder
from stages.f0 import estimate_f0
from stages.f0.sovits_compat import fill_unvoiced
from stages.loudness import apply_gain, measure_loudness
from stages.pcm import dequantise, quantise
from stages.pieces import Joiner, Piece, plan_pieces, read_frames, stretches
from stages.quality.second_voice import Suspects, suspects
from stages.resample import resample
from stages.slice import is_silent, slice_silence
from stages.types import Array
from stages.units import UnitStatistics, encode_units, pack_units, unpack_units

HIGHEST_HZ = 1100.0  # so-vits-svc's networks do not tell higher pitches apart
MAX_LEVEL_DIFFERENCE_DB = 6.0  # between song and voice; a larger one gives a notice
_OTHER_VOICE = (
    "its weights are unusable. Convert with an earlier checkpoint of its training, or train it "
    "again with a lower optimizer.learning_rate"
)
Progress = Callable[[float], None]  # called with the seconds of the song done since the last call


class Singing(Protocol):
    """A synthesizer, run by torch or by onnxruntime."""

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
    """Models that a conversion needs. target_hz: the middle of the speaker's range, if known."""

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
    """Pieces without silence between them, with contours over all frames that they read.

    f0: Hz of the song, 0 = unvoiced. target_f0: Hz that the voice is to sing, 0 = unvoiced.
    """

    pieces: list[Piece]
    f0: Array
    target_f0: Array

    @property
    def start(self) -> int:
        return self.pieces[0].read_start

    def part(self, piece: Piece, contour: Array) -> Array:
        """Return the frames of a contour that a piece reads."""
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

        Raises: BadInput: when the source cannot be read; OSError: when the storage fails;
        UserError: when the settings do not suit the song.
        """
        begun, cpu = time.perf_counter(), time.process_time()
        with decoder.decode(source, self.sample_rate, self.config.resample) as decoded:
            song = _SongConversion(self, song_id, decoded, progress)
            song.analyse(decoded)
            with SongFile(
                output, self.config.output, decoded, self.config.resample, self.sample_rate
            ) as file:
                for wav in song.sing():
                    file.write(wav)
            return Conversion(
                song_id=song_id,
                source=source,
                output=output,
                sample_rate=self.sample_rate,
                hop_length=self.hop_length,
                num_samples=file.num_samples,
                f0=song.contour(lambda stretch: stretch.f0),
                target_f0=song.contour(lambda stretch: stretch.target_f0),
                notices=(*song.notices, *file.notices),
                pieces=len(song.pieces),
                gain_db=song.gain_db,
                peak=file.peak,
                wall_s=time.perf_counter() - begun,
                cpu_s=time.process_time() - cpu,
            )


class _SongConversion:
    """The conversion of one song: `analyse` all of it, then `sing` it piece by piece.

    pieces: parts of the song that sing, in order. stretches: the same, with their f0.
    gain_db: gain of the whole song, 0 where each piece has its own.
    key: semitones that the enhancer sings lower by.
    statistics: mean and variance of the song's units, where the voice learnt normalised ones.
    """

    def __init__(
        self, converter: Converter, song_id: str, decoded: Decoded, progress: Progress
    ) -> None:
        self.song_id, self.progress = song_id, progress
        self.models, self.config = converter.models, converter.config
        self.rate, self.hop = converter.sample_rate, converter.hop_length
        self.song = decoded.wav
        self.notices: list[str] = []
        self.pieces: list[Piece] = []
        self.stretches: list[_Stretch] = []
        self.gain_db = 0.0
        self.suspects = Suspects()
        self.key = 0.0
        self.statistics: UnitStatistics | None = None

    def analyse(self, decoded: Decoded) -> None:
        """Slice the song, measure its loudness, estimate f0 and choose the transposition.

        Raises: UserError: when pitch.transpose is auto or octave, and the speaker's range is not
        known.
        """
        self.notices += decoded.notes
        self.pieces = self._plan()
        reading = measure_loudness(self.song, self.rate, self.config.loudness)
        self.gain_db = reading.gain_db if self.config.loudness.per == "song" else 0.0
        if not self.pieces:
            cause = why_silent(decoded, self.rate, self.config.slice, self.config.decode)
            self.notices.append(f"the song is silent throughout: {cause}")
        groups = [(pieces, self._f0(pieces)) for pieces in stretches(self.pieces)]
        semitones = self._semitones([f0 for _, f0 in groups])
        self.stretches = [_Stretch(p, f0, transpose(f0, semitones)) for p, f0 in groups]
        self.key = self._vocoder_key()
        self.statistics = self._statistics()
        self._warn_of_high_pitch()
        self._warn_of_second_voice()

    def sing(self) -> Iterator[Array]:
        """Yield the converted song at the voice's rate, as long as the song, in order."""
        joiner = Joiner(self.hop)
        energies = np.zeros(2)  # of the song, and of the converted song
        envelope = EnvelopeMix(self.config.output.envelope, self.rate)
        written = 0
        for stretch in self.stretches:
            for piece, wav in self._sing_stretch(stretch):
                converted = joiner.add(piece, wav)[: len(self.song) - written]
                song = self.song[written : written + len(converted)]
                energies += [np.square(each, dtype=np.float64).sum() for each in (song, converted)]
                yield envelope.push(converted, song)
                written += len(converted)
                self._report_half(piece)
        rest = joiner.finish(len(self.song))[: max(0, len(self.song) - written)]
        yield envelope.push(rest, self.song[written:])
        yield envelope.finish()
        self._warn_of_level_difference(*energies)

    def contour(self, of: Callable[[_Stretch], Array]) -> Array:
        """Return a contour (F,) of the whole song, 0 where it is silent or unvoiced."""
        frames = -(-len(self.song) // self.hop)
        contour = np.zeros(frames, np.float32)
        for stretch in self.stretches:
            first, last = stretch.pieces[0].start, stretch.pieces[-1].stop
            contour[first:last] = of(stretch)[first - stretch.start : last - stretch.start]
        return contour

    def _report_half(self, piece: Piece) -> None:
        """Report half a piece as done: each is worked on twice, for its f0 and to sing it."""
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

    def _normalised(self, piece: Piece, gain_db: float, context: bool = True) -> Array:
        """Return the samples (T,) that f0 and units read, as a shard would have them."""
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
            wav = self._normalised(piece, self._gain_of(piece))
            f0 = estimate_f0(wav, self.rate, self.config.f0, piece.frames)
            self.suspects += suspects(wav, self.rate, f0, self.hop)
            first = piece.start if piece.joined else piece.read_start
            contour[first - base : piece.read_stop - base] = f0[first - piece.read_start :]
            self._report_half(piece)
        return contour

    def _semitones(self, contours: Sequence[Array]) -> float:
        setting = self.config.pitch.transpose
        f0 = np.concatenate([*contours, np.zeros(0, np.float32)])
        if setting not in AUTOMATIC:
            if float(setting) == 0:
                self._tell_distance(f0)
            return float(setting)
        if self.models.target_hz is None:
            why = (
                "several speakers are mixed"
                if self.config.voice.mix
                else "the voice does not record its speaker's range"
            )
            raise UserError(
                f"pitch.transpose is {setting}, but {why}; set it to a number of semitones"
            )
        if not (f0 > 0).any():
            return 0.0
        semitones = semitones_between(f0, self.models.target_hz, AUTOMATIC[setting])
        self.notices.append(f"transposed by {semitones:+d} semitones")
        return semitones

    def _tell_distance(self, f0: Array) -> None:
        """Compare the song's median pitch with the speaker's, where it is not transposed."""
        target_hz = self.models.target_hz
        if target_hz is None or not (f0 > 0).any():
            return
        auto, octave = (semitones_between(f0, target_hz, step) for step in (1, 12))
        if auto == 0:
            return
        where = "below" if auto > 0 else "above"
        moves = f"auto moves it by {auto:+d}"
        if octave == auto:
            moves = f"auto or octave moves it by {octave:+d}, which keeps the key"
        elif octave:
            moves += f", octave by {octave:+d}, which keeps the key"
        self.notices.append(
            f"the song's median pitch, {np.median(f0[f0 > 0]):.0f} Hz, lies {abs(auto)} semitones "
            f"{where} that of {self.config.voice.speaker}, {target_hz:.0f} Hz; --transpose "
            f"{moves}"
        )

    def _vocoder_key(self) -> float:
        """Return the semitones that the enhancer sings lower by, the same for the whole song."""
        key = self.config.enhancer.adaptive_key
        if key is not None:
            return key
        highest = max((float(each.target_f0.max()) for each in self.stretches), default=0.0)
        return automatic_key(torch.tensor([highest]))

    def _statistics(self) -> UnitStatistics | None:
        """Return the statistics of the song's units, where the voice learnt normalised units."""
        if self.config.encoder.normalize != "song":
            return None
        statistics = UnitStatistics()
        for piece in self.pieces:
            statistics.add(
                self._encode(self._normalised(piece, self._gain_of(piece), context=False))
            )
        return statistics

    def _warn_of_high_pitch(self) -> None:
        contours = [each.target_f0 for each in self.stretches]
        target_f0 = np.concatenate([*contours, np.zeros(1, np.float32)])
        share = (target_f0 > HIGHEST_HZ).sum() / max(1, (target_f0 > 0).sum())
        if share > 0:
            self.notices.append(
                f"{100 * share:.2g} % of the voiced frames lie above {HIGHEST_HZ:.0f} Hz, where "
                "the networks do not tell pitches apart; transpose downwards"
            )

    def _warn_of_second_voice(self) -> None:
        if self.suspects.suspicion() > 0.5:
            self.notices.append(
                "the song seems to have more than one voice, or instruments, in "
                f"{self.suspects.share:.0%} of its voiced frames; the voice would sing all of it: "
                "separate the vocals first, and convert those"
            )

    def _warn_of_level_difference(self, song: float, converted: float) -> None:
        """Compare the energy of the song and of the converted song."""
        decibels = 10 * np.log10(converted / song) if min(song, converted) > 0 else 0.0
        if abs(decibels) > MAX_LEVEL_DIFFERENCE_DB and self.config.output.envelope == 0:
            than = "softer" if decibels < 0 else "louder"
            self.notices.append(
                f"the voice sings {abs(decibels):.0f} dB {than} than the song; set "
                "output.envelope to follow the song's loudness"
            )

    def _sing_stretch(self, stretch: _Stretch) -> Iterator[tuple[Piece, Array]]:
        """Yield each piece and its converted samples, over all that it reads, its gain undone."""
        target_f0 = stretch.target_f0.astype(np.float64)
        filled = fill_unvoiced(target_f0, self.rate, self.hop).astype(np.float32)
        melody = filled.copy()
        voiced = (target_f0 > 0).astype(np.float32)
        noise = KeyedNoise([zlib.crc32(f"{self.config.voice.seed} {stretch.start}".encode())])
        phase = vocoder_phase = first_phase(torch.zeros(1, 1), noise).double()
        reached = stretch.start
        for piece in stretch.pieces:
            gain_db = self._gain_of(piece)
            normalised = self._normalised(piece, gain_db)
            inputs = self._inputs(piece, normalised, stretch.part(piece, voiced))
            if self.config.pitch.predict:
                self._predict(stretch, piece, inputs, filled, melody)
            between = melody[reached - stretch.start : piece.read_start - stretch.start]
            phase = phase_after(torch.from_numpy(between)[None], self._source_rate, self.hop, phase)
            if self.models.enhancer is not None:
                vocoder_phase = self.models.enhancer.phase_after(
                    torch.from_numpy(between), self.rate, self.hop, self.key, vocoder_phase
                )
            reached = piece.read_start
            f0 = stretch.part(piece, melody)
            wav = self._sing(piece, inputs, f0, phase)
            if self.config.units.second_pass:
                again = self._inputs(piece, self._quantised(wav), stretch.part(piece, voiced))
                wav = self._sing(piece, again, f0, phase)
            if self.models.enhancer is not None:
                wav = self._enhance(self.models.enhancer, piece, wav, f0, vocoder_phase)
            yield piece, apply_gain(wav, -gain_db)

    @property
    def _source_rate(self) -> int:
        return self.models.network.config.source_rate

    def _inputs(self, piece: Piece, wav: Array, voiced: Array) -> _Inputs:
        plain = self._encode(wav)
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
            volume=torch.from_numpy(volume_of(wav, self.hop))[None].to(device),
            speaker=torch.from_numpy(mix)[None].to(device),
        )

    def _encode(self, wav: Array) -> Array:
        """Return units (F, D), before the song's mean and variance are made 0 and 1."""
        cfg = replace(self.config.encoder, normalize="none")
        encoder, resampling = self.models.encoder, self.config.resample
        (units,) = encode_units([wav], [""], self.rate, encoder, cfg, resampling)
        return units

    def _predict(
        self, stretch: _Stretch, piece: Piece, inputs: _Inputs, filled: Array, melody: Array
    ) -> None:
        """Put the voice's own f0 into `melody`, from the end of the last piece on."""
        f0 = torch.from_numpy(stretch.part(piece, filled))[None].to(self.models.device)
        predicted = self.models.network.predict_f0(
            inputs.units, f0, inputs.voiced, inputs.speaker, inputs.volume_of(self.models)
        )
        own = predicted[0].cpu().numpy()
        self._require_finite(own, piece, self.rate / self.hop, "the pitch that the voice predicts")
        first = piece.start if piece.joined else piece.read_start
        frames = slice(first - stretch.start, piece.read_stop - stretch.start)
        melody[frames] = own[first - piece.read_start :]
        stretch.target_f0[frames] = np.where(stretch.target_f0[frames] > 0, melody[frames], 0)

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
        sung = wav[0].float().cpu().numpy()
        self._require_finite(sung, piece, self.rate, "the voice's output")
        return sung

    def _require_finite(
        self, values: Array, piece: Piece, rate: float, what: str, remedy: str = _OTHER_VOICE
    ) -> None:
        """Check the values that a network returned for a piece. rate: of the values, in Hz.

        Raises: UserError: when a value is NaN or infinite.
        """
        finite = np.isfinite(values)
        if finite.all():
            return
        second = max(0.0, piece.read_start * self.hop / self.rate + finite.argmin() / rate)
        raise UserError(
            f"{self.song_id}: {what} is not finite (NaN or infinity, first at {second:.2f} s); "
            f"{remedy}"
        )

    def _enhance(
        self, enhancer: Enhancer, piece: Piece, wav: Array, f0: Array, phase: Tensor
    ) -> Array:
        silent_s = self.config.enhancer.silence_front - piece.read_start * self.hop / self.rate
        name = f"{self.config.voice.seed} {piece.read_start} vocoder"
        enhanced, rate = enhancer.enhance(
            torch.from_numpy(wav),
            self.rate,
            torch.from_numpy(f0),
            self.hop,
            self.key,
            max(0.0, silent_s),
            noise=KeyedNoise([zlib.crc32(name.encode())], self.models.device),
            phase=phase,
        )
        out = resample(enhanced.cpu().numpy(), rate, self.rate, self.config.resample)[: len(wav)]
        self._require_finite(
            out, piece, self.rate, "the enhancer's output", "name another enhancer.checkpoint"
        )
        return np.pad(out, (0, len(wav) - len(out)))


@dataclass(frozen=True)
class _Inputs:
    """Inputs of the network for a piece, on its device, without the pitch."""

    units: Tensor  # (1, D, F)
    voiced: Tensor  # (1, F)
    volume: Tensor  # (1, F)
    speaker: Tensor  # (1, S), or (1, F, S) over time

    def volume_of(self, models: Models) -> Tensor | None:
        return self.volume if models.network.config.volume_embedding else None
