"""The Gumbel vector quantizer of wav2vec 2.0, which makes the targets of pre-training.

Baevski et al. (2020), section 2, after Jang et al. (2017). Implemented here because the lookup in
transformers needs frames x entries x width in memory; parameter names are the same as there.

Tested by tests/models/encoders/test_fine_tuning.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GumbelVectorQuantizer(nn.Module):
    """Quantizer of frames to one entry of each group's codebook, concatenated.

    temperature: of the Gumbel softmax in training; the training loop lowers it.
    """

    def __init__(self, width: int, groups: int = 2, entries: int = 320, dim: int = 256) -> None:
        """Build the quantizer. width: of the input. entries: per group. dim: of the output.

        Raises: ValueError: when `dim` is not a multiple of the groups.
        """
        super().__init__()
        if dim % groups:
            raise ValueError(f"the width {dim} is not a multiple of the {groups} groups")
        self.groups, self.entries = groups, entries
        self.temperature = 2.0
        self.codevectors = nn.Parameter(torch.rand(1, groups * entries, dim // groups))
        self.weight_proj = nn.Linear(width, groups * entries)
        nn.init.normal_(self.weight_proj.weight)
        nn.init.zeros_(self.weight_proj.bias)

    def forward(self, x: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Quantize (B, F, width) to codevectors (B, F, dim); also return the perplexity ().

        Training draws an entry, with a straight-through gradient to its probability; evaluation
        takes the most likely one.

        counted: (B, F) bool, frames included in the perplexity; None: all. Perplexity is exp of the
        entropy of the mean distribution, summed over groups: of the probabilities in training, of
        the choices in evaluation.
        """
        n_clips, n_frames, _ = x.shape
        logits = self.weight_proj(x).view(-1, self.entries)  # (B F groups, entries)
        if self.training:
            wide = logits.float()
            chosen = F.gumbel_softmax(wide, tau=self.temperature, hard=True).to(logits)
            shares = wide.softmax(dim=1)
        else:
            chosen = F.one_hot(logits.argmax(dim=1), self.entries).to(logits)
            shares = chosen
        vectors = torch.einsum(
            "fge,ged->fgd",
            chosen.view(-1, self.groups, self.entries),
            self.codevectors.view(self.groups, self.entries, -1),
        )
        shares = shares.view(-1, self.groups, self.entries)
        if counted is not None:
            shares = shares[counted.flatten()]
        return vectors.reshape(n_clips, n_frames, -1), _perplexity(shares)


def _perplexity(shares: Tensor) -> Tensor:
    """Compute the perplexity () of shares (frames, groups, entries)."""
    mean = shares.mean(dim=0)
    return (-torch.xlogy(mean, mean).sum(dim=1)).exp().sum()
