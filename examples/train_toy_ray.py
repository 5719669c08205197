"""A custom trainer on two workers of Ray Train, each with its share of every batch.

python examples/train_toy_ray.py DATASET OUT
"""

import sys
import tempfile
from itertools import islice
from pathlib import Path

import ray.train
import torch
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from rich.console import Console
from torch import nn

from pipeline.dataset.data_config import DataConfig
from pipeline.dataset.shard_dataset import ShardDataset


def loss_of(model, batch, frames):
    """Compute the mean error of the loudness predicted from units and pitch."""
    pitch = torch.stack([batch.f0.clamp(min=1).log2(), batch.voiced], dim=1)
    guess = model(torch.cat([batch.units, pitch], dim=1))[:, 0]
    real = torch.arange(batch.f0.shape[1]) < batch.lengths[:, None]
    return ((guess - batch.volume.clamp(min=1e-3).log()).abs() * real).sum() / frames


def train(config):
    """Train on one worker."""
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    data = ShardDataset(config["dataset"], data=DataConfig(batch_size=8))
    torch.manual_seed(0)
    model = prepare_model(nn.Conv1d(data.identity.encoder.dim + 2, 1, 5, padding=2))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for batch, totals, _ in islice(data.batches(0, rank, workers), config["steps"]):
        loss = loss_of(model, batch, totals.frames)
        optimizer.zero_grad()
        (loss * workers).backward()  # gradients are the mean of the workers' afterwards
        optimizer.step()
        losses.append(loss.detach())
    of_all = torch.stack(losses)
    torch.distributed.all_reduce(of_all)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.module.state_dict(), f"{folder}/model.pt")
        checkpoint = Checkpoint.from_directory(folder) if rank == 0 else None
        ray.train.report({"losses": of_all.tolist()}, checkpoint)


if __name__ == "__main__":
    trainer = TorchTrainer(
        train,
        train_loop_config={"dataset": sys.argv[1], "steps": 60},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(Path(sys.argv[2]).absolute())),
    )
    Console().print(trainer.fit().metrics["losses"])
