"""`distill`: a smaller student of an encoder, trained on the audio of a dataset.

What the run has reached lies in the folder OUT.run: settings.json (what it was begun with),
log.jsonl (a line a step), state.safetensors (weights and optimizer, written whole every so many
steps) and pruned.safetensors (the dense student before the second phase). A step depends on the
state, the seed and its number alone, so a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from soundfile import LibsndfileError
from torch import Tensor

from models.checkpoint import CheckpointError, read_safetensors, save_safetensors, sha256_of
from models.encoders.distill import Distillation, DistillConfig, Phase, StepReport, gated_student
from models.encoders.encoder_names import NAMES, Family
from models.encoders.layouts import EncoderFile, read_encoder, read_encoder_file, save_checkpoint
from models.encoders.layouts.key_layouts import OURS
from models.encoders.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from pipeline.cluster.bar import show_bar
from pipeline.cluster.device import choose_device
from pipeline.dataset.shards import Footer, iter_shards, read_dataset_info, read_footers
from pipeline.errors import UserError
from pipeline.extract.from_dataset import read_source
from pipeline.fingerprint import differences, neutral_values
from pipeline.storage.lock import lock
from pipeline.storage.step_log import StepLog
from pipeline.storage.weight_files import require_safetensors
from stages.flac import decode_flac
from stages.pcm import dequantise
from stages.resample import resample
from stages.types import Array

_RATE = 16000  # of every network of the family
_MIXED_GROUPS = 8  # row groups whose clips are shuffled together, and which are held in memory


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """What `distill` can be told.

    teacher: an encoder's name; its units are what the student's shall be like. batch: clips in a
    step. crop_s: longest stretch of a clip, in seconds; longer clips are cut at random.
    save_every: steps between states on disk.
    """

    teacher: str
    teacher_checkpoint: Path
    training: DistillConfig
    split: str = "train"
    batch: int = 8
    crop_s: float = 10.0
    save_every: int = 200
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.teacher not in NAMES:
            raise UserError(
                f"--teacher is '{self.teacher}'; a student can be made of {', '.join(NAMES)}"
            )
        if self.batch < 1 or self.save_every < 1:
            raise UserError("--batch and --save-every must be 1 or more")
        if not 0.1 <= self.crop_s <= 60:
            raise UserError(f"--crop-seconds is {self.crop_s:g}; it must lie in 0.1 to 60")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}; it must be 0 or more")


@dataclass(frozen=True)
class DistillOutcome:
    """What came of it. Sizes in parameters; losses averaged over the first and last tenth."""

    teacher_size: int
    student_size: int
    sparsity: float
    first_loss: float
    last_loss: float
    config: Wav2Vec2Config


def training_config(**settings: Any) -> DistillConfig:
    """`DistillConfig` of what a person gave. Raises UserError."""
    try:
        return DistillConfig(**settings)
    except ValueError as error:
        raise UserError(str(error)) from error


def numbers(option: str, text: str) -> tuple[int, ...]:
    """ "0,4,8" -> (0, 4, 8). Raises UserError naming the option."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise UserError(f"{option} is '{text}'; write whole numbers, as in 0,4,8,12") from error


def distill(dataset: Path, out: Path, options: DistillOptions, console: Console) -> DistillOutcome:
    """Train a student on the clips of `dataset` and write it to `out`, as an encoder `dphubert`.

    The same seed, dataset and options give the same file on the same kind of machine and number of
    threads. The same call goes on with a run that was stopped.
    Raises: UserError.
    """
    device = choose_device(options.device)
    require_safetensors(out)
    with ExitStack() as held:
        return _distill(dataset, out, options, device, console, held)


def _distill(
    dataset: Path,
    out: Path,
    options: DistillOptions,
    device: str,
    console: Console,
    held: ExitStack,
) -> DistillOutcome:
    """held: gets the lock of the run's folder, once nothing is wrong with the options."""
    if out.exists():
        raise UserError(f"{out} is there already; remove it or name another file")
    training = options.training
    try:
        teacher = _load(*read_encoder(options.teacher, options.teacher_checkpoint)).to(device)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    clips = Clips(dataset, options, teacher.config)
    with _own_random_numbers(device), _memory_may_end():
        torch.manual_seed(options.seed)
        try:
            first = Distillation(teacher, gated_student(teacher, training), training, "prune")
        except ValueError as error:
            raise UserError(str(error)) from error
        run = _Run(Path(f"{out}.run"))
        held.enter_context(lock(run.folder))
        phase, reached = run.begin(_settings(dataset, options, clips))
        if phase == "prune":
            if reached:
                first.load_state(run.state())
            _train(first, reached, clips, run, options, console)
            try:
                pruned = first.pruned()
            except ValueError as error:
                raise UserError(f"{error}; remove {run.folder} to start over") from error
            run.save_pruned(pruned)
            last = Distillation(teacher, pruned, training, "finetune")
            last.projections.load_state_dict(first.projections.state_dict())
            run.save(last, training.steps)
            reached = training.steps
        else:
            last = Distillation(teacher, run.pruned().to(device), training, "finetune")
            last.load_state(run.state())
        _train(last, reached, clips, run, options, console)
        student = last.finished().cpu()
    out.parent.mkdir(parents=True, exist_ok=True)
    _save_encoder(student, out)
    outcome = _outcome(teacher, student, run.losses())
    run.end()
    return outcome


def show_student(console: Console, outcome: DistillOutcome, out: Path) -> None:
    table = Table(show_header=False)
    table.add_row("teacher", f"{outcome.teacher_size:,} parameters")
    table.add_row("student", f"{outcome.student_size:,} parameters")
    table.add_row("sparsity", f"{outcome.sparsity:.1%}, without the final projections")
    table.add_row("channels", " ".join(str(c) for c, _, _ in outcome.config.stem))
    table.add_row("heads", " ".join(str(s.heads) for s in outcome.config.layers))
    table.add_row("feed-forward", " ".join(str(s.feed_forward) for s in outcome.config.layers))
    table.add_row("loss", f"{outcome.first_loss:.4f} at first, {outcome.last_loss:.4f} at last")
    console.print(table)
    console.print(
        f"use it with: encoder.name=dphubert encoder.checkpoint={out}", markup=False, soft_wrap=True
    )


def _train(
    distillation: Distillation,
    reached: int,
    clips: Clips,
    run: _Run,
    options: DistillOptions,
    console: Console,
) -> None:
    """Do what is left of a phase. reached: steps done, over both phases."""
    cfg, pruning = distillation.cfg, distillation.phase == "prune"
    begin, stop = (0, cfg.steps) if pruning else (cfg.steps, cfg.steps + cfg.finetune_steps)
    device = distillation.multipliers.device
    title = "prune" if pruning else "finetune"
    with (
        show_bar(console, title, stop - begin, done=reached - begin) as advance,
        ThreadPoolExecutor(1) as reader,
        run.log.open_from(reached) as log,
    ):
        ahead = reader.submit(clips.batch, reached)
        for step in range(reached, stop):
            wavs, num_samples = ahead.result()
            ahead = reader.submit(clips.batch, step + 1)
            torch.manual_seed(options.seed * 1_000_003 + step)
            report = distillation.step(step - begin, wavs.to(device), num_samples)
            if not math.isfinite(report.loss):
                raise UserError(
                    f"the loss is {report.loss} at step {step}: take lower learning rates, and "
                    f"remove {run.folder} to start over"
                )
            log.write(_line(step, distillation.phase, report))
            advance(1)
            if (step + 1) % options.save_every == 0 or step + 1 == stop:
                log.flush()
                run.save(distillation, step + 1)


def _line(step: int, phase: Phase, report: StepReport) -> str:
    values = {k: float(f"{v:.6g}") for k, v in dataclasses.asdict(report).items()}
    return json.dumps({"step": step, "phase": phase, **values}) + "\n"


class Clips:
    """Batches of a dataset's clips at 16 kHz, each a function of the seed and its number."""

    def __init__(self, dataset: Path, options: DistillOptions, config: Wav2Vec2Config) -> None:
        """Reads how long every clip is. Raises UserError when none can be used."""
        self.options = options
        self.info = read_dataset_info(dataset)
        self.resampling = read_source(dataset).config.resample
        shortest = config.reach - 2 * config.pad
        self.groups: list[tuple[Path, int, Footer]] = []
        rows: list[NDArray[np.int64]] = []  # of each group: which are long enough
        for path, footer in read_footers(iter_shards(dataset)):
            if isinstance(footer, UserError):
                raise footer
            if not path.name.startswith(f"{options.split}-"):
                continue
            for index, lengths in enumerate(_lengths(path)):
                usable = np.flatnonzero(lengths * _RATE >= shortest * footer.sample_rate)
                if len(usable):
                    self.groups.append((path, index, footer))
                    rows.append(usable)
        self.rows = np.concatenate([*rows, np.zeros(0, np.int64)])
        self.starts = np.cumsum([0, *map(len, rows)])
        if len(self) == 0:
            raise UserError(
                f"{dataset} has no clip in split '{options.split}' that an encoder can take; run "
                "`extract` first"
            )
        self._order = lru_cache(2)(self._shuffled)
        self._held: OrderedDict[int, list[bytes]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, step: int) -> tuple[Tensor, list[int]]:
        """Clips of a step, padded (B, T), and the samples of each."""
        rng = np.random.default_rng([self.options.seed, step])
        size = self.options.batch
        wavs = []
        for position in range(step * size, (step + 1) * size):
            epoch, place = divmod(position, len(self))
            clip = int(self._order(epoch)[place])
            wavs.append(torch.from_numpy(self._read(clip, rng)))
        return torch.nn.utils.rnn.pad_sequence(wavs, True), [len(wav) for wav in wavs]

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        """All clips once: row groups in random order, the clips of a few of them mixed."""
        rng = np.random.default_rng([self.options.seed, epoch, 1])
        groups = rng.permutation(len(self.groups))
        parts = []
        for first in range(0, len(groups), _MIXED_GROUPS):
            few = groups[first : first + _MIXED_GROUPS]
            clips = [np.arange(self.starts[g], self.starts[g + 1]) for g in few]
            parts.append(rng.permutation(np.concatenate(clips)))
        return np.concatenate(parts)

    def _read(self, clip: int, rng: np.random.Generator) -> Array:
        """(T,) at 16 kHz, at most `crop_s` of it."""
        group = int(np.searchsorted(self.starts, clip, side="right")) - 1
        path, _, footer = self.groups[group]
        try:
            samples = decode_flac(self._audio(group)[self.rows[clip]], footer.subtype)
        except LibsndfileError as error:
            raise UserError(f"{path} is damaged: {error}; `verify` finds out more") from error
        longest = round(self.options.crop_s * footer.sample_rate)
        start = int(rng.integers(0, max(0, len(samples) - longest) + 1))
        wav = dequantise(samples[start : start + longest], footer.subtype)
        return resample(wav, footer.sample_rate, _RATE, self.resampling)

    def _audio(self, group: int) -> list[bytes]:
        if group not in self._held:
            path, index, _ = self.groups[group]
            try:
                with pq.ParquetFile(path) as file:
                    cells = file.read_row_group(index, columns=["audio"])["audio"].to_pylist()
            except pa.ArrowException as error:
                raise UserError(f"{path} is damaged: {error}") from error
            self._held[group] = [cell["bytes"] for cell in cells]
            if len(self._held) > 2 * _MIXED_GROUPS:
                self._held.popitem(last=False)
        return self._held[group]


def _lengths(path: Path) -> Iterator[NDArray[np.int64]]:
    """Samples of every clip, by row group."""
    try:
        with pq.ParquetFile(path) as file:
            for index in range(file.num_row_groups):
                column = file.read_row_group(index, columns=["num_samples"])["num_samples"]
                yield column.to_numpy()
    except pa.ArrowException as error:
        raise UserError(f"{path} is damaged: {error}") from error


class _Run:
    """The folder of a run; see the module."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._settings = folder / "settings.json"
        self.log = StepLog(folder / "log.jsonl")
        self._state = folder / "state.safetensors"
        self._pruned = folder / "pruned.safetensors"

    def begin(self, settings: dict[str, Any]) -> tuple[Phase, int]:
        """Start, or go on: (phase, steps done over both phases).

        Raises UserError where the run was begun with other settings.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"{self.folder} is a file where the run's folder should be") from error
        if not self._state.exists():
            self._settings.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            self.log.path.unlink(missing_ok=True)
            return "prune", 0
        before = json.loads(self._settings.read_text(encoding="utf-8"))
        differing = differences(before, settings, neutral_values(DistillConfig))
        if differing:
            raise UserError(
                f"{self.folder} holds a run begun with other settings ({'; '.join(differing)}); "
                "give the same ones to go on, or remove the folder to start over"
            )
        notes = _read(self._state, [])[1]
        return ("prune" if notes["phase"] == "prune" else "finetune"), int(notes["step"])

    def state(self) -> dict[str, Tensor]:
        return _read(self._state)[0]

    def save(self, distillation: Distillation, step: int) -> None:
        """Keep the state after `step` steps, those of the first phase counted."""
        tensors = {k: t.detach().cpu() for k, t in distillation.state().items()}
        save_safetensors(self._state, tensors, {"step": str(step), "phase": distillation.phase})

    def save_pruned(self, student: Wav2Vec2) -> None:
        _save_encoder(student, self._pruned)

    def pruned(self) -> Wav2Vec2:
        return _load(*read_encoder_file(self._pruned).take())

    def losses(self) -> list[float]:
        return [float(line["loss"]) for line in self.log.lines()]

    def end(self) -> None:
        """The student is written: only what a person may want to look at stays."""
        self._state.unlink()


def _read(path: Path, keys: list[str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        return read_safetensors(path, keys)
    except CheckpointError as error:
        raise UserError(f"{error}; remove the folder {path.parent} to start over") from error


def _settings(dataset: Path, options: DistillOptions, clips: Clips) -> dict[str, Any]:
    """Everything that the student depends on."""
    training = {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in dataclasses.asdict(options.training).items()
    }
    try:
        teacher_sha256 = sha256_of(options.teacher_checkpoint)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    return {
        "dataset_fingerprint": clips.info["fingerprint"],
        "clips": len(clips),
        "teacher": options.teacher,
        "teacher_sha256": teacher_sha256,
        "split": options.split,
        "batch": options.batch,
        "crop_s": options.crop_s,
        "seed": options.seed,
        **training,
    }


def _load(config: Wav2Vec2Config, tensors: dict[str, Tensor]) -> Wav2Vec2:
    network = Wav2Vec2(config)
    network.load_state_dict(tensors)
    return network


def _save_encoder(network: Wav2Vec2, path: Path) -> None:
    tensors = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    family: Family = "dphubert" if network.config.relative_bias is None else "dpwavlm"
    names = {name: name for name in tensors}
    save_checkpoint(EncoderFile(path, OURS, family, network.config, tensors, names), path)


def _outcome(teacher: Wav2Vec2, student: Wav2Vec2, losses: list[float]) -> DistillOutcome:
    def size(network: Wav2Vec2, projection: bool) -> int:
        return sum(
            parameter.numel()
            for name, parameter in network.named_parameters()
            if projection or not name.startswith("final_projection.")
        )

    some = max(1, len(losses) // 10)
    return DistillOutcome(
        teacher_size=size(teacher, True),
        student_size=size(student, True),
        sparsity=1 - size(student, False) / size(teacher, False),
        first_loss=float(np.mean(losses[:some])),
        last_loss=float(np.mean(losses[-some:])),
        config=student.config,
    )


@contextmanager
def _own_random_numbers(device: str) -> Iterator[None]:
    """Leave the process's generators as they were."""
    with torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else []):
        yield


@contextmanager
def _memory_may_end() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "a step does not fit into the GPU's memory; take a smaller --batch or --crop-seconds"
        ) from error
