"""Encoder of phonemes and language-model features to the prior of each phoneme.

Source: Bert-VITS2 (commit 61130ac), after Kim et al., "Conditional Variational Autoencoder with
Adversarial Learning for End-to-End Text-to-Speech" (2021).

B batch, C latent channels, G speaker channels, H hidden channels, N symbols.

Tested by tests/models/synthesizer/text/test_synthesizer.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from models.synthesizer.blocks.attention import TransformerEncoder
from models.synthesizer.text.config import TextSynthesizerConfig


@dataclass(frozen=True)
class Text:
    """Symbols of several texts, padded with zeros."""

    symbols: Tensor  # (B, N) int64
    tones: Tensor  # (B, N) int64
    languages: Tensor  # (B, N) int64
    bert: Tensor  # (B, bert_channels, N), 0 where the language is not Chinese
    ja_bert: Tensor  # (B, ja_bert_channels, N), 0 where it is not Japanese
    lengths: Tensor  # (B,) int64, symbols


class TextEncoder(nn.Module):
    """A sum of embeddings and a transformer conditioned on the speaker."""

    def __init__(self, config: TextSynthesizerConfig) -> None:
        super().__init__()
        hidden = config.hidden_channels
        self.emb = _embedding(config.n_symbols, hidden)
        self.tone_emb = _embedding(config.n_tones, hidden)
        self.language_emb = _embedding(config.n_languages, hidden)
        self.bert_proj = nn.Conv1d(config.bert_channels, hidden, 1)
        self.ja_bert_proj = nn.Conv1d(config.ja_bert_channels, hidden, 1)
        self.encoder = TransformerEncoder(
            hidden,
            config.filter_channels,
            config.n_heads,
            config.n_layers,
            config.kernel_size,
            dropout=config.dropout,
            gin_channels=config.gin_channels,
        )
        self.proj = nn.Conv1d(hidden, 2 * config.inter_channels, 1)

    def forward(self, text: Text, mask: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states (B, H, N), mean and log standard deviation, both (B, C, N).

        mask: (B, 1, N), 1 in symbols and 0 in padding. g: (B, G, 1).
        """
        embedded = (
            self.emb(text.symbols) + self.tone_emb(text.tones) + self.language_emb(text.languages)
        )
        context = self.bert_proj(text.bert) + self.ja_bert_proj(text.ja_bert)
        x = (embedded.transpose(1, 2) + context) * math.sqrt(embedded.shape[2])
        x = self.encoder(x * mask, mask, g)
        mean, log_std = (self.proj(x) * mask).chunk(2, dim=1)
        return x, mean, log_std


def _embedding(count: int, width: int) -> nn.Embedding:
    embedding = nn.Embedding(count, width)
    nn.init.normal_(embedding.weight, 0.0, width**-0.5)
    return embedding
