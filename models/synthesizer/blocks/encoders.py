"""Encoders of the synthesizer: posterior (spectrogram), prior (content and pitch), f0 predictor.

Sources: VITS; so-vits-svc (commit 730930d), whose state dicts these have.

B batch, C latent channels, H hidden channels, G speaker channels, F frames. A mask of frames is
(B, 1, F); a speaker embedding g is (B, G, 1), or (B, G, F) where it changes over time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.synthesizer.blocks.attention import FFT, TransformerEncoder
from models.synthesizer.blocks.noise import Noise
from models.synthesizer.blocks.wavenet import WN
from models.synthesizer.config import ModelConfig, SynthesizerConfig

_F0_BINS = 256


class PosteriorEncoder(nn.Module):
    """Posterior encoder: a normal distribution of the latent z for each frame of a spectrogram."""

    def __init__(self, config: SynthesizerConfig) -> None:
        super().__init__()
        hidden = config.hidden_channels
        self.pre = nn.Conv1d(config.spec_channels, hidden, 1)
        self.enc = WN(
            hidden,
            kernel_size=5,
            dilation_rate=1,
            n_layers=16,
            gin_channels=config.gin_channels,
            depthwise=config.depthwise_conv,
        )
        self.proj = nn.Conv1d(hidden, 2 * config.inter_channels, 1)

    def forward(
        self, spec: Tensor, mask: Tensor, g: Tensor | None, noise: Noise
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode spec (B, bins, F) to z, mean and log standard deviation, each (B, C, F)."""
        x = self.enc(self.pre(spec) * mask, mask, g)
        mean, log_deviation = (self.proj(x) * mask).chunk(2, dim=1)
        z = (mean + noise.normal(mean) * torch.exp(log_deviation)) * mask
        return z, mean, log_deviation


class PriorEncoder(nn.Module):
    """Prior encoder: a normal distribution of the latent for each frame of content and pitch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.hidden_channels
        self.proj = nn.Conv1d(hidden, 2 * config.inter_channels, 1)
        self.f0_emb = nn.Embedding(_F0_BINS, hidden)
        self.enc_ = TransformerEncoder(
            hidden,
            config.filter_channels,
            config.n_heads,
            config.n_layers,
            config.kernel_size,
            dropout=config.dropout,
        )

    def forward(self, x: Tensor, mask: Tensor, coarse_f0: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log standard deviation, each (B, C, F).

        x: (B, H, F) content. coarse_f0: (B, F) int64, bins of pitch.f0_to_coarse.
        """
        x = self.enc_(x + self.f0_emb(coarse_f0).transpose(1, 2), mask)
        mean, log_deviation = (self.proj(x) * mask).chunk(2, dim=1)
        return mean, log_deviation


class F0Predictor(nn.Module):
    """Predictor of a melody from content, as mel-like log f0 (`sovits.networks.mel_f0`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.hidden_channels
        self.prenet = nn.Conv1d(hidden, hidden, 3, padding=1)
        self.decoder = FFT(
            hidden,
            config.filter_channels,
            config.n_heads,
            config.n_layers,
            config.kernel_size,
            dropout=config.dropout,
        )
        self.proj = nn.Conv1d(hidden, 1, 1)
        self.f0_prenet = nn.Conv1d(1, hidden, 3, padding=1)
        self.cond = nn.Conv1d(config.gin_channels, hidden, 1)

    def forward(self, x: Tensor, norm_lf0: Tensor, mask: Tensor, g: Tensor | None = None) -> Tensor:
        """Predict (B, 1, F) from content x (B, H, F), without gradients, and norm_lf0 (B, 1, F).

        The first convolution reads one frame of padding, so the padding of x affects the result, as
        in so-vits-svc (voicing and volume are not masked there).
        """
        x = x.detach() + self.f0_prenet(norm_lf0)
        if g is not None:
            x = x + self.cond(g)
        return self.proj(self.decoder(self.prenet(x) * mask, mask)) * mask
