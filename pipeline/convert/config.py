"""Every setting of `convert`: the stages that made the voice's clips, and what is asked of it."""

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
    """Who sings, and how freely.

    mix: of several speakers, "ann=0.7,ben=0.3", or a CSV file of weights over time.
    noise_scale: of the chance in the latents; 0 is the mean of what the network would sing.
    """

    speaker: str | None = None
    mix: str | None = None
    noise_scale: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(0, "voice.noise_scale", self.noise_scale)
        if self.speaker is not None and self.mix is not None:
            raise ValueError("voice.speaker and voice.mix are both given; one says who sings")


@dataclass(frozen=True, kw_only=True)
class PitchConfig:
    """transpose: semitones, or "auto": as many whole ones as bring the song to the speaker's range.

    predict: the melody is the voice's own guess (for speech); the song's says how high it is.
    """

    transpose: str = "0"
    predict: bool = False

    def __post_init__(self) -> None:
        if self.transpose != "auto":
            try:
                semitones = float(self.transpose)
            except ValueError:
                raise ValueError(
                    f"pitch.transpose is '{self.transpose}'; it is a number of semitones, or auto"
                ) from None
            if not -MOST_SEMITONES <= semitones <= MOST_SEMITONES:
                raise ValueError(
                    f"pitch.transpose is {self.transpose}; it must lie in -{MOST_SEMITONES} to "
                    f"{MOST_SEMITONES} semitones"
                )


MOST_SEMITONES = 36


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """How the pieces of a song meet.

    pad_ms: what the networks see of the song beyond each end of a piece.
    crossfade_ms: over which one piece goes over into the next.
    """

    pad_ms: int = 500
    crossfade_ms: int = 50

    def __post_init__(self) -> None:
        require_at_least(0, "join.crossfade_ms", self.crossfade_ms)
        if not self.pad_ms >= self.crossfade_ms:
            raise ValueError(
                f"join.pad_ms is {self.pad_ms}; it must be join.crossfade_ms, "
                f"{self.crossfade_ms}, or more"
            )


@dataclass(frozen=True, kw_only=True)
class EnhancerConfig:
    """A vocoder that sings the voice's output again.

    checkpoint: the NSF-HiFiGAN of the community, a file with its config.json beside it.
    adaptive_key: semitones that it is lifted by where the song goes beyond what it was trained on.
    silence_front: seconds at the beginning of the song that it leaves silent.
    """

    checkpoint: str | None = None
    adaptive_key: float | None = 0.0  # None: as high as the song needs
    silence_front: float = field(default=0.0, metadata={"neutral": 0.0})

    def __post_init__(self) -> None:
        require_at_least(0, "enhancer.silence_front", self.silence_front)
        if self.adaptive_key is not None and not -24 <= self.adaptive_key <= 24:
            raise ValueError(
                f"enhancer.adaptive_key is {self.adaptive_key}; it must lie in -24 to 24 semitones"
            )


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """sample_rate: Hz; None: the voice's. envelope: 0 keeps the loudness that the voice sings
    with, 1 gives it the song's from moment to moment.
    """

    sample_rate: int | None = None
    channels: Literal["mono", "dual"] = "mono"
    format: Literal["wav", "flac", "ogg", "mp3"] = (
        "wav"  # of songs of a folder; a file's is its suffix
    )
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
    """Where the networks run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["torch", "onnx"] = "torch"


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Every setting of `convert`. The first sections are those of `extract`."""

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


# Where a voice does not say how its clips were made: as so-vits-svc makes them.
_SOVITS: dict[str, Any] = {
    "loudness": {"mode": "peak"},
    "f0": {"method": "fcpe"},
}


def convert_config(
    voice: Voice, path: Path | None = None, overrides: Sequence[str] = ()
) -> ConvertConfig:
    """The voice's own settings, then the YAML file at `path`, then `key=value` overrides.

    Raises: UserError for what is wrong, and for settings that the voice cannot sing with.
    """
    base = _of_the_voice(voice)
    given = read_settings(ConvertConfig, path, overrides)
    before = check_settings(ConvertConfig, base, "the voice")
    before["f0"] = of_the_same_method(before["f0"], given.get("f0", {}))
    config = build_settings(ConvertConfig, before, given)
    _refuse_other_identity(voice, config)
    if config.pitch.predict and not voice.config.predict_f0:
        raise UserError("pitch.predict is true, but this voice was built without a pitch predictor")
    try:
        stream_resampler(
            voice.sample_rate, config.output.sample_rate or voice.sample_rate, config.resample
        )
    except BadInput as error:
        raise UserError(f"output.sample_rate: {error.detail}") from error
    return config


def _of_the_voice(voice: Voice) -> dict[str, Any]:
    stated: Mapping[str, Any] = voice.extraction or _SOVITS
    base = {section: dict(values) for section, values in stated.items()}
    base.setdefault("audio", {})["sample_rate"] = voice.sample_rate
    base["f0"]["hop_length"] = voice.hop_length
    base.setdefault("encoder", {})["name"] = voice.encoder.name
    return base


def _refuse_other_identity(voice: Voice, config: ConvertConfig) -> None:
    pairs: tuple[tuple[str, object, object], ...] = (
        ("encoder.name", config.encoder.name, voice.encoder.name),
        ("audio.sample_rate", config.audio.sample_rate, voice.sample_rate),
        ("f0.hop_length", config.f0.hop_length, voice.hop_length),
        ("f0.interpolate", config.f0.interpolate, False),
        ("encoder.codebook", config.encoder.codebook, None),
    )
    for key, asked, own in pairs:
        if asked != own:
            raise UserError(f"{key} cannot be {asked}: this voice was trained with {own}")
