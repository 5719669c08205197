"""The folder of a training run: its settings, log and checkpoints.

RUN/run.json     the settings that the numbers depend on
RUN/config.yaml  every setting of the last start
RUN/log.jsonl    a line a step
RUN/checkpoints/step-00001000/
    voice.safetensors, voice.json  the voice, ready to use
    training.safetensors           the state to resume from
    checkpoint.json                step, validation and SHA-256 of the others

A checkpoint gets its name when it is complete and on the disk, and loses it before it is deleted.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from models.checkpoint import (
    CHECKPOINT_RECORD,
    CheckpointError,
    read_safetensors,
    require_sha256,
    save_safetensors,
    sha256_of,
)
from models.input_file import read_json
from pipeline.errors import StorageFault, UserError
from pipeline.fingerprint import differences, neutral_values
from pipeline.storage.atomic import commit_file, sync_folder
from pipeline.storage.step_log import StepLog
from pipeline.train.config import TrainConfig

TRAINING_FILE = "training.safetensors"
_BEST_BY = "mel_distance"


class RunFolder:
    """The folder of a run; the module's docstring lists its files. Only one process writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = StepLog(folder / "log.jsonl")

    def require_run(self) -> None:
        """Check that the folder is a run, empty or absent. Writes nothing.

        Raises: UserError: when it has other files.
        """
        if not self.folder.is_dir() or (self.folder / "run.json").exists():
            return
        others = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith("."))
        if others:
            raise UserError(
                f"{self.folder} has {others[0]} and no run.json: it is not a training run; name a "
                "new folder"
            )

    def begin(self, dataset: str, settings: Mapping[str, Any], config_yaml: str) -> None:
        """Start a run, or resume one. settings: all that the numbers depend on, by name.

        Raises: UserError: when there are checkpoints made with other settings.
        """
        shutil.rmtree(self.folder / ".tmp", ignore_errors=True)
        before = self.settings()
        if before is not None and any((self.folder / "checkpoints").glob("step-*")):
            differing = differences(before, settings, neutral_values(TrainConfig))
            if differing:
                raise UserError(
                    f"{self.folder} has a run with other settings ({'; '.join(differing)}); give "
                    "the same ones to resume it, or name a new folder"
                )
        self.write_json("run.json", {"format": 1, "dataset": dataset, "settings": settings})
        commit_file(self.folder, "config.yaml", lambda file: file.write(config_yaml.encode()))

    def settings(self) -> dict[str, Any] | None:
        """Return the settings of the run; None for a new one.

        Raises: UserError: when run.json is damaged.
        """
        path = self.folder / "run.json"
        try:
            settings = dict(read_json(path)["settings"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not the run.json of a Cantor run ({error})") from error
        return settings

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a file into the folder."""
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        commit_file(self.folder, name, lambda file: file.write(text.encode()))


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. validation: the measures of its step; {} when it was not validated."""

    folder: Path
    step: int
    validation: dict[str, float]

    def read(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors and notes of the state to resume from."""
        return read_safetensors(self.folder / TRAINING_FILE)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Return the checkpoint in `folder`, after its files were compared with their SHA-256.

    Raises: CheckpointError: when it is damaged or incomplete.
    """
    checkpoint, sums = _facts(folder)
    for name, expected in sums.items():
        require_sha256(folder / name, expected, CHECKPOINT_RECORD)
    return checkpoint


def _facts(folder: Path) -> tuple[Checkpoint, dict[str, str]]:
    """Return the checkpoint in `folder` and the SHA-256 of each of its files.

    Raises: CheckpointError: when checkpoint.json is damaged.
    """
    path = folder / CHECKPOINT_RECORD
    try:
        facts = read_json(path)
        step, validation, sums = facts["step"], dict(facts["validation"]), dict(facts["sha256"])
        if type(step) is not int or not all(
            isinstance(value, int | float) for value in validation.values()
        ):
            raise ValueError("its step or a measure is not a number")
        if not all(isinstance(name, str) and Path(name).name == name for name in sums):
            raise ValueError("it lists something other than files of its folder")
        return Checkpoint(folder, step, validation), sums
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error


class Checkpoints:
    """The folder RUN/checkpoints."""

    def __init__(self, folder: Path, keep_last: int = 3, keep_best: bool = True) -> None:
        self.folder = folder
        self.keep_last, self.keep_best = keep_last, keep_best

    def save(
        self, step: int, fill: Callable[[Path], None], validation: Mapping[str, float]
    ) -> Checkpoint:
        """Keep what `fill` writes into a folder, whole or not at all; delete old checkpoints.

        Raises: OSError: when the storage fails; StorageFault: when safetensors cannot write.
        """
        final = self.folder_of(step)
        temporary = self.folder / f".new-{final.name}-{secrets.token_hex(4)}"
        temporary.mkdir(parents=True)
        try:
            fill(temporary)
            _seal(temporary, step, validation)
            if final.exists():  # it is damaged, or the run would have resumed from it
                _remove(final)
            temporary.rename(final)
        except SafetensorError as error:  # also for a full disk
            raise StorageFault(f"cannot write {final}: {error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(self.folder)
        self._delete_old()
        return Checkpoint(final, step, dict(validation))

    def latest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """Return the last checkpoint that is not damaged; None in a run without checkpoints.

        warn: gets a line for each later, damaged one.

        Raises: UserError: when all are damaged.
        """
        folders = self._folders()
        for folder in reversed(folders):
            try:
                return read_checkpoint(folder)
            except CheckpointError as error:
                warn(f"{error}; the checkpoint before it is used")
        if folders:
            raise UserError(
                f"all checkpoints in {self.folder} are damaged; remove {self.folder.parent} to "
                "start over"
            )
        return None

    def best(self) -> Checkpoint | None:
        """Return the checkpoint of the least finite mel distance; None when no one has any.

        Their files are not checked.
        """
        known = [c for c in self._readable() if _distance(c.validation) is not None]
        return min(known, key=lambda c: (c.validation[_BEST_BY], c.step), default=None)

    def would_be_best(self, validation: Mapping[str, float]) -> bool:
        """Return True when no checkpoint has a smaller mel distance."""
        best = self.best()
        value = _distance(validation)
        return value is not None and (best is None or value < best.validation[_BEST_BY])

    def folder_of(self, step: int) -> Path:
        """Return the folder of the checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def sweep(self) -> None:
        """Remove what a killed run left half-written or half-deleted."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.startswith("."):
                    shutil.rmtree(path)

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _readable(self) -> Iterator[Checkpoint]:
        for folder in self._folders():
            with suppress(CheckpointError):
                yield _facts(folder)[0]

    def _delete_old(self) -> None:
        best = self.best() if self.keep_best else None
        for folder in self._folders()[: -self.keep_last]:
            if best is None or folder != best.folder:
                _remove(folder)


def _distance(validation: Mapping[str, float]) -> float | None:
    """Return the mel distance; None when it was not measured or is not finite."""
    value = validation.get(_BEST_BY, math.nan)
    return value if math.isfinite(value) else None


def _seal(folder: Path, step: int, validation: Mapping[str, float]) -> None:
    """List the files of a checkpoint with their SHA-256, and sync all of it to the disk."""
    sums = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    facts = {"step": step, "validation": dict(validation), "sha256": sums}
    (folder / CHECKPOINT_RECORD).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def _remove(folder: Path) -> None:
    """Delete a checkpoint, which loses its name first: half of it is never taken for one."""
    doomed = folder.with_name(f".old-{folder.name}-{secrets.token_hex(4)}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def network_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return copies on the CPU; a tensor with several names is copied for each name."""
    return {
        name: tensor.detach().to("cpu", copy=True) for name, tensor in network.state_dict().items()
    }


def optimizer_tensors(optimizer: Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    """Return moments and counts as "<parameter>/<kind>". names: of the parameters, in order."""
    return {
        f"{name}/{kind}": value.detach().to("cpu", copy=True)
        for name, parameter in zip(names, _parameters(optimizer), strict=True)
        for kind, value in optimizer.state[parameter].items()
    }


def load_optimizer(
    optimizer: Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor]
) -> None:
    """Restore what `optimizer_tensors` returned.

    Raises: CheckpointError: when the tensors do not fit.
    """
    states: dict[int, dict[str, Tensor]] = {}
    index = {name: number for number, name in enumerate(names)}
    shapes = [parameter.shape for parameter in _parameters(optimizer)]
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        number = index.get(name)
        if number is None or (kind != "step" and tensor.shape != shapes[number]):
            raise CheckpointError(f"there is no parameter for the optimizer's {key}")
        states.setdefault(number, {})[kind] = tensor.clone()  # out of the mapped file
    groups = optimizer.state_dict()["param_groups"]
    try:
        optimizer.load_state_dict({"state": states, "param_groups": groups})
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the optimizer's state does not fit: {error}") from error


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def join(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the tensors of several parts: {"generator": {"a": ...}} -> {"generator/a": ...}."""
    return {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}


def part_of(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Return one part of what `join` returned."""
    return {
        name.removeprefix(f"{part}/"): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{part}/")
    }


def write_training(folder: Path, tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
    """Write the state to resume from into the folder of a checkpoint."""
    save_safetensors(folder / TRAINING_FILE, tensors, notes)


def load_network_state(network: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy tensors of the file `source` into a network.

    Raises: CheckpointError: when names or shapes differ.
    """
    try:
        network.load_state_dict(dict(tensors))
    except RuntimeError as error:
        line = str(error).partition("\n")[2].partition("\n")[0].strip() or str(error)
        raise CheckpointError(f"{source} does not fit the networks: {line}") from error


@torch.no_grad()
def move_average(averaged: nn.Module, network: nn.Module, decay: float) -> None:
    """Set averaged <- decay * averaged + (1 - decay) * network; buffers are copied."""
    torch._foreach_lerp_(list(averaged.parameters()), list(network.parameters()), 1 - decay)
    for target, source in zip(averaged.buffers(), network.buffers(), strict=True):
        target.copy_(source)
