"""Training losses: least-squares adversarial losses, feature matching, and the KL term.

All but the KL term are means over examples. In a batch processed in parts, each part is weighted by
its share of the examples.

Sources: Mao et al., "Least Squares Generative Adversarial Networks" (2017); Kim et al.,
"Conditional Variational Autoencoder with Adversarial Learning" (2021), VITS.
B batch, C channels, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Features = Sequence[Sequence[Tensor]]
"""Features of each layer of each discriminator."""


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Discriminator loss: scores (B, N) should be 1 for originals and 0 for generated audio."""
    terms = [
        (1 - _wide(r)).square().mean() + _wide(f).square().mean()
        for r, f in zip(real, fake, strict=True)
    ]
    return torch.stack(terms).sum()


def generator_loss(fake: Sequence[Tensor]) -> Tensor:
    """Generator loss: each discriminator's scores (B, N) of generated audio should be 1."""
    return torch.stack([(1 - _wide(score)).square().mean() for score in fake]).sum()


def feature_loss(real: Features, fake: Features) -> Tensor:
    """Feature matching: twice the mean distance of features (B, ...), summed over the layers.

    No gradient flows to `real`.
    """
    terms = [
        (_wide(r.detach()) - _wide(f)).abs().mean()
        for originals, generated in zip(real, fake, strict=True)
        for r, f in zip(originals, generated, strict=True)
    ]
    return 2 * torch.stack(terms).sum()


def kl_loss(
    z_p: Tensor,
    logs_q: Tensor,
    m_p: Tensor,
    logs_p: Tensor,
    mask: Tensor,
    total_frames: float | None = None,
) -> Tensor:
    """KL divergence of posterior and prior, estimated at the sampled z (VITS, equation 4).

    z_p: (B, C, F) the posterior's z after the flow. logs_q: (B, C, F) log standard deviation of the
    posterior; m_p, logs_p: mean and log standard deviation of the prior. mask: (B, 1, F), 1 in
    frames and 0 in padding. total_frames: of the global batch, without padding; None: of `mask`.

    Summed over channels, averaged over frames.
    """
    terms = logs_p - logs_q - 0.5 + 0.5 * (z_p - m_p).square() * torch.exp(-2 * logs_p)
    return (terms * mask).sum() / (mask.sum() if total_frames is None else total_frames)


def kl_divergence(m_p: Tensor, logs_p: Tensor, m_q: Tensor, logs_q: Tensor) -> Tensor:
    """Elementwise KL(P || Q) of normal distributions, from means and log standard deviations."""
    variance = torch.exp(2 * logs_p) + (m_p - m_q).square()
    return logs_q - logs_p - 0.5 + 0.5 * variance * torch.exp(-2 * logs_q)


def _wide(x: Tensor) -> Tensor:
    """Convert to at least float32, because sums of squares overflow half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
