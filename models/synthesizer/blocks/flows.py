"""Coupling flows of VITS: invertible layers between the posterior's latent z and its prior.

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
    """Affine coupling: half of the channels shift the other half, and scale it unless mean_only.

    enc: network of (B, H, F), mask and speaker embedding that computes shift and scale.
    Initialised as the identity.
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
        """Map x (B, C, F) to (y, log |det dy/dx| (B,)); with `reverse` map y to x only."""
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
    """Reversal of the order of the channels, so that the next coupling moves the other half."""

    def forward(
        self, x: Tensor, mask: Tensor, g: Tensor | None = None, reverse: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return (y, log |det dy/dx| (B,)), which is 0; with `reverse` x only."""
        y = x.flip(1)
        return y if reverse else (y, y.new_zeros(len(y)))


class CouplingBlock(nn.Module):
    """Mean-only coupling layers, each followed by a flip.

    network: builds the network of a layer.
    share: all layers use one network; the state dict has it as `wn` too.
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
        """Map latent to prior, (B, C, F) -> (B, C, F), or back; log |det| is 0.

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
    """The flows of VITS, with gated convolutions."""

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
    """so-vits-svc's flows with causal transformers."""

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
