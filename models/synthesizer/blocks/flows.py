"""Invertible layers between a spectrogram's latent z and its prior: VITS' coupling flows.

Sources: Dinh et al., "Density estimation using Real NVP" (2016); VITS; so-vits-svc (commit
730930d), whose state dict this has.

B batch, C latent channels, H hidden channels, F frames. A mask of frames is (B, 1, F).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.synthesizer.blocks.attention import FFT
from models.synthesizer.blocks.wavenet import WN
from models.synthesizer.config import ModelConfig

_KERNEL_SIZE = 5  # of every flow's network


class CouplingLayer(nn.Module):
    """Half of the channels shift the others, and scale them unless mean_only.

    enc: network of (B, H, F), mask and speaker embedding that says by how much.
    Begins as the identity.
    """

    def __init__(
        self, channels: int, hidden_channels: int, enc: nn.Module, mean_only: bool = True
    ) -> None:
        super().__init__()
        half = channels // 2
        self.mean_only = mean_only
        self.pre = nn.Conv1d(half, hidden_channels, 1)
        self.enc = enc
        self.post = nn.Conv1d(hidden_channels, half if mean_only else 2 * half, 1)
        nn.init.zeros_(self.post.weight)
        nn.init.zeros_(self.post.bias)

    def forward(
        self, x: Tensor, mask: Tensor, g: Tensor | None = None, reverse: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(y, log |det dy/dx| (B,)) of x (B, C, F); with `reverse` the x of a y, alone."""
        kept, moved = x.chunk(2, dim=1)
        shift = self.post(self.enc(self.pre(kept) * mask, mask, g)) * mask
        log_scale = None
        if not self.mean_only:
            shift, log_scale = shift.chunk(2, dim=1)
        if reverse:
            moved = moved - shift
            if log_scale is not None:
                moved = moved * torch.exp(-log_scale)
            return torch.cat([kept, moved * mask], dim=1)
        if log_scale is not None:
            moved = moved * torch.exp(log_scale)
        y = torch.cat([kept, shift + moved * mask], dim=1)
        return y, y.new_zeros(len(y)) if log_scale is None else log_scale.sum((1, 2))


class Flip(nn.Module):
    """Reverses the order of the channels, so that the next coupling moves the other half."""

    def forward(
        self, x: Tensor, mask: Tensor, g: Tensor | None = None, reverse: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(y, log |det dy/dx| (B,)), which is 0; with `reverse` x alone."""
        y = x.flip(1)
        return y if reverse else (y, y.new_zeros(len(y)))


class CouplingBlock(nn.Module):
    """Coupling layers that shift, each followed by a flip.

    network: builds what is inside a layer.
    share: one network inside all of them; the state dict has it as `wn` too.
    """

    def __init__(
        self, config: ModelConfig, network: Callable[[], nn.Module], share: bool = False
    ) -> None:
        super().__init__()
        shared = network() if share else None
        self.flows = nn.ModuleList()
        for _ in range(config.n_flows):
            enc = network() if shared is None else shared
            self.flows.append(CouplingLayer(config.inter_channels, config.hidden_channels, enc))
            self.flows.append(Flip())
        if shared is not None:
            self.wn = shared

    def forward(
        self, x: Tensor, mask: Tensor, g: Tensor | None = None, reverse: bool = False
    ) -> Tensor:
        """Latent to prior, (B, C, F) -> (B, C, F), or back. Volumes stay: log |det| is 0.

        g: (B, G, 1 or F) speaker embedding.
        """
        if reverse:
            for flow in reversed(self.flows):
                x = flow(x, mask, g, reverse=True)
            return x
        for flow in self.flows:
            x, _ = flow(x, mask, g)
        return x


class ResidualCouplingBlock(CouplingBlock):
    """The flows of VITS, with gated convolutions inside."""

    def __init__(self, config: ModelConfig) -> None:
        def network() -> WN:
            return WN(
                config.hidden_channels,
                _KERNEL_SIZE,
                1,
                config.n_flow_layers,
                gin_channels=config.gin_channels,
                depthwise=config.depthwise_conv,
            )

        super().__init__(config, network, config.share_flow)


class TransformerCouplingBlock(CouplingBlock):
    """so-vits-svc's flows with causal transformers inside."""

    def __init__(self, config: ModelConfig) -> None:
        def network() -> FFT:
            return FFT(
                config.hidden_channels,
                config.filter_channels,
                config.n_heads,
                config.n_flow_layers,
                _KERNEL_SIZE,
                dropout=config.dropout,
                gin_channels=config.gin_channels,
            )

        super().__init__(config, network, config.share_flow)
