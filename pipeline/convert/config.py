"""The settings of `convert`: the stages that made the voice's clips, and the conversion's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from models.synthesizer.config import require_at_least
from models.synthesizer.voice import Voice
from pipeline.cluster.workload import WorkersConfig
from pipeline.convert.unit_blend import UnitsConfig
from pipeline.errors import UserError
from pipeline.extract.config import of_the_same_method
from pipeline.settings import build_settings, check_settings, read_settings
from stages.chain import AudioConfig
from stages.decode import DecodeConfig
from stages.errors import BadInput
from stages.f0.config import F0Config
from stages.loudness import LoudnessConfig
from stages.resample import ResampleConfig, stream_resampler
from stages.slice import SliceConfig
from stages.units import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class VoiceConfig:
    """Settings of the singer.

    mix: several speakers, "ann=0.7,ben=0.3", or a CSV file of weights over time.
    noise_scale: scale of the latent noise; 0 sings the mean.
    """

    speaker: str | None = None
    mix: str | None = None
    noise_scale: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(0, "voice.noise_scale", self.noise_scale)
        if self.speaker is not None and self.mix is not None:
            raise ValueError("voice.speaker and voice.mix are both set; give one of them")


@dataclass(frozen=True, kw_only=True)
class PitchConfig:
    """Settings of the melody.

    transpose: semitones, or "auto": as many whole semitones as bring the song into the speaker's
      range, or "octave": as many octaves, which keep the key.
    predict: the voice predicts the melody (for speech), at the pitch level of the song.
    """

    transpose: str = "0"
    predict: bool = False

    def __post_init__(self) -> None:
        if self.transpose not in AUTOMATIC:
            try:
                semitones = float(self.transpose)
            except ValueError:
                raise ValueError(
                    f"pitch.transpose is '{self.transpose}'; it must be a number of semitones, "
                    "auto or octave"
                ) from None
            if not -MOST_SEMITONES <= semitones <= MOST_SEMITONES:
                raise ValueError(
                    f"pitch.transpose is {self.transpose}; it must lie in -{MOST_SEMITONES} to "
                    f"{MOST_SEMITONES} semitones"
                )


MOST_SEMITONES = 36
AUTOMATIC = {"auto": 1, "octave": 12}  # the multiple of semitones that each chooses from


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """Settings for joining the pieces of a song.

    pad_ms: context on each side of a piece that the networks see.
    crossfade_ms: overlap over which neighbouring pieces are cross-faded.
    """

    pad_ms: int = 500
    crossfade_ms: int = 50

    def __post_init__(self) -> None:
        require_at_least(0, "join.crossfade_ms", self.crossfade_ms)
        if not self.pad_ms >= self.crossfade_ms:
            raise ValueError(
                f"join.pad_ms is {self.pad_ms}; it must be at least join.crossfade_ms, "
                f"{self.crossfade_ms}"
            )


@dataclass(frozen=True, kw_only=True)
class EnhancerConfig:
    """Settings of a vocoder that renders the voice's output again.

    checkpoint: the community's NSF-HiFiGAN, with its config.json in the same folder.
    adaptive_key: semitones to raise its range by, for songs higher than its training data.
    silence_front: seconds at the start of the song that it leaves silent.
    """

    checkpoint: str | None = None
    adaptive_key: float | None = 0.0  # None: as many as the song needs
    silence_front: float = field(default=0.0, metadata={"neutral": 0.0})

    def __post_init__(self) -> None:
        require_at_least(0, "enhancer.silence_front", self.silence_front)
        if self.adaptive_key is not None and not -24 <= self.adaptive_key <= 24:
            raise ValueError(
                f"enhancer.adaptive_key is {self.adaptive_key}; it must lie in -24 to 24 semitones"
            )


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Settings of the output file.

    sample_rate: Hz; None: the voice's. format: of the songs of a folder; a single song's is the
    suffix of its file. envelope: 0 keeps the voice's loudness, 1 follows the song's loudness.
    """

    sample_rate: int | None = None
    channels: Literal["mono", "dual"] = "mono"
    format: Literal["wav", "flac", "ogg", "mp3"] = "wav"
    subtype: Literal["PCM_16", "PCM_24", "FLOAT"] = "PCM_16"
    envelope: float = field(default=0.0, metadata={"neutral": 0.0})

    def __post_init__(self) -> None:
        if self.sample_rate is not None and not 8000 <= self.sample_rate <= 192000:
            raise ValueError(
                f"output.sample_rate is {self.sample_rate}; it must lie in 8000 to 192000 Hz"
            )
        if not 0 <= self.envelope <= 1:
            raise ValueError(f"output.envelope is {self.envelope}; it must lie in 0 to 1")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Device and runtime of the networks."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["torch", "onnx"] = "torch"


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Every setting of `convert`. The sections up to encoder are those of `extract`."""

    audio: AudioConfig = field(default_factory=AudioConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    resample: ResampleConfig = field(default_factory=ResampleConfig)
    slice: SliceConfig = field(default_factory=SliceConfig)
    loudness: LoudnessConfig = field(default_factory=LoudnessConfig)
    f0: F0Config = field(default_factory=F0Config)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    voice: VoiceConfig = field(default_factory=VoiceConfig)
    pitch: PitchConfig = field(default_factory=PitchConfig)
    units: UnitsConfig = field(default_factory=UnitsConfig)
    join: JoinConfig = field(default_factory=JoinConfig)
    enhancer: EnhancerConfig = field(default_factory=EnhancerConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)


# For voices that do not state how their clips were made: so-vits-svc's settings.
_SOVITS: dict[str, Any] = {
    "loudness": {"mode": "peak"},
    "f0": {"method": "fcpe"},
}


def convert_config(
    voice: Voice, path: Path | None = None, overrides: Sequence[str] = ()
) -> ConvertConfig:
    """Read settings: the voice's, then the YAML file at `path`, then `key=value` overrides.

    Raises: UserError: when a setting is wrong, or the voice cannot sing with it.
    """
    base = _voice_settings(voice)
    given = read_settings(ConvertConfig, path, overrides)
    before = check_settings(ConvertConfig, base, "the voice")
    before["f0"] = of_the_same_method(before["f0"], given.get("f0", {}))
    config = build_settings(ConvertConfig, before, given)
    _refuse_idle_ratios(given, read_settings(ConvertConfig, None, overrides))
    _refuse_other_identity(voice, config)
    if config.pitch.predict and not voice.config.predict_f0:
        raise UserError(
            "pitch.predict is true, but this voice has no pitch predictor; set it to false"
        )
    try:
        stream_resampler(
            voice.sample_rate, config.output.sample_rate or voice.sample_rate, config.resample
        )
    except BadInput as error:
        raise UserError(f"output.sample_rate: {error.detail}") from error
    return config


def _voice_settings(voice: Voice) -> dict[str, Any]:
    stated: Mapping[str, Any] = voice.extraction or _SOVITS
    base = {section: dict(values) for section, values in stated.items()}
    base.setdefault("audio", {})["sample_rate"] = voice.sample_rate
    base["f0"]["hop_length"] = voice.hop_length
    base.setdefault("encoder", {})["name"] = voice.encoder.name
    return base


def _refuse_idle_ratios(given: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Refuse the ratio of an index or a codebook that is not set.

    A file that lists every setting has the default ratio beside an index of null; that is allowed.

    Raises: UserError: when a ratio above 0 would have no effect.
    """
    units = given.get("units", {})
    for name, command in (("index", "cantor index"), ("codebook", "cantor codebook")):
        key = f"{name}_ratio"
        listed = name in units and key not in overrides.get("units", {})
        if listed and units.get(key) == getattr(UnitsConfig(), key):
            continue
        if units.get(key, 0) > 0 and units.get(name) is None:
            raise UserError(
                f"units.{key} is {units[key]:g}, but units.{name} is not set; make one of the "
                f"speaker with `{command}` and name it with units.{name}=PATH, or leave out the "
                "ratio"
            )


def _refuse_other_identity(voice: Voice, config: ConvertConfig) -> None:
    pairs: tuple[tuple[str, object, object], ...] = (
        ("encoder.name", config.encoder.name, voice.encoder.name),
        ("audio.sample_rate", config.audio.sample_rate, voice.sample_rate),
        ("f0.hop_length", config.f0.hop_length, voice.hop_length),
        ("f0.interpolate", config.f0.interpolate, False),
        ("encoder.codebook", config.encoder.codebook, None),
    )
    for key, value, own in pairs:
        if value != own:
            raise UserError(f"{key} cannot be {value}: this voice was trained with {own}")
