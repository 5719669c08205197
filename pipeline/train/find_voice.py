"""Locating and reading the voice at a path: a Cantor voice, a run, or a so-vits-svc voice."""

from __future__ import annotations

import re
from pathlib import Path

from models.synthesizer.onnx import GRAPH, OnnxSynthesizer
from models.synthesizer.sovits.files import read_voice
from models.synthesizer.voice import DESCRIPTION, WEIGHTS, Voice, load_voice
from pipeline.errors import UserError
from pipeline.train.run_folder import Checkpoints

SOVITS_CONFIG = "config.json"
_KINDS = (
    "name the folder of a voice or of a run, or a G_*.pth of so-vits-svc with config.json in the "
    "same folder"
)


def weights_file(path: Path) -> Path:
    """Return the file with the weights of the voice at `path`.

    For a run, the last checkpoint's. For a folder with a config.json (of so-vits-svc, or the
    NAME/{model.pth, config.json} of its first releases), the G_*.pth of the largest number, or the
    only *.pth. For an exported voice, the graph.

    Raises: UserError: when there is no voice.
    """
    if path.is_dir() and (path / "run.json").exists():
        latest = Checkpoints(path / "checkpoints").latest(lambda line: None)
        if latest is None:
            raise UserError(f"the run {path} has no checkpoint yet")
        path = latest.folder
    if path.is_dir():
        return _file_in(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; {_KINDS}")
    return path


def read_any_voice(path: Path) -> Voice:
    """Return the voice at `path`; the voice of a graph has no tensors.

    Raises: UserError: when there is no voice, or it cannot be read.
    """
    file = weights_file(path)
    try:
        if is_graph(file):
            return OnnxSynthesizer(file).voice
        if file.name in (WEIGHTS, DESCRIPTION):
            return load_voice(file)
        if not (file.parent / SOVITS_CONFIG).is_file():
            raise UserError(
                f"{file} is not a Cantor voice. A so-vits-svc voice needs {SOVITS_CONFIG} in the "
                "same folder; voices of other programs, such as RVC, are not supported"
            )
        return read_voice(file, file.parent / SOVITS_CONFIG)
    except ValueError as error:  # a CheckpointError, or onnxruntime is missing
        raise UserError(str(error)) from error


def is_graph(file: Path) -> bool:
    """Return True for the ONNX graph of an exported voice."""
    return file.name == GRAPH


def _file_in(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / GRAPH).is_file():
        return folder / GRAPH
    if not (folder / SOVITS_CONFIG).is_file():
        raise UserError(f"{folder} holds no voice; {_KINDS}")
    files = sorted(folder.glob("*.pth"))
    if not files:
        raise UserError(f"{folder} has a {SOVITS_CONFIG} but no *.pth")
    steps = {int(n[1]): file for file in files if (n := re.fullmatch(r"G_(\d+)", file.stem))}
    if steps:
        return steps[max(steps)]
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{folder} has several models ({names}); name one file")
    return files[0]
