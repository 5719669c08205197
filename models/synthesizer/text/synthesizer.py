"""The text-conditioned synthesizer: VITS on phonemes, with durations and a plain HiFi-GAN.

Sources: Kim et al., "Conditional Variational Autoencoder with Adversarial Learning for End-to-End
Text-to-Speech" (2021); Kong et al., "VITS2" (2023); Bert-VITS2 (commit 61130ac), whose state dict
this is.

B batch, C latent channels, G speaker channels, H hidden channels, K bins of the spectrogram, N
symbols, F frames, T samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.synthesizer.blocks.attention import TransformerEncoder
from models.synthesizer.blocks.decoder import PlainGenerator
from models.synthesizer.blocks.encoders import PosteriorEncoder
from models.synthesizer.blocks.flows import CouplingBlock, ResidualCouplingBlock
from models.synthesizer.blocks.noise import Noise
from models.synthesizer.blocks.segments import random_starts, sequence_mask, slice_segments
from models.synthesizer.text.alignment import log_likelihood, monotonic_path, path_of_durations
from models.synthesizer.text.config import TextSynthesizerConfig
from models.synthesizer.text.durations import DurationPredictor, StochasticDurationPredictor
from models.synthesizer.text.reference_encoder import ReferenceEncoder
from models.synthesizer.text.text_encoder import Text, TextEncoder

_DURATION_CHANNELS = 256
_DURATION_DROPOUT = 0.5


@dataclass(frozen=True)
class TextOutputs:
    """Training outputs that the losses use: posterior z, prior, durations, audio of a segment."""

    wav: Tensor  # (B, 1, segment)
    starts: Tensor  # (B,) int64, first frames of the segments
    path: Tensor  # (B, F, N) 1 for the symbol of each frame
    text_mask: Tensor  # (B, 1, N)
    mask: Tensor  # (B, 1, F)
    z_p: Tensor  # (B, C, F) the posterior's z after the flow
    m_p: Tensor  # (B, C, F) the prior, repeated for each symbol's frames
    logs_p: Tensor
    m_q: Tensor
    logs_q: Tensor
    hidden: Tensor  # (B, H, N) of the text
    log_durations: Tensor  # (B, 1, N) of the path, in log frames
    log_durations_hat: Tensor  # their prediction
    duration_nll: Tensor  # (B,) their negative log likelihood by the stochastic predictor


@dataclass(frozen=True)
class TextSynthesis:
    """Result of inference."""

    wav: Tensor  # (B, T), undefined after each example's frames
    frames: Tensor  # (B,) int64
    path: Tensor  # (B, F, N) 1 for the symbol of each frame


class TextSynthesizer(nn.Module):
    """Network from phonemes and a speaker to singing or speech."""

    def __init__(self, config: TextSynthesizerConfig) -> None:
        super().__init__()
        self.config = config
        hidden, gin = config.hidden_channels, config.gin_channels
        self.enc_p = TextEncoder(config)
        self.dec = PlainGenerator(config)
        self.enc_q = PosteriorEncoder(config)
        self.flow = _flow(config)
        self.sdp = StochasticDurationPredictor(hidden, 3, _DURATION_DROPOUT, gin)
        self.dp = DurationPredictor(hidden, _DURATION_CHANNELS, 3, _DURATION_DROPOUT, gin)
        if config.n_speakers:
            self.emb_g = nn.Embedding(config.n_speakers, gin)
        else:
            self.ref_enc = ReferenceEncoder(config.spec_channels, gin)

    def forward(
        self,
        text: Text,
        spec: Tensor,
        frames: Tensor,
        speaker: Tensor | None,
        noise: Noise,
        segment_frames: int,
        alignment_noise: float = 0.0,
    ) -> TextOutputs:
        """Run one training pass.

        spec: (B, K, F) linear spectrogram, 0 in padding. frames: (B,) int64, its lengths.
        speaker: (B,) int64; None where the speaker comes from the spectrogram.
        segment_frames: frames decoded of each clip, from a random start.
        alignment_noise: noise on the alignment scores, in units of their standard deviation.
            VITS2 starts with 0.01 and subtracts 2e-6 at each step.

        Raises: ValueError: when a text has more symbols than its clip has frames.
        """
        g = self._speaker(speaker, spec)
        text_mask = _mask(text.lengths, text.symbols.shape[1], spec)
        mask = _mask(frames, spec.shape[2], spec)
        hidden, m_p, logs_p = self.enc_p(text, text_mask, g)
        z, m_q, logs_q = self.enc_q(spec, mask, g, noise)
        z_p = self.flow(z, mask, g)
        with torch.no_grad():
            score = log_likelihood(z_p, m_p, logs_p)
            if alignment_noise:
                cells = mask.transpose(1, 2) * text_mask
                score = score + alignment_noise * _deviation(score, cells) * noise.normal(score)
            path = monotonic_path(score, text.lengths, frames)

        durations = path.sum(1, keepdim=True)  # (B, 1, N)
        starts = random_starts(frames, segment_frames, noise)
        return TextOutputs(
            wav=self.dec(slice_segments(z, starts, segment_frames), g),
            starts=starts,
            path=path,
            text_mask=text_mask,
            mask=mask,
            z_p=z_p,
            m_p=_spread(m_p, path),
            logs_p=_spread(logs_p, path),
            m_q=m_q,
            logs_q=logs_q,
            hidden=hidden,
            log_durations=torch.log(durations + 1e-6) * text_mask,
            log_durations_hat=self.dp(hidden, text_mask, g),
            duration_nll=self.sdp(hidden, text_mask, durations, g, noise),
        )

    @torch.no_grad()
    def infer(
        self,
        text: Text,
        speaker: Tensor | None = None,
        *,
        noise: Noise,
        reference: Tensor | None = None,
        noise_scale: float = 0.667,
        duration_noise_scale: float = 0.8,
        sdp_ratio: float = 0.0,
        length_scale: float = 1.0,
        max_frames: int | None = None,
    ) -> TextSynthesis:
        """Synthesize texts.

        speaker: (B,) int64. reference: (B, K, F) linear spectrogram of the speaker, for a network
        without a table of speakers.
        sdp_ratio: share, 0 to 1, of the stochastic durations against the predicted ones.
        length_scale: 2 is half the speed. max_frames: longest output.
        """
        g = self._speaker(speaker, reference)
        text_mask = _mask(text.lengths, text.symbols.shape[1], text.bert)
        hidden, m_p, logs_p = self.enc_p(text, text_mask, g)
        sampled = self.sdp.sample(hidden, text_mask, g, noise, duration_noise_scale)
        log_durations = sdp_ratio * sampled + (1 - sdp_ratio) * self.dp(hidden, text_mask, g)
        durations = torch.ceil(torch.exp(log_durations) * text_mask * length_scale).squeeze(1)
        frames = durations.long().sum(1).clamp(min=1)
        longest = int(frames.max())
        path = path_of_durations(durations, longest)
        mask = _mask(frames, longest, m_p)
        m_p, logs_p = _spread(m_p, path), _spread(logs_p, path)
        z_p = m_p + noise.normal(m_p) * torch.exp(logs_p) * noise_scale
        z = self.flow(z_p, mask, g, reverse=True)
        return TextSynthesis(self.dec((z * mask)[..., :max_frames], g).squeeze(1), frames, path)

    def _speaker(self, speaker: Tensor | None, spec: Tensor | None) -> Tensor:
        """Embed the speaker: (B, G, 1)."""
        if not self.config.n_speakers:
            if spec is None:
                raise ValueError("this network needs a reference spectrogram of the speaker")
            return self.ref_enc(spec).unsqueeze(-1)
        if speaker is None:
            raise ValueError(f"this network has {self.config.n_speakers} speakers; name one")
        return self.emb_g(speaker).unsqueeze(-1)


def _flow(config: TextSynthesizerConfig) -> CouplingBlock:
    if config.flow == "residual":
        return ResidualCouplingBlock(config)

    def network() -> TransformerEncoder:
        return TransformerEncoder(
            config.hidden_channels,
            config.filter_channels,
            config.n_heads,
            config.n_flow_layers,
            kernel_size=5,
            dropout=config.dropout,
            gin_channels=config.gin_channels,
        )

    return CouplingBlock(config, network)


def _mask(lengths: Tensor, longest: int, like: Tensor) -> Tensor:
    """Build a mask (B, 1, longest) in the dtype of `like`."""
    return sequence_mask(lengths, longest).unsqueeze(1).to(like.dtype)


def _spread(values: Tensor, path: Tensor) -> Tensor:
    """Repeat the values of each symbol for its frames, (B, C, N) -> (B, C, F)."""
    return values @ path.transpose(1, 2).to(values.dtype)


def _deviation(score: Tensor, cells: Tensor) -> Tensor:
    """Return the standard deviation (B, 1, 1) of scores (B, F, N) where `cells` is 1."""
    count = cells.sum((1, 2), keepdim=True)
    mean = (score * cells).sum((1, 2), keepdim=True) / count
    return (((score - mean).square() * cells).sum((1, 2), keepdim=True) / count).sqrt()
