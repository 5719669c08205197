"""`distill`: train a smaller student of an encoder on the audio of a dataset.

The folder OUT.run holds the state of the run: settings.json (its settings), log.jsonl (one line
per step), state.safetensors (weights and optimizer, replaced every `run.save_every` steps) and
pruned.safetensors (the dense student before the second phase). A step depends only on the state,
the seed and its number, so a run that was killed resumes to the same student.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from models.checkpoint import CheckpointError, read_safetensors, save_safetensors, sha256_of
from models.encoders.distill import Distillation, DistillConfig, Phase, StepReport, gated_student
from models.encoders.encoder_names import NAMES, Family
from models.encoders.layouts import EncoderFile, read_encoder, read_encoder_file, save_encoder_file
from models.encoders.layouts.key_layouts import CANTOR
from models.encoders.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from models.input_file import read_json
from models.synthesizer.config import require_at_least
from pipeline.cluster.bar import show_bar
from pipeline.cluster.device import choose_device
from pipeline.cluster.resumable_run import complete
from pipeline.dataset.audio_batches import AudioBatches, AudioDataConfig
from pipeline.dataset.shards import read_supported_info
from pipeline.errors import UserError
from pipeline.extract.from_dataset import read_source
from pipeline.fingerprint import differences, neutral_values
from pipeline.reports.command_summary import Summary, text_table
from pipeline.storage.step_log import StepLog
from pipeline.storage.weight_files import require_safetensors

_RATE = 16000  # Hz, the input of every network of the family


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The encoder whose hidden states the student learns. checkpoint: file or folder of weights."""

    name: str | None = None
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None and self.name not in NAMES:
            raise ValueError(f"teacher.name is '{self.name}'; choose from {', '.join(NAMES)}")


@dataclass(frozen=True, kw_only=True)
class DistillRunConfig:
    """Seed, device and saving. save_every: steps between two states on disk."""

    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    save_every: int = 200

    def __post_init__(self) -> None:
        require_at_least(0, "run.seed", self.seed)
        require_at_least(1, "run.save_every", self.save_every)


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """Every setting of `distill`."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    data: AudioDataConfig = field(default_factory=AudioDataConfig)
    run: DistillRunConfig = field(default_factory=DistillRunConfig)


@dataclass(frozen=True)
class DistillOutcome:
    """Figures of a finished run. Sizes in parameters; losses: means of the first and last tenth."""

    teacher_size: int
    student_size: int
    sparsity: float
    first_loss: float
    last_loss: float
    config: Wav2Vec2Config


def distill(
    dataset: Path, out: Path, settings: DistillSettings, console: Console
) -> DistillOutcome:
    """Train a student on the clips of `dataset` and write it to `out`, as an encoder `dphubert`.

    The same seed, dataset and settings give the same file on the same kind of machine and number
    of threads. The same call resumes a run that was stopped.

    Raises: UserError: when settings, teacher or dataset cannot be used, or the run is in use.
    """
    device = choose_device(settings.run.device, "run.device")
    require_safetensors(out)
    if out.exists():
        raise UserError(f"{out} exists already; remove it or name another file")
    with _own_random_numbers(device), _out_of_memory_as_user_error():
        return complete(DistillRun(dataset, out, settings, device, console))


@dataclass(frozen=True)
class DistillPlan:
    """The state that a run has reached. steps_done: counted over both phases."""

    phase: Phase
    steps_done: int


class DistillRun:
    """The steps of a distillation, as `complete` calls them."""

    def __init__(
        self, dataset: Path, out: Path, settings: DistillSettings, device: str, console: Console
    ) -> None:
        self.dataset, self.out = dataset, out
        self.settings, self.device, self.console = settings, device, console
        self.files = _RunFiles(Path(f"{out}.run"))

    @property
    def folder(self) -> Path:
        return self.files.folder

    def list_inputs(self) -> None:
        """Load the teacher, list the clips and build the student of the first phase."""
        settings = self.settings
        self.teacher = _load(*_read_teacher(settings.teacher)).to(self.device)
        self.clips = AudioBatches(
            self.dataset,
            settings.data,
            sample_rate=_RATE,
            shortest=self.teacher.config.reach - 2 * self.teacher.config.pad,
            seed=settings.run.seed,
            resampling=read_source(self.dataset).config.resample,
        )
        torch.manual_seed(settings.run.seed)
        try:
            student = gated_student(self.teacher, settings.distill)
            self.pruning = Distillation(self.teacher, student, settings.distill, "prune")
        except ValueError as error:
            raise UserError(str(error)) from error
        self.recorded = _fingerprinted(self.dataset, settings, self.clips)

    def check_settings(self) -> None:
        if not self.files.state.exists():
            return
        before = self.files.read_settings()
        differing = differences(before, self.recorded, neutral_values(DistillConfig))
        if differing:
            raise UserError(
                f"{self.folder} was started with other settings ({'; '.join(differing)}); "
                "give the same ones to resume, or remove the folder to start over"
            )

    def plan(self) -> DistillPlan:
        if not self.files.state.exists():
            return DistillPlan("prune", 0)
        notes = _read(self.files.state, [])[1]
        try:
            phase: Phase = "prune" if notes["phase"] == "prune" else "finetune"
            return DistillPlan(phase, int(notes["step"]))
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{self.files.state} does not state its step; remove the folder {self.folder} to "
                "start over"
            ) from error

    def begin(self, plan: DistillPlan) -> None:
        if plan.steps_done == 0:
            text = json.dumps(self.recorded, indent=2) + "\n"
            self.files.settings.write_text(text, encoding="utf-8")
            self.files.log.path.unlink(missing_ok=True)

    def run(self, plan: DistillPlan) -> None:
        cfg, files, steps_done = self.settings.distill, self.files, plan.steps_done
        if plan.phase == "prune":
            pruned = self._prune(steps_done)
            finetuning = Distillation(self.teacher, pruned, cfg, "finetune")
            finetuning.projections.load_state_dict(self.pruning.projections.state_dict())
            files.save(finetuning, cfg.steps)
            steps_done = cfg.steps
        else:
            pruned = files.read_pruned().to(self.device)
            finetuning = Distillation(self.teacher, pruned, cfg, "finetune")
            finetuning.load_state(files.read_state())
        _train(finetuning, steps_done, self.clips, files, self.settings, self.console)
        self.student = finetuning.finished().cpu()

    def balance(self, plan: DistillPlan) -> DistillOutcome:
        """Write the student and return its figures beside the teacher's."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        _save_encoder(self.student, self.out)
        outcome = _outcome(self.teacher, self.student, self.files.losses())
        self.files.end()
        return outcome

    def _prune(self, steps_done: int) -> Wav2Vec2:
        """Do the rest of the first phase, and save and return the pruned student."""
        if steps_done:
            self.pruning.load_state(self.files.read_state())
        _train(self.pruning, steps_done, self.clips, self.files, self.settings, self.console)
        try:
            pruned = self.pruning.pruned()
        except ValueError as error:
            raise UserError(f"{error}; remove {self.folder} to start over") from error
        self.files.save_pruned(pruned)
        return pruned


def _read_teacher(teacher: TeacherConfig) -> tuple[Wav2Vec2Config, dict[str, Tensor]]:
    for key, value in (("name", teacher.name), ("checkpoint", teacher.checkpoint)):
        if value is None:
            raise UserError(
                f"teacher.{key} is not set; give teacher.name=ENCODER and teacher.checkpoint=FILE"
            )
    assert teacher.name is not None
    try:
        return read_encoder(teacher.name, _checkpoint_path(teacher))
    except CheckpointError as error:
        raise UserError(str(error)) from error


def _checkpoint_path(teacher: TeacherConfig) -> Path:
    assert teacher.checkpoint is not None
    return Path(teacher.checkpoint).expanduser()


def student_summary(outcome: DistillOutcome, out: Path) -> Summary:
    """Return sizes, sparsity, remaining widths and losses of the student."""
    layers = outcome.config.layers
    figures = {
        "file": str(out),
        "teacher_parameters": outcome.teacher_size,
        "student_parameters": outcome.student_size,
        "sparsity": outcome.sparsity,
        "channels": [channels for channels, _, _ in outcome.config.stem],
        "heads": [layer.heads for layer in layers],
        "feed_forward": [layer.feed_forward for layer in layers],
        "first_loss": outcome.first_loss,
        "last_loss": outcome.last_loss,
    }
    rows = [
        ("teacher", f"{outcome.teacher_size:,} parameters"),
        ("student", f"{outcome.student_size:,} parameters"),
        ("sparsity", f"{outcome.sparsity:.1%}, without the final projections"),
        ("channels", " ".join(str(channels) for channels, _, _ in outcome.config.stem)),
        ("heads", " ".join(str(layer.heads) for layer in layers)),
        ("feed-forward", " ".join(str(layer.feed_forward) for layer in layers)),
        ("loss", f"{outcome.first_loss:.4f} at first, {outcome.last_loss:.4f} at last"),
    ]
    use = f"use it with: encoder.name=dphubert encoder.checkpoint={out}"
    return Summary(parts=[text_table(rows), use], figures=figures)


def _train(
    distillation: Distillation,
    steps_done: int,
    clips: AudioBatches,
    files: _RunFiles,
    settings: DistillSettings,
    console: Console,
) -> None:
    """Run the remaining steps of a phase. steps_done: counted over both phases."""
    cfg, pruning = distillation.cfg, distillation.phase == "prune"
    begin, stop = (0, cfg.steps) if pruning else (cfg.steps, cfg.steps + cfg.finetune_steps)
    device = distillation.multipliers.device
    title = "prune" if pruning else "finetune"
    with (
        show_bar(console, title, stop - begin, done=steps_done - begin) as advance,
        closing(clips.stream(steps_done)) as batches,
        files.log.open_from(steps_done) as log,
    ):
        for step in range(steps_done, stop):
            wavs, num_samples = next(batches)
            torch.manual_seed(settings.run.seed * 1_000_003 + step)
            report = distillation.step(step - begin, wavs.to(device), num_samples)
            if not math.isfinite(report.loss):
                raise UserError(
                    f"the loss is {report.loss} at step {step}; lower distill.learning_rate, and "
                    f"remove {files.folder} to start over"
                )
            log.write(_line(step, distillation.phase, report))
            advance(1)
            if (step + 1) % settings.run.save_every == 0 or step + 1 == stop:
                log.flush()
                files.save(distillation, step + 1)


def _line(step: int, phase: Phase, report: StepReport) -> str:
    values = {k: float(f"{v:.6g}") for k, v in dataclasses.asdict(report).items()}
    return json.dumps({"step": step, "phase": phase, **values}) + "\n"


class _RunFiles:
    """The folder of a run; the module's docstring lists its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = folder / "settings.json"
        self.log = StepLog(folder / "log.jsonl")
        self.state = folder / "state.safetensors"
        self._pruned = folder / "pruned.safetensors"

    def read_settings(self) -> dict[str, Any]:
        """Read the settings that the run was started with.

        Raises: UserError: when they are missing or damaged.
        """
        try:
            settings = read_json(self.settings)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(
                f"{self.settings} is missing or damaged ({error}); remove the folder "
                f"{self.folder} to start over"
            ) from error
        if not isinstance(settings, dict):
            raise UserError(
                f"{self.settings} has no settings; remove the folder {self.folder} to start over"
            )
        return settings

    def read_state(self) -> dict[str, Tensor]:
        return _read(self.state)[0]

    def save(self, distillation: Distillation, step: int) -> None:
        """Save the state after `step` steps, counted over both phases."""
        tensors = {k: t.detach().cpu() for k, t in distillation.state().items()}
        save_safetensors(self.state, tensors, {"step": str(step), "phase": distillation.phase})

    def save_pruned(self, student: Wav2Vec2) -> None:
        _save_encoder(student, self._pruned)

    def read_pruned(self) -> Wav2Vec2:
        return _load(*read_encoder_file(self._pruned).take())

    def losses(self) -> list[float]:
        return [float(line["loss"]) for line in self.log.lines() if _is_number(line.get("loss"))]

    def end(self) -> None:
        """Delete the training state of a finished run; settings, log and pruned student stay."""
        self.state.unlink()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _read(path: Path, keys: list[str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        return read_safetensors(path, keys)
    except CheckpointError as error:
        raise UserError(f"{error}; remove the folder {path.parent} to start over") from error


def _fingerprinted(dataset: Path, settings: DistillSettings, clips: AudioBatches) -> dict[str, Any]:
    """Return everything that the student depends on, under the keys of settings.json."""
    training = {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in dataclasses.asdict(settings.distill).items()
    }
    try:
        teacher_sha256 = sha256_of(_checkpoint_path(settings.teacher))
    except CheckpointError as error:
        raise UserError(str(error)) from error
    return {
        "dataset_fingerprint": read_supported_info(dataset)["fingerprint"],
        "clips": len(clips),
        "teacher": settings.teacher.name,
        "teacher_sha256": teacher_sha256,
        "split": settings.data.split,
        "batch": settings.data.batch_size,
        "crop_s": settings.data.crop_s,
        "seed": settings.run.seed,
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
    save_encoder_file(EncoderFile(path, CANTOR, family, network.config, tensors, names), path)


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
    """Restore the process's random generators afterwards."""
    with torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else []):
        yield


@contextmanager
def _out_of_memory_as_user_error() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "a step does not fit into GPU memory; lower data.batch_size or data.crop_s"
        ) from error
