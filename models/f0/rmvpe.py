"""RMVPE: f0 from the log-mel of a clip as an image.

H. Wei, X. Cao, T. Dan, Y. Chen, "RMVPE: A robust model for vocal pitch estimation in polyphonic
music", Interspeech 2023. The network is the one in the community's `rmvpe.pt`: a U-Net of residual
blocks, a bidirectional GRU over frames, and a sigmoid for each of 360 bins of 20 cents.

Clips: frame i is centred on sample 160 i of 16 kHz audio; T samples have T // 160 + 1 frames. A
clip's log-mel is padded with zeros to a multiple of 32 frames, and this padding affects the result.
In a batch every layer's output is cleared beyond each clip's own multiple, so that a clip gives the
same result as alone.

Speed: norms are folded into the convolutions before them. On a CPU these run in oneDNN with packed
weights and fused ReLU, channels last. Time lies along the rows of the image, because it is longer
than the mel axis, which has four bins left at the lowest level.

Long clips: a frame of the U-Net depends on `RmvpeConfig.reach` frames on either side, 16 s. It runs
in windows that overlap by twice as much, which is exact. The GRU runs over the whole clip.

Axes: B batch, C channels, M mel bins, F frames, H the GRU's width, K bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import rnn

from models.batching import Batcher, Window, windows
from models.checkpoint import CheckpointError
from models.cpu_packing import PackedLinear, can_pack
from models.f0.bins import CENTS_PER_BIN, LOWEST_CENTS, NUM_BINS, hz_of_cents, local_average
from models.f0.mel import HOP_LENGTH, N_FFT, NUM_MELS, SAMPLE_RATE, f0_log_mel, f0_mel_filters
from models.f0.rmvpe_checkpoint import LEVELS, MAPS, RmvpeConfig, read_rmvpe
from models.f0.rmvpe_onnx import OnnxRmvpe
from models.onnx_session import is_onnx

THRESHOLD = 0.03  # the largest salience of a voiced frame is above it; from the paper's code
WINDOW_FRAMES = 16384  # 164 s
TILE_FRAMES = 512
_NORM_EPS = 1e-5
_UNET_FRAMES = {"cpu": 512, "cuda": 48000}  # padded frames of one batch
_GRU_FRAMES = 32768


class Network(Protocol):
    """A network from log-mels to salience, whose clips do not affect each other."""

    def salience(self, mels: Sequence[Tensor]) -> list[Tensor]:
        """Compute salience: (M, F) each, F a multiple of 32 -> (F, K) each, on the CPU."""
        ...


class Rmvpe:
    """RMVPE for clips: log-mel, network and trimming of padding."""

    sample_rate = SAMPLE_RATE
    hop_length = HOP_LENGTH

    def __init__(self, network: Network, device: str = "cpu") -> None:
        self.network = network
        self.device = torch.device(device)
        self.filters = f0_mel_filters("htk", 30, 8000).to(self.device)

    @torch.inference_mode()
    def salience(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Compute salience of clips (T,) float32 at 16 kHz.

        Returns float32 (T // 160 + 1, K) each, 0 to 1, on the CPU. A clip of fewer than 513 samples
        is padded with zeros, because its ends are reflected.

        Raises: CheckpointError: when the weights give values that are not finite.
        """
        saliences = self.network.salience([self._mel(wav) for wav in wavs])
        out = [row[: len(wav) // HOP_LENGTH + 1] for row, wav in zip(saliences, wavs, strict=True)]
        if not all(bool(torch.isfinite(row).all()) for row in out):
            raise CheckpointError(
                "RMVPE's weights give values that are not finite: the file may be damaged"
            )
        return out

    def _mel(self, wav: Tensor) -> Tensor:
        """Compute the log-mel (M, F) of (T,), F the next multiple of 32."""
        n_frames = len(wav) // HOP_LENGTH + 1
        wav = F.pad(wav.to(self.device), (0, max(0, N_FFT // 2 + 1 - len(wav))))
        padded = F.pad(wav[None], (N_FFT // 2, N_FFT // 2), mode="reflect")[0]
        mel = f0_log_mel(padded, self.filters)[:n_frames]
        return F.pad(mel.T, (0, -n_frames % (1 << LEVELS)))


def decode_rmvpe(salience: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Decode (F, K) to f0 in Hz, float64 (F,), 0 where no bin is above the threshold."""
    bins = torch.arange(NUM_BINS, dtype=torch.float64, device=salience.device)
    f0 = hz_of_cents(local_average(salience.double(), bins * CENTS_PER_BIN + LOWEST_CENTS))
    return torch.where(salience.amax(dim=1) > threshold, f0, 0.0)


def load_rmvpe(path: str | Path, device: str = "cpu") -> Rmvpe:
    """Load rmvpe.pt, a safetensors file with its keys, or an ONNX export.

    Raises: CheckpointError: when the file is none of these (the message names keys); ValueError:
    when it is an ONNX file and onnxruntime is missing or does not support `device`.
    """
    if is_onnx(Path(path)):
        return Rmvpe(OnnxRmvpe(Path(path), device), device)
    if torch.device(device).type == "cuda":
        # By default convolutions would round to 10 bits (TF32); matrix products do not.
        torch.backends.cudnn.allow_tf32 = False
    config, tensors = read_rmvpe(path)
    packed = can_pack(torch.empty(0, device=device))
    try:
        network = UNetGru(config, tensors, packed)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Rmvpe(BatchedRmvpe(network, device), device)


def check_rmvpe(path: str | Path) -> None:
    """Check that a file is an RMVPE, as `load_rmvpe` on a CPU.

    Only names and shapes of torch's containers and safetensors are read, not weights.

    Raises: CheckpointError: when it is not; ValueError: when it is an ONNX file and onnxruntime is
    missing.
    """
    if is_onnx(Path(path)):
        OnnxRmvpe(Path(path), "cpu")
    else:
        read_rmvpe(path)


class BatchedRmvpe:
    """The network for clips of any length, in batches.

    Five seconds of audio keep a CPU busy in the U-Net. Shorter clips share a batch of that length,
    so that its weights (370 MB) are read less often. The GRU is sequential and takes large batches.
    """

    def __init__(self, network: UNetGru, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.network = network.eval().requires_grad_(False).to(self.device)
        self.unet_batcher = Batcher(_UNET_FRAMES[self.device.type])
        self.gru_batcher = Batcher(_GRU_FRAMES)

    def salience(self, mels: Sequence[Tensor]) -> list[Tensor]:
        """Compute salience as `Network.salience`."""
        features = self._features(mels)

        def run(batch: list[int]) -> list[Tensor]:
            return [row.cpu() for row in self.network.salience([features[i] for i in batch])]

        return self.gru_batcher.map([len(row) for row in features], run)

    def _features(self, mels: Sequence[Tensor]) -> list[Tensor]:
        """Run the U-Net: (M, F) each -> (F, 3 M) each."""
        overlap = 2 * self.network.config.reach
        pieces: list[tuple[int, Window]] = [
            (clip, window)
            for clip, mel in enumerate(mels)
            for window in windows(mel.shape[1], WINDOW_FRAMES, overlap)
        ]
        lengths = [window.stop - window.start for _, window in pieces]

        def run(batch: list[int]) -> list[Tensor]:
            longest = max(lengths[i] for i in batch)
            rows = torch.zeros(len(batch), NUM_MELS, longest, device=self.device)
            for row, i in zip(rows, batch, strict=True):
                clip, window = pieces[i]
                row[:, : lengths[i]] = mels[clip][:, window.start : window.stop]
            features = self.network.unet(rows, [lengths[i] for i in batch])
            kept = [pieces[i][1] for i in batch]
            return [
                row[window.first - window.start : window.last - window.start]
                for row, window in zip(features, kept, strict=True)
            ]

        parts: list[list[Tensor]] = [[] for _ in mels]
        for (clip, _), features in zip(pieces, self.unet_batcher.map(lengths, run), strict=True):
            parts[clip].append(features)
        return [part[0] if len(part) == 1 else torch.cat(part) for part in parts]


class Ends:
    """Clearing of the padding beyond each clip's own frames, at every level of a batch."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        """Prepare masks. lengths: frames, multiples of 2 ** LEVELS."""
        self.beyond: dict[int, Tensor] = {}  # by frames of the level: (B, 1, 1, F)
        if min(lengths) == (longest := max(lengths)):
            return
        counts = torch.tensor(lengths, device=device)[:, None, None, None]
        for level in range(LEVELS + 1):
            frames = torch.arange(longest >> level, device=device)
            self.beyond[len(frames)] = frames >= counts >> level

    def __call__(self, x: Tensor) -> Tensor:
        """Clear x (B, C, M, F) in place."""
        return x.masked_fill_(self.beyond[x.shape[3]], 0) if self.beyond else x


class Conv(nn.Module):
    """A convolution that keeps the size of (B, C, M, F), optionally followed by ReLU."""

    def __init__(self, weight: Tensor, bias: Tensor, relu: bool) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[2] // 2)
        return x.relu_() if self.relu else x


class Up(nn.Module):
    """A transposed convolution that doubles M and F, followed by ReLU."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1, output_padding=1)
        return x.relu_()


class PackedConv(nn.Module):
    """`Conv` in oneDNN with a packed weight."""

    def __init__(self, weight: Tensor, bias: Tensor, relu: bool) -> None:
        super().__init__()
        self.padding = [weight.shape[2] // 2] * 2
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            weight, self.padding, [1, 1], [1, 1], 1
        )
        self.bias = bias
        self.post = "relu" if relu else "none"

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, self.padding, [1, 1], [1, 1], 1, self.post, [], ""
        )


class PackedUp(nn.Module):
    """`Up` in oneDNN with a packed weight."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_convolution_transpose_weight(
            weight, [1, 1], [1, 1], [2, 2], [1, 1], 1
        )
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_transpose_pointwise(
            x, self.weight, self.bias, [1, 1], [1, 1], [2, 2], [1, 1], 1, "relu", [], ""
        )


class UNetBlock(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, first: Conv, second: Conv, shortcut: Conv | None) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = first, second, shortcut

    def forward(self, x: Tensor, ends: Ends) -> Tensor:
        y = self.second(ends(self.first(x)))
        y += x if self.shortcut is None else self.shortcut(x)
        return ends(y)


class UNetLayer(nn.Module):
    """A sequence of residual blocks.

    tiled: channels last, and a single long clip runs in tiles that fit into the processor's cache.
    """

    def __init__(self, blocks: Sequence[UNetBlock], tiled: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.reach = 2 * len(blocks)  # frames of this level on either side
        self.tiled = tiled

    def forward(self, x: Tensor, ends: Ends, skip: Tensor | None = None) -> Tensor:
        """Map (B, C, M, F) to (B, C out, M, F). skip: further input channels."""
        n_frames = x.shape[3]
        if not self.tiled or ends.beyond or n_frames <= TILE_FRAMES + 2 * self.reach:
            return self._run(x, ends, skip)
        tiles = windows(n_frames, TILE_FRAMES + 2 * self.reach, 2 * self.reach)
        out: Tensor | None = None
        for tile in tiles:
            span = slice(tile.start, tile.stop)
            y = self._run(x[..., span], ends, None if skip is None else skip[..., span])
            if out is None:
                shape = (*y.shape[:3], n_frames)
                out = torch.empty(shape, memory_format=torch.channels_last)
            out[..., tile.first : tile.last] = y[
                ..., tile.first - tile.start : tile.last - tile.start
            ]
        return out

    def _run(self, x: Tensor, ends: Ends, skip: Tensor | None) -> Tensor:
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        elif self.tiled:
            x = x.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x, ends)
        return x


class BiGru(nn.Module):
    """A bidirectional GRU over several clips: (F, D) each -> (F, 2 H) each."""

    def __init__(self, gru: nn.GRU) -> None:
        super().__init__()
        self.gru = gru

    def forward(self, rows: Sequence[Tensor]) -> list[Tensor]:
        packed = rnn.pack_sequence(list(rows), enforce_sorted=False)
        return rnn.unpack_sequence(self.gru(packed)[0])


class UNetGru(nn.Module):
    """The network with folded norms."""

    def __init__(
        self, config: RmvpeConfig, tensors: Mapping[str, Tensor], packed: bool = False
    ) -> None:
        """Build from tensors under the published keys. packed: use oneDNN's packed weights."""
        super().__init__()
        self.config = config
        read = _Reader(tensors, packed)

        def layer(name: str) -> UNetLayer:
            return UNetLayer([read.block(f"{name}.{i}") for i in range(config.blocks)], packed)

        scale, shift = read.norm("unet.encoder.bn")
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.encoder = nn.ModuleList(layer(f"unet.encoder.layers.{i}.conv") for i in range(LEVELS))
        self.intermediate = nn.ModuleList(
            layer(f"unet.intermediate.layers.{i}.conv") for i in range(config.inter_layers)
        )
        self.ups = nn.ModuleList(read.up(f"unet.decoder.layers.{i}.conv1") for i in range(LEVELS))
        self.decoder = nn.ModuleList(layer(f"unet.decoder.layers.{i}.conv2") for i in range(LEVELS))
        self.maps = read.conv("cnn")
        self.gru = read.gru("fc.0.gru")
        self.linear = read.linear("fc.1")

    def unet(self, mel: Tensor, lengths: Sequence[int]) -> Tensor:
        """Map (B, M, F) to (B, F, 3 M). lengths: frames of each clip; multiples of 32, like F."""
        ends = Ends(lengths, mel.device)
        x = ends((mel * self.scale + self.shift)[:, None])  # (B, 1, M, F)
        skipped = []
        for layer in self.encoder:
            skipped.append(layer(x, ends))
            x = F.avg_pool2d(skipped[-1], 2)
        for layer in self.intermediate:
            x = layer(x, ends)
        for up, layer in zip(self.ups, self.decoder, strict=True):
            x = layer(ends(up(x)), ends, skip=skipped.pop())
        return self.maps(x).permute(0, 3, 1, 2).flatten(2)

    def salience(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Compute salience: (F, 3 M) each -> (F, K) each."""
        return [self.linear(row).sigmoid_() for row in self.gru(features)]


class _Reader:
    """Builder of layers from a state dict: norms folded into the convolutions, mel bins first.

    Weights that are not finite raise CheckpointError, because ReLU would hide them.
    """

    def __init__(self, tensors: Mapping[str, Tensor], packed: bool) -> None:
        self.tensors = tensors
        self.packed = packed

    def numbers(self, name: str) -> Tensor:
        """Copy a tensor, so that the file is not needed any more."""
        return _finite(name, self.tensors[name].float().clone())

    def folded(self, name: str, scale: Tensor) -> Tensor:
        return _finite(name, self.tensors[name].float() * scale)

    def norm(self, name: str) -> tuple[Tensor, Tensor]:
        """Return scale and shift of a batch norm."""
        weight, bias, mean, variance = (
            self.tensors[f"{name}.{part}"].double()
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight * torch.rsqrt(variance + _NORM_EPS)
        shift = bias - scale * mean
        return _finite(name, scale.float()), _finite(name, shift.float())

    def conv(self, name: str, norm: str | None = None) -> nn.Module:
        """Build a convolution, with ReLU if there is a norm."""
        if norm is None:
            weight, bias = self.numbers(f"{name}.weight"), self.numbers(f"{name}.bias")
        else:
            scale, bias = self.norm(norm)
            weight = self.folded(f"{name}.weight", scale[:, None, None, None])
        kind = PackedConv if self.packed else Conv
        return kind(weight.transpose(2, 3).contiguous(), bias, relu=norm is not None)

    def up(self, name: str) -> nn.Module:
        scale, bias = self.norm(f"{name}.1")
        weight = self.folded(f"{name}.0.weight", scale[:, None, None])
        kind = PackedUp if self.packed else Up
        return kind(weight.transpose(2, 3).contiguous(), bias)

    def block(self, name: str) -> UNetBlock:
        has_shortcut = f"{name}.shortcut.weight" in self.tensors
        return UNetBlock(
            self.conv(f"{name}.conv.0", f"{name}.conv.1"),
            self.conv(f"{name}.conv.3", f"{name}.conv.4"),
            self.conv(f"{name}.shortcut") if has_shortcut else None,
        )

    def gru(self, name: str) -> BiGru:
        hidden = self.tensors[f"{name}.weight_hh_l0"].shape[1]
        with torch.device("meta"):
            gru = nn.GRU(MAPS * NUM_MELS, hidden, batch_first=True, bidirectional=True)
        state = {part: self.numbers(f"{name}.{part}") for part in gru.state_dict()}
        gru.load_state_dict(state, assign=True)
        return BiGru(gru)

    def linear(self, name: str) -> nn.Module:
        weight, bias = (self.numbers(f"{name}.{part}") for part in ("weight", "bias"))
        if self.packed:
            return PackedLinear(weight, bias)
        linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        linear.load_state_dict({"weight": weight, "bias": bias}, assign=True)
        return linear


def _finite(name: str, numbers: Tensor) -> Tensor:
    if not torch.isfinite(numbers.sum()):
        raise CheckpointError(f"{name} has values that are not finite: the file is damaged")
    return numbers
