"""Every checkpoint file of the wav2vec 2.0 family, as `models.encoders.wav2vec2` wants it.

    read_checkpoint   any file or folder -> Checkpoint: the whole network's shapes, and its tensors
                      as views of the file under our names
    Checkpoint.take   what one encoder needs of it -> configuration and state dict
    read_encoder      both, for the encoder's name

What a file is, its content says, never its name. Shapes are read from the tensors and the rest from
the configuration beside them; where that is silent, what all published networks of the family do.
Every key must be there, have its shape, and be known.
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

from models.checkpoint import (
    OWN_HEADER,
    CheckpointError,
    json_beside,
    load_weights,
    save_safetensors,
)
from models.encoders.encoder_names import (
    FAMILIES,
    NAMES,
    WHISPER,
    Family,
    fits,
    names_for,
    stranger,
    stranger_by_config,
)
from models.encoders.layouts import foreign_config
from models.encoders.layouts.foreign_config import Stated
from models.encoders.layouts.key_layouts import (
    DPHUBERT,
    FAIRSEQ,
    HUBERT_SOFT,
    HUGGING_FACE,
    LAYOUTS,
    OURS,
    KeyLayout,
)
from models.encoders.wav2vec2 import LayerShape, RelativeBias, Wav2Vec2, Wav2Vec2Config

__all__ = [
    "Checkpoint",
    "check_fit",
    "checkpoint_of",
    "is_whisper",
    "read_checkpoint",
    "read_encoder",
    "save_checkpoint",
]

_HEAD_DIM = 64  # of every published network
_WRAPPERS = ("model", "state_dict", "hubert", "model_state_dict", "weight")
_PREFIXES = ("module.", "hubert.", "wavlm.")
_FORMAT = "wav2vec2"


@dataclass(frozen=True)
class EncoderFile:
    """A whole network in a file.

    config: of all of it: all layers, the final norm and the final projection where it has them.
    tensors: under our names, query, key and value perhaps still apart and the weight norm perhaps
    still unfolded; views of the file in its dtypes.
    keys: our name -> the file's.
    """

    path: Path
    layout: KeyLayout
    family: Family
    config: Wav2Vec2Config
    tensors: Mapping[str, Tensor]
    keys: Mapping[str, str]

    @property
    def num_parameters(self) -> int:
        """Of the whole network, the weight norm folded."""
        return sum(math.prod(shape) for _, shape in _shapes(self.config))

    def take(
        self, layers: int | None = None, *, project: bool = False, normalize_wav: bool | None = None
    ) -> tuple[Wav2Vec2Config, dict[str, Tensor]]:
        """Shapes and float32 state dict of the network up to a layer; the rest is not read.

        Arguments as of `shaped`. Copies, except for float32 tensors of our own format: those stay
        views of the mapped file, so that loading costs nothing until they are used. They may be
        written to.
        """
        config = self.shaped(layers, project=project, normalize_wav=normalize_wav)
        return config, {name: self._tensor(name, shape) for name, shape in _shapes(config)}

    def shaped(
        self, layers: int | None = None, *, project: bool = False, normalize_wav: bool | None = None
    ) -> Wav2Vec2Config:
        """Shapes of the network up to a layer.

        layers: units leave after so many of them, or after the last if there are fewer, without the
        final norm; None: after all and the norm. project: through the final projection.
        normalize_wav: None: as the file states.

        Raises CheckpointError where there is no final projection to go through.
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
        copy = self.layout is not OURS
        parts = [self.tensors[part].to(torch.float32, copy=copy) for part in self._parts(name)]
        if name == "position.conv.weight" and len(parts) == 2:
            direction, size = parts
            return torch._weight_norm(direction, size, 2)
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(shape)

    def _parts(self, name: str) -> list[str]:
        return [name] if name in self.tensors else _parts_of(name)


def read_encoder_file(path: str | Path) -> EncoderFile:
    """The network in a file or in a Hugging Face folder; see the module.

    Raises CheckpointError, which names the keys and what the file seems to be.
    """
    path = Path(path)
    content, metadata = load_weights(path)
    if OWN_HEADER in metadata:
        return _ours(path, content, metadata[OWN_HEADER])
    if not path.is_dir() and HUGGING_FACE.signature not in _unwrapped(content):
        return checkpoint_of(path, content)  # a config.json beside it is of something else
    config_json = json_beside(path, "config.json")
    if path.is_dir() and (what := stranger_by_config(config_json)):
        raise CheckpointError(f"{path} seems to be {what}")
    return checkpoint_of(path, content, config_json, json_beside(path, "preprocessor_config.json"))


def is_whisper(path: str | Path) -> bool:
    """Whether a file or folder holds a Whisper, which `models.encoders.whisper` reads."""
    content, metadata = load_weights(path)
    if OWN_HEADER in metadata:
        return '"kind": "whisper"' in metadata[OWN_HEADER]
    return stranger(_unwrapped(content)) == WHISPER


def checkpoint_of(
    path: Path,
    content: Mapping[str, Any],
    config_json: Mapping[str, Any] = MappingProxyType({}),
    preprocessor_json: Mapping[str, Any] = MappingProxyType({}),
) -> EncoderFile:
    """As `read_encoder_file`, of what a foreign file holds.

    path: for errors. config_json, preprocessor_json: of Hugging Face's folder.
    """
    tensors = _unwrapped(content)
    if what := stranger(tensors):
        raise CheckpointError(f"{path} seems to be {what}")
    layout = _layout(path, tensors)
    tensors = {key: t for key, t in tensors.items() if not layout.is_beside(key)}
    try:
        if layout is FAIRSEQ:
            said = foreign_config.of_fairseq(content)
        elif layout is HUGGING_FACE:
            said = foreign_config.of_hugging_face(config_json, preprocessor_json)
        elif layout is DPHUBERT:
            said = foreign_config.of_dphubert(_dict(content.get("config")))
        else:
            said = Stated()
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error or 'its configuration is malformed'}") from error
    return _Reader(path, layout, tensors, said).read()


def read_encoder(
    name: str, path: str | Path, normalize_wav: bool | None = None
) -> tuple[Wav2Vec2Config, dict[str, Tensor]]:
    """Shapes and float32 state dict of the encoder `name` (a key of `kinds.NAMES`) in a file.

    normalize_wav: None: the name's default. Raises CheckpointError; for another encoder's file it
    says which names are right.
    """
    checkpoint, how = _chosen(name, path, normalize_wav)
    return checkpoint.take(**how)


def check_fit(name: str, path: str | Path) -> None:
    """Raises what `read_encoder` would, and reads no weights for it."""
    checkpoint, how = _chosen(name, path, None)
    checkpoint.shaped(**how)


def _chosen(
    name: str, path: str | Path, normalize_wav: bool | None
) -> tuple[EncoderFile, dict[str, Any]]:
    """The checkpoint, and what `name` takes of it."""
    checkpoint = read_encoder_file(path)
    wanted, width = NAMES[name], checkpoint.config.width
    if not fits(wanted, checkpoint.family, width):
        right = " or ".join(names_for(checkpoint.family, width)) or "none here"
        raise CheckpointError(
            f"{path} is {FAMILIES[checkpoint.family]} of width {width}: "
            f"its encoder is {right}, not {name}"
        )
    dim = checkpoint.config.project_dim
    if wanted.project and width == wanted.width and wanted.dim and dim not in (None, wanted.dim):
        raise CheckpointError(
            f"the final projection of {path} gives {dim} numbers, not {wanted.dim} as {name} does"
        )
    if normalize_wav is None:
        normalize_wav = wanted.normalize_wav
    project = dim is not None if wanted.project is None else wanted.project
    how = {"layers": wanted.layers, "project": project, "normalize_wav": normalize_wav}
    return checkpoint, how


def save_checkpoint(
    checkpoint: EncoderFile, path: str | Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write a whole network as our own format: safetensors, its configuration in the header."""
    has_projection = checkpoint.config.project_dim is not None
    config, tensors = checkpoint.take(project=has_projection)
    header = {"kind": _FORMAT, "family": checkpoint.family, "config": dataclasses.asdict(config)}
    save_safetensors(
        path, {k: t.to(dtype) for k, t in tensors.items()}, {OWN_HEADER: json.dumps(header)}
    )


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _unwrapped(content: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict in a checkpoint, without what stands before every key."""
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
        f"{path} is no encoder that is known here: it has none of "
        f"{', '.join(layout.signature for layout in LAYOUTS)}; it has {some}, ..."
    )


@dataclass(frozen=True)
class _Reader:
    """Fits what a file holds to the network, or says why it does not fit."""

    path: Path
    layout: KeyLayout
    foreign: Mapping[str, Any]
    said: Stated

    def read(self) -> EncoderFile:
        keys, unknown = self.renamed()
        tensors = {name: self.foreign[key] for name, key in keys.items()}
        config = self.config(tensors)
        if self.layout is DPHUBERT:
            for name in _unused(config, tensors):
                del tensors[name], keys[name]
        family: Family = "hubert"
        if self.layout is HUBERT_SOFT:
            family = "hubert-soft"
        elif self.layout is DPHUBERT:
            family = "dpwavlm" if self.said.kept_heads else "dphubert"
        elif config.relative_bias is not None:
            family = "wavlm"
        self.check(config, tensors, unknown)
        return EncoderFile(self.path, self.layout, family, config, tensors, keys)

    def renamed(self) -> tuple[dict[str, str], list[str]]:
        """(our name -> their key, keys that nothing here has)."""
        keys: dict[str, str] = {}
        unknown: list[str] = []
        for key, value in self.foreign.items():
            name = self.layout.ours(key)
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
                max_distance=self.said.max_distance or RelativeBias.max_distance,
            )
        stem_norm = "layer" if "stem.1.norm.weight" in tensors else "group"
        pre_norm = stem_norm == "layer" if self.said.pre_norm is None else self.said.pre_norm
        normalize_wav = self.said.normalize_wav
        if normalize_wav is None:  # as the published WavLMs do: Large does, Base and Base+ do not
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
            activation=self.said.activation or "gelu",
            project_dim=None if projection is None else projection.shape[0],
            pad=self.layout.pad,
            normalize_wav=normalize_wav,
        )

    def stem(self, tensors: Mapping[str, Tensor]) -> tuple[tuple[int, int, int], ...]:
        count = 1 + max(_indices(tensors, "stem"), default=0)
        shapes = [self.shape(tensors, f"stem.{i}.conv.weight", 3) for i in range(count)]
        kernels = tuple(kernel for _, _, kernel in shapes)
        strides = self.said.strides or foreign_config.usual_strides(kernels)
        if len(strides) != count:
            raise CheckpointError(
                f"{self.seems()} with {count} convolutions of kernels {kernels}, "
                f"and its configuration does not state their strides"
            )
        return tuple(
            (channels, kernel, stride)
            for (channels, _, kernel), stride in zip(shapes, strides, strict=True)
        )

    def head_dim(self, width: int, bias: RelativeBias | None) -> int:
        if self.said.head_dim:
            return self.said.head_dim
        heads = (bias.heads if bias else self.said.heads) or width // _HEAD_DIM
        if heads < 1 or width % heads:
            raise CheckpointError(f"{self.seems()} of width {width}, but with {heads} heads")
        return width // heads

    def layers(
        self, tensors: Mapping[str, Tensor], width: int, bias: RelativeBias | None
    ) -> tuple[LayerShape, ...]:
        head_dim = self.head_dim(width, bias)
        count = self.said.layers or 1 + max(_indices(tensors, "layers"), default=-1)
        said = self.said
        shapes = []
        for i in range(count):
            attention = said.attention[i] if i < len(said.attention) else True
            feed_forward = said.feed_forward[i] if i < len(said.feed_forward) else True
            kept = said.kept_heads[i] if i < len(said.kept_heads) else None
            inner = 0
            if feed_forward:
                _, inner = self.shape(tensors, f"layers.{i}.feed_forward.fc2.weight", 2)
            here = 0
            if attention:
                _, inside = self.shape(tensors, f"layers.{i}.attention.out.weight", 2)
                here = inside // head_dim if kept is None else len(kept)
            if bias is None or not attention or kept == tuple(range(bias.heads)):
                kept = None
            shapes.append(
                LayerShape(heads=here, head_dim=head_dim, feed_forward=inner, kept_heads=kept)
            )
        return tuple(shapes)

    def shape(self, tensors: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
        if name not in tensors:
            raise CheckpointError(f"{self.seems()}, but lacks {self.layout.theirs(name)}")
        shape = tuple(tensors[name].shape)
        if len(shape) != ndim or 0 in shape:
            key = self.layout.theirs(name)
            raise CheckpointError(f"{self.seems()}, but its {key} is {list(shape)}")
        return shape

    def check(
        self, config: Wav2Vec2Config, tensors: Mapping[str, Tensor], unknown: list[str]
    ) -> None:
        """Raises CheckpointError where tensors are not exactly those of the network."""
        expected: dict[str, tuple[int, ...]] = {}
        try:
            shapes = _shapes(config)
        except (TypeError, ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"{self.seems()}, but of impossible shape: {error}") from error
        for name, shape in shapes:
            expected |= _expected(name, shape, tensors)
        theirs = self.layout.theirs
        missing = [theirs(name) for name in expected if name not in tensors]
        if missing:
            raise CheckpointError(f"{self.seems()}, but lacks {_some(missing)}")
        extra = unknown + [theirs(name) for name in tensors if name not in expected]
        if extra:
            raise CheckpointError(f"{self.seems()}, but has {_some(extra)}, which none has")
        for name, shape in expected.items():
            found = tuple(tensors[name].shape)
            if found != shape and not _is_gate_scale(name, found, shape):
                raise CheckpointError(
                    f"{self.seems()}, but its {theirs(name)} is {list(found)} where "
                    f"{list(shape)} is needed"
                )

    def seems(self) -> str:
        return f"{self.path} seems to be {self.layout.title}"


def _unused(config: Wav2Vec2Config, tensors: Mapping[str, Tensor]) -> list[str]:
    """What pruning leaves in a file although the pruned network does not use it.

    The norms of a pre-norm network's absent blocks; and, where layer 0 has no attention and so no
    position bias, the gates of that bias in the other layers.
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


def _ours(path: Path, tensors: dict[str, Any], header: str) -> EncoderFile:
    """A file of `save_checkpoint`."""
    try:
        content = json.loads(header)
        if content["kind"] != _FORMAT:
            raise CheckpointError(f"{path} holds a {content['kind']}, which is another encoder")
        config = _config_of(content["config"])
        family = content["family"]
        if family not in FAMILIES:
            raise ValueError(f"no family is called {family!r}")
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header that is not Cantor's ({error!r})") from error
    reader = _Reader(path, OURS, tensors, Stated())
    reader.check(config, tensors, [])
    return EncoderFile(path, OURS, family, config, tensors, {name: name for name in tensors})


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
def _shapes(config: Wav2Vec2Config) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Every parameter of the network and its shape."""
    with torch.device("meta"):
        state = Wav2Vec2(config).state_dict()
    return tuple((name, tuple(tensor.shape)) for name, tensor in state.items())


def _parts_of(name: str) -> list[str]:
    """What a fused parameter is made of."""
    if name == "position.conv.weight":
        return [f"{name}_v", f"{name}_g"]
    return [name.replace(".qkv.", f".{part}.") for part in "qkv"]


def _expected(
    name: str, shape: tuple[int, ...], tensors: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """The shapes that a parameter of ours asks for, as one tensor or in parts."""
    if name in tensors:
        return {name: shape}
    if name == "position.conv.weight":
        return {f"{name}_v": shape, f"{name}_g": (1, 1, shape[2])}
    if ".qkv." in name:
        return {part: (shape[0] // 3, *shape[1:]) for part in _parts_of(name)}
    return {name: shape}


def _is_gate_scale(name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """WavLM keeps one number a head as (1, N, 1, 1)."""
    return name.endswith("bias_gate.scale") and found == (1, *shape, 1, 1)


def _indices(names: Iterable[str], of: str) -> set[int]:
    return {int(name.split(".")[1]) for name in names if name.startswith(f"{of}.")}


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more
