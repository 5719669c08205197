"""`export`: a voice as ONNX graphs, to sing with where there is no torch."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from models.synthesizer.onnx import export_voice
from models.synthesizer.voice import WEIGHTS
from pipeline.errors import UserError
from pipeline.train.find_voice import read_any_voice


def export(checkpoint: Path, folder: Path) -> None:
    """Write the voice that `checkpoint` means into `folder`, which is made.

    Raises: UserError for what is no voice, for a folder of something else, and where onnx is
    missing.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder to write the graphs into")
    if (folder / WEIGHTS).exists():
        raise UserError(f"{folder} holds a voice already; name a folder for the graphs alone")
    voice = read_any_voice(checkpoint)
    if not voice.tensors:
        raise UserError(f"{checkpoint} is a voice that was exported; name the one it was made of")
    try:
        export_voice(folder, voice)
    except ValueError as error:
        raise UserError(str(error)) from error


def show_export(console: Console, folder: Path) -> None:
    """One line for each file."""
    for file in sorted(folder.glob("*.onnx")):
        size = f"{file.stat().st_size / 1e6:.1f} MB"
        console.print(f"{file}  {size}", markup=False, highlight=False, soft_wrap=True)
