"""The output of a run: log, TensorBoard, validation and checkpoints. One process writes it.

Tested by tests/pipeline/train/test_trainer.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from models.synthesizer.batch import Batch
from models.synthesizer.voice import Voice, VoiceEncoder, save_voice
from pipeline.dataset.shard_dataset import ShardDataset
from pipeline.errors import UserError, first_names
from pipeline.train.config import TrainConfig
from pipeline.train.run_folder import Checkpoints, RunFolder, write_training
from pipeline.train.train_state import REMEDY, TrainState
from pipeline.train.validation import Metrics, describe_measures, fixed_clips
from pipeline.train.watch import Watch


@contextmanager
def open_writer(
    folder: RunFolder,
    checkpoints: Checkpoints,
    config: TrainConfig,
    data: ShardDataset,
    state: TrainState,
    watch: Watch,
) -> Iterator[RunWriter]:
    """Open the log and TensorBoard at the step that `state` is at."""
    done = state.steps_done
    clips = _validation_clips(config, data, watch)
    with (
        closing(
            Metrics(folder.folder, clips, state.generator.config, config.mel, step=done)
        ) as metrics,
        folder.log.open_from(done + 1 if done else 0) as log,
    ):
        yield RunWriter(checkpoints, config, data, state, watch, metrics, log)


class RunWriter:
    """Writes what a step measured, validates and saves when that is due, and informs the watch."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        config: TrainConfig,
        data: ShardDataset,
        state: TrainState,
        watch: Watch,
        metrics: Metrics,
        log: TextIO,
    ) -> None:
        self.checkpoints, self.config, self.data = checkpoints, config, data
        self.state, self.watch, self.metrics, self.log = state, watch, metrics, log
        self.validation: dict[str, float] = {}  # the last one
        self._validated_at = -1
        self._saved_at = state.steps_done if state.steps_done else -1

    def begin(self) -> None:
        """Start the watch; validate a new run before its first step."""
        self.watch.begin(self.state.steps_done, self.config.run.steps)
        if self.state.steps_done == 0:
            self._validate()
            if self.validation:
                line = {"step": 0, "validation": _json_values(self.validation)}
                self.log.write(json.dumps(line) + "\n")

    def write_step(self, line: dict[str, Any], losses: Mapping[str, float]) -> bool:
        """Write a step that is done. line: for the log. Returns whether the run is to stop."""
        run, done = self.config.run, self.state.steps_done
        last = done == run.steps
        if done % run.log_every == 0 or last:
            self.metrics.log(done, {k: v for k, v in line.items() if k != "step"})
        if done % run.validate_every == 0 or last:
            self._validate()
            if self.validation:
                line["validation"] = _json_values(self.validation)
        self.log.write(json.dumps(_json_values(line)) + "\n")
        self.log.flush()
        if done % run.save_every == 0 or last or (run.keep_best and self._is_best()):
            self._save()
        return self.watch.step(done, losses)

    def save_unsaved(self) -> None:
        """Save the state, unless its checkpoint exists."""
        if self._saved_at != self.state.steps_done:
            self._save()

    def _validate(self) -> None:
        done = self.state.steps_done
        self.validation = self.metrics.validate(done, self.state.voice)
        self._validated_at = done
        if self.validation:
            self.watch.say(f"step {done}: {describe_measures(self.validation)}")

    def _is_best(self) -> bool:
        validated = self._validated_at == self.state.steps_done
        return validated and self.checkpoints.would_be_best(self.validation)

    def _save(self) -> None:
        done = self.state.steps_done
        validation = self.validation if self._validated_at == done else {}
        tensors = self.state.tensors()
        _require_finite(done, tensors, validation)
        self.checkpoints.save(
            done, lambda folder: self._write_checkpoint(folder, tensors), validation
        )
        self._saved_at = done

    def _write_checkpoint(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        save_voice(folder, _describe_voice(self.state, self.config, self.data))
        write_training(folder, tensors, self.state.notes())


def _require_finite(
    step: int, tensors: Mapping[str, Tensor], validation: Mapping[str, float]
) -> None:
    """Refuse to save a state that no training can continue from and no voice can sing with.

    Raises: UserError: when weights, moments of the optimizers or validation are not finite.
    """
    wrong = [
        f"validation's {name}" for name, value in validation.items() if not math.isfinite(value)
    ]
    wrong += [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if wrong:
        raise UserError(
            f"{first_names(wrong)} became not finite (NaN or infinity) at step {step}, which is "
            f"not saved. Earlier checkpoints of this run may have diverged already; {REMEDY}"
        )


def _describe_voice(state: TrainState, config: TrainConfig, data: ShardDataset) -> Voice:
    identity, extraction = data.identity, data.extraction
    return Voice(
        tensors=state.voice.state_dict(),
        config=state.generator.config,
        mel=config.mel,
        speakers=identity.speakers,
        encoder=VoiceEncoder(**dataclasses.asdict(identity.encoder)),
        expand=config.data.expand,
        f0_method=identity.f0_method,
        f0_min=extraction["f0"]["f0_min"] if extraction else None,
        f0_max=extraction["f0"]["f0_max"] if extraction else None,
        step=state.steps_done,
        dataset_fingerprint=identity.fingerprint,
        extraction=extraction,
        pitch_hz=data.pitch_hz,
    )


def _validation_clips(config: TrainConfig, data: ShardDataset, watch: Watch) -> list[Batch]:
    held_out = ShardDataset(
        data.folder.root,
        data=config.data,
        seed=config.run.seed,
        subset="validation",
        filesystem=data.folder.filesystem,
    )
    left_out = [f"{count} {reason}" for reason, count in data.left_out.items() if count]
    watch.say(
        f"{len(data)} clips to train with, {len(held_out)} clips of held-out songs to validate "
        f"with; left out: {', '.join(left_out) or 'none'}"
    )
    return fixed_clips(held_out, data, config.run.validation_clips)


def _json_values(line: Mapping[str, Any]) -> dict[str, Any]:
    """Replace numbers that JSON lacks, such as infinite gradients of fp16, by null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }
