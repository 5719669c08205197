"""`export`: a voice as ONNX graphs for onnxruntime, or as files of so-vits-svc."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from models.synthesizer.onnx import GRAPH, export_voice
from models.synthesizer.sovits.files import write_voice
from models.synthesizer.voice import WEIGHTS, Voice
from pipeline.errors import UserError
from pipeline.reports.command_summary import Summary
from pipeline.settings import suggest
from pipeline.train.find_voice import SOVITS_CONFIG, read_any_voice
from stages.units import EncoderConfig


def export(checkpoint: Path, folder: Path, file_format: str = "onnx") -> list[Path]:
    """Write the voice of `checkpoint` into `folder`, and return the files. file_format: in FORMATS.

    Raises: UserError: when `checkpoint` is not a voice, `folder` has another voice, the format
    cannot represent the voice, or onnx is not installed.
    """
    if file_format not in FORMATS:
        raise UserError(f"--format is '{file_format}'{suggest(file_format, FORMATS)}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder to write into")
    if (folder / WEIGHTS).exists():
        raise UserError(f"{folder} already has a voice; name another folder")
    voice = read_any_voice(checkpoint)
    if not voice.tensors:
        raise UserError(f"{checkpoint} is an exported voice; name the voice that it was made from")
    try:
        return FORMATS[file_format](voice, folder)
    except ValueError as error:
        raise UserError(str(error)) from error


def export_summary(files: list[Path]) -> Summary:
    """Return one line for each file that was written."""
    sizes = {str(file): file.stat().st_size for file in files}
    lines = [f"{file}  {size / 1e6:.1f} MB" for file, size in sizes.items()]
    return Summary(parts=lines, figures={"bytes": sizes})


def _write_onnx(voice: Voice, folder: Path) -> list[Path]:
    export_voice(folder, voice)
    return sorted(folder.glob("*.onnx"))


def _write_sovits(voice: Voice, folder: Path) -> list[Path]:
    """Write G_STEP.pth and config.json; so-vits-svc loads them to the same bits.

    Raises: ValueError: when so-vits-svc cannot represent the voice; UserError: when the folder has
    files of a voice already.
    """
    for name in (SOVITS_CONFIG, GRAPH):
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists already; name another folder")
    changed = EncoderConfig(**(voice.extraction or {}).get("encoder", {})).meaning()
    if changed:
        settings = " ".join(f"encoder.{key}={value}" for key, value in sorted(changed.items()))
        raise ValueError(
            f"so-vits-svc cannot use this voice: it was trained on units made with {settings}, "
            "which so-vits-svc does not have"
        )
    file = folder / f"G_{voice.step}.pth"
    write_voice(voice, file)
    return [file, folder / SOVITS_CONFIG]


FORMATS: dict[str, Callable[[Voice, Path], list[Path]]] = {
    "onnx": _write_onnx,
    "sovits": _write_sovits,
}
