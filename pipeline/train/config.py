"""Settings of `train`: networks, data, losses, optimizer and run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from models.synthesizer.config import MelConfig, ModelConfig, require_at_least
from pipeline.dataset.data_config import DataConfig


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the losses, and the length that the decoder generates in a step.

    adversarial_from: the step at which the discriminators begin. Before it, only spectrograms are
    compared: that is faster, but gives no detail.
    """

    mel: float = 45.0
    kl: float = 1.0
    adversarial_from: int = 0
    segment_frames: int = 20

    def __post_init__(self) -> None:
        require_at_least(0, "loss.mel", self.mel)
        require_at_least(0, "loss.kl", self.kl)
        require_at_least(0, "loss.adversarial_from", self.adversarial_from)
        require_at_least(1, "loss.segment_frames", self.segment_frames)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of AdamW, for the synthesizer and for the discriminators.

    decay: factor of the learning rate after every epoch.
    clip_norm: the largest norm of gradients; longer ones are scaled down; None: only measured.
    accumulate: parts of a batch that are computed one after the other, to save memory.
    ema: decay of the weights' moving average, which becomes the voice; None: no average.
    freeze: regular expressions; parameters whose names match one are not trained.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.8, 0.99)
    eps: float = 1e-9
    weight_decay: float = 0.01
    decay: float = 0.999875
    warmup_steps: int = 0
    clip_norm: float | None = None
    accumulate: int = 1
    ema: float | None = None
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"optimizer.learning_rate is {self.learning_rate}; it must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas is {list(self.betas)}; both must lie in 0 to 1")
        if not 0 < self.decay <= 1:
            raise ValueError(f"optimizer.decay is {self.decay}; it must lie in 0 to 1")
        for name in ("eps", "weight_decay", "warmup_steps"):
            require_at_least(0, f"optimizer.{name}", getattr(self, name))
        require_at_least(1, "optimizer.accumulate", self.accumulate)
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"optimizer.clip_norm is {self.clip_norm}; it must be above 0")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"optimizer.ema is {self.ema}; it must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, precision and checkpoints of a run. Only steps, seed and precision change numbers."""

    steps: int = 100_000
    seed: int = 1234
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False  # torch.compile
    threads: int | None = None  # of torch in each worker; None: the cores, divided among workers
    log_every: int = 50
    validate_every: int = 1000
    save_every: int = 1000
    keep_last: int = 3
    keep_best: bool = True  # by the validation's mel distance
    validation_clips: int = 4  # measured, drawn and written as sound; always the same ones

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "validate_every", "save_every", "keep_last"):
            require_at_least(1, f"run.{name}", getattr(self, name))
        require_at_least(0, "run.validation_clips", self.validation_clips)
        if self.threads is not None:
            require_at_least(1, "run.threads", self.threads)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every setting of `train`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    mel: MelConfig = field(default_factory=MelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.data.batch_size % self.optimizer.accumulate:
            raise ValueError(
                f"data.batch_size is {self.data.batch_size}; it must be a multiple of "
                f"optimizer.accumulate, {self.optimizer.accumulate}"
            )
        if self.data.min_frames < self.loss.segment_frames:
            raise ValueError(
                f"data.min_frames is {self.data.min_frames}; it must be at least "
                f"loss.segment_frames, {self.loss.segment_frames}"
            )
