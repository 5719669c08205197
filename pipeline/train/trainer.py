"""Training of a synthesizer on the clips of a dataset, in one process or in several.

A step depends on the state before it, the settings and its number alone: the clips, the learning
rate, dropout and every other random number follow from those. So a run that was killed resumes as
if it had not been, and several processes compute the gradients of one.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from models.synthesizer.batch import Batch
from pipeline.cluster.device import choose_device
from pipeline.cluster.stop_signals import stop_on_signal
from pipeline.dataset.shard_dataset import ShardDataset, Share
from pipeline.dataset.shards import note_on_trial_units
from pipeline.errors import Interrupted, UserError
from pipeline.settings import dump_yaml
from pipeline.storage.lock import lock
from pipeline.train.config import TrainConfig
from pipeline.train.optimizer import learning_rate
from pipeline.train.process_group import ProcessGroup
from pipeline.train.process_setup import (
    explain_errors,
    keep_global_generators,
    training_threads,
)
from pipeline.train.random_keys import clip_noise, seed_dropout
from pipeline.train.run_folder import (
    Checkpoint,
    Checkpoints,
    RunFolder,
    move_average,
    read_checkpoint,
)
from pipeline.train.run_settings import numeric_settings, require_suitable
from pipeline.train.run_writer import RunWriter, open_writer
from pipeline.train.train_state import REMEDY, TrainState, new_state, resume_state
from pipeline.train.watch import ConsoleWatch, SilentWatch, Watch


@dataclass(frozen=True)
class TrainOutcome:
    """The result of a call. losses, validation: the last ones; {} when it did no step."""

    run: Path
    begun_at: int  # steps done before the call
    steps: int  # steps done after it
    losses: dict[str, float]
    validation: dict[str, float]
    checkpoint: Path


def fit(
    dataset: str | Path,
    run: Path,
    config: TrainConfig,
    *,
    init_from: Path | None = None,
    console: Console | None = None,
    watch: Watch | None = None,
) -> TrainOutcome:
    """Train on `dataset` until `run.steps` steps are done; the same call resumes a run.

    Where torch.distributed is initialised, its processes share each batch, and the first of them
    writes; each computes on torch's current device. All of them see `run` and `dataset`.
    init_from: initial weights of a new run: a voice, a checkpoint, a run, or a G_*.pth.
    console, watch: where progress is shown; give one of the two.

    Raises: UserError: when settings, data or weights do not suit; Interrupted: when Ctrl-C,
    SIGTERM, SIGHUP or the watch stopped the run, after the state was saved.
    """
    device = torch.device(choose_device(config.run.device, "run.device"))
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    group = ProcessGroup.of_this_process(device)
    with ExitStack() as stack:
        stack.enter_context(explain_errors())
        stack.enter_context(training_threads(config.run.threads, group.local_size))
        stack.enter_context(keep_global_generators(device))
        folder = RunFolder(run)
        data = ShardDataset(dataset, data=config.data, seed=config.run.seed)
        require_suitable(config, data.identity, group)
        if group.leads:
            folder.require_run()
            stack.enter_context(lock(run))
            settings = numeric_settings(config, data, init_from, folder)
            folder.begin(str(dataset), settings, dump_yaml(dataclasses.asdict(config)))
        if watch is None:
            watch = SilentWatch() if console is None else ConsoleWatch(console, stack)
        if not group.leads:
            watch = SilentWatch()
        note = note_on_trial_units([data.identity.encoder.name])
        if note is not None:
            watch.say(f"note: {note}")
        checkpoints = Checkpoints(run / "checkpoints", config.run.keep_last, config.run.keep_best)
        checkpoint = _last_checkpoint(checkpoints, group, watch)
        if checkpoint is not None:
            state = resume_state(checkpoint, config, data.identity, group)
        else:
            state = new_state(init_from, config, data.identity, group, watch.say)
        _require_same_weights(state, group, run)
        trainer = _Trainer(folder, config, data, group, state)
        begun_at, validation = state.steps_done, {}
        if begun_at >= config.run.steps:
            watch.say(f"{begun_at} steps are done already; a larger run.steps trains on")
        elif group.leads:
            with open_writer(folder, checkpoints, config, data, state, watch) as writer:
                writer.begin()
                trainer.train(writer)
                validation = writer.validation
        else:
            trainer.train(None)
        return TrainOutcome(
            run,
            begun_at,
            state.steps_done,
            trainer.losses,
            validation,
            checkpoints.folder_of(state.steps_done),
        )


def _last_checkpoint(
    checkpoints: Checkpoints, group: ProcessGroup, watch: Watch
) -> Checkpoint | None:
    """Return the checkpoint to resume from, which the leader chooses for all processes."""
    latest = None
    if group.leads:
        checkpoints.sweep()
        latest = checkpoints.latest(watch.say)
    name = group.broadcast(latest and latest.folder.name)
    if name is None or latest is not None:
        return latest
    return read_checkpoint(checkpoints.folder / str(name))


def _require_same_weights(state: TrainState, group: ProcessGroup, run: Path) -> None:
    """Compare the weights of all processes, since different ones would go unnoticed later.

    Raises: UserError: when they differ.
    """
    sums = [float(p.detach().double().sum()) for p in state.generator.parameters()]
    if len({repr(each) for each in group.gather((state.steps_done, sums))}) > 1:
        raise UserError(
            "the workers begin with different weights; give all of them the same version of torch "
            f"and the same {run}"
        )


@dataclass
class _Trainer:
    """The loop over the remaining steps. losses: those of the last step."""

    folder: RunFolder
    config: TrainConfig
    data: ShardDataset
    group: ProcessGroup
    state: TrainState
    losses: dict[str, float] = field(default_factory=dict)

    def train(self, writer: RunWriter | None) -> None:
        """Do the remaining steps. writer: of the leader.

        Raises: Interrupted: when the run is to stop, after the state was saved.
        """
        state, steps = self.state, self.config.run.steps
        stream = self.data.batches(state.steps_done, self.group.rank, self.group.size)
        with closing(stream), stop_on_signal() as request:
            while state.steps_done < steps:
                begun = time.perf_counter()
                share = next(stream)
                waited = time.perf_counter() - begun
                line = self._do_step(share)
                line |= {"seconds": time.perf_counter() - begun, "data_wait_s": waited}
                stop = writer is not None and writer.write_step(line, self.losses)
                stop = stop or request.number is not None
                if self.group.any(stop) and state.steps_done < steps:
                    if writer is not None:
                        writer.save_unsaved()
                    raise Interrupted(request.number or signal.SIGINT)

    def _do_step(self, share: Share) -> dict[str, Any]:
        """Do a step and return its line of the log."""
        config, state, step = self.config.optimizer, self.state, self.state.steps_done
        rate = learning_rate(config, step, share.epoch)
        for optimizer in (state.step.optim_g, state.step.optim_d):
            for parameters in optimizer.param_groups:
                parameters["lr"] = rate
        seed_dropout(self.config.run.seed, step, self.group.rank)
        batch = share.batch.to(self.group.device)
        parts = [batch.part(i, config.accumulate) for i in range(config.accumulate)]
        state.generator.train()
        self.losses = state.step(
            parts, share.totals, lambda part: clip_noise(part, step, self.group.device), step
        )
        line = {"step": step + 1, "epoch": share.epoch, "lr": rate, **self.losses}
        self._require_finite(line, share.batch)
        if state.averaged is not None and config.ema is not None:
            move_average(state.averaged, state.generator, config.ema)
        state.steps_done = step + 1
        return line

    def _require_finite(self, line: Mapping[str, Any], batch: Batch) -> None:
        """Check the losses of a step.

        Infinite gradients of fp16 are allowed: its scaler skips the step.

        Raises: UserError: when a loss or norm is not finite.
        """
        half = self.config.run.precision == "fp16"
        checked = {k: v for k, v in self.losses.items() if not (half and k.startswith("grad_norm"))}
        wrong = [name for name, value in checked.items() if not math.isfinite(value)]
        if not wrong:
            return
        clips = [clip for ids in self.group.gather(batch.clip_ids) for clip in ids]
        name = f"nan-step-{line['step']:06d}.json"
        if self.group.leads:
            values = {k: v if math.isfinite(v) else str(v) for k, v in line.items()}
            self.folder.write_json(name, {**values, "clips": clips})
        raise UserError(
            f"{' and '.join(wrong)} became {self.losses[wrong[0]]} at step {line['step']}, at a "
            f"learning rate of {line['lr']:g}; {self.folder.folder / name} lists the clips. The "
            f"checkpoints of this run may have diverged already; {REMEDY}"
        )
