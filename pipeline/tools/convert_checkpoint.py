"""`convert-encoder`: describe a checkpoint, and write it in a format that loads faster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoint import load_weights, save_safetensors, sha256_of, sibling_json
from models.encoders.encoder_names import FAMILIES, names_for
from models.encoders.layouts import EncoderFile, is_whisper, read_encoder_file, save_encoder_file
from models.encoders.onnx import describe_onnx
from models.encoders.whisper import WhisperConfig, header, read_whisper
from models.onnx_session import is_onnx
from pipeline.errors import UserError
from pipeline.reports.command_summary import Summary
from pipeline.storage.weight_files import require_safetensors

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def checkpoint_summary(source: Path, describe: bool, out: Path | None) -> Summary:
    """Return the description of `source` if that is wanted, and the file that is written."""
    facts = describe_checkpoint(source) if describe else {}
    lines = [f"{label:13} {value}" for label, value in facts.items()]
    if out is not None:
        lines.append(f"written to {out}")
    return Summary(parts=lines, figures=facts | ({} if out is None else {"file": str(out)}))


def describe_checkpoint(path: Path) -> dict[str, str]:
    """Return kind, shapes, dtype, size and hash of a checkpoint, by label.

    Raises: UserError: when it is not an encoder's checkpoint.
    """
    if is_onnx(path):
        with _user_errors():
            return dict([*describe_onnx(path), ("sha256", sha256_of(path))])
    checkpoint = _read(path)
    if isinstance(checkpoint, EncoderFile):
        lines = _lines_of_network(checkpoint)
        if "WavLMForXVector" in sibling_json(path, "config.json").get("architectures", ()):
            lines.append(("head", "x-vectors, for xvector.checkpoint"))
    else:
        config, tensors = checkpoint
        lines = [
            ("kind", "audio encoder of Whisper"),
            ("encoder.name", "whisper-ppg (width 1024) or whisper-ppg-large (1280)"),
            ("layers", f"{config.layers}, with {config.heads} heads"),
            ("width", f"{config.width}, feed-forward {config.feed_forward}"),
            ("units", f"{config.width} wide, 50 frames per second"),
            ("dtype", _dtypes(_stored(path))),
            ("parameters", f"{sum(tensor.numel() for tensor in tensors.values()):,}"),
        ]
    return dict([*lines, ("sha256", sha256_of(path))])


def _lines_of_network(checkpoint: EncoderFile) -> list[tuple[str, str]]:
    config = checkpoint.config
    heads = sorted({layer.heads for layer in config.layers})
    inner = sorted({layer.feed_forward for layer in config.layers})
    norm = "before" if config.pre_norm else "after"
    units = f"{config.width} wide"
    if config.project_dim is not None:
        units += f", {config.project_dim} through the final projection"
    return [
        ("kind", FAMILIES[checkpoint.family]),
        ("file", checkpoint.layout.title),
        ("encoder.name", ", ".join(names_for(checkpoint.family, config.width)) or "none"),
        ("layers", f"{len(config.layers)}, with {_span(heads)} heads; norm {norm} each block"),
        ("width", f"{config.width}, feed-forward {_span(inner)}"),
        (
            "convolutions",
            f"{len(config.stem)}, {_span(sorted({c for c, _, _ in config.stem}))} channels",
        ),
        ("units", f"{units}, {16000 / config.hop_length:g} frames per second"),
        ("waveform", "normalised" if config.normalize_wav else "not normalised"),
        ("dtype", _dtypes(checkpoint.tensors.values())),
        ("parameters", f"{checkpoint.num_parameters:,}"),
    ]


def convert_checkpoint(source: Path, out: Path, dtype: str = "float32") -> None:
    """Write the encoder in `source` to `out`, atomically. dtype: a key of `DTYPES`.

    Raises: UserError: when `source` cannot be read or `out` cannot be written.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}; it must be {' or '.join(DTYPES)}")
    require_safetensors(out)
    if not out.parent.is_dir():
        raise UserError(f"{out} cannot be written: its folder does not exist")
    if out.exists() and source.exists() and out.samefile(source):
        raise UserError(f"{out} is the checkpoint itself; name another file")
    checkpoint = _read(source)
    if isinstance(checkpoint, EncoderFile):
        save_encoder_file(checkpoint, out, DTYPES[dtype])
    else:
        config, tensors = checkpoint
        stored = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
        save_safetensors(out, stored, header(config))


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
    """Return the tensors of a Whisper file in their stored dtype."""
    content, _ = load_weights(path)
    tensors = content.get("model_state_dict", content)
    return [tensor for tensor in tensors.values() if isinstance(tensor, Tensor)]


def _dtypes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def _span(numbers: list[int]) -> str:
    """Format sorted numbers: the only one, or the least and the greatest."""
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    return f"{numbers[0]} to {numbers[-1]}"
