"""Attention over frames, and VITS' stacks of it: encoder, causal transformer, decoder.

Sources: Vaswani et al., "Attention Is All You Need" (2017); Shaw et al., "Self-Attention with
Relative Position Representations" (2018); VITS; so-vits-svc (commit 730930d), Bert-VITS2 (61130ac),
whose state dicts these have.

B batch, H hidden channels, F frames, N heads, W relative positions within the window, Q and K the
frames of queries and of keys. Everything is channels first, (B, H, F); a mask of frames is
(B, 1, F), 1 in frames and 0 in padding.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.synthesizer.blocks.dropout import Dropout
from models.synthesizer.blocks.wavenet import gate
from models.synthesizer.blocks.weight_norm import Conv1d
from models.synthesizer.config import SPEAKER_LAYER

_MASKED = -1e4  # score of a masked key; a query with all keys masked averages over all


class LayerNorm(nn.Module):
    """Layer normalisation of each frame over its channels, (B, H, F)."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.transpose(1, 2), self.gamma.shape, self.gamma, self.beta, self.eps)
        return x.transpose(1, 2)


class MultiHeadAttention(nn.Module):
    """Multi-head attention of x to a context.

    window: relative positions up to this distance have their own key and value embeddings, shared
        by the heads if heads_share. Beyond it, position has no effect.
    proximal_bias: scores decrease with the logarithm of the distance.
    proximal_init: initialise queries and keys equally, so that similar frames attend to each other.
    block_length: keys further away are masked.

    The last three and the window are for self-attention only.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        n_heads: int,
        *,
        dropout: float = 0.0,
        window: int | None = None,
        heads_share: bool = True,
        block_length: int | None = None,
        proximal_bias: bool = False,
        proximal_init: bool = False,
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.head_width = channels // n_heads
        self.window = window
        self.block_length = block_length
        self.proximal_bias = proximal_bias
        self.conv_q = nn.Conv1d(channels, channels, 1)
        self.conv_k = nn.Conv1d(channels, channels, 1)
        self.conv_v = nn.Conv1d(channels, channels, 1)
        self.conv_o = nn.Conv1d(channels, out_channels, 1)
        self.drop = Dropout(dropout)
        if window is not None:
            shape = (1 if heads_share else n_heads, 2 * window + 1, self.head_width)
            self.emb_rel_k = nn.Parameter(torch.randn(shape) * self.head_width**-0.5)
            self.emb_rel_v = nn.Parameter(torch.randn(shape) * self.head_width**-0.5)
        for conv in (self.conv_q, self.conv_k, self.conv_v):
            nn.init.xavier_uniform_(conv.weight)
        if proximal_init:
            self.conv_k.load_state_dict(self.conv_q.state_dict())

    def forward(
        self, x: Tensor, context: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Attend from x (B, H, Q) to context (B, H, K): (B, out_channels, Q).

        mask: bool, broadcast to (B, N, Q, K); True where the query may attend to the key.
        causal: no query attends to a later key. Not together with a mask.
        """
        q, k, v = (
            self._heads(conv(of))
            for conv, of in ((self.conv_q, x), (self.conv_k, context), (self.conv_v, context))
        )
        plain = self.window is None and self.block_length is None and not self.proximal_bias
        if plain and not self.drop.draws(q):
            attended = self._attend_plainly(q, k, v, mask, causal)
        else:
            attended = self._attend(q, k, v, mask, causal)
        return self.conv_o(attended.transpose(2, 3).flatten(1, 2))

    def weights(
        self, q: Tensor, k: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Return the attention weights (B, N, Q, K); q and k are (B, N, frames, width)."""
        q = q / math.sqrt(self.head_width)
        scores = q @ k.transpose(2, 3)
        if self.window is not None:
            index, inside = _band(scores.shape[-1], self.window, scores.device)
            near = (q @ self.emb_rel_k.transpose(1, 2)).masked_fill(~inside, 0)  # (B, N, Q, W)
            scores.scatter_add_(-1, index.expand_as(near), near)
        if self.proximal_bias or self.block_length is not None or causal:
            self._weigh_distance(scores, causal)
        if mask is not None:
            scores.masked_fill_(~mask, _MASKED)
        return F.softmax(scores, dim=-1)

    def _weigh_distance(self, scores: Tensor, causal: bool) -> None:
        """Lower scores (B, N, Q, K) in place, depending on the distance of key and query."""
        queries, keys = (torch.arange(n, device=scores.device) for n in scores.shape[-2:])
        distance = keys - queries[:, None]
        if self.proximal_bias:
            scores -= torch.log1p(distance.abs().double())
        if self.block_length is not None:
            scores.masked_fill_(distance.abs() > self.block_length, _MASKED)
        if causal:
            scores.masked_fill_(distance > 0, _MASKED)

    def _heads(self, x: Tensor) -> Tensor:
        """Split into heads, (B, H, F) -> (B, N, F, width)."""
        # With unflatten, torch's ONNX exporter would make the number of frames a constant.
        return x.reshape(x.shape[0], self.n_heads, self.head_width, x.shape[2]).transpose(2, 3)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        weights = self.drop(self.weights(q, k, mask, causal))
        attended = weights @ v
        if self.window is None:
            return attended
        index, inside = _band(weights.shape[-1], self.window, weights.device)
        index = index.expand(*weights.shape[:3], -1)
        near = weights.gather(-1, index).masked_fill(~inside, 0)  # (B, N, Q, W)
        return attended + near @ self.emb_rel_v

    def _attend_plainly(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        if mask is not None:
            sees = mask.any(dim=-1, keepdim=True)
            q, mask = q * sees, mask | ~sees  # a query of zeros attends equally to every key
        dropout = self.drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)


def _band(length: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (keys, inside) for the 2 * window + 1 positions around each query, both (length, W).

    inside: False for positions before the first or after the last frame, whose key is arbitrary.
    """
    queries = torch.arange(length, device=device)
    keys = queries[:, None] + torch.arange(-window, window + 1, device=device)
    inside = (keys >= 0) & (keys < length)
    return keys.clamp(0, length - 1), inside


class FFN(nn.Module):
    """Feed-forward network of two convolutions over time, (B, in, F) -> (B, out, F).

    causal: reads no later frames. Otherwise as many later as earlier ones, or one more for an even
    kernel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        filter_channels: int,
        kernel_size: int,
        *,
        dropout: float = 0.0,
        activation: Literal["relu", "gelu"] = "relu",
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.activation = activation
        left = kernel_size - 1 if causal else (kernel_size - 1) // 2
        padding = max(left, kernel_size - 1 - left)
        self.surplus = padding - left  # surplus outputs at the start
        self.conv_1 = nn.Conv1d(in_channels, filter_channels, kernel_size, padding=padding)
        self.conv_2 = nn.Conv1d(filter_channels, out_channels, kernel_size, padding=padding)
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self._within(self.conv_1(x * mask), mask)
        # OpenAI's approximation of GELU with a sigmoid.
        x = torch.relu(x) if self.activation == "relu" else x * torch.sigmoid(1.702 * x)
        x = self.conv_2(self.drop(x) * mask)
        return self._within(x, mask) * mask

    def _within(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.narrow(2, self.surplus, mask.shape[2])


class TransformerEncoder(nn.Module):
    """Transformer encoder with relative positions over all frames of a clip.

    gin_channels: width of a speaker embedding added before the third layer (VITS2, Bert-VITS2);
        0 means none.

    Raises: ValueError: when there is a speaker embedding and fewer than three layers.
    """

    def __init__(
        self,
        hidden_channels: int,
        filter_channels: int,
        n_heads: int,
        n_layers: int,
        kernel_size: int = 1,
        *,
        dropout: float = 0.0,
        window: int = 4,
        gin_channels: int = 0,
    ) -> None:
        super().__init__()
        if gin_channels and n_layers <= SPEAKER_LAYER:
            raise ValueError(
                f"an encoder with a speaker embedding needs {SPEAKER_LAYER + 1} layers or more, "
                f"not {n_layers}"
            )
        if gin_channels:
            self.spk_emb_linear = nn.Linear(gin_channels, hidden_channels)
        self.drop = Dropout(dropout)
        self.attn_layers = nn.ModuleList()
        self.norm_layers_1 = nn.ModuleList()
        self.ffn_layers = nn.ModuleList()
        self.norm_layers_2 = nn.ModuleList()
        for _ in range(n_layers):
            self.attn_layers.append(
                MultiHeadAttention(
                    hidden_channels, hidden_channels, n_heads, dropout=dropout, window=window
                )
            )
            self.norm_layers_1.append(LayerNorm(hidden_channels))
            self.ffn_layers.append(
                FFN(hidden_channels, hidden_channels, filter_channels, kernel_size, dropout=dropout)
            )
            self.norm_layers_2.append(LayerNorm(hidden_channels))

    def forward(self, x: Tensor, mask: Tensor, g: Tensor | None = None) -> Tensor:
        """(B, H, F) -> (B, H, F), 0 in padding. g: (B, gin_channels, 1 or F)."""
        keys = mask.bool().unsqueeze(1)  # (B, 1, 1, F)
        x = x * mask
        layers = zip(
            self.attn_layers, self.norm_layers_1, self.ffn_layers, self.norm_layers_2, strict=True
        )
        for i, (attention, norm_1, ffn, norm_2) in enumerate(layers):
            if g is not None and i == SPEAKER_LAYER:
                x = (x + self.spk_emb_linear(g.transpose(1, 2)).transpose(1, 2)) * mask
            x = norm_1(x + self.drop(attention(x, x, keys)))
            x = norm_2(x + self.drop(ffn(x, mask)))
        return x * mask


class FFT(nn.Module):
    """Causal transformer: no frame attends to a later one, so none to the padding after its clip.

    gin_channels: width of a speaker embedding that gates the input of every layer, for flows; 0
        means none.
    """

    def __init__(
        self,
        hidden_channels: int,
        filter_channels: int,
        n_heads: int,
        n_layers: int = 1,
        kernel_size: int = 1,
        *,
        dropout: float = 0.0,
        proximal_bias: bool = False,
        gin_channels: int = 0,
    ) -> None:
        super().__init__()
        if gin_channels:
            self.cond_pre = nn.Conv1d(hidden_channels, 2 * hidden_channels, 1)
            self.cond_layer = Conv1d(gin_channels, 2 * hidden_channels * n_layers, 1)
        self.drop = Dropout(dropout)
        self.self_attn_layers = nn.ModuleList()
        self.norm_layers_0 = nn.ModuleList()
        self.ffn_layers = nn.ModuleList()
        self.norm_layers_1 = nn.ModuleList()
        for _ in range(n_layers):
            self.self_attn_layers.append(
                _causal_attention(hidden_channels, n_heads, dropout, proximal_bias)
            )
            self.norm_layers_0.append(LayerNorm(hidden_channels))
            self.ffn_layers.append(
                _causal_ffn(hidden_channels, filter_channels, kernel_size, dropout)
            )
            self.norm_layers_1.append(LayerNorm(hidden_channels))

    def forward(self, x: Tensor, mask: Tensor, g: Tensor | None = None) -> Tensor:
        """(B, H, F) -> (B, H, F), 0 in padding. g: (B, gin_channels, 1 or F)."""
        conditions = [None] * len(self.self_attn_layers)
        if g is not None:
            conditions = self.cond_layer(g).chunk(len(conditions), dim=1)
        x = x * mask
        layers = zip(
            self.self_attn_layers,
            self.norm_layers_0,
            self.ffn_layers,
            self.norm_layers_1,
            conditions,
            strict=True,
        )
        for attention, norm_0, ffn, norm_1, condition in layers:
            if condition is not None:
                x = gate(self.cond_pre(x), condition)
            x = norm_0(x + self.drop(attention(x, x, causal=True)))
            x = norm_1(x + self.drop(ffn(x, mask)))
        return x * mask


class TransformerDecoder(nn.Module):
    """Causal transformer decoder with attention to all frames of an encoder."""

    def __init__(
        self,
        hidden_channels: int,
        filter_channels: int,
        n_heads: int,
        n_layers: int,
        kernel_size: int = 1,
        *,
        dropout: float = 0.0,
        proximal_bias: bool = False,
    ) -> None:
        super().__init__()
        self.drop = Dropout(dropout)
        self.self_attn_layers = nn.ModuleList()
        self.norm_layers_0 = nn.ModuleList()
        self.encdec_attn_layers = nn.ModuleList()
        self.norm_layers_1 = nn.ModuleList()
        self.ffn_layers = nn.ModuleList()
        self.norm_layers_2 = nn.ModuleList()
        for _ in range(n_layers):
            self.self_attn_layers.append(
                _causal_attention(hidden_channels, n_heads, dropout, proximal_bias)
            )
            self.norm_layers_0.append(LayerNorm(hidden_channels))
            self.encdec_attn_layers.append(
                MultiHeadAttention(hidden_channels, hidden_channels, n_heads, dropout=dropout)
            )
            self.norm_layers_1.append(LayerNorm(hidden_channels))
            self.ffn_layers.append(
                _causal_ffn(hidden_channels, filter_channels, kernel_size, dropout)
            )
            self.norm_layers_2.append(LayerNorm(hidden_channels))

    def forward(self, x: Tensor, mask: Tensor, encoded: Tensor, encoded_mask: Tensor) -> Tensor:
        """(B, H, F) -> (B, H, F), 0 in padding. encoded: (B, H, K); encoded_mask: (B, 1, K)."""
        keys = encoded_mask.bool().unsqueeze(1)  # (B, 1, 1, K)
        x = x * mask
        layers = zip(
            self.self_attn_layers,
            self.norm_layers_0,
            self.encdec_attn_layers,
            self.norm_layers_1,
            self.ffn_layers,
            self.norm_layers_2,
            strict=True,
        )
        for attention, norm_0, cross_attention, norm_1, ffn, norm_2 in layers:
            x = norm_0(x + self.drop(attention(x, x, causal=True)))
            x = norm_1(x + self.drop(cross_attention(x, encoded, keys)))
            x = norm_2(x + self.drop(ffn(x, mask)))
        return x * mask


def _causal_attention(
    channels: int, n_heads: int, dropout: float, proximal_bias: bool
) -> MultiHeadAttention:
    return MultiHeadAttention(
        channels,
        channels,
        n_heads,
        dropout=dropout,
        proximal_bias=proximal_bias,
        proximal_init=True,
    )


def _causal_ffn(channels: int, filter_channels: int, kernel_size: int, dropout: float) -> FFN:
    return FFN(channels, channels, filter_channels, kernel_size, dropout=dropout, causal=True)
