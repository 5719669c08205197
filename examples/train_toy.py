"""A custom trainer in plain PyTorch: units and pitch of a dataset's clips to their spectra.

python examples/train_toy.py DATASET
"""

import sys
from itertools import islice

import torch
from rich.console import Console
from torch import nn

from pipeline.dataset.data_config import DataConfig
from pipeline.dataset.shard_dataset import ShardDataset


def spectra(batch, hop):
    """Compute log magnitudes (B, 2 * hop + 1, F) of a batch's audio."""
    window = torch.hann_window(4 * hop)
    spec = torch.stft(batch.wav, 4 * hop, hop, window=window, return_complex=True)
    return spec.abs().clamp(min=1e-3).log()[:, :, : batch.f0.shape[1]]


def loss_of(model, batch, frames, hop):
    """Compute the mean absolute error over `frames` frames, without padding."""
    pitch = torch.stack([batch.f0.clamp(min=1).log2(), batch.voiced], dim=1)
    guess = model(torch.cat([batch.units, pitch], dim=1))
    real = torch.arange(batch.f0.shape[1]) < batch.lengths[:, None]
    return ((guess - spectra(batch, hop)).abs().mean(dim=1) * real).sum() / frames


def train(dataset, steps=200):
    """Train and return the loss of each step."""
    data = ShardDataset(dataset, data=DataConfig(batch_size=8))
    width, hop = data.identity.encoder.dim, data.identity.hop_length
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(width + 2, 64, 5, padding=2), nn.GELU())
    model.append(nn.Conv1d(64, 2 * hop + 1, 1))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for batch, totals, _ in islice(data.batches(), steps):
        loss = loss_of(model, batch, totals.frames, hop)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    Console().print("losses", train(sys.argv[1]))
