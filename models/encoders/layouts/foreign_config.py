"""Settings of a network from the configuration in a foreign file, beyond the tensors' shapes.

Tested by tests/models/encoders/layouts/test_encoder_file.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.encoders.wav2vec2 import STEM_OF_WAV2VEC2
from models.input_file import shown

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "tanh": "tanh",
    "linear": "linear",
    "glu": "glu-swish",
}
_MOST = 1_000_000
_MOST_TEXT = 1000
_MOST_STEM_LAYERS = 100
_STEM_TERM = re.compile(
    r"\[\s*((?:\(\s*\d+\s*,\s*\d+\s*,\s*\d+\s*\)(?:\s*,)?\s*)+)\](?:\s*\*\s*(\d+))?"
)


@dataclass(frozen=True, kw_only=True)
class ForeignConfig:
    """Settings stated in a foreign file; None or empty: not stated. Tuples: one entry per layer.

    heads: of the unpruned network. kept_heads: indices of the heads that a pruned layer has.
    """

    layers: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    pre_norm: bool | None = None
    normalize_wav: bool | None = None
    activation: str | None = None
    strides: tuple[int, ...] = ()
    max_distance: int | None = None
    attention: tuple[bool, ...] = ()
    feed_forward: tuple[bool, ...] = ()
    kept_heads: tuple[tuple[int, ...], ...] = ()


def fairseq_config(content: Mapping[str, Any]) -> ForeignConfig:
    """Read cfg (a dict, or WavLM's flat one) or args.

    Raises: ValueError: when a value is invalid.
    """
    cfg = content.get("cfg") or content.get("args") or {}
    model = cfg.get("model") if isinstance(cfg.get("model"), dict) else cfg
    task = cfg.get("task") if isinstance(cfg.get("task"), dict) else cfg
    return ForeignConfig(
        layers=_number(model, "encoder_layers"),
        heads=_number(model, "encoder_attention_heads"),
        pre_norm=_flag(model, "layer_norm_first"),
        normalize_wav=_flag(task, "normalize"),
        activation=_activation(model.get("activation_fn")),
        strides=_strides(model.get("conv_feature_layers")),
        max_distance=_number(model, "max_distance"),
    )


def hugging_face_config(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any]
) -> ForeignConfig:
    """Read config.json and preprocessor_config.json.

    Raises: ValueError: when a value is invalid.
    """
    return ForeignConfig(
        layers=_number(config, "num_hidden_layers"),
        heads=_number(config, "num_attention_heads"),
        pre_norm=_flag(config, "do_stable_layer_norm"),
        normalize_wav=_flag(preprocessor, "do_normalize"),
        activation=_activation(config.get("hidden_act")),
        strides=tuple(map(int, config.get("conv_stride") or ())),
        max_distance=_number(config, "max_bucket_distance"),
    )


def dphubert_config(config: Mapping[str, Any]) -> ForeignConfig:
    """Read the arguments of torchaudio's constructor.

    Raises: ValueError: when a value is invalid.
    """
    total = config.get("encoder_total_num_heads") or []
    stem = config.get("extractor_conv_layer_config") or ()
    return ForeignConfig(
        layers=_number(config, "encoder_num_layers"),
        heads=int(total[0]) if total else None,
        head_dim=_number(config, "encoder_head_dim"),
        pre_norm=_flag(config, "encoder_layer_norm_first"),
        normalize_wav=_flag(config, "normalize_waveform"),
        strides=tuple(int(stride) for _, _, stride in stem),
        max_distance=_number(config, "encoder_max_distance"),
        attention=tuple(map(bool, config.get("encoder_use_attention") or ())),
        feed_forward=tuple(map(bool, config.get("encoder_use_feed_forward") or ())),
        kept_heads=tuple(
            tuple(map(int, kept)) for kept in config.get("encoder_remaining_heads") or ()
        ),
    )


def usual_strides(kernels: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of the stem of all published networks; () for another stem."""
    if kernels == tuple(kernel for _, kernel, _ in STEM_OF_WAV2VEC2):
        return tuple(stride for _, _, stride in STEM_OF_WAV2VEC2)
    return ()


def _number(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value <= _MOST:
        raise ValueError(f"its {key} is {shown(value)}; it must be a whole number to {_MOST}")
    return int(value)


def _flag(config: Mapping[str, Any], key: str) -> bool | None:
    value = config.get(key)
    return value if isinstance(value, bool) else None


def _activation(name: Any) -> str | None:
    if name is None:
        return None
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ValueError(
            f"its activation is {shown(name)}; supported are {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _strides(layers: Any) -> tuple[int, ...]:
    """Parse the strides of fairseq's stem, such as "[(512,10,5)] + [(512,3,2)] * 4"."""
    text = str(layers or "")
    if len(text) > _MOST_TEXT:
        raise ValueError(f"its conv_feature_layers has {len(text)} characters")
    strides: list[int] = []
    for term, times in _STEM_TERM.findall(text):
        numbers = re.findall(r"\d+", term)
        if int(times or 1) > _MOST_STEM_LAYERS:
            raise ValueError(f"its conv_feature_layers has a layer {times} times")
        strides += [int(n) for n in numbers[2::3]] * int(times or 1)
    return tuple(strides)
