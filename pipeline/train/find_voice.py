"""Where the voice is that a path means: ours, a run's, so-vits-svc's."""

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
    "name a voice's folder, a run's, or a G_*.pth of so-vits-svc with its config.json beside it"
)


def weights_file(path: Path) -> Path:
    """The file of a synthesizer's weights that `path` means.

    Of a run it is the last checkpoint's; of a folder with a config.json (so-vits-svc's, or the
    NAME/{model.pth, config.json} of its first releases) the G_*.pth of the largest number, or
    the only *.pth; of an exported voice it is the graph. Raises UserError.
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
    """The voice that `path` means; without tensors, of graphs. Raises UserError in a sentence."""
    file = weights_file(path)
    try:
        if is_graph(file):
            return OnnxSynthesizer(file).voice
        if file.name in (WEIGHTS, DESCRIPTION):
            return load_voice(file)
        if not (file.parent / SOVITS_CONFIG).is_file():
            raise UserError(
                f"{file} is no voice of ours, and a voice of so-vits-svc has its {SOVITS_CONFIG} "
                "beside it; those of other programs, such as RVC, cannot be sung with"
            )
        return read_voice(file, file.parent / SOVITS_CONFIG)
    except ValueError as error:  # a CheckpointError, or onnxruntime is missing
        raise UserError(str(error)) from error


def is_graph(file: Path) -> bool:
    return file.name == GRAPH


def _file_in(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / GRAPH).is_file():
        return folder / GRAPH
    if not (folder / SOVITS_CONFIG).is_file():
        raise UserError(f"{folder} holds no voice; {_KINDS}")
    found = sorted(folder.glob("*.pth"))
    if not found:
        raise UserError(f"{folder} has a {SOVITS_CONFIG} and no *.pth beside it")
    steps = {int(n[1]): file for file in found if (n := re.fullmatch(r"G_(\d+)", file.stem))}
    if steps:
        return steps[max(steps)]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{folder} has several models ({names}); name one")
    return found[0]
