"""Loading the voice and the models of a conversion, and converting one file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from models.checkpoint import CheckpointError, sha256_of
from models.encoders import WITHOUT_WEIGHTS, load_encoder
from models.synthesizer.blocks.decoder import prepare_for_inference
from models.synthesizer.enhancer import Enhancer
from models.synthesizer.onnx import OnnxSynthesizer, export_voice
from models.synthesizer.vocoder import load_vocoder
from models.synthesizer.voice import Voice, load_network
from pipeline.cluster.bar import show_bar
from pipeline.cluster.device import choose_device
from pipeline.convert.config import ConvertConfig, convert_config
from pipeline.convert.output_file import check_output
from pipeline.convert.page import write_conversion_report
from pipeline.convert.result import Conversion
from pipeline.convert.song import Converter, Models, Singing
from pipeline.convert.speaker_mix import SpeakerMix, read_mix
from pipeline.convert.unit_blend import UnitControls, names_of
from pipeline.errors import UserError
from pipeline.extract.model_checks import name_setting_in_errors
from pipeline.settings import flatten
from pipeline.train.find_voice import is_graph, read_any_voice, weights_file
from stages.decode import Decoder
from stages.errors import BadInput
from stages.f0 import check_networks

_FETCHED = Path("checkpoints")  # default folder of `fetch-encoder`


@dataclass(frozen=True)
class Request:
    """A voice and the settings of a conversion."""

    checkpoint: Path
    voice: Voice
    config: ConvertConfig


def read_request(
    checkpoint: Path,
    settings: Sequence[str] = (),
    file: Path | None = None,
    encoder_checkpoint: Path | None = None,
) -> Request:
    """Return the voice at `checkpoint` with its settings, those of a YAML file, then `settings`.

    encoder_checkpoint: the encoder's weights, for a voice that does not record where they are.

    Raises: UserError: when voice, settings and encoder do not fit each other.
    """
    checkpoint = weights_file(checkpoint)  # one for all, even while training goes on
    voice = read_any_voice(checkpoint)
    config = convert_config(voice, file, settings)
    given = str(encoder_checkpoint.absolute()) if encoder_checkpoint else config.encoder.checkpoint
    weights = _encoder_weights(voice, given)
    # Voices of so-vits-svc do not record the hash.
    if weights is not None and voice.encoder.checkpoint_sha256 is None:
        known = replace(voice.encoder, checkpoint_sha256=_sha256(weights))
        voice = replace(voice, encoder=known)
    config = replace(
        config,
        encoder=replace(config.encoder, checkpoint=weights),
        voice=replace(config.voice, speaker=_speaker(voice, config)),
    )
    return Request(checkpoint, voice, config)


def load_models(request: Request) -> Models:
    """Load the models of a conversion.

    Raises: UserError: when one does not load or does not fit the voice.
    """
    voice, config = request.voice, request.config
    device = choose_device(config.compute.device, "compute.device")
    cfg = config.encoder
    with name_setting_in_errors("encoder"):
        where = device if cfg.device == "auto" else choose_device(cfg.device, "encoder.device")
        encoder = load_encoder(cfg.name, cfg.checkpoint, where, **cfg.options())
    if encoder.dim != voice.config.units_dim:
        raise UserError(
            f"encoder: {cfg.name} has units of width {encoder.dim}, but the voice takes width "
            f"{voice.config.units_dim}; name the encoder that the voice was trained with"
        )
    with name_setting_in_errors("f0"):
        check_networks(config.f0)
    enhancer = None
    if config.enhancer.checkpoint is not None:
        with name_setting_in_errors("enhancer.checkpoint"):
            enhancer = Enhancer(load_vocoder(config.enhancer.checkpoint, device))
    speaker = config.voice.speaker
    return Models(
        voice=voice,
        network=_network(request, device),
        encoder=encoder,
        mix=_mix(voice, config),
        controls=UnitControls(config.units, voice, speaker),
        enhancer=enhancer,
        target_hz=None if speaker is None else voice.pitch_hz.get(speaker),
        device=device,
    )


def convert_file(request: Request, source: Path, output: Path, console: Console) -> Conversion:
    """Convert one file.

    Raises: UserError: when the source cannot be read or the output cannot be written.
    """
    from pipeline.storage.scratch import Scratch

    check_output(output, request.config.output, request.config.audio.sample_rate)
    if source.resolve() == output.resolve():
        raise UserError(f"{output} is the input song; name another output file")
    converter = Converter(load_models(request), request.config)
    scratch = Scratch(request.config.workers.scratch)
    try:
        with Decoder(request.config.decode, scratch.folder) as decoder:
            milliseconds = round(1000 * decoder.probe(source).duration_s)
            with show_bar(console, source.name, milliseconds) as advance:
                return converter.convert(
                    source.name, source, output, decoder, lambda s: advance(round(1000 * s))
                )
    except BadInput as error:
        raise UserError(f"{source} cannot be converted: {error}") from error
    finally:
        scratch.close()


def write_page(request: Request, conversions: Sequence[Conversion], page: Path) -> None:
    """Write a page with players and pictures of the songs.

    Raises: UserError: when it cannot be written.
    """
    from pipeline.storage.scratch import Scratch

    config, voice = request.config, request.voice
    about = {
        "voice": f"{request.checkpoint}, after {voice.step} steps",
        "sung by": config.voice.speaker or f"a mix, {config.voice.mix}",
        "units": voice.encoder.name,
        "pitch": config.f0.method,
    }
    scratch = Scratch(config.workers.scratch)
    try:
        with Decoder(config.decode, scratch.folder) as decoder:
            write_conversion_report(
                page,
                conversions,
                flatten(config),
                about,
                defaults=flatten(convert_config(voice)),
                decoder=decoder,
                resample=config.resample,
            )
    finally:
        scratch.close()


def _speaker(voice: Voice, config: ConvertConfig) -> str | None:
    """Return the speaker; None for a mix.

    Raises: UserError: when the voice has no such speaker (the message names those it has).
    """
    if config.voice.mix is not None:
        read_mix(config.voice.mix, voice.speakers)
        return None
    speaker = config.voice.speaker
    if speaker is None and len(voice.speakers) == 1:
        return voice.speakers[0]
    if speaker not in voice.speakers:
        problem = "no speaker is named" if speaker is None else f"it has no speaker '{speaker}'"
        raise UserError(
            f"{problem}; name one of this voice's speakers with --speaker: "
            f"{names_of(voice.speakers)}"
        )
    return speaker


def _network(request: Request, device: str) -> Singing:
    """Return the torch or ONNX synthesizer.

    For ONNX, a voice not yet exported is exported to a temporary folder.
    """
    file = weights_file(request.checkpoint)
    with name_setting_in_errors("compute.backend"), tempfile.TemporaryDirectory() as folder:
        if is_graph(file):
            return OnnxSynthesizer(file, device)
        if request.config.compute.backend == "onnx":
            export_voice(folder, request.voice)
            return OnnxSynthesizer(folder, device)
    return prepare_for_inference(load_network(request.voice, device))


def _mix(voice: Voice, config: ConvertConfig) -> SpeakerMix:
    rows = voice.config.n_speakers
    if config.voice.mix is not None:
        return read_mix(config.voice.mix, voice.speakers, rows)
    assert config.voice.speaker is not None
    return SpeakerMix(np.eye(rows)[[voice.speakers.index(config.voice.speaker)]])


def _encoder_weights(voice: Voice, path: str | None) -> str | None:
    """Return the file of the voice's encoder.

    path: the file in the settings, or the one that training used.

    Raises: UserError: when it is missing or is not the encoder of the voice.
    """
    encoder = voice.encoder
    if encoder.name in WITHOUT_WEIGHTS:
        return path
    wanted = encoder.checkpoint_sha256
    if path is not None and path != _trained_with(voice):
        if not os.path.exists(path):
            raise UserError(f"there is no encoder at {path}")
        if wanted is not None and _sha256(path) != wanted:
            raise UserError(
                f"{path} is not the encoder that this voice was trained with; it needs "
                f"{encoder.name} with SHA-256 {wanted}"
            )
        return path
    here = [] if path is None else [path]
    for file in here + sorted(map(str, _FETCHED.absolute().glob("*"))):
        if wanted is not None and os.path.exists(file) and _sha256(file) == wanted:
            return file
    which = f" with SHA-256 {wanted}" if wanted else ""
    raise UserError(
        f"this voice needs the encoder {encoder.name}{which}; name its weights with "
        "--encoder-checkpoint (`cantor fetch-encoder --list` shows encoders to download)"
    )


def _trained_with(voice: Voice) -> str | None:
    """Return the path of the encoder's weights at the time of training."""
    path: str | None = (voice.extraction or {}).get("encoder", {}).get("checkpoint")
    return path


def _sha256(path: str) -> str:
    try:
        return sha256_of(path)
    except (CheckpointError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
