"""Ray's workers, one of them killed on the way, reach what one process alone does."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil
import pytest

from pipeline.errors import UserError
from pipeline.train.ray_train import train_on_ray
from pipeline.train.trainer import fit
from tests.pipeline.train.small_training import losses, small_config, write_small_dataset

pytestmark = pytest.mark.ray

WORDS = ("model.dropout=0", "optimizer.learning_rate=1e-12", "loss.mel=1", "data.batch_size=4")


def kill_a_worker(run: Path, killed: list[int]) -> None:
    """Once the run has a checkpoint."""
    while not list(run.glob("checkpoints/step-*")):
        time.sleep(0.02)
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.kill()
                killed.append(process.pid)
                return
        except psutil.Error:  # it ended while we looked
            continue


def test_two_workers_one_of_them_killed_have_the_losses_of_one(tmp_path: Path) -> None:
    data = write_small_dataset(tmp_path / "data")
    config = small_config(*WORDS, "run.steps=12")
    fit(data, tmp_path / "1", config)
    killed: list[int] = []
    watcher = threading.Thread(target=kill_a_worker, args=(tmp_path / "2", killed), daemon=True)
    watcher.start()
    outcome = train_on_ray(data, tmp_path / "2", config, 2)
    assert len(killed) == 1
    assert (outcome.steps, outcome.checkpoint.name) == (12, "step-00000012")
    assert outcome.begun_at > 0
    for one, two in zip(losses(tmp_path / "1"), losses(tmp_path / "2"), strict=True):
        assert one == pytest.approx(two, rel=1e-6)


def test_what_the_user_can_put_right_comes_as_a_sentence(tmp_path: Path) -> None:
    data = write_small_dataset(tmp_path / "data", clips=1)
    with pytest.raises(UserError, match="100 workers need as many CPUs, but"):
        train_on_ray(data, tmp_path / "run", small_config(), 100)
