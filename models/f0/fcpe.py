"""FCPE: f0 from the log-mel of a clip by a convolutional network.

Y. Luo et al., "FCPE: A fast context-based pitch estimation model", 2025 (arXiv 2509.15140). The
network is that of the package torchfcpe 0.0.4: two convolutions, six convolution modules of a
Conformer without attention, and a sigmoid for each of 360 bins from 32.7 to 1975.5 Hz.

A frame depends on 92 frames on either side and, through one group norm, on the mean and variance of
the whole clip. Given those two, windows that overlap by twice that are exact.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.batching import Batcher, windows
from models.checkpoint import CheckpointError, load_weights
from models.cpu_packing import PackedLinear, can_pack
from models.f0.bins import NUM_BINS, hz_of_cents
from models.f0.mel import HOP_LENGTH, N_FFT, NUM_MELS, SAMPLE_RATE, f0_log_mel, f0_mel_filters

WINDOW_FRAMES = 3000  # 30 s: longer clips run in windows, to reuse memory

_WIDTH = 512
_LAYERS = 6
_KERNEL = 31
_GROUPS = 4
_REACH_FRAMES = 1 + 1 + _LAYERS * (_KERNEL // 2)
_BATCH_FRAMES = {"cpu": 500, "cuda": 120_000}  # padded; on a GPU about 3 GB of activations

_PACKAGE = "torchfcpe"
_FILE = "assets/fcpe_c_v001.pt"
_EXPECTED = {  # settings in the file that the shapes of the weights do not determine
    "mel": {"sr": 16000, "n_fft": 1024, "win_size": 1024, "hop_size": 160, "fmin": 0, "fmax": 8000},
    "model": {"type": "CFNaiveMelPE", "conv_only": True},
}


def bundled_fcpe() -> Path:
    """Return the weights file in the installed package torchfcpe, without importing it.

    Raises: ValueError: when it does not exist.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "fcpe needs the weights in the package torchfcpe, which is not installed: "
            "pip install torchfcpe"
        )
    path = Path(spec.submodule_search_locations[0], _FILE)
    if not path.is_file():
        raise ValueError(
            f"fcpe needs {path}, which the installed torchfcpe lacks: pip install torchfcpe==0.0.4"
        )
    return path


def load_fcpe(path: Path, device: str = "cpu") -> Fcpe:
    """Load the network with the weights of torchfcpe's file on `device`.

    Raises: CheckpointError: when the file cannot be read or has another network.
    """
    return Fcpe(read_fcpe(path), device)


def read_fcpe(path: Path) -> FcpeNetwork:
    """Build the network with torchfcpe's weights; most of them are not read from disk yet.

    Raises: CheckpointError: when the file cannot be read or has another network.
    """
    content, _ = load_weights(path)
    settings, weights = content.get("config_dict"), content.get("model")
    if not isinstance(settings, dict) or not isinstance(weights, dict):
        raise CheckpointError(f"{path} is not an FCPE file: it lacks 'model' or 'config_dict'")
    for part, expected in _EXPECTED.items():
        section = settings.get(part)
        for key, value in expected.items():
            actual = section.get(key) if isinstance(section, dict) else None
            if actual != value:
                raise CheckpointError(
                    f"{path} is not torchfcpe's FCPE: its {part}.{key} is {actual!r}, not {value!r}"
                )
    with torch.device("meta"):  # no memory and no random numbers, since all weights are replaced
        network = FcpeNetwork()
    network.load_state_dict(_renamed_weights(path, weights, network.state_dict()), assign=True)
    return network


class Fcpe:
    """FCPE for clips of any length: one frame every 10 ms, T // 160 + 1 frames (T at 16 kHz).

    Frame j reads the samples [160 j - 432, 160 j + 592). The clip is reflected at its ends, or
    padded with zeros if it is shorter than 433 samples. The last frame has the same input as the
    one before it, as in torchfcpe.

    Clips run in padded batches, large ones on a GPU. On a CPU a batch of 5 s is enough: clips of
    half a second take 60 % of the time that they take one by one, clips of 2 s 100 %.
    """

    def __init__(self, network: FcpeNetwork, device: str = "cpu") -> None:
        """Take over `network`: it is moved, and on a CPU packed for inference."""
        self.device = torch.device(device)
        if self.device.type == "cuda":
            # By default convolutions would round to 10 bits (TF32); matrix products do not.
            torch.backends.cudnn.allow_tf32 = False
        self.network = network.eval().requires_grad_(False).to(self.device)
        if self.device.type == "cpu":
            _pack(self.network)
        self.filters = f0_mel_filters("slaney", 0, SAMPLE_RATE / 2).to(self.device)
        self.batcher = Batcher(_BATCH_FRAMES.get(self.device.type, 500))

    def pitch(self, wavs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Estimate f0 of clips (T,) float32 at 16 kHz.

        Returns for each clip f0 in Hz, also where unvoiced, and the largest activation, both (F,)
        on the CPU.
        """
        decoded = self._each(wavs, lambda salience: decode_fcpe(salience, self.network.cents))
        return [(both[:, 0], both[:, 1]) for both in decoded]

    def activations(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Compute activations (F, 360), 0 to 1, on the CPU, of clips (T,) float32 at 16 kHz."""
        return self._each(wavs, lambda salience: salience)

    @torch.inference_mode()
    def _each(self, wavs: Sequence[Tensor], read: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Apply `read`, which maps (F, 360) to (F, K) by frame, to each clip's activations."""
        lengths = [len(wav) // HOP_LENGTH + 1 for wav in wavs]

        def run(batch: list[int]) -> list[Tensor]:
            if len(batch) == 1:
                return [self._alone(wavs[batch[0]], read)]
            return self._batch([wavs[i] for i in batch], read)

        # A clip that needs windows runs alone: for the batcher it is as long as a whole batch.
        sizes = [self.batcher.budget if n > WINDOW_FRAMES else n for n in lengths]
        return self.batcher.map(sizes, run)

    def _batch(self, wavs: list[Tensor], read: Callable[[Tensor], Tensor]) -> list[Tensor]:
        mels = [self.mel(wav) for wav in wavs]
        lengths = [len(mel) for mel in mels]
        salience = self.network(nn.utils.rnn.pad_sequence(mels, True), lengths)
        rows = read(salience.flatten(0, 1)).unflatten(0, salience.shape[:2]).cpu()
        return [row[:n] for row, n in zip(rows, lengths, strict=True)]

    def _alone(self, wav: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        mel = self.mel(wav)
        return torch.cat([read(piece).cpu() for piece in self._pieces(mel)])

    def _pieces(self, mel: Tensor) -> Iterator[Tensor]:
        """Yield the activations of mel (F, M) in consecutive pieces."""
        if len(mel) <= WINDOW_FRAMES:
            yield self.network(mel[None])[0]
            return
        overlap = 2 * _REACH_FRAMES
        count = -(-(len(mel) - overlap) // (WINDOW_FRAMES - overlap))
        size = -(-(len(mel) + (count - 1) * overlap) // count)  # equal sizes, so none is tiny
        parts = windows(len(mel), size, overlap)
        kept = [slice(part.first - part.start, part.last - part.start) for part in parts]
        sums = torch.zeros(1, 2, _GROUPS, dtype=torch.float64, device=self.device)
        for part, keep in zip(parts, kept, strict=True):
            sums += group_sums(self.network.enter(mel[None, part.start : part.stop])[:, keep])
        for part, keep in zip(parts, kept, strict=True):
            x = self.network.enter(mel[None, part.start : part.stop])
            yield self.network.context(x, sums, [len(mel)])[0, keep]

    def mel(self, wav: Tensor) -> Tensor:
        """Compute the log-mel (F, M) of (T,)."""
        wav = wav.to(self.device, torch.float32)
        before = (N_FFT - HOP_LENGTH) // 2
        after = max(before, N_FFT - before - len(wav))
        mode = "reflect" if len(wav) > after else "constant"
        padded = F.pad(wav[None], (before, after), mode)[0]
        mel = f0_log_mel(padded, self.filters, floor=1e-9)
        return mel if len(wav) < HOP_LENGTH else torch.cat([mel, mel[-1:]])


def decode_fcpe(salience: Tensor, cents: Tensor) -> Tensor:
    """Decode (F, 360) to (F, 2), f0 in Hz and the largest activation: torchfcpe's local_argmax.

    f0 is the mean of the nine bins around the highest one, weighted by activation. Beyond an end of
    the range the outermost bin is repeated.
    """
    strength, peak = salience.max(dim=1, keepdim=True)
    near = peak + torch.arange(-4, 5, device=salience.device)
    near = near.clamp(0, NUM_BINS - 1)  # (F, 9)
    weights = salience.gather(1, near)
    mean = (weights * cents[near]).sum(1) / weights.sum(1)
    return torch.stack([hz_of_cents(mean), strength[:, 0]], dim=1)


class FcpeNetwork(nn.Module):
    """Network from log-mel (B, F, M) to activations (B, F, 360); layers are (B, F, channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = FrameConv(NUM_MELS, _WIDTH, 3)
        self.group_norm = nn.GroupNorm(_GROUPS, _WIDTH)
        self.second = FrameConv(_WIDTH, _WIDTH, 3)
        self.layers = nn.ModuleList(ConvolutionModule() for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(_WIDTH)
        self.output = nn.Linear(_WIDTH, NUM_BINS)
        self.register_buffer("cents", torch.zeros(NUM_BINS))  # of each bin, above 10 Hz

    def forward(self, mel: Tensor, lengths: list[int] | None = None) -> Tensor:
        """Compute activations. lengths: frames of each clip, where they differ.

        `mel` is 0 after a clip's own frames, and so is the input of every convolution.
        """
        n_clips, n_frames, _ = mel.shape
        mask = None
        if lengths is not None and min(lengths) < n_frames:
            ends = torch.tensor(lengths, device=mel.device)
            mask = (torch.arange(n_frames, device=mel.device) < ends[:, None])[:, :, None]
        x = masked(self.enter(mel), mask)
        return self.context(x, group_sums(x), lengths or [n_frames] * n_clips, mask)

    def context(
        self, x: Tensor, sums: Tensor, lengths: list[int], mask: Tensor | None = None
    ) -> Tensor:
        """Run the layers after the first. sums: `group_sums` of whole clips of `lengths`."""
        norm = self.group_norm
        counts = torch.tensor(lengths, device=x.device)[:, None] * (_WIDTH // _GROUPS)
        mean, mean_square = sums.unbind(1)  # (B, groups)
        mean, mean_square = mean / counts, mean_square / counts
        scale = (mean_square - mean.square() + norm.eps).rsqrt()
        shift = -mean * scale
        scale, shift = (v.float().repeat_interleave(_WIDTH // _GROUPS, 1) for v in (scale, shift))
        scale, shift = norm.weight * scale, norm.weight * shift + norm.bias  # (B, channels)
        x = F.leaky_relu(torch.addcmul(shift[:, None], x, scale[:, None]))
        x = self.second(masked(x, mask))
        for layer in self.layers:
            x = x + layer(x, mask)
        return self.output(self.norm(x)).sigmoid()


class ConvolutionModule(nn.Module):
    """The convolution module of a Conformer, without batch norm.

    A. Gulati et al., "Conformer: Convolution-augmented transformer for speech recognition",
    Interspeech 2020, section 2.2.
    """

    def __init__(self) -> None:
        super().__init__()
        inner = 2 * _WIDTH
        self.norm = nn.LayerNorm(_WIDTH)
        self.expand = nn.Linear(_WIDTH, 2 * inner)
        self.depthwise = FrameConv(inner, inner, _KERNEL, groups=inner)
        self.project = nn.Linear(inner, _WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply to (B, F, H), to the same shape."""
        x = F.glu(self.expand(self.norm(x)), dim=2)
        x = self.depthwise(masked(x, mask))
        return self.project(F.silu(x))


class FrameConv(nn.Module):
    """`nn.Conv1d` over (B, F, channels), padded with zeros to keep the number of frames.

    It runs as a convolution over images one pixel high with channels last, so neither input nor
    output is copied. On a CPU the depthwise ones are thirty times as fast as `conv1d`.
    """

    def __init__(self, n_in: int, n_out: int, kernel: int, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_out, n_in // groups, kernel))
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.kernel, self.groups = kernel, groups

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, F, n_in) to (B, F, n_out)."""
        image = x.transpose(1, 2)[:, :, None]  # (B, n_in, 1, F)
        weight = self.weight[:, :, None]
        padding = (0, self.kernel // 2)
        image = F.conv2d(image, weight, self.bias, padding=padding, groups=self.groups)
        return image[:, :, 0].transpose(1, 2)


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Set x (B, F, channels) to 0 where mask (B, F, 1) is False."""
    return x if mask is None else x * mask


def group_sums(x: Tensor) -> Tensor:
    """Sum x (B, F, channels) and its squares over each group of channels: float64 (B, 2, G)."""
    both = torch.stack([x.sum(1, dtype=torch.float64), x.square().sum(1, dtype=torch.float64)], 1)
    return both.unflatten(2, (_GROUPS, -1)).sum(3)


def _pack(network: FcpeNetwork) -> None:
    """Replace the linear layers by packed ones (`models.cpu_packing`) where possible."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and can_pack(child.weight):
                setattr(parent, name, PackedLinear(child.weight, child.bias))


_KEYS = {  # module -> prefix of its keys in the file
    "enter": "input_stack.0",
    "group_norm": "input_stack.1",
    "second": "input_stack.3",
    "norm": "norm",
    "output": "output_proj",
} | {
    f"layers.{i}.{name}": f"net.encoder_layers.{i}.conformer.net.{key}"
    for i in range(_LAYERS)
    for name, key in (("norm", 0), ("expand", 2), ("depthwise", "4.conv"), ("project", 6))
}
_NORMED = "output_proj.weight"  # weight-normalised in the file
_UNUSED = {  # for training, and for the attention that this network does not have
    "gaussian_blurred_cent_mask": (),
    **{
        f"net.encoder_layers.{i}.norm.{kind}": (_WIDTH,)
        for i in range(_LAYERS)
        for kind in ("weight", "bias")
    },
}


def _renamed_weights(
    path: Path, weights: dict[Any, Any], network: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Rename the file's tensors to the names in `network`, a state dict.

    Raises: CheckpointError: when a key is missing, unknown or of another shape.
    """
    keys, shapes = {}, dict(_UNUSED)
    for name, tensor in network.items():
        module, _, kind = name.rpartition(".")
        keys[name] = key = f"{_KEYS[module]}.{kind}" if module else "cent_table"
        one_frame = (1,) if module.endswith(("expand", "project")) and kind == "weight" else ()
        shapes[key] = (*tensor.shape, *one_frame)  # the file has convolutions there
    n_out, _ = shapes[f"{_NORMED}_v"] = shapes.pop(_NORMED)
    shapes[f"{_NORMED}_g"] = (n_out, 1)

    for key in [*shapes, *weights]:
        if key not in weights:
            raise CheckpointError(f"{path} is not torchfcpe's FCPE: it lacks {key}")
        if key not in shapes:
            raise CheckpointError(f"{path} is not torchfcpe's FCPE: it has the unknown key {key}")
        value = weights[key]
        if not isinstance(value, Tensor) or tuple(value.shape) != shapes[key]:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(
                f"{path} is not torchfcpe's FCPE: {key} is {shape}, not {shapes[key]}"
            )
    direction, length = weights[f"{_NORMED}_v"].float(), weights[f"{_NORMED}_g"].float()
    folded = {_NORMED: direction * (length / direction.norm(dim=1, keepdim=True))}
    return {
        name: (weights | folded)[keys[name]].float().reshape(tensor.shape)
        for name, tensor in network.items()
    }
