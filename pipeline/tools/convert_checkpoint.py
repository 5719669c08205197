"""`convert-encoder`: what a checkpoint is, and the same encoder in a format that loads faster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from models.checkpoint import load_weights, save_safetensors, sha256_of, sibling_json
from models.encoders.encoder_names import FAMILIES, names_for
from models.encoders.layouts import EncoderFile, is_whisper, read_encoder_file, save_encoder_file
from models.encoders.onnx import describe_onnx
from models.encoders.whisper import WhisperConfig, header, read_whisper
from models.onnx_session import is_onnx
from pipeline.errors import UserError
from pipeline.storage.weight_files import require_safetensors

DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Description:
    """What a checkpoint is. lines: label and value, for a person."""

    lines: tuple[tuple[str, str], ...]


def describe_checkpoint(path: Path) -> Description:
    """Kind, shapes, dtype, size and hash of a checkpoint. Raises UserError for what is none."""
    if is_onnx(path):
        with _user_errors():
            return Description((*describe_onnx(path), ("sha256", sha256_of(path))))
    found = _read(path)
    if isinstance(found, EncoderFile):
        lines = _lines_of_network(found)
        if "WavLMForXVector" in sibling_json(path, "config.json").get("architectures", ()):
            lines.append(("head", "x-vectors, for xvector.checkpoint and purity"))
    else:
        config, tensors = found
        lines = [
            ("kind", "the audio encoder of a Whisper"),
            ("encoder.name", "whisper-ppg or whisper-ppg-large, by width 1024 or 1280"),
            ("layers", f"{config.layers}, of {config.heads} heads"),
            ("width", f"{config.width}, feed-forward {config.feed_forward}"),
            ("units", f"{config.width} numbers, 50 frames a second"),
            ("dtype", _dtypes(_stored(path))),
            ("parameters", f"{sum(tensor.numel() for tensor in tensors.values()):,}"),
        ]
    return Description((*lines, ("sha256", sha256_of(path))))


def _lines_of_network(checkpoint: EncoderFile) -> list[tuple[str, str]]:
    config = checkpoint.config
    heads = sorted({layer.heads for layer in config.layers})
    inner = sorted({layer.feed_forward for layer in config.layers})
    norm = "before attention and feed-forward" if config.pre_norm else "after them"
    units = f"{config.width} numbers"
    if config.project_dim is not None:
        units += f", {config.project_dim} through the final projection"
    return [
        ("kind", FAMILIES[checkpoint.family]),
        ("file", f"of {checkpoint.layout.title}"),
        ("encoder.name", ", ".join(names_for(checkpoint.family, config.width)) or "none"),
        ("layers", f"{len(config.layers)}, of {_span(heads)} heads; norms stand {norm}"),
        ("width", f"{config.width}, feed-forward {_span(inner)}"),
        ("convolutions", f"{len(config.stem)} of {_span(sorted({c for c, _, _ in config.stem}))}"),
        ("units", f"{units}, {16000 / config.hop_length:g} frames a second"),
        ("waveform", "is normalised" if config.normalize_wav else "is taken as it is"),
        ("dtype", _dtypes(checkpoint.tensors.values())),
        ("parameters", f"{checkpoint.num_parameters:,}"),
    ]


def convert_checkpoint(source: Path, out: Path, dtype: str = "float32") -> None:
    """Write the encoder in `source` to `out`, whole or not at all. dtype: a key of `DTYPES`.

    Raises UserError for what cannot be read, and where `out` cannot be.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}; it must be {' or '.join(DTYPES)}")
    require_safetensors(out)
    if not out.parent.is_dir():
        raise UserError(f"{out} must be a file in a folder that exists")
    if out.exists() and source.exists() and out.samefile(source):
        raise UserError(f"{out} is the checkpoint itself; name another file to write")
    found = _read(source)
    if isinstance(found, EncoderFile):
        save_encoder_file(found, out, DTYPES[dtype])
    else:
        config, tensors = found
        stored = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
        save_safetensors(out, stored, header(config))


def show_description(console: Console, description: Description) -> None:
    """One line for each thing known."""
    for label, value in description.lines:
        console.print(f"{label:13} {value}", markup=False, highlight=False, soft_wrap=True)


def _read(path: Path) -> EncoderFile | tuple[WhisperConfig, dict[str, Tensor]]:
    with _user_errors():
        return read_whisper(path) if is_whisper(path) else read_encoder_file(path)


@contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # CheckpointError, or onnxruntime is missing
        raise UserError(str(error)) from error


def _stored(path: Path) -> list[Tensor]:
    """The tensors of a file of Whisper's as they lie in it."""
    content, _ = load_weights(path)
    tensors = content.get("model_state_dict", content)
    return [tensor for tensor in tensors.values() if isinstance(tensor, Tensor)]


def _dtypes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def _span(numbers: list[int]) -> str:
    """Of sorted numbers: the one, or the least and the most."""
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    return f"{numbers[0]} to {numbers[-1]}"
