"""`train`: fits a synthesizer to the clips of a dataset, on one process or on several alike.

A step depends on the state before it, the settings and its number alone: the clips, the learning
rate, dropout and every other random number follow from those. So a run that was killed goes on as
if it had not been, and several processes give the gradients of one.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.optim import AdamW

from models.checkpoint import CheckpointError
from models.synthesizer.batch import Batch
from models.synthesizer.blocks.discriminators import MultiPeriodDiscriminator
from models.synthesizer.blocks.noise import KeyedNoise
from models.synthesizer.config import SynthesizerConfig
from models.synthesizer.sovits.networks import Synthesizer
from models.synthesizer.step import GanStep, LossWeights
from models.synthesizer.voice import Voice, VoiceEncoder, save_voice
from pipeline.cluster.device import choose_device
from pipeline.dataset.clip_index import Identity
from pipeline.dataset.shard_dataset import ShardDataset, Share
from pipeline.errors import Interrupted, UserError
from pipeline.settings import dump_yaml, flatten
from pipeline.storage.lock import lock
from pipeline.train.config import OptimizerConfig, TrainConfig
from pipeline.train.init_weights import Wanted, read_start
from pipeline.train.process_group import ProcessGroup
from pipeline.train.run_folder import (
    Checkpoint,
    Checkpoints,
    RunFolder,
    join,
    load_network_state,
    load_optimizer,
    move_average,
    network_tensors,
    optimizer_tensors,
    part_of,
    read_checkpoint,
    write_training,
)
from pipeline.train.validation import Metrics, describe_measures, fixed_clips
from pipeline.train.watch import Nobody, OnConsole, Watch

# Settings that the numbers do not depend on; of the section `run` all but these are such.
_COUNT_IN_RUN = ("run.seed", "run.precision")
_DO_NOT_COUNT = ("data.loader_threads", "data.prefetch")


@dataclass(frozen=True)
class TrainOutcome:
    """What a call did. losses, validation: the last ones; {} where it did no step."""

    run: Path
    begun_at: int  # steps that were done before
    steps: int  # and are done now
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
    """Train on `dataset` until `run.steps` steps are done; the same call goes on with a run.

    Where torch.distributed is initialised, its processes share each batch, and the first of them
    writes; each computes on torch's current device. All of them see `run` and `dataset`.
    init_from: what a new run begins with: a voice, a checkpoint or a run of ours, or a G_*.pth.
    console, watch: who looks on; one of the two.

    Raises: UserError; Interrupted, with the state saved, after Ctrl-C, SIGTERM, or a watch's word.
    """
    device = torch.device(choose_device(config.run.device, "run.device"))
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    group = ProcessGroup.of_this_process(device)
    with ExitStack() as held:
        held.enter_context(_faults_in_words())
        held.enter_context(_threads(config.run.threads, group))
        held.enter_context(_own_random_numbers(device))
        folder = RunFolder(run)
        data = ShardDataset(dataset, data=config.data, seed=config.run.seed)
        _check(config, data.identity, group)
        if group.leads:
            folder.require_ours()
            held.enter_context(lock(run))
            settings = _settings(config, data, init_from, folder)
            folder.begin(str(dataset), settings, dump_yaml(dataclasses.asdict(config)))
        if watch is None:
            watch = Nobody() if console is None else OnConsole(console, held)
        trainer = _Trainer(folder, config, data, group, watch if group.leads else Nobody())
        trainer.begin(init_from)
        return trainer.run()


class _Trainer:
    """A run under way: networks, optimizers and how many steps are done."""

    def __init__(
        self,
        folder: RunFolder,
        config: TrainConfig,
        data: ShardDataset,
        group: ProcessGroup,
        watch: Watch,
    ) -> None:
        self.folder, self.config, self.data = folder, config, data
        self.group, self.watch = group, watch
        self.checkpoints = Checkpoints(
            folder.folder / "checkpoints", config.run.keep_last, config.run.keep_best
        )
        self.done = 0
        self.losses: dict[str, float] = {}
        self.validation: dict[str, float] = {}
        self.validated_at = self.saved_at = -1

    def begin(self, init_from: Path | None) -> None:
        """Build everything, as the last checkpoint has it or as a new run begins."""
        checkpoint = self._last_checkpoint()
        if checkpoint is not None:
            tensors, notes = checkpoint.read()
            self._build(int(notes["source_rate"]))
            load_network_state(self.generator, part_of(tensors, "generator"), checkpoint.folder)
            load_network_state(
                self.discriminator, part_of(tensors, "discriminator"), checkpoint.folder
            )
            self._make_step()
            if self.averaged is not None:
                load_network_state(self.averaged, part_of(tensors, "averaged"), checkpoint.folder)
            load_optimizer(self.step.optim_g, self.names_g, part_of(tensors, "optim_g"))
            load_optimizer(self.step.optim_d, self.names_d, part_of(tensors, "optim_d"))
            self.step.scaler.load_state_dict(json.loads(notes["scaler"]))
            self.done = self.saved_at = checkpoint.step
        else:
            self._build_anew(init_from)
            self._make_step()
        self._require_one_state()

    def _last_checkpoint(self) -> Checkpoint | None:
        """The leader finds it; the others read the same."""
        found = None
        if self.group.leads:
            self.checkpoints.sweep()
            found = self.checkpoints.latest(self.watch.say)
        name = self.group.tell(found and found.folder.name)
        if name is None or found is not None:
            return found
        return read_checkpoint(self.checkpoints.folder / str(name))

    def _build(self, source_rate: int) -> None:
        """Networks with the weights that the seed gives them, on the device."""
        torch.manual_seed(_key(self.config.run.seed, "networks"))
        shape = synthesizer_config(self.config, self.data.identity, source_rate)
        self.generator = Synthesizer(shape).to(self.group.device)
        critics = MultiPeriodDiscriminator(shape.spectral_norm, shape.discriminator_channels)
        self.discriminator = critics.to(self.group.device)

    def _build_anew(self, init_from: Path | None) -> None:
        identity = self.data.identity
        if init_from is None:
            self._build(identity.sample_rate)
            return
        shape = synthesizer_config(self.config, identity, identity.sample_rate)
        wanted = Wanted(shape, self.config.mel, identity.encoder, identity.speakers)
        start = read_start(init_from, wanted)
        self._build(start.source_rate)
        load_network_state(self.generator, start.generator, init_from)
        if start.discriminator is not None:
            load_network_state(self.discriminator, start.discriminator, init_from)
        for line in start.lines:
            self.watch.say(f"from {init_from}: {line}")

    def _make_step(self) -> None:
        """What works on the networks' weights, which are in place."""
        config, both = self.config.optimizer, (self.generator, self.discriminator)
        _freeze(both, config.freeze)
        self.averaged = None
        if config.ema is not None:
            self.averaged = copy.deepcopy(self.generator).requires_grad_(False)
        self.names_g, self.names_d = map(_learning, both)
        self.step = GanStep(
            self.generator,
            self.discriminator,
            _optimizer(self.generator, config),
            _optimizer(self.discriminator, config),
            self.config.mel,
            LossWeights(**dataclasses.asdict(self.config.loss)),
            precision=self.config.run.precision,
            clip_norm=config.clip_norm,
            reduce=self.group.add_up,
        )
        if self.config.run.compile:  # what works on segments, which are all of one length
            self.generator.dec.compile()
            self.discriminator.compile()

    def _require_one_state(self) -> None:
        """Workers that began with different weights would never be told by their losses."""
        sums = [float(p.detach().double().sum()) for p in self.generator.parameters()]
        if len({repr(each) for each in self.group.gather((self.done, sums))}) > 1:
            raise UserError(
                "the workers begin with different weights: do they have the same versions of "
                f"torch, and do all of them see the same {self.folder.folder}?"
            )

    @property
    def voice(self) -> Synthesizer:
        return self.generator if self.averaged is None else self.averaged

    def run(self) -> TrainOutcome:
        begun_at, steps = self.done, self.config.run.steps
        if begun_at >= steps:
            self.watch.say(f"{begun_at} steps are done already; a larger run.steps trains on")
        elif self.group.leads:
            with ExitStack() as held:
                self._train_and_write(held)
        else:
            self._train(lambda line: False)
        return TrainOutcome(
            self.folder.folder,
            begun_at,
            self.done,
            self.losses,
            self.validation,
            self.checkpoints.folder / f"step-{self.done:08d}",
        )

    def _train_and_write(self, held: ExitStack) -> None:
        run = self.config.run
        metrics = Metrics(
            self.folder.folder,
            self._validation_clips(),
            self.generator.config,
            self.config.mel,
            step=self.done,
        )
        held.callback(metrics.close)
        log = held.enter_context(self.folder.log.open_from(self.done + 1 if self.done else 0))

        def after(line: dict[str, Any]) -> bool:
            last = self.done == run.steps
            if self.done % run.log_every == 0 or last:
                metrics.log(self.done, {k: v for k, v in line.items() if k != "step"})
            if self.done % run.validate_every == 0 or last:
                self._validate(metrics)
                if self.validation:
                    line["validation"] = self.validation
            log.write(json.dumps(_in_json(line)) + "\n")
            log.flush()
            due = self.done % run.save_every == 0 or last
            if due or (run.keep_best and self._best_so_far()):
                self._save()
            return self.watch.step(self.done, self.losses)

        self.watch.begin(self.done, run.steps)
        if self.done == 0:
            self._validate(metrics)
            if self.validation:
                log.write(json.dumps({"step": 0, "validation": self.validation}) + "\n")
        self._train(after)

    def _train(self, after: Callable[[dict[str, Any]], bool]) -> None:
        """The steps that are left. after: is given the log's line; True: to stop.

        Raises: Interrupted, with the state saved.
        """
        stream = self.data.batches(self.done, self.group.rank, self.group.size)
        with closing(stream), stop_asked() as asked:
            while self.done < self.config.run.steps:
                begun = time.perf_counter()
                share = next(stream)
                waited = time.perf_counter() - begun
                line = self._do_step(share)
                line |= {"seconds": time.perf_counter() - begun, "data_wait_s": waited}
                stop = after(line)
                if self.group.any(stop or asked.is_set()) and self.done < self.config.run.steps:
                    if self.group.leads and self.saved_at != self.done:
                        self._save()
                    raise Interrupted

    def _do_step(self, share: Share) -> dict[str, Any]:
        config, step = self.config.optimizer, self.done
        rate = learning_rate(config, step, share.epoch)
        for optimizer in (self.step.optim_g, self.step.optim_d):
            for each in optimizer.param_groups:
                each["lr"] = rate
        torch.manual_seed(_key(self.config.run.seed, step, self.group.rank))  # of dropout
        batch = share.batch.to(self.group.device)
        parts = [batch.part(i, config.accumulate) for i in range(config.accumulate)]
        self.generator.train()
        self.losses = self.step(parts, share.totals, lambda part: self._noise(part, step), step)
        line = {"step": step + 1, "epoch": share.epoch, "lr": rate, **self.losses}
        self._require_finite(line, share.batch)
        if self.averaged is not None and config.ema is not None:
            move_average(self.averaged, self.generator, config.ema)
        self.done = step + 1
        return line

    def _noise(self, part: Batch, step: int) -> KeyedNoise:
        return KeyedNoise([_key(key, step) for key in part.noise_keys], self.group.device)

    def _require_finite(self, line: Mapping[str, Any], batch: Batch) -> None:
        """Raises UserError. Infinite gradients of fp16 are no fault: its scaler skips the step."""
        half = self.config.run.precision == "fp16"
        watched = {k: v for k, v in self.losses.items() if not (half and k.startswith("grad_norm"))}
        wrong = [name for name, value in watched.items() if not math.isfinite(value)]
        if not wrong:
            return
        clips = [clip for ids in self.group.gather(batch.clip_ids) for clip in ids]
        name = f"nan-step-{line['step']:06d}.json"
        if self.group.leads:
            values = {k: v if math.isfinite(v) else str(v) for k, v in line.items()}
            self.folder.write_json(name, {**values, "clips": clips})
        raise UserError(
            f"{' and '.join(wrong)} came out as {self.losses[wrong[0]]} at step {line['step']}, at "
            f"a learning rate of {line['lr']:g}; {self.folder.folder / name} names the clips. The "
            "checkpoints are from before it: begin a new run from one with --init-from, and a "
            "lower optimizer.learning_rate, an optimizer.clip_norm, or precision bf16 or fp32"
        )

    def _validation_clips(self) -> list[Batch]:
        folder = self.data.folder
        held_back = ShardDataset(
            folder.root,
            data=self.config.data,
            seed=self.config.run.seed,
            subset="validation",
            filesystem=folder.filesystem,
        )
        self.watch.say(_in_words(self.data, held_back))
        return fixed_clips(held_back, self.data, self.config.run.validation_clips)

    def _validate(self, metrics: Metrics) -> None:
        self.validation = metrics.validate(self.done, self.voice)
        self.validated_at = self.done
        if self.validation:
            self.watch.say(f"step {self.done}: {describe_measures(self.validation)}")

    def _best_so_far(self) -> bool:
        return self.validated_at == self.done and self.checkpoints.would_be_best(self.validation)

    def _save(self) -> None:
        validation = self.validation if self.validated_at == self.done else {}
        self.checkpoints.save(self.done, self._fill, validation)
        self.saved_at = self.done

    def _fill(self, folder: Path) -> None:
        save_voice(folder, self._described_voice())
        parts = {
            "generator": network_tensors(self.generator),
            "discriminator": network_tensors(self.discriminator),
            "optim_g": optimizer_tensors(self.step.optim_g, self.names_g),
            "optim_d": optimizer_tensors(self.step.optim_d, self.names_d),
        }
        if self.averaged is not None:
            parts["averaged"] = network_tensors(self.averaged)
        notes = {
            "step": str(self.done),
            "source_rate": str(self.generator.config.source_rate),
            "scaler": json.dumps(self.step.scaler.state_dict()),
        }
        write_training(folder, join(parts), notes)

    def _described_voice(self) -> Voice:
        identity, extraction = self.data.identity, self.data.extraction
        return Voice(
            tensors=self.voice.state_dict(),
            config=self.generator.config,
            mel=self.config.mel,
            speakers=identity.speakers,
            encoder=VoiceEncoder(**dataclasses.asdict(identity.encoder)),
            expand=self.config.data.expand,
            f0_method=identity.f0_method,
            f0_min=extraction["f0"]["f0_min"] if extraction else None,
            f0_max=extraction["f0"]["f0_max"] if extraction else None,
            step=self.done,
            dataset_fingerprint=identity.fingerprint,
            extraction=extraction,
            pitch_hz=self.data.pitch_hz,
        )


def synthesizer_config(
    config: TrainConfig, identity: Identity, source_rate: int
) -> SynthesizerConfig:
    """The networks that `config` asks for on such data. source_rate: of their sine source."""
    return SynthesizerConfig(
        **dataclasses.asdict(config.model),
        units_dim=identity.encoder.dim,
        n_speakers=len(identity.speakers),
        sample_rate=identity.sample_rate,
        n_fft=config.mel.n_fft,
        source_rate=source_rate,
    )


def learning_rate(config: OptimizerConfig, step: int, epoch: int) -> float:
    """Of step `step`, counted from 0: a linear warm-up, and a decay with every epoch."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return config.learning_rate * warm * config.decay**epoch


def _check(config: TrainConfig, identity: Identity, group: ProcessGroup) -> None:
    """Raises UserError where settings do not suit the data or the workers."""
    hop = config.model.hop_length
    if hop != identity.hop_length:
        raise UserError(
            f"the product of model.upsample_rates is {hop}, and the dataset has a frame every "
            f"{identity.hop_length} samples (f0.hop_length); these must be the same"
        )
    parts = group.size * config.optimizer.accumulate
    if config.data.batch_size % parts:
        raise UserError(
            f"data.batch_size is {config.data.batch_size}; it must be a multiple of workers x "
            f"optimizer.accumulate, {group.size} x {config.optimizer.accumulate}"
        )


def _in_words(data: ShardDataset, held_back: ShardDataset) -> str:
    """What is learnt from, what is not, and why."""
    left_out = [f"{count} {reason}" for reason, count in data.left_out.items() if count]
    return (
        f"{len(data)} clips to learn from, {len(held_back)} of other songs to validate with; "
        f"left out: {', '.join(left_out) or 'none'}"
    )


def _settings(
    config: TrainConfig, data: ShardDataset, init_from: Path | None, folder: RunFolder
) -> dict[str, Any]:
    """All that the numbers depend on."""
    before = folder.settings() or {}
    start = before.get("init_from") if init_from is None else str(init_from.absolute())
    counted = {key: value for key, value in flatten(config).items() if _counts(key)}
    identity = dataclasses.asdict(data.identity)
    clips = hashlib.blake2b("\0".join(data.index.clip_ids.to_pylist()).encode(), digest_size=8)
    clips.update(data.index.group.astype("<i8").tobytes())
    about = {f"dataset.{key}": value for key, value in identity.items()}
    about["dataset.clips"] = f"{len(data)} ({clips.hexdigest()})"
    return {**about, "init_from": start, **counted}


def _in_json(line: Mapping[str, Any]) -> dict[str, Any]:
    """With null for a number that JSON has no word for, as infinite gradients of fp16."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }


def _counts(key: str) -> bool:
    if key.startswith("run."):
        return key in _COUNT_IN_RUN
    return key not in _DO_NOT_COUNT


def _freeze(networks: Sequence[nn.Module], patterns: Sequence[str]) -> None:
    """Raises UserError for a pattern that finds no parameter, and where nothing is left."""
    parameters = [pair for network in networks for pair in network.named_parameters()]
    for pattern in patterns:
        try:
            found = [p for name, p in parameters if re.search(pattern, name)]
        except re.error as error:
            raise UserError(
                f"optimizer.freeze: '{pattern}' is no regular expression: {error}"
            ) from error
        if not found:
            raise UserError(
                f"optimizer.freeze: '{pattern}' finds no parameter; there are "
                f"{parameters[0][0]}, {parameters[-1][0]} and others"
            )
        for parameter in found:
            parameter.requires_grad_(False)
    for network in networks:
        if not _learning(network):
            raise UserError(
                f"optimizer.freeze leaves nothing to learn in the {type(network).__name__}"
            )


def _learning(network: nn.Module) -> list[str]:
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


def _optimizer(network: nn.Module, config: OptimizerConfig) -> AdamW:
    return AdamW(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _key(*parts: int | str) -> int:
    """63 bits that follow from `parts`."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


@contextmanager
def _threads(threads: int | None, group: ProcessGroup) -> Iterator[None]:
    """Of torch: `threads`, or this machine's cores, shared out among its workers."""
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads or max(1, cores // group.neighbours))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """Leave the process's generators as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def _faults_in_words() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "a step does not fit into the GPU's memory; take a smaller data.batch_size or "
            "data.max_frames, or a larger optimizer.accumulate"
        ) from error
    except CheckpointError as error:
        raise UserError(str(error)) from error


@contextmanager
def stop_asked() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C or SIGTERM; the second one does what it did before."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # signals are the main thread's; who started this one asks otherwise
        return
    before: dict[int, Any] = {}

    def ask(caught: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(caught, before[caught])

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        before[number] = signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
