"""A training step as so-vits-svc arranges it (commit 730930d), in plain PyTorch.

The networks of its template have the same names and values as Cantor's, so that weights can be
exchanged by state dict. The computation of the step differs:

- the discriminators process originals and generated audio one after the other, and in the
  generator's turn they compute gradients for their own weights and a graph for the originals, both
  unused;
- weights are normalised by hooks of torch.nn.utils;
- attention to relative positions pads a table of 2F - 1 of them, causal attention fills a mask;
- the sine source sums its phase sample by sample, with wraps removed;
- AdamW has PyTorch's defaults, and losses are read one by one.

benchmarks/train.py compares Cantor with it. Axes as in models/synthesizer; P = 2F - 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.synthesizer.batch import Batch
from models.synthesizer.blocks.noise import Noise
from models.synthesizer.blocks.pitch import f0_to_coarse
from models.synthesizer.blocks.segments import sequence_mask
from models.synthesizer.config import MelConfig, SynthesizerConfig
from models.synthesizer.mel import mel_of, spectrogram

_SLOPE = 0.1
_UNSEEN = -1e4
_HARMONICS = 9

Mark = Callable[[str], None]
"""Called with the name of a part of the step when it is done."""


def weight_norm(conv: nn.Module) -> nn.Module:
    """Normalise a weight by a hook, which recomputes it before every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its successor has other names of tensors
        return nn.utils.weight_norm(conv)


# ---- attention ---------------------------------------------------------------------------------


class LayerNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.transpose(1, -1), self.gamma.shape, self.gamma, self.beta, 1e-5)
        return x.transpose(1, -1)


class Attention(nn.Module):
    def __init__(self, config: SynthesizerConfig, window: int | None) -> None:
        super().__init__()
        channels = config.hidden_channels
        self.heads, self.width, self.window = config.n_heads, channels // config.n_heads, window
        self.conv_q = nn.Conv1d(channels, channels, 1)
        self.conv_k = nn.Conv1d(channels, channels, 1)
        self.conv_v = nn.Conv1d(channels, channels, 1)
        self.conv_o = nn.Conv1d(channels, channels, 1)
        self.drop = nn.Dropout(config.dropout)
        if window is not None:
            shape = (1, 2 * window + 1, self.width)
            self.emb_rel_k = nn.Parameter(torch.randn(shape))
            self.emb_rel_v = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor, sees: Tensor) -> Tensor:
        """Apply to x (B, H, F); sees: 0 where a query may not attend to a key."""
        shape = (len(x), self.heads, self.width, x.shape[-1])
        q, k, v = (
            conv(x).view(shape).transpose(2, 3) for conv in (self.conv_q, self.conv_k, self.conv_v)
        )
        scores = torch.matmul(q / math.sqrt(self.width), k.transpose(-2, -1))
        if self.window is not None:
            table = self._positions(self.emb_rel_k, self.window, x.shape[-1])
            near = torch.matmul(q / math.sqrt(self.width), table.unsqueeze(0).transpose(-2, -1))
            scores = scores + _to_absolute(near)
        scores = scores.masked_fill(sees == 0, _UNSEEN)
        weights = self.drop(F.softmax(scores, dim=-1))
        out = torch.matmul(weights, v)
        if self.window is not None:
            table = self._positions(self.emb_rel_v, self.window, x.shape[-1])
            out = out + torch.matmul(_to_relative(weights), table.unsqueeze(0))
        return self.conv_o(out.transpose(2, 3).contiguous().view(x.shape))

    @staticmethod
    def _positions(table: Tensor, window: int, frames: int) -> Tensor:
        """Pad relative positions to (1, P, width), with zeros beyond the window."""
        around = max(frames - window - 1, 0)
        begin = max(window + 1 - frames, 0)
        return F.pad(table, (0, 0, around, around))[:, begin : begin + 2 * frames - 1]


def _to_absolute(x: Tensor) -> Tensor:
    """Convert (B, N, F, P) by distance to (B, N, F, F) by key, by a skewed view."""
    batch, heads, frames, _ = x.shape
    flat = F.pad(x, (0, 1)).view(batch, heads, 2 * frames * frames)
    rows = F.pad(flat, (0, frames - 1)).view(batch, heads, frames + 1, 2 * frames - 1)
    return rows[:, :, :frames, frames - 1 :]


def _to_relative(x: Tensor) -> Tensor:
    """Convert (B, N, F, F) by key to (B, N, F, P) by distance."""
    batch, heads, frames, _ = x.shape
    flat = F.pad(x, (0, frames - 1)).view(batch, heads, frames * (2 * frames - 1))
    return F.pad(flat, (frames, 0)).view(batch, heads, frames, 2 * frames)[:, :, :, 1:]


class FeedForward(nn.Module):
    def __init__(self, config: SynthesizerConfig, causal: bool) -> None:
        super().__init__()
        hidden, inner, kernel = config.hidden_channels, config.filter_channels, config.kernel_size
        self.around = (kernel - 1, 0) if causal else ((kernel - 1) // 2, kernel // 2)
        self.conv_1 = nn.Conv1d(hidden, inner, kernel)
        self.conv_2 = nn.Conv1d(inner, hidden, kernel)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.conv_1(F.pad(x * mask, self.around))))
        return self.conv_2(F.pad(x * mask, self.around)) * mask


class Transformer(nn.Module):
    """The prior's encoder, or the causal one of the f0 predictor; names: of its module lists."""

    def __init__(self, config: SynthesizerConfig, names: Sequence[str], causal: bool) -> None:
        super().__init__()
        self.drop, self.causal = nn.Dropout(config.dropout), causal
        layers = range(config.n_layers)
        window = None if causal else 4
        attentions = nn.ModuleList(Attention(config, window) for _ in layers)
        norms = [nn.ModuleList(LayerNorm(config.hidden_channels) for _ in layers) for _ in range(2)]
        feeds = nn.ModuleList(FeedForward(config, causal) for _ in layers)
        self.names = names
        for name, modules in zip(names, (attentions, norms[0], feeds, norms[1]), strict=True):
            self.add_module(name, modules)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.causal:
            sees = torch.tril(torch.ones(x.shape[-1], x.shape[-1]))[None, None].to(x)
        else:
            sees = mask.unsqueeze(2) * mask.unsqueeze(-1)
        x = x * mask
        for attention, norm_1, feed, norm_2 in zip(
            *(getattr(self, name) for name in self.names), strict=True
        ):
            x = norm_1(x + self.drop(attention(x, sees)))
            x = norm_2(x + self.drop(feed(x, mask)))
        return x * mask


_ENCODER = ("attn_layers", "norm_layers_1", "ffn_layers", "norm_layers_2")
_CAUSAL = ("self_attn_layers", "norm_layers_0", "ffn_layers", "norm_layers_1")


# ---- encoders and flow -------------------------------------------------------------------------


def _gate(x: Tensor, condition: Tensor, hidden: int) -> Tensor:
    both = x + condition
    return torch.tanh(both[:, :hidden]) * torch.sigmoid(both[:, hidden:])


class WaveNet(nn.Module):
    def __init__(self, config: SynthesizerConfig, layers: int) -> None:
        super().__init__()
        hidden = self.hidden = config.hidden_channels
        self.cond_layer = weight_norm(nn.Conv1d(config.gin_channels, 2 * hidden * layers, 1))
        self.in_layers = nn.ModuleList(
            weight_norm(nn.Conv1d(hidden, 2 * hidden, 5, padding=2)) for _ in range(layers)
        )
        self.res_skip_layers = nn.ModuleList(
            weight_norm(nn.Conv1d(hidden, (2 if i < layers - 1 else 1) * hidden, 1))
            for i in range(layers)
        )

    def forward(self, x: Tensor, mask: Tensor, g: Tensor) -> Tensor:
        output = torch.zeros_like(x)
        conditions = self.cond_layer(g)
        for i, (layer, after) in enumerate(zip(self.in_layers, self.res_skip_layers, strict=True)):
            condition = conditions[:, 2 * i * self.hidden : 2 * (i + 1) * self.hidden]
            y = after(_gate(layer(x), condition, self.hidden))
            if i < len(self.in_layers) - 1:
                x = (x + y[:, : self.hidden]) * mask
                output = output + y[:, self.hidden :]
            else:
                output = output + y
        return output * mask


class PosteriorEncoder(nn.Module):
    def __init__(self, config: SynthesizerConfig) -> None:
        super().__init__()
        self.pre = nn.Conv1d(config.spec_channels, config.hidden_channels, 1)
        self.enc = WaveNet(config, 16)
        self.proj = nn.Conv1d(config.hidden_channels, 2 * config.inter_channels, 1)

    def forward(self, spec: Tensor, mask: Tensor, g: Tensor, noise: Noise) -> Sequence[Tensor]:
        x = self.enc(self.pre(spec) * mask, mask, g)
        mean, log_deviation = torch.chunk(self.proj(x) * mask, 2, dim=1)
        z = (mean + noise.normal(mean) * torch.exp(log_deviation)) * mask
        return z, mean, log_deviation


class PriorEncoder(nn.Module):
    def __init__(self, config: SynthesizerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv1d(config.hidden_channels, 2 * config.inter_channels, 1)
        self.f0_emb = nn.Embedding(256, config.hidden_channels)
        self.enc_ = Transformer(config, _ENCODER, causal=False)

    def forward(self, x: Tensor, mask: Tensor, coarse: Tensor) -> Sequence[Tensor]:
        x = self.enc_((x + self.f0_emb(coarse).transpose(1, 2)) * mask, mask)
        mean, log_deviation = torch.chunk(self.proj(x) * mask, 2, dim=1)
        z = (mean + torch.randn_like(mean) * torch.exp(log_deviation)) * mask  # nobody asks for it
        return z, mean, log_deviation


class F0Predictor(nn.Module):
    def __init__(self, config: SynthesizerConfig) -> None:
        super().__init__()
        hidden = config.hidden_channels
        self.prenet = nn.Conv1d(hidden, hidden, 3, padding=1)
        self.decoder = Transformer(config, _CAUSAL, causal=True)
        self.proj = nn.Conv1d(hidden, 1, 1)
        self.f0_prenet = nn.Conv1d(1, hidden, 3, padding=1)
        self.cond = nn.Conv1d(config.gin_channels, hidden, 1)

    def forward(self, x: Tensor, norm_lf0: Tensor, mask: Tensor, g: Tensor) -> Tensor:
        x = x.detach() + self.cond(g)
        x += self.f0_prenet(norm_lf0)
        return self.proj(self.decoder(self.prenet(x) * mask, mask)) * mask


class Coupling(nn.Module):
    def __init__(self, config: SynthesizerConfig) -> None:
        super().__init__()
        half = config.inter_channels // 2
        self.pre = nn.Conv1d(half, config.hidden_channels, 1)
        self.enc = WaveNet(config, config.n_flow_layers)
        self.post = nn.Conv1d(config.hidden_channels, half, 1)

    def forward(self, x: Tensor, mask: Tensor, g: Tensor) -> Tensor:
        kept, moved = torch.chunk(x, 2, dim=1)
        shift = self.post(self.enc(self.pre(kept) * mask, mask, g)) * mask
        log_scale = torch.zeros_like(shift)
        moved = shift + moved * torch.exp(log_scale) * mask
        return torch.cat([kept, moved], dim=1)


class Flip(nn.Module):
    def forward(self, x: Tensor, mask: Tensor, g: Tensor) -> Tensor:
        return torch.flip(x, [1])


class Flow(nn.Module):
    def __init__(self, config: SynthesizerConfig) -> None:
        super().__init__()
        self.flows = nn.ModuleList()
        for _ in range(config.n_flows):
            self.flows.extend([Coupling(config), Flip()])

    def forward(self, x: Tensor, mask: Tensor, g: Tensor) -> Tensor:
        for flow in self.flows:
            x = flow(x, mask, g)
        return x


# ---- decoder -----------------------------------------------------------------------------------


class Source(nn.Module):
    def __init__(self, config: SynthesizerConfig) -> None:
        super().__init__()
        self.rate = config.source_rate
        self.l_linear = nn.Linear(_HARMONICS, 1)

    def forward(self, f0: Tensor, noise: Noise) -> Tensor:
        """Generate (B, T, 1) from f0 (B, T, 1), one value per sample."""
        with torch.no_grad():
            waves = self._waves(f0, noise)
        return torch.tanh(self.l_linear(waves))

    def _waves(self, f0: Tensor, noise: Noise) -> Tensor:
        """(B, T, N)"""
        harmonics = f0 * torch.arange(1, _HARMONICS + 1, dtype=torch.float32).to(f0)
        step = (harmonics / self.rate) % 1
        chance = noise.uniform(f0.new_empty(len(f0), _HARMONICS - 1))
        step[:, 0, :] += F.pad(chance, (1, 0))
        cycles = torch.cumsum(step, 1) % 1
        wrapped = torch.zeros_like(step)
        wrapped[:, 1:, :] = (cycles[:, 1:] - cycles[:, :-1] < 0) * -1.0
        waves = 0.1 * torch.sin(torch.cumsum(step + wrapped, dim=1) * 2 * math.pi)
        voiced = (f0 > 0).float()
        deviation = voiced * 0.003 + (1 - voiced) * 0.1 / 3
        return waves * voiced + deviation * noise.normal(waves.transpose(1, 2)).transpose(1, 2)


class ResBlock(nn.Module):
    def __init__(self, channels: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__()

        def convs(widths: Sequence[int]) -> nn.ModuleList:
            return nn.ModuleList(
                weight_norm(
                    nn.Conv1d(channels, channels, kernel, dilation=d, padding=d * (kernel - 1) // 2)
                )
                for d in widths
            )

        self.convs1, self.convs2 = convs(dilations), convs([1] * len(dilations))

    def forward(self, x: Tensor) -> Tensor:
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            y = dilated(F.leaky_relu(x, _SLOPE))
            x = plain(F.leaky_relu(y, _SLOPE)) + x
        return x


class Generator(nn.Module):
    def __init__(self, config: SynthesizerConfig) -> None:
        super().__init__()
        self.hop = config.hop_length
        self.m_source = Source(config)
        width = config.upsample_initial_channel
        self.conv_pre = weight_norm(nn.Conv1d(config.inter_channels, width, 7, padding=3))
        self.cond = nn.Conv1d(config.gin_channels, width, 1)
        self.ups, self.noise_convs = nn.ModuleList(), nn.ModuleList()
        self.resblocks = nn.ModuleList()
        stride = config.hop_length
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
            stride //= rate
            around = (kernel - rate + 1) // 2
            up = nn.ConvTranspose1d(width, width // 2, kernel, rate, padding=around)
            self.ups.append(weight_norm(up))
            width //= 2
            shape = (2 * stride, stride, (stride + 1) // 2) if stride > 1 else (1,)
            self.noise_convs.append(nn.Conv1d(1, width, *shape))
            for size, dilations in zip(
                config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True
            ):
                self.resblocks.append(ResBlock(width, size, dilations))
        self.conv_post = weight_norm(nn.Conv1d(width, 1, 7, padding=3))

    def forward(self, z: Tensor, f0: Tensor, g: Tensor, noise: Noise) -> Tensor:
        f0 = F.interpolate(f0[:, None], scale_factor=self.hop).transpose(1, 2)
        source = self.m_source(f0, noise).transpose(1, 2)
        x = self.conv_pre(z) + self.cond(g)
        blocks = len(self.resblocks) // len(self.ups)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, _SLOPE)) + self.noise_convs[i](source)
            total = self.resblocks[i * blocks](x)
            for j in range(1, blocks):
                total += self.resblocks[i * blocks + j](x)
            x = total / blocks
        return torch.tanh(self.conv_post(F.leaky_relu(x)))


# ---- the synthesizer ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    wav: Tensor
    starts: Tensor
    mask: Tensor
    z_p: Tensor
    m_p: Tensor
    logs_p: Tensor
    logs_q: Tensor
    lf0: Tensor
    lf0_hat: Tensor


class PlainSynthesizer(nn.Module):
    """so-vits-svc's template; a Cantor Synthesizer with residual flows has the same state dict."""

    def __init__(self, config: SynthesizerConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_channels
        self.emb_g = nn.Embedding(config.n_speakers, config.gin_channels)
        self.pre = nn.Conv1d(config.units_dim, hidden, 5, padding=2)
        self.enc_p = PriorEncoder(config)
        self.dec = Generator(config)
        self.enc_q = PosteriorEncoder(config)
        self.flow = Flow(config)
        self.f0_decoder = F0Predictor(config)
        self.emb_uv = nn.Embedding(2, hidden)

    def forward(self, batch: Batch, spec: Tensor, noise: Noise, segment: int) -> Made:
        g = self.emb_g(batch.speaker).unsqueeze(-1)
        mask = sequence_mask(batch.lengths, batch.units.shape[-1]).unsqueeze(1).to(spec.dtype)
        x = self.pre(batch.units) * mask + self.emb_uv(batch.voiced.long()).transpose(1, 2)
        lf0 = 2595.0 * torch.log10(1.0 + batch.f0.unsqueeze(1) / 700.0) / 500
        centred = self._centred(lf0, mask, batch.voiced, noise)
        lf0_hat = self.f0_decoder(x, centred, mask, g)
        _, m_p, logs_p = self.enc_p(x, mask, f0_to_coarse(batch.f0, sovits=True))
        z, _, logs_q = self.enc_q(spec, mask, g, noise)
        z_p = self.flow(z, mask, g)
        last = (batch.lengths - segment).clamp(min=0)
        chance = noise.uniform(torch.zeros_like(batch.lengths, dtype=torch.float32))
        starts = (chance * (last + 1)).long()
        f0 = slices(batch.f0.unsqueeze(1), starts, segment).squeeze(1)
        wav = self.dec(slices(z, starts, segment), f0, g, noise)
        return Made(wav, starts, mask, z_p, m_p, logs_p, logs_q, lf0, lf0_hat)

    @staticmethod
    def _centred(lf0: Tensor, mask: Tensor, voiced: Tensor, noise: Noise) -> Tensor:
        count = voiced.sum(dim=1, keepdim=True)
        count[count == 0] = 9999
        mean = (lf0[:, 0] * voiced).sum(dim=1, keepdim=True) / count
        factor = noise.between(lf0[:, 0, 0], 0.8, 1.2)[:, None]
        return (lf0 - mean.unsqueeze(-1)) * factor.unsqueeze(-1) * mask


def slices(x: Tensor, starts: Tensor, size: int) -> Tensor:
    """Slice segments one after the other: x (B, C, F) -> (B, C, size)."""
    out = torch.zeros_like(x[:, :, :size])
    for i, start in enumerate(starts.tolist()):
        out[i] = x[i, :, start : start + size]
    return out


# ---- discriminators ----------------------------------------------------------------------------


Verdict = tuple[Tensor, list[Tensor]]


class PeriodDiscriminator(nn.Module):
    def __init__(self, period: int, widest: int) -> None:
        super().__init__()
        self.period = period
        widths = (1, widest // 32, widest // 8, widest // 2, widest, widest)
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(into, out, (5, 1), (3 if i < 4 else 1, 1), padding=(2, 0)))
            for i, (into, out) in enumerate(pairwise(widths))
        )
        self.conv_post = weight_norm(nn.Conv2d(widest, 1, (3, 1), padding=(1, 0)))

    def forward(self, wav: Tensor) -> Verdict:
        wav = F.pad(wav, (0, -wav.shape[-1] % self.period), "reflect")
        return _judge(self, wav.view(len(wav), 1, -1, self.period))


class ScaleDiscriminator(nn.Module):
    def __init__(self, widest: int) -> None:
        super().__init__()
        widths = (1, widest // 64, widest // 16, widest // 4, widest, widest, widest)
        grouped = [(41, 4, 20, max(1, each * widest // 1024)) for each in (4, 16, 64, 256)]
        shapes = [(15, 1, 7, 1), *grouped, (5, 1, 2, 1)]  # kernel, stride, padding, groups
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv1d(into, out, kernel, stride, padding, groups=groups))
            for (into, out), (kernel, stride, padding, groups) in zip(
                pairwise(widths), shapes, strict=True
            )
        )
        self.conv_post = weight_norm(nn.Conv1d(widest, 1, 3, padding=1))

    def forward(self, wav: Tensor) -> Verdict:
        return _judge(self, wav)


def _judge(discriminator: nn.Module, x: Tensor) -> Verdict:
    features = []
    for conv in discriminator.convs:
        x = F.leaky_relu(conv(x), _SLOPE)
        features.append(x)
    x = discriminator.conv_post(x)
    return torch.flatten(x, 1, -1), [*features, x]


class PlainDiscriminator(nn.Module):
    def __init__(self, widest: int = 1024) -> None:
        super().__init__()
        periods = (PeriodDiscriminator(period, widest) for period in (2, 3, 5, 7, 11))
        self.discriminators = nn.ModuleList([ScaleDiscriminator(widest), *periods])

    def forward(self, real: Tensor, fake: Tensor) -> list[tuple[Verdict, Verdict]]:
        """Return the output of each discriminator for real and for fake audio."""
        return [(each(real), each(fake)) for each in self.discriminators]


# ---- a step ------------------------------------------------------------------------------------


class PlainStep:
    """One step of both networks. mark: called with the name of each part when it is done."""

    def __init__(
        self,
        generator: PlainSynthesizer,
        discriminator: PlainDiscriminator,
        mel: MelConfig,
        segment_frames: int,
        mark: Mark = lambda name: None,
    ) -> None:
        self.generator, self.discriminator, self.mel = generator, discriminator, mel
        self.segment, self.mark = segment_frames, mark
        self.optim_g, self.optim_d = (
            torch.optim.AdamW(network.parameters(), 1e-4, betas=(0.8, 0.99), eps=1e-9)
            for network in (generator, discriminator)
        )

    def __call__(self, batch: Batch, noise: Noise) -> dict[str, float]:
        """Run a step; return losses before the updates, and the gradient norms."""
        spec = spectrogram(batch.wav, self.mel, self.generator.config.hop_length, batch.lengths)
        self.mark("spectrograms")
        made = self.generator(batch, spec, noise, self.segment)
        self.mark("G forward")
        wav, mel, mel_hat = self._compared(batch, spec, made)
        self.mark("spectrograms")

        disc = _disc_loss(self.discriminator(wav, made.wav.detach()))
        self.mark("D forward")
        self.optim_d.zero_grad()
        disc.backward()
        self.mark("D backward")
        norm_d = _gradient_norm(self.discriminator)
        self.optim_d.step()
        self.mark("D optimizer")

        verdicts = self.discriminator(wav, made.wav)
        self.mark("D forward, second")
        losses = {
            **_adversarial_losses(verdicts),
            "mel": F.l1_loss(mel, mel_hat) * 45,
            "kl": _kl_loss(made),
            "lf0": F.mse_loss(made.lf0_hat, made.lf0),
        }
        total = sum(losses.values())
        self.optim_g.zero_grad()
        total.backward()
        self.mark("G backward")
        norm_g = _gradient_norm(self.generator)
        self.optim_g.step()
        self.mark("G optimizer")
        named = {"disc": disc, **losses, "total": total}
        values = {name: loss.item() for name, loss in named.items()}
        return {**values, "grad_norm_d": norm_d, "grad_norm_g": norm_g}

    def _compared(self, batch: Batch, spec: Tensor, made: Made) -> tuple[Tensor, Tensor, Tensor]:
        """Return the original's segment, its mel, and the mel of the generated audio."""
        hop, rate = self.generator.config.hop_length, self.generator.config.sample_rate
        wav = slices(batch.wav.unsqueeze(1), made.starts * hop, self.segment * hop)
        mel = slices(mel_of(spec, self.mel, rate), made.starts, self.segment)
        return wav, mel, mel_of(spectrogram(made.wav.squeeze(1), self.mel, hop), self.mel, rate)


def _disc_loss(verdicts: Sequence[tuple[Verdict, Verdict]]) -> Tensor:
    terms = [torch.mean((1 - real) ** 2) + torch.mean(fake**2) for (real, _), (fake, _) in verdicts]
    return torch.stack(terms).sum()


def _adversarial_losses(verdicts: Sequence[tuple[Verdict, Verdict]]) -> dict[str, Tensor]:
    judged = [torch.mean((1 - scores) ** 2) for _, (scores, _) in verdicts]
    distances = [
        torch.mean(torch.abs(r.detach() - f))
        for (_, real), (_, fake) in verdicts
        for r, f in zip(real, fake, strict=True)
    ]
    return {"gen": torch.stack(judged).sum(), "fm": 2 * torch.stack(distances).sum()}


def _kl_loss(made: Made) -> Tensor:
    kl = made.logs_p - made.logs_q - 0.5
    kl = kl + 0.5 * (made.z_p - made.m_p) ** 2 * torch.exp(-2.0 * made.logs_p)
    return torch.sum(kl * made.mask) / torch.sum(made.mask)


def _gradient_norm(network: nn.Module) -> float:
    """Compute the gradient norm, one parameter after the other."""
    total = 0.0
    for parameter in network.parameters():
        if parameter.grad is not None:
            total += parameter.grad.data.norm(2).item() ** 2
    return total**0.5
