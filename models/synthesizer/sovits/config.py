"""Reading and writing of so-vits-svc's config.json: its names and defaults of the settings.

Source: so-vits-svc (commit 730930d), models.py, configs_template/, preprocess_flist_config.py.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.checkpoint import CheckpointError
from models.input_file import read_json, shown
from models.synthesizer.config import MelConfig, SynthesizerConfig
from models.synthesizer.json_fields import typed

# so-vits-svc's name of an encoder -> Cantor's name and the width of its units.
ENCODERS = {
    "vec768l12": ("contentvec768l12", 768),
    "vec256l9": ("contentvec256l9", 256),
    "vec768l12-onnx": ("contentvec768l12-onnx", 768),
    "vec768l9-onnx": ("contentvec768l9-onnx", 768),
    "vec256l12-onnx": ("contentvec256l12-onnx", 256),
    "vec256l9-onnx": ("contentvec256l9-onnx", 256),
    "hubertsoft": ("hubertsoft", 256),
    "hubertsoft-onnx": ("hubertsoft-onnx", 256),
    "cnhubertlarge": ("cnhubertlarge", 1024),
    "dphubert": ("dphubert", 768),
    "wavlmbase+": ("wavlm-base-plus", 768),
    "whisper-ppg": ("whisper-ppg", 1024),
    "whisper-ppg-large": ("whisper-ppg-large", 1280),
}
# Encoder of a config.json that does not state one, by width. Version 4.0 had only vec256l9.
_UNSTATED_ENCODERS = {768: "vec768l12", 256: "vec256l9"}

# Settings in `model` -> fields of SynthesizerConfig; those of the flow are in `_flow`.
_MODEL = {
    "inter_channels": "inter_channels",
    "hidden_channels": "hidden_channels",
    "filter_channels": "filter_channels",
    "n_heads": "n_heads",
    "n_layers": "n_layers",
    "kernel_size": "kernel_size",
    "p_dropout": "dropout",
    "resblock": "resblock",
    "resblock_kernel_sizes": "resblock_kernel_sizes",
    "resblock_dilation_sizes": "resblock_dilation_sizes",
    "upsample_rates": "upsample_rates",
    "upsample_initial_channel": "upsample_initial_channel",
    "upsample_kernel_sizes": "upsample_kernel_sizes",
    "use_spectral_norm": "spectral_norm",
    "gin_channels": "gin_channels",
    "ssl_dim": "units_dim",
    "n_speakers": "n_speakers",
    "vocoder_name": "decoder",
    "vol_embedding": "volume_embedding",
    "use_depthwise_conv": "depthwise_conv",
    "flow_share_parameter": "share_flow",
    "use_automatic_f0_prediction": "predict_f0",
    "sampling_rate": "source_rate",
}
# so-vits-svc's defaults of the settings in `model` that are newer than version 4.0.
_MODEL_DEFAULTS: dict[str, Any] = {
    "n_layers_trans_flow": 3,
    "n_flow_layer": 4,
    "use_spectral_norm": False,
    "vocoder_name": "nsf-hifigan",
    "vol_embedding": False,
    "use_depthwise_conv": False,
    "flow_share_parameter": False,
    "use_automatic_f0_prediction": True,
    "use_transformer_flow": False,
    "sampling_rate": 44100,  # of the sine source only; in no template
}
_FRAMES = ("sampling_rate", "filter_length", "hop_length", "win_length", "n_mel_channels")
LEARNING_RATE = 1e-4
# Settings in `train` that its trainer requires, with the template's values.
_TRAIN = {
    "log_interval": 200,
    "eval_interval": 800,
    "seed": 1234,
    "epochs": 10000,
    "learning_rate": LEARNING_RATE,
    "betas": [0.8, 0.99],
    "eps": 1e-9,
    "batch_size": 6,
    "fp16_run": False,
    "half_type": "fp16",
    "lr_decay": 0.999875,
    "init_lr_ratio": 1,
    "warmup_epochs": 0,
    "c_mel": 45,
    "c_kl": 1.0,
    "use_sr": True,
    "max_speclen": 512,
    "port": "8001",
    "keep_ckpts": 3,
    "all_in_mem": False,
    "vol_aug": False,
}
_SEGMENT_FRAMES = 20
_RESIDUAL_FLOWS = 4  # fixed in so-vits-svc


@dataclass(frozen=True, kw_only=True)
class SovitsConfig:
    """Content of a config.json.

    speakers: name -> row of the embedding. encoder: Cantor's name of the encoder; None: not stated.
    """

    network: SynthesizerConfig
    mel: MelConfig
    speakers: Mapping[str, int]
    encoder: str | None
    expand: Literal["nearest", "left"]


def read_config(path: str | os.PathLike[str]) -> SovitsConfig:
    """Read a config.json.

    Raises: CheckpointError: when a setting is missing, unknown or contradictory (the message names
    it).
    """
    path = Path(path)
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    try:
        return _config_of(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def config_json(config: SovitsConfig) -> dict[str, Any]:
    """Return the content of a config.json, with the template's training settings.

    Raises: ValueError: when so-vits-svc does not have the encoder or a setting.
    """
    network, mel = config.network, config.mel
    if mel.n_fft != network.n_fft:
        raise ValueError(
            f"so-vits-svc has one n_fft for all spectrograms, not {network.n_fft} and {mel.n_fft}"
        )
    model = {key: getattr(network, field) for key, field in _MODEL.items()}
    if model["sampling_rate"] == _MODEL_DEFAULTS["sampling_rate"]:
        del model["sampling_rate"]
    model |= _flow_json(network)
    model |= {"n_layers_q": 3, "speaker_embedding": False}  # so-vits-svc ignores these
    if config.encoder is not None:
        model["speech_encoder"] = _sovits_encoder(config.encoder)
    return {
        "train": _TRAIN | {"segment_size": _SEGMENT_FRAMES * network.hop_length},
        "data": {
            "training_files": "filelists/train.txt",
            "validation_files": "filelists/val.txt",
            "max_wav_value": 32768.0,
            "sampling_rate": network.sample_rate,
            "filter_length": network.n_fft,
            "hop_length": network.hop_length,
            "win_length": mel.win_length,
            "n_mel_channels": mel.n_mels,
            "mel_fmin": mel.f_min,
            "mel_fmax": mel.f_max,
            "unit_interpolate_mode": config.expand,
        },
        "model": model,
        "spk": dict(config.speakers),
    }


def bare_config(network: SynthesizerConfig) -> SovitsConfig:
    """Return the configuration of a bare network: numbered speakers and no encoder."""
    return SovitsConfig(
        network=network,
        mel=MelConfig(n_fft=network.n_fft, win_length=network.n_fft),
        speakers={f"speaker{row}": row for row in range(network.n_speakers)},
        encoder=None,
        expand="nearest",
    )


def _sovits_encoder(encoder: str) -> str:
    for key, (name, _) in ENCODERS.items():
        if name == encoder:
            return key
    raise ValueError(
        f"so-vits-svc does not have the encoder {encoder}; it has "
        f"{', '.join(name for name, _ in ENCODERS.values())}"
    )


def _config_of(content: Any) -> SovitsConfig:
    if not isinstance(content, dict):
        raise ValueError("it must be an object with the sections train, data, model and spk")
    model, data, speakers = (_section(content, name) for name in ("model", "data", "spk"))
    _require(model, "model", [name for name in _MODEL if name not in _MODEL_DEFAULTS])
    _require(data, "data", [*_FRAMES, "mel_fmin", "mel_fmax"])
    _require_positive(data, "data", _FRAMES)
    network = _network_config(_MODEL_DEFAULTS | model, data)
    if data["hop_length"] != network.hop_length:
        raise ValueError(
            f"data.hop_length is {data['hop_length']}, but the product of model.upsample_rates is "
            f"{network.hop_length}"
        )
    fields = typing.get_type_hints(SovitsConfig)
    expand = data.get("unit_interpolate_mode", "left")
    return SovitsConfig(
        network=network,
        mel=_mel_config(data),
        speakers=_speakers(speakers, network.n_speakers),
        encoder=_encoder(model, network.units_dim),
        expand=typed(fields["expand"], expand, "data.unit_interpolate_mode"),
    )


def _section(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = content.get(name)
    if not isinstance(section, dict):
        raise ValueError(
            f"the section {name!r} {'is missing' if section is None else 'is not an object'}; "
            "a config.json of so-vits-svc has train, data, model and spk"
        )
    return section


def _require(section: Mapping[str, Any], name: str, keys: Sequence[str]) -> None:
    missing = [f"{name}.{key}" for key in keys if key not in section]
    if missing:
        raise ValueError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")


def _network_config(model: Mapping[str, Any], data: Mapping[str, Any]) -> SynthesizerConfig:
    hints = typing.get_type_hints(SynthesizerConfig)
    values = {
        field: typed(hints[field], model[key], f"model.{key}") for key, field in _MODEL.items()
    }
    values |= _flow(model)
    used = 2 if values["resblock"] == "2" else 3  # entries used of each list
    dilations = values["resblock_dilation_sizes"]
    values["resblock_dilation_sizes"] = tuple(each[:used] for each in dilations)
    values["sample_rate"] = typed(int, data["sampling_rate"], "data.sampling_rate")
    values["n_fft"] = typed(int, data["filter_length"], "data.filter_length")
    _require_positive(model, "model", [*_MODEL, "n_flow_layer", "n_layers_trans_flow"])
    return SynthesizerConfig(**values)


def _flow(model: Mapping[str, Any]) -> dict[str, Any]:
    """Read the settings of the flows.

    n_flow_layer counts the layers of each residual flow, but the flows with transformers.
    """
    transformer = typed(bool, model["use_transformer_flow"], "model.use_transformer_flow")
    count = typed(int, model["n_flow_layer"], "model.n_flow_layer")
    layers = typed(int, model["n_layers_trans_flow"], "model.n_layers_trans_flow")
    if transformer:
        return {"flow": "transformer", "n_flows": count, "n_flow_layers": layers}
    return {"flow": "residual", "n_flows": _RESIDUAL_FLOWS, "n_flow_layers": count}


def _flow_json(network: SynthesizerConfig) -> dict[str, Any]:
    if network.flow == "transformer":
        count, layers = network.n_flows, network.n_flow_layers
    elif network.n_flows == _RESIDUAL_FLOWS:
        count, layers = network.n_flow_layers, _MODEL_DEFAULTS["n_layers_trans_flow"]
    else:
        raise ValueError(f"so-vits-svc has {_RESIDUAL_FLOWS} residual flows, not {network.n_flows}")
    return {
        "use_transformer_flow": network.flow == "transformer",
        "n_flow_layer": count,
        "n_layers_trans_flow": layers,
    }


def _require_positive(section: Mapping[str, Any], name: str, keys: Sequence[str]) -> None:
    """Check that whole numbers, also in lists, are positive.

    Raises: ValueError: when a number is below 1 or a list is empty.
    """
    for key in keys:
        numbers = _flat(section[key])
        if not numbers:
            raise ValueError(f"{name}.{key} is empty")
        if any(type(number) is int and number < 1 for number in numbers):
            raise ValueError(f"{name}.{key} is {shown(section[key])}; it must be 1 or more")


def _flat(value: Any) -> list[Any]:
    return [one for part in value for one in _flat(part)] if isinstance(value, list) else [value]


def _mel_config(data: Mapping[str, Any]) -> MelConfig:
    hints = typing.get_type_hints(MelConfig)
    names = {
        "n_fft": "filter_length",
        "win_length": "win_length",
        "n_mels": "n_mel_channels",
        "f_min": "mel_fmin",
        "f_max": "mel_fmax",
    }
    return MelConfig(
        **{field: typed(hints[field], data[key], f"data.{key}") for field, key in names.items()}
    )


def _speakers(section: Mapping[str, Any], n_speakers: int) -> dict[str, int]:
    rows: dict[int, str] = {}
    for name, row in section.items():
        if type(row) is not int or not 0 <= row < n_speakers:
            raise ValueError(
                f"spk.{name} is {shown(row)}; it must be a whole number below model.n_speakers, "
                f"{n_speakers}"
            )
        if row in rows:
            raise ValueError(f"spk.{name} and spk.{rows[row]} are both {row}")
        rows[row] = name
    return dict(section)


def names_by_row(speakers: Mapping[str, int]) -> tuple[str, ...]:
    """Return the names in order of their rows, up to the last named row."""
    by_row = {row: name for name, row in speakers.items()}
    last = max(by_row, default=-1)
    return tuple(by_row.get(row, f"unnamed speaker {row}") for row in range(last + 1))


def _encoder(model: Mapping[str, Any], units_dim: int) -> str | None:
    stated = model.get("speech_encoder", _UNSTATED_ENCODERS.get(units_dim))
    if stated is None:
        return None
    typed(str, stated, "model.speech_encoder")
    if stated not in ENCODERS:
        raise ValueError(
            f"model.speech_encoder is {shown(stated)}; choose from {', '.join(ENCODERS)}"
        )
    name, width = ENCODERS[stated]
    if width != units_dim:
        raise ValueError(
            f"model.speech_encoder is {stated}, whose units have the width {width}, but "
            f"model.ssl_dim is {units_dim}"
        )
    return name
