"""One step of adversarial training: the discriminators first, then the synthesizer.

Every loss is normalised by the whole global batch, so that the gradients of its parts, computed one
after the other or by several workers, add up to the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models.synthesizer import losses
from models.synthesizer.batch import Batch
from models.synthesizer.blocks.discriminators import MultiPeriodDiscriminator
from models.synthesizer.blocks.noise import Noise
from models.synthesizer.blocks.segments import slice_segments
from models.synthesizer.config import MelConfig
from models.synthesizer.mel import mel_of, spectrogram
from models.synthesizer.sovits.networks import Outputs, Synthesizer

LOSSES = ("disc", "gen", "fm", "mel", "kl", "lf0", "total")

Reduce = Callable[[Sequence[Tensor]], None]
"""Sums each tensor over the workers, in place."""


@dataclass(frozen=True)
class Totals:
    """Size of the global batch, over all workers."""

    examples: int
    frames: int  # of all clips, without padding


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses, start of the adversarial ones, and length of decoded segments."""

    mel: float = 45.0
    kl: float = 1.0
    adversarial_from: int = 0  # first step that uses and trains the discriminators
    segment_frames: int = 20


@dataclass(frozen=True)
class _Synthesized:
    """The synthesizer's outputs for a part of the batch, and their targets."""

    outputs: Outputs
    wav: Tensor  # (B, 1, segment) target
    mel: Tensor  # (B, M, segment frames) target
    share: float  # examples of this part over those of the global batch


class GanStep:
    """Losses, gradients and updates of both optimizers; called once per global batch."""

    def __init__(
        self,
        generator: Synthesizer,
        discriminator: MultiPeriodDiscriminator,
        optim_g: Optimizer,
        optim_d: Optimizer,
        mel: MelConfig,
        weights: LossWeights,
        *,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        clip_norm: float | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.optim_g, self.optim_d = optim_g, optim_d
        self.mel, self.weights = mel, weights
        self.spec_of = self._spectrogram
        self.clip_norm = clip_norm
        self.reduce = reduce or (lambda tensors: None)
        self.device = next(generator.parameters()).device
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def __call__(
        self,
        parts: Sequence[Batch],
        totals: Totals,
        noise: Callable[[Batch], Noise],
        number: int = 0,
    ) -> dict[str, float]:
        """Train on one global batch; return its losses (`LOSSES`) and the gradient norms.

        parts: this worker's share. If there are several, each is synthesized twice, so that only
        one is in memory at a time. noise: returns the noise of a part, the same at each call.
        number: the step, from 0.
        """
        sums = torch.zeros(len(LOSSES), device=self.device)
        norm_d = sums.new_zeros(())
        adversarial = number >= self.weights.adversarial_from
        kept = self._synthesize(parts[0], totals, noise) if len(parts) == 1 else None

        for part in parts if adversarial else ():
            with torch.no_grad():
                made = kept or self._synthesize(part, totals, noise)
            disc = self._discriminator_loss(made)
            self.scaler.scale(disc).backward()
            sums[0] += disc.detach()
        if adversarial:
            norm_d = self._update(self.optim_d)

        for part in parts:
            made = kept or self._synthesize(part, totals, noise)
            terms = self._generator_losses(made, totals, adversarial)
            total = torch.stack(terms).sum()
            self.scaler.scale(total).backward()
            sums[1:] += torch.stack([*terms, total]).detach()
        norm_g = self._update(self.optim_g)
        self.scaler.update()

        self.reduce([sums])
        values = torch.stack([*sums, norm_d, norm_g]).tolist()  # the only wait for the device
        return dict(zip((*LOSSES, "grad_norm_d", "grad_norm_g"), values, strict=True))

    def _synthesize(
        self, part: Batch, totals: Totals, noise: Callable[[Batch], Noise]
    ) -> _Synthesized:
        segment, hop = self.weights.segment_frames, self.generator.config.hop_length
        spec = self.spec_of(part)
        with self._autocast():
            outputs = self.generator(part, spec, noise(part), segment)
        wav = slice_segments(part.wav.unsqueeze(1), outputs.starts * hop, segment * hop)
        mel = mel_of(
            slice_segments(spec, outputs.starts, segment),
            self.mel,
            self.generator.config.sample_rate,
        )
        return _Synthesized(outputs, wav, mel, len(part) / totals.examples)

    def _spectrogram(self, part: Batch) -> Tensor:
        """Compute the linear spectrogram (B, n_fft // 2 + 1, F), 0 in padding."""
        return spectrogram(part.wav, self.mel, self.generator.config.hop_length, part.lengths)

    def _discriminator_loss(self, made: _Synthesized) -> Tensor:
        both = torch.cat([made.wav, made.outputs.wav.detach().to(made.wav)])
        with self._autocast():
            scores, _ = self.discriminator(both)
        real, fake = zip(*(score.chunk(2) for score in scores), strict=True)
        return losses.discriminator_loss(real, fake) * made.share

    def _generator_losses(
        self, made: _Synthesized, totals: Totals, adversarial: bool
    ) -> list[Tensor]:
        """Compute the weighted losses gen, fm, mel, kl and lf0; their sum is the total."""
        out, config = made.outputs, self.generator.config
        gen, fm = self._adversarial_losses(made) if adversarial else (out.wav.new_zeros(()),) * 2
        wav = out.wav.float().squeeze(1)
        mel = mel_of(spectrogram(wav, self.mel, config.hop_length), self.mel, config.sample_rate)
        mel_loss = (made.mel - mel).abs().mean() * self.weights.mel
        lf0 = mel_loss.new_zeros(())
        if out.lf0 is not None and out.lf0_hat is not None:
            lf0 = nn.functional.mse_loss(out.lf0_hat.float(), out.lf0.float())
        kl = losses.kl_loss(
            out.z_p.float(),
            out.logs_q.float(),
            out.m_p.float(),
            out.logs_p.float(),
            out.mask,
            total_frames=totals.frames,
        )
        mean_losses = [each.float() * made.share for each in (gen, fm, mel_loss, lf0)]
        return [*mean_losses[:3], kl * self.weights.kl, mean_losses[3]]

    def _adversarial_losses(self, made: _Synthesized) -> tuple[Tensor, Tensor]:
        """Compute gen and fm, without gradients for the originals and the discriminators."""
        with _frozen(self.discriminator), self._autocast():
            with torch.no_grad():
                _, real = self.discriminator(made.wav)
            scores, fake = self.discriminator(made.outputs.wav)
        return losses.generator_loss(scores), losses.feature_loss(real, fake)

    def _update(self, optimizer: Optimizer) -> Tensor:
        """Sum the gradients over the workers, take a step, and return the gradients' norm."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.reduce(gradients)
        self.scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm(gradients)
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        self.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Turn off gradients of the network's weights inside the block."""
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
