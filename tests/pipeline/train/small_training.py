"""Runs of `fit` that take a fraction of a second a step, in this process and in others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.settings import load_settings
from pipeline.storage.step_log import StepLog
from pipeline.train.config import TrainConfig
from tests.helpers.training_data import write_dataset

ROOT = Path(__file__).resolve().parents[3]

SMALL = {
    "model.inter_channels": "8",
    "model.hidden_channels": "16",
    "model.filter_channels": "16",
    "model.n_layers": "1",
    "model.n_flows": "2",
    "model.resblock": "'2'",
    "model.resblock_kernel_sizes": "[3]",
    "model.resblock_dilation_sizes": "[[1, 3]]",
    "model.upsample_rates": "[8, 8]",
    "model.upsample_initial_channel": "16",
    "model.upsample_kernel_sizes": "[16, 16]",
    "model.gin_channels": "8",
    "model.discriminator_channels": "64",
    "mel.n_fft": "256",
    "mel.win_length": "256",
    "mel.n_mels": "20",
    "data.batch_size": "2",
    "data.max_frames": "64",
    "data.min_frames": "20",
    "data.loader_threads": "1",
    "data.validation": "0.2",
    "loss.segment_frames": "10",
    "run.steps": "6",
    "run.save_every": "2",
    "run.keep_last": "10",
    "run.validate_every": "1000",
    "run.validation_clips": "0",
    "run.threads": "1",
    "run.device": "cpu",
}


def small_config(*words: str) -> TrainConfig:
    changed = dict(word.split("=", 1) for word in words)
    return load_settings(TrainConfig, None, [f"{k}={v}" for k, v in (SMALL | changed).items()])


def write_small_dataset(folder: Path, **options: Any) -> Path:
    """20 clips to train with, of two speakers: ten steps an epoch."""
    shape = {"sample_rate": 8000, "hop_length": 64, "songs": 3, "seconds": (0.4, 0.8)}
    return write_dataset(folder, **{**shape, **options})


def losses(run: Path) -> list[dict[str, float]]:
    """Everything of each step that does not depend on the clock."""
    lines = [line for line in StepLog(run / "log.jsonl").lines() if line["step"]]
    clock = ("seconds", "data_wait_s", "validation")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def start_fit(dataset: Path, run: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """`fit` in a process of its own. RANK and WORLD_SIZE in its environment make it one of many."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.pipeline.train.small_training", dataset, run, *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _main(dataset: str, run: str, *words: str) -> None:
    import torch.distributed as dist

    from pipeline.train.trainer import fit

    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    fit(dataset, Path(run), small_config(*words))


if __name__ == "__main__":
    _main(*sys.argv[1:])
