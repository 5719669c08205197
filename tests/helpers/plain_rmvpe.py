"""RMVPE layer by layer as in its paper's code, as a reference for the fast one.

Nothing is folded, fused or packed, and clips have no lengths. Modules bear the published names.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from models.f0.mel import NUM_MELS
from models.f0.rmvpe_checkpoint import LEVELS, RmvpeConfig


class Block(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(),
            nn.Conv2d(n_out, n_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(),
        )
        if n_in != n_out:
            self.shortcut = nn.Conv2d(n_in, n_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + (self.shortcut(x) if hasattr(self, "shortcut") else x)


def blocks(n_in: int, n_out: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(Block(n_in if i == 0 else n_out, n_out) for i in range(count)))


class Layer(nn.Module):
    def __init__(self, n_in: int, n_out: int, count: int) -> None:
        super().__init__()
        self.conv = blocks(n_in, n_out, count)


class Up(nn.Module):
    def __init__(self, n_in: int, n_out: int, count: int) -> None:
        super().__init__()
        up = nn.ConvTranspose2d(n_in, n_out, 3, 2, padding=1, output_padding=1, bias=False)
        self.conv1 = nn.Sequential(up, nn.BatchNorm2d(n_out), nn.ReLU())
        self.conv2 = blocks(2 * n_out, n_out, count)


class Encoder(nn.Module):
    def __init__(self, config: RmvpeConfig) -> None:
        super().__init__()
        widths = [1] + [config.channels << i for i in range(LEVELS)]
        self.bn = nn.BatchNorm2d(1)
        self.layers = nn.ModuleList(
            Layer(n_in, n_out, config.blocks) for n_in, n_out in itertools.pairwise(widths)
        )


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class UNet(nn.Module):
    def __init__(self, config: RmvpeConfig) -> None:
        super().__init__()
        widths = [config.channels << i for i in range(LEVELS + 1)]
        self.encoder = Encoder(config)
        self.intermediate = Stack(
            [
                Layer(widths[-2 if i == 0 else -1], widths[-1], config.blocks)
                for i in range(config.inter_layers)
            ]
        )
        if config.timbre_filter:
            self.tf = Stack([Block(width, width) for width in widths[:-1]])
        self.decoder = Stack(
            [Up(widths[-1 - i], widths[-2 - i], config.blocks) for i in range(LEVELS)]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder.bn(x)
        skipped = []
        for layer in self.encoder.layers:
            x = layer.conv(x)
            skipped.append(x)
            x = nn.functional.avg_pool2d(x, 2)
        for layer in self.intermediate.layers:
            x = layer.conv(x)
        for layer in self.decoder.layers:
            x = layer.conv2(torch.cat([layer.conv1(x), skipped.pop()], dim=1))
        return x


class BiGRU(nn.Module):
    def __init__(self, config: RmvpeConfig) -> None:
        super().__init__()
        self.gru = nn.GRU(3 * NUM_MELS, config.hidden, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


class PlainRmvpe(nn.Module):
    """Log-mel (B, M, F) -> salience (B, F, 360); F a multiple of 32."""

    def __init__(self, config: RmvpeConfig) -> None:
        super().__init__()
        self.unet = UNet(config)
        self.cnn = nn.Conv2d(config.channels, 3, 3, padding=1)
        self.fc = nn.Sequential(BiGRU(config), nn.Linear(2 * config.hidden, 360), nn.Sigmoid())

    def maps(self, mel: Tensor) -> Tensor:
        """Compute the GRU's input: (B, M, F) -> (B, F, 3 M)."""
        x = self.cnn(self.unet(mel.transpose(1, 2)[:, None]))  # (B, 3, F, M)
        return x.transpose(1, 2).flatten(2)

    def forward(self, mel: Tensor) -> Tensor:
        return self.fc(self.maps(mel))
