"""Reading of all encoder files of the wav2vec 2.0 family for `models.encoders.wav2vec2`.

    read_encoder_file   any file or folder -> EncoderFile: the whole network's shapes, and its
                        tensors as views of the file under Cantor's names
    EncoderFile.take    the part that one encoder needs -> configuration and state dict
    read_encoder        both, for the encoder's name

Files are identified by content, not by name. Shapes come from the tensors and other settings from
the configuration in the file or folder. A setting that is not stated has the value of all published
networks of the family. Every key must be present, known and of its shape.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from models.bounded_meta import bounded_meta, most_parameters
from models.checkpoint import (
    OWN_HEADER,
    CheckpointError,
    load_weights,
    save_safetensors,
    sibling_json,
)
from models.encoders.encoder_names import (
    FAMILIES,
    NAMES,
    WHISPER,
    Family,
    fits,
    names_for,
    other_kind,
    other_kind_by_config,
)
from models.encoders.layouts.foreign_config import (
    ForeignConfig,
    dphubert_config,
    fairseq_config,
    hugging_face_config,
    usual_strides,
)
from models.encoders.layouts.key_layouts import (
    CANTOR,
    DPHUBERT,
    FAIRSEQ,
    HUBERT_SOFT,
    HUGGING_FACE,
    LAYOUTS,
    KeyLayout,
)
from models.encoders.wav2vec2 import LayerShape, RelativeBias, Wav2Vec2, Wav2Vec2Config
from models.input_file import parse_json

_HEAD_DIM = 64  # in every published network
_WRAPPERS = ("model", "state_dict", "hubert", "model_state_dict", "weight")
_PREFIXES = ("module.", "hubert.", "wavlm.")
_FORMAT = "wav2vec2"
_MOST_STRIDE = 1000


@dataclass(frozen=True)
class EncoderFile:
    """A whole network in a file.

    config: of the whole network: all layers, the final norm and the final projection if present.
    tensors: under Cantor's names; views of the file in its dtypes. Query, key and value may be
    separate, and the weight norm may not be folded.
    keys: Cantor's name -> the file's key.
    """

    path: Path
    layout: KeyLayout
    family: Family
    config: Wav2Vec2Config
    tensors: Mapping[str, Tensor]
    keys: Mapping[str, str]

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole network, with the weight norm folded."""
        return sum(math.prod(shape) for _, shape in _shapes(self.config))

    def take(
        self, layers: int | None = None, *, project: bool = False, normalize_wav: bool | None = None
    ) -> tuple[Wav2Vec2Config, dict[str, Tensor]]:
        """Return configuration and float32 state dict of the network up to a layer.

        The arguments are those of `config_up_to`; other layers are not read. The tensors are
        copies, except float32 tensors in Cantor's format: those are writable views of the mapped
        file, so that loading costs nothing until they are used.
        """
        config = self.config_up_to(layers, project=project, normalize_wav=normalize_wav)
        return config, {name: self._tensor(name, shape) for name, shape in _shapes(config)}

    def config_up_to(
        self, layers: int | None = None, *, project: bool = False, normalize_wav: bool | None = None
    ) -> Wav2Vec2Config:
        """Return the configuration of the network up to a layer.

        layers: number of layers, or all if there are fewer, without the final norm; None: all, with
        the final norm. project: with the final projection. normalize_wav: None: as in the file.

        Raises: CheckpointError: when there is no final projection to use.
        """
        if project and self.config.project_dim is None:
            raise CheckpointError(f"{self.path} has no final projection (final_proj)")
        return replace(
            self.config,
            layers=self.config.layers[:layers],
            final_norm=self.config.final_norm and layers is None,
            project_dim=self.config.project_dim if project else None,
            normalize_wav=self.config.normalize_wav if normalize_wav is None else normalize_wav,
        )

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        copy = self.layout is not CANTOR
        parts = [self.tensors[part].to(torch.float32, copy=copy) for part in self._parts(name)]
        if name == "position.conv.weight" and len(parts) == 2:
            direction, size = parts
            return torch._weight_norm(direction, size, 2)
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(shape)

    def _parts(self, name: str) -> list[str]:
        return [name] if name in self.tensors else _parts_of(name)


def read_encoder_file(path: str | Path) -> EncoderFile:
    """Read the network in a file or a Hugging Face folder.

    Raises: CheckpointError: when it is not such a network (the message names the keys and the
    likely kind of the file).
    """
    path = Path(path)
    content, metadata = load_weights(path)
    if OWN_HEADER in metadata:
        return _parse_cantor_file(path, content, metadata[OWN_HEADER])
    if not path.is_dir() and HUGGING_FACE.signature not in _state_dict(content):
        return parse_encoder_file(path, content)  # a config.json next to it is of something else
    config_json = sibling_json(path, "config.json")
    if path.is_dir() and (what := other_kind_by_config(config_json)):
        raise CheckpointError(f"{path} seems to be {what}")
    preprocessor_json = sibling_json(path, "preprocessor_config.json")
    return parse_encoder_file(path, content, config_json, preprocessor_json)


def is_whisper(path: str | Path) -> bool:
    """Check whether a file or folder is a Whisper, which `models.encoders.whisper` reads."""
    content, metadata = load_weights(path)
    if OWN_HEADER in metadata:
        return '"kind": "whisper"' in metadata[OWN_HEADER]
    return other_kind(_state_dict(content)) == WHISPER


def parse_encoder_file(
    path: Path,
    content: Mapping[str, Any],
    config_json: Mapping[str, Any] = MappingProxyType({}),
    preprocessor_json: Mapping[str, Any] = MappingProxyType({}),
) -> EncoderFile:
    """Parse the content of a foreign file; see `read_encoder_file`.

    path: for errors. config_json, preprocessor_json: from a Hugging Face folder.
    """
    tensors = _state_dict(content)
    if what := other_kind(tensors):
        raise CheckpointError(f"{path} seems to be {what}")
    layout = _layout(path, tensors)
    tensors = {key: t for key, t in tensors.items() if not layout.ignores(key)}
    try:
        if layout is FAIRSEQ:
            stated = fairseq_config(content)
        elif layout is HUGGING_FACE:
            stated = hugging_face_config(config_json, preprocessor_json)
        elif layout is DPHUBERT:
            stated = dphubert_config(_dict(content.get("config")))
        else:
            stated = ForeignConfig()
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: {error or 'its configuration is malformed'}") from error
    return _Reader(path, layout, tensors, stated).read()


def read_encoder(
    name: str, path: str | Path, normalize_wav: bool | None = None
) -> tuple[Wav2Vec2Config, dict[str, Tensor]]:
    """Read configuration and float32 state dict of the encoder `name` (a key of `NAMES`).

    normalize_wav: None: the name's default.

    Raises: CheckpointError: when the file is broken or of another encoder (the message names it).
    """
    file, options = _select(name, path, normalize_wav)
    return file.take(**options)


def check_fit(name: str, path: str | Path) -> None:
    """Check that a file fits an encoder's name, without reading weights.

    Raises: CheckpointError: when `read_encoder` would refuse the file.
    """
    file, options = _select(name, path, None)
    file.config_up_to(**options)


def _select(
    name: str, path: str | Path, normalize_wav: bool | None
) -> tuple[EncoderFile, dict[str, Any]]:
    """Read a file and choose the arguments of `EncoderFile.take` for the encoder `name`."""
    file = read_encoder_file(path)
    wanted, width = NAMES[name], file.config.width
    if not fits(wanted, file.family, width):
        right = " or ".join(names_for(file.family, width)) or "not supported"
        raise CheckpointError(
            f"{path} is {FAMILIES[file.family]} of width {width}: "
            f"its encoder.name is {right}, not {name}"
        )
    dim = file.config.project_dim
    if wanted.project and width == wanted.width and wanted.dim and dim not in (None, wanted.dim):
        raise CheckpointError(
            f"{path} has a final projection to the width {dim}, but {name} has {wanted.dim}"
        )
    if normalize_wav is None:
        normalize_wav = wanted.normalize_wav
    project = dim is not None if wanted.project is None else wanted.project
    options = {"layers": wanted.layers, "project": project, "normalize_wav": normalize_wav}
    return file, options


def save_encoder_file(
    file: EncoderFile, path: str | Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write a whole network in Cantor's format: safetensors with its configuration as header."""
    has_projection = file.config.project_dim is not None
    config, tensors = file.take(project=has_projection)
    header = {"kind": _FORMAT, "family": file.family, "config": dataclasses.asdict(config)}
    save_safetensors(
        path, {k: t.to(dtype) for k, t in tensors.items()}, {OWN_HEADER: json.dumps(header)}
    )


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _state_dict(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state dict in a checkpoint, without a common prefix of the keys."""
    tensors = content
    for wrapper in _WRAPPERS:
        inner = content.get(wrapper)
        if isinstance(inner, dict) and any(isinstance(t, Tensor) for t in inner.values()):
            tensors = inner
            break
    for prefix in _PREFIXES:
        if any(str(key).startswith(prefix) for key in tensors):
            tensors = {str(key).removeprefix(prefix): value for key, value in tensors.items()}
    return {str(key): value for key, value in tensors.items()}


def _layout(path: Path, tensors: Mapping[str, Any]) -> KeyLayout:
    for layout in LAYOUTS:
        if layout.signature in tensors:
            return layout
    some = ", ".join(sorted(tensors)[:3]) or "nothing"
    raise CheckpointError(
        f"{path} is not a known encoder: it has none of "
        f"{', '.join(layout.signature for layout in LAYOUTS)}; it has {some}, ..."
    )


@dataclass(frozen=True)
class _Reader:
    """Conversion of a file's content to the network, with an explanation if it does not fit."""

    path: Path
    layout: KeyLayout
    foreign: Mapping[str, Any]
    stated: ForeignConfig

    def read(self) -> EncoderFile:
        keys, unknown = self.rename()
        tensors = {name: self.foreign[key] for name, key in keys.items()}
        config = self.config(tensors)
        if self.layout is DPHUBERT:
            for name in _unused(config, tensors):
                del tensors[name], keys[name]
        family: Family = "hubert"
        if self.layout is HUBERT_SOFT:
            family = "hubert-soft"
        elif self.layout is DPHUBERT:
            family = "dpwavlm" if self.stated.kept_heads else "dphubert"
        elif config.relative_bias is not None:
            family = "wavlm"
        self.check(config, tensors, unknown)
        return EncoderFile(self.path, self.layout, family, config, tensors, keys)

    def rename(self) -> tuple[dict[str, str], list[str]]:
        """Return the file's key by Cantor's name, and the unknown keys."""
        keys: dict[str, str] = {}
        unknown: list[str] = []
        for key, value in self.foreign.items():
            name = self.layout.name_of(key)
            if name is None or name in keys or not isinstance(value, Tensor):
                unknown.append(key)
            else:
                keys[name] = key
        return keys, unknown

    def config(self, tensors: Mapping[str, Tensor]) -> Wav2Vec2Config:
        stem = self.stem(tensors)
        width, _ = self.shape(tensors, "projection.weight", 2)
        weight = "position.conv.weight"
        position = weight if weight in tensors else f"{weight}_v"
        _, per_group, kernel = self.shape(tensors, position, 3)
        projection = tensors.get("final_projection.weight")
        table = tensors.get("relative_bias.weight")
        bias = None
        if table is not None and table.ndim == 2:
            bias = RelativeBias(
                buckets=table.shape[0],
                heads=table.shape[1],
                max_distance=self.stated.max_distance or RelativeBias.max_distance,
            )
        stem_norm = "layer" if "stem.1.norm.weight" in tensors else "group"
        pre_norm = stem_norm == "layer" if self.stated.pre_norm is None else self.stated.pre_norm
        normalize_wav = self.stated.normalize_wav
        if normalize_wav is None:  # as in the published WavLMs: Large does, Base and Base+ do not
            normalize_wav = bias is not None and pre_norm
        return Wav2Vec2Config(
            stem=stem,
            stem_bias="stem.0.conv.bias" in tensors,
            stem_norm=stem_norm,
            stem_scale="stem_scale" in tensors,
            width=width,
            position_kernel=kernel,
            position_groups=max(1, width // max(1, per_group)),
            layers=self.layers(tensors, width, bias),
            pre_norm=pre_norm,
            final_norm=pre_norm,
            relative_bias=bias,
            activation=self.stated.activation or "gelu",
            project_dim=None if projection is None else projection.shape[0],
            pad=self.layout.pad,
            normalize_wav=normalize_wav,
        )

    def stem(self, tensors: Mapping[str, Tensor]) -> tuple[tuple[int, int, int], ...]:
        count = 1 + max(_indices(tensors, "stem"), default=0)
        shapes = [self.shape(tensors, f"stem.{i}.conv.weight", 3) for i in range(count)]
        kernels = tuple(kernel for _, _, kernel in shapes)
        strides = self.stated.strides or usual_strides(kernels)
        if not all(1 <= stride <= _MOST_STRIDE for stride in strides):
            raise CheckpointError(
                f"{self.seems()}, but its configuration has strides beyond {_MOST_STRIDE}"
            )
        if len(strides) != count:
            raise CheckpointError(
                f"{self.seems()} with {count} convolutions of kernels {kernels}, "
                f"but its configuration does not state their strides"
            )
        return tuple(
            (channels, kernel, stride)
            for (channels, _, kernel), stride in zip(shapes, strides, strict=True)
        )

    def head_dim(self, width: int, bias: RelativeBias | None) -> int:
        if self.stated.head_dim:
            return self.stated.head_dim
        heads = (bias.heads if bias else self.stated.heads) or width // _HEAD_DIM
        if heads < 1 or width % heads:
            raise CheckpointError(f"{self.seems()} of width {width}, but with {heads} heads")
        return width // heads

    def layers(
        self, tensors: Mapping[str, Tensor], width: int, bias: RelativeBias | None
    ) -> tuple[LayerShape, ...]:
        head_dim = self.head_dim(width, bias)
        count = self.stated.layers or 1 + max(_indices(tensors, "layers"), default=-1)
        stated = self.stated
        shapes = []
        for i in range(count):
            attention = stated.attention[i] if i < len(stated.attention) else True
            feed_forward = stated.feed_forward[i] if i < len(stated.feed_forward) else True
            kept = stated.kept_heads[i] if i < len(stated.kept_heads) else None
            inner = 0
            if feed_forward:
                _, inner = self.shape(tensors, f"layers.{i}.feed_forward.fc2.weight", 2)
            heads = 0
            if attention:
                _, inside = self.shape(tensors, f"layers.{i}.attention.out.weight", 2)
                heads = inside // head_dim if kept is None else len(kept)
            if bias is None or not attention or kept == tuple(range(bias.heads)):
                kept = None
            shapes.append(
                LayerShape(heads=heads, head_dim=head_dim, feed_forward=inner, kept_heads=kept)
            )
        return tuple(shapes)

    def shape(self, tensors: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
        if name not in tensors:
            raise CheckpointError(f"{self.seems()}, but lacks {self.layout.key_of(name)}")
        shape = tuple(tensors[name].shape)
        if len(shape) != ndim or 0 in shape:
            key = self.layout.key_of(name)
            raise CheckpointError(f"{self.seems()}, but its {key} has the shape {list(shape)}")
        return shape

    def check(
        self, config: Wav2Vec2Config, tensors: Mapping[str, Tensor], unknown: list[str]
    ) -> None:
        """Check that the tensors are exactly those of the network.

        Raises: CheckpointError: when they are not (the message names the keys).
        """
        expected: dict[str, tuple[int, ...]] = {}
        try:
            shapes = _shapes(config, most_parameters(len(tensors)))
        except (TypeError, ValueError, RuntimeError, LookupError, ArithmeticError) as error:
            raise CheckpointError(f"{self.seems()}, but of an invalid shape: {error}") from error
        for name, shape in shapes:
            expected |= _expected(name, shape, tensors)
        key_of = self.layout.key_of
        missing = [key_of(name) for name in expected if name not in tensors]
        if missing:
            raise CheckpointError(f"{self.seems()}, but lacks {_some(missing)}")
        extra = unknown + [key_of(name) for name in tensors if name not in expected]
        if extra:
            raise CheckpointError(f"{self.seems()}, but has unknown keys: {_some(extra)}")
        for name, shape in expected.items():
            actual = tuple(tensors[name].shape)
            if actual != shape and not _is_gate_scale(name, actual, shape):
                raise CheckpointError(
                    f"{self.seems()}, but its {key_of(name)} has the shape {list(actual)}; "
                    f"it must be {list(shape)}"
                )

    def seems(self) -> str:
        return f"{self.path} seems to be {self.layout.title}"


def _unused(config: Wav2Vec2Config, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the tensors in a file of a pruned network that the network does not use.

    These are the norms of a pre-norm network's absent blocks; and, where layer 0 has no attention
    and so no position bias, the gates of that bias in the other layers.
    """
    prefixes = []
    for i, layer in enumerate(config.layers):
        if config.pre_norm and not layer.heads:
            prefixes.append(f"layers.{i}.attention_norm.")
        if config.pre_norm and not layer.feed_forward:
            prefixes.append(f"layers.{i}.feed_forward_norm.")
        if config.relative_bias is None:
            prefixes.append(f"layers.{i}.attention.bias_gate.")
    return [name for name in tensors if name.startswith(tuple(prefixes))] if prefixes else []


def _parse_cantor_file(path: Path, tensors: dict[str, Any], header: str) -> EncoderFile:
    """Parse a file of `save_encoder_file`."""
    try:
        content = parse_json(header)
        if content["kind"] != _FORMAT:
            raise CheckpointError(f"{path} is a {content['kind']} file, which is another encoder")
        config = _config_of(content["config"])
        family = content["family"]
        if family not in FAMILIES:
            raise ValueError(f"the family {family!r} is unknown")
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path} has a damaged header: {error!r}") from error
    reader = _Reader(path, CANTOR, tensors, ForeignConfig())
    reader.check(config, tensors, [])
    return EncoderFile(path, CANTOR, family, config, tensors, {name: name for name in tensors})


def _config_of(fields: dict[str, Any]) -> Wav2Vec2Config:
    def layer(shape: dict[str, Any]) -> LayerShape:
        kept = shape.pop("kept_heads", None)
        return LayerShape(**shape, kept_heads=None if kept is None else tuple(kept))

    bias = fields.pop("relative_bias", None)
    return Wav2Vec2Config(
        stem=tuple((c, k, s) for c, k, s in fields.pop("stem")),
        layers=tuple(layer(shape) for shape in fields.pop("layers")),
        relative_bias=None if bias is None else RelativeBias(**bias),
        **fields,
    )


@functools.lru_cache(maxsize=8)
def _shapes(
    config: Wav2Vec2Config, most: int | None = None
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return the names and shapes of all parameters of the network.

    Raises: ValueError: when it has more than `most`, or cannot be built.
    """
    with bounded_meta(most):
        state = Wav2Vec2(config).state_dict()
    return tuple((name, tuple(tensor.shape)) for name, tensor in state.items())


def _parts_of(name: str) -> list[str]:
    """Return the names of the parts of a fused parameter."""
    if name == "position.conv.weight":
        return [f"{name}_v", f"{name}_g"]
    return [name.replace(".qkv.", f".{part}.") for part in "qkv"]


def _expected(
    name: str, shape: tuple[int, ...], tensors: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Return the expected shapes of a parameter, as one tensor or in parts."""
    if name in tensors:
        return {name: shape}
    if name == "position.conv.weight":
        return {f"{name}_v": shape, f"{name}_g": (1, 1, shape[2])}
    if ".qkv." in name:
        return {part: (shape[0] // 3, *shape[1:]) for part in _parts_of(name)}
    return {name: shape}


def _is_gate_scale(name: str, actual: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Allow WavLM's shape (1, N, 1, 1) of one number per head."""
    return name.endswith("bias_gate.scale") and actual == (1, *shape, 1, 1)


def _indices(names: Iterable[str], stack: str) -> set[int]:
    return {int(name.split(".")[1]) for name in names if name.startswith(f"{stack}.")}


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more
