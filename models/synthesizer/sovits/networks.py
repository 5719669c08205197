"""The singing voice synthesizer of so-vits-svc: VITS on content units with an NSF-HiFiGAN decoder.

Sources: Kim et al., "Conditional Variational Autoencoder with Adversarial Learning for End-to-End
Text-to-Speech" (2021); so-vits-svc (commit 730930d), whose state dict this one is.

B batch, D unit width, C latent channels, H hidden channels, G speaker channels, S speakers,
F frames, T samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.synthesizer.batch import Batch
from models.synthesizer.blocks.decoder import Generator
from models.synthesizer.blocks.encoders import F0Predictor, PosteriorEncoder, PriorEncoder
from models.synthesizer.blocks.flows import ResidualCouplingBlock, TransformerCouplingBlock
from models.synthesizer.blocks.noise import Noise
from models.synthesizer.blocks.pitch import f0_to_coarse, normalize_f0
from models.synthesizer.blocks.segments import random_starts, sequence_mask, slice_segments
from models.synthesizer.config import SynthesizerConfig

_F0_STRETCH = (0.8, 1.2)  # random stretch of contours in training of the f0 predictor


@dataclass(frozen=True)
class Outputs:
    """Training outputs that the losses use: posterior z, prior, and the audio of a segment."""

    wav: Tensor  # (B, 1, segment)
    starts: Tensor  # (B,) int64, first frames of the segments
    mask: Tensor  # (B, 1, F)
    z_p: Tensor  # (B, C, F) the posterior's z after the flow
    m_p: Tensor
    logs_p: Tensor
    m_q: Tensor
    logs_q: Tensor
    lf0: Tensor | None  # (B, 1, F) mel-like log f0
    lf0_hat: Tensor | None  # its prediction


class Synthesizer(nn.Module):
    """Network from units, f0 and a speaker to singing."""

    def __init__(self, config: SynthesizerConfig) -> None:
        super().__init__()
        self.config = config
        hidden, gin = config.hidden_channels, config.gin_channels
        self.emb_g = nn.Embedding(config.n_speakers, gin)
        if config.volume_embedding:
            self.emb_vol = nn.Linear(1, hidden)
        self.pre = nn.Conv1d(config.units_dim, hidden, kernel_size=5, padding=2)
        self.enc_p = PriorEncoder(config)
        self.dec = Generator(config)
        self.enc_q = PosteriorEncoder(config)
        block = TransformerCouplingBlock if config.flow == "transformer" else ResidualCouplingBlock
        self.flow = block(config)
        if config.predict_f0:
            self.f0_decoder = F0Predictor(config)
        self.emb_uv = nn.Embedding(2, hidden)

    def forward(self, batch: Batch, spec: Tensor, noise: Noise, segment_frames: int) -> Outputs:
        """Run one training pass.

        spec: (B, n_fft // 2 + 1, F) linear spectrogram of the batch, 0 in padding.
        segment_frames: frames decoded of each clip, from a random start.
        """
        g = self.emb_g(batch.speaker).unsqueeze(-1)  # (B, G, 1)
        mask = sequence_mask(batch.lengths, batch.units.shape[-1]).unsqueeze(1).to(spec.dtype)
        x = self._content(batch.units, batch.voiced, mask, batch.volume)
        lf0 = lf0_hat = None
        if self.config.predict_f0:
            lf0 = mel_f0(batch.f0).unsqueeze(1)
            stretch = noise.between(batch.f0[:, 0], *_F0_STRETCH)
            centred = normalize_f0(lf0, mask, batch.voiced, stretch)
            lf0_hat = self.f0_decoder(x, centred, mask, g)
        m_p, logs_p = self.enc_p(x, mask, f0_to_coarse(batch.f0, sovits=True))
        z, m_q, logs_q = self.enc_q(spec, mask, g, noise)
        z_p = self.flow(z, mask, g)
        starts = random_starts(batch.lengths, segment_frames, noise)
        z_segment = slice_segments(z, starts, segment_frames)
        f0_segment = slice_segments(batch.f0.unsqueeze(1), starts, segment_frames).squeeze(1)
        wav = self.dec(z_segment, f0_segment, g, noise)
        return Outputs(wav, starts, mask, z_p, m_p, logs_p, m_q, logs_q, lf0, lf0_hat)

    @torch.no_grad()
    def infer(
        self,
        units: Tensor,
        f0: Tensor,
        voiced: Tensor,
        speaker: Tensor,
        *,
        noise: Noise,
        noise_scale: float = 0.35,
        predict_f0: bool = False,
        volume: Tensor | None = None,
        phase: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Synthesize; return wav (B, T) and the f0 (B, F) that was used.

        units: (B, D, F) on the frame clock. f0: (B, F) in Hz, interpolated through unvoiced frames.
        speaker: (B,) int64; or weights of a mix of speakers, (B, S), or (B, F, S) over time.
        predict_f0: use the predicted melody; `f0` then sets only its mean and its range.
        phase: (B, 9) of the sine source's harmonics before the first sample, in cycles, for
        consecutive pieces; None: 0 for f0, random for its overtones.

        Raises: ValueError: when the voice has no predictor, or needs the volume and gets none.
        """
        g = self._speaker(speaker)
        mask = torch.ones_like(f0).unsqueeze(1)
        x = self._content(units, voiced, mask, volume)
        if predict_f0:
            f0 = self._predict_f0(x, f0, voiced, mask, g)
        m_p, logs_p = self.enc_p(x, mask, f0_to_coarse(f0, sovits=True))
        z_p = m_p + noise.normal(m_p) * torch.exp(logs_p) * noise_scale
        z = self.flow(z_p, mask, g, reverse=True)
        return self.dec.infer(z, f0, g, noise, phase).squeeze(1), f0

    @torch.no_grad()
    def predict_f0(
        self,
        units: Tensor,
        f0: Tensor,
        voiced: Tensor,
        speaker: Tensor,
        volume: Tensor | None = None,
    ) -> Tensor:
        """Predict the melody (B, F) in Hz; arguments and errors are those of `infer`."""
        mask = torch.ones_like(f0).unsqueeze(1)
        x = self._content(units, voiced, mask, volume)
        return self._predict_f0(x, f0, voiced, mask, self._speaker(speaker))

    @torch.no_grad()
    def resynthesize(
        self, spec: Tensor, lengths: Tensor, f0: Tensor, speaker: Tensor, *, noise: Noise
    ) -> Tensor:
        """Resynthesize a spectrogram (B, n_fft // 2 + 1, F) as wav (B, T)."""
        g = self._speaker(speaker)
        mask = sequence_mask(lengths, spec.shape[-1]).unsqueeze(1).to(spec.dtype)
        z, _, _ = self.enc_q(spec, mask, g, noise)
        return self.dec.infer(z * mask, f0, g, noise).squeeze(1)

    def _content(
        self, units: Tensor, voiced: Tensor, mask: Tensor, volume: Tensor | None
    ) -> Tensor:
        """Embed the content (B, H, F). Padding is not 0, as in so-vits-svc: voicing and volume."""
        x = self.pre(units) * mask + self.emb_uv(voiced.long()).transpose(1, 2)
        if not self.config.volume_embedding:
            return x
        if volume is None:
            raise ValueError("this voice needs the volume of each frame")
        return x + self.emb_vol(volume.unsqueeze(-1)).transpose(1, 2)

    def _speaker(self, speaker: Tensor) -> Tensor:
        """Embed the speaker: (B, G, 1), or (B, G, F) for a mix over time."""
        if not speaker.is_floating_point():
            return self.emb_g(speaker).unsqueeze(-1)
        if speaker.shape[-1] != self.config.n_speakers:
            raise ValueError(
                f"the mix has weights for {speaker.shape[-1]} speakers, "
                f"but this voice has {self.config.n_speakers}"
            )
        mixed = speaker @ self.emb_g.weight  # (B, G) or (B, F, G)
        return mixed.unsqueeze(-1) if mixed.dim() == 2 else mixed.transpose(1, 2)

    def _predict_f0(self, x: Tensor, f0: Tensor, voiced: Tensor, mask: Tensor, g: Tensor) -> Tensor:
        if not self.config.predict_f0:
            raise ValueError("this voice has no pitch predictor (model.predict_f0 was false)")
        centred = normalize_f0(mel_f0(f0).unsqueeze(1), mask, voiced)
        return inverse_mel_f0(self.f0_decoder(x, centred, mask, g).squeeze(1))


def mel_f0(f0: Tensor) -> Tensor:
    """Convert f0 in Hz to the f0 predictor's scale: mel, divided by 500."""
    return 2595 * torch.log10(1 + f0 / 700) / 500


def inverse_mel_f0(lf0: Tensor) -> Tensor:
    """Convert the f0 predictor's scale to Hz."""
    return 700 * (torch.pow(10, lf0 * 500 / 2595) - 1)
