"""Whisper's audio encoder as a content encoder; so-vits-svc calls its output a PPG.

    waveform -> log-mel spectrum of 30 s -> two convolutions -> + positions -> transformer -> norm

Radford et al., 2022. The network always sees 30 s: a shorter clip is followed by zeros, and its
frames attend to those too. A shorter window would change the numbers.

A clip of N samples has max(1, N // 320) frames. One longer than 30 s goes through windows of 30 s
that begin every 25 s; the last one ends with the clip. Where two overlap, the earlier gives the
frames up to the middle of the overlap and the later those after it, so a frame sees 2.5 s or more
to either side, and those up to the first seam are what the first 30 s give alone. Each window has
its own floor of the spectrum, 8 decades below its own maximum.

Whisper knows a frame's place in its window, so two windows hear the same sound in two ways. The
seam error, one window's frames against the other's around a seam: 0.4 to 0.6 RMS, where the units'
standard deviation is 1 (whole songs, random weights in medium's shape; trained ones were not at
hand). In the rest of the overlap it is no less: it is the place, not what a window's end cuts off.

Axes: B batch, T samples, M mel bins, F frames, H width, N heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.batching import Batcher, windows
from models.checkpoint import OWN_HEADER, CheckpointError, json_beside, load_weights
from models.cpu_packing import PackedLinear, can_pack
from models.encoders.encoder import DType, checked
from models.encoders.encoder_names import FAMILIES, names_for, stranger
from models.encoders.layouts import read_encoder_file

SAMPLE_RATE = 16000
HOP_LENGTH = 320
WINDOW_FRAMES = 1500
WINDOW_SAMPLES = WINDOW_FRAMES * HOP_LENGTH
OVERLAP_FRAMES = 250

_N_FFT = 400
_MEL_HOP = 160
_HEAD_DIM = 64  # of every published Whisper
_GPU_WINDOWS = 16  # in one call of the network: 1 GB of activations of the large one


@dataclass(frozen=True, kw_only=True)
class WhisperConfig:
    """Shapes of an audio encoder. feed_forward: inner width of each layer's feed-forward."""

    n_mels: int = 80
    width: int
    heads: int
    layers: int
    feed_forward: int


class WhisperEncoder:
    """Encoder by Whisper: (T,) -> (max(1, T // 320), width). Frames and windows: see the module."""

    sample_rate = SAMPLE_RATE
    hop_length = HOP_LENGTH

    def __init__(
        self,
        name: str,
        config: WhisperConfig,
        tensors: Mapping[str, Tensor],
        device: str = "cpu",
        dtype: DType = "float32",
    ) -> None:
        """config, tensors: as `read_whisper` gives them."""
        self.name = name
        self.dim = config.width
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype)
        with torch.device("meta"):
            network = WhisperNetwork(config)
        network.load_state_dict(dict(tensors), assign=True)
        self.network = network.eval().requires_grad_(False).to(self.device, self.dtype)
        _pack(self.network)
        self.filters = whisper_mel_filters(config.n_mels).to(self.device)
        # One window fills a processor; more would only take more memory.
        at_once = 1 if self.device.type == "cpu" else _GPU_WINDOWS
        self.batcher = Batcher(at_once * WINDOW_FRAMES)

    @torch.inference_mode()
    def encode(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """As `Encoder.encode`."""
        seen = [
            (i, window)
            for i, wav in enumerate(checked(wavs))
            for window in windows(whisper_num_frames(len(wav)), WINDOW_FRAMES, OVERLAP_FRAMES)
        ]

        def run(batch: list[int]) -> list[Tensor]:
            part = [seen[at] for at in batch]
            frames = self._frames([_cut(wavs[i], window.start) for i, window in part])
            return [
                row[window.first - window.start : window.last - window.start].cpu().float().clone()
                for row, (_, window) in zip(frames, part, strict=True)
            ]

        units: list[list[Tensor]] = [[] for _ in wavs]
        pieces = self.batcher.map([WINDOW_FRAMES] * len(seen), run)
        for (i, _), piece in zip(seen, pieces, strict=True):
            units[i].append(piece)
        return [torch.cat(pieces) for pieces in units]

    def _frames(self, wavs: Sequence[Tensor]) -> Tensor:
        """Windows of at most 30 s, (T,) each -> (B, 1500, H)."""
        padded = [F.pad(wav.to(self.device), (0, WINDOW_SAMPLES - len(wav))) for wav in wavs]
        mel = whisper_log_mel(torch.stack(padded), self.filters)
        return self.network(mel.to(self.dtype))


def load_whisper(
    name: str, checkpoint: str | None, device: str = "cpu", dtype: DType = "float32"
) -> WhisperEncoder:
    """The encoder `name`, whisper-ppg (medium) or whisper-ppg-large, from any file of Whisper.

    Raises CheckpointError for a file that is no Whisper or is the other name's, ValueError where
    there is none.
    """
    if checkpoint is None:
        raise ValueError(f"encoder.checkpoint is empty: {name} needs a file of Whisper's weights")
    config, tensors = read_whisper(checkpoint)
    other = _NAME_OF_WIDTH.get(config.width, name)
    if other != name:
        raise CheckpointError(
            f"{checkpoint} is a Whisper of width {config.width}: its name is {other}, not {name}"
        )
    return WhisperEncoder(name, config, tensors, device, dtype)


_NAME_OF_WIDTH = {1024: "whisper-ppg", 1280: "whisper-ppg-large"}


def whisper_num_frames(num_samples: int) -> int:
    """Frames of a clip."""
    return max(1, num_samples // HOP_LENGTH)


def _cut(wav: Tensor, start: int) -> Tensor:
    """What a window that starts at frame `start` sees of a clip, without the zeros after it."""
    return wav[start * HOP_LENGTH :][:WINDOW_SAMPLES]


# Spectrum


def whisper_mel_filters(n_mels: int) -> Tensor:
    """Slaney's mel filters from 0 to 8 kHz: float32 (M, 201)."""
    import librosa  # slow to import

    return torch.from_numpy(librosa.filters.mel(sr=SAMPLE_RATE, n_fft=_N_FFT, n_mels=n_mels))


def whisper_log_mel(wavs: Tensor, filters: Tensor) -> Tensor:
    """(B, T) -> (B, M, T // 160): about -1 to 1, cut off 8 decades below each row's maximum."""
    hann = torch.hann_window(_N_FFT, device=wavs.device)
    spectrum = torch.stft(wavs, _N_FFT, _MEL_HOP, window=hann, return_complex=True)
    power = spectrum[..., :-1].abs().square()
    mel = (filters @ power).clamp(min=1e-10).log10()
    mel = torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 8)
    return (mel + 4) / 4


# Network


class WhisperNetwork(nn.Module):
    """See the module."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.n_mels, config.width, 3, padding=1)
        self.conv2 = nn.Conv1d(config.width, config.width, 3, stride=2, padding=1)
        self.register_buffer("positions", torch.empty(WINDOW_FRAMES, config.width))
        self.layers = nn.ModuleList(WhisperLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, mel: Tensor) -> Tensor:
        """(B, M, 3000) -> (B, 1500, H)"""
        x = F.gelu(self.conv1(mel))
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        x = x + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class WhisperLayer(nn.Module):
    """Attention and feed-forward, each after its norm and added to what it had."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = WhisperAttention(config.width, config.heads)
        self.feed_forward_norm = nn.LayerNorm(config.width)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.width, config.feed_forward),
            nn.GELU(),
            nn.Linear(config.feed_forward, config.width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, H) -> (B, F, H)"""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class WhisperAttention(nn.Module):
    """Multi-head self-attention over all frames.

    Query, key and value are one matrix. Whisper's keys have no bias: that third of it is zero.
    Its scaling of query and key by d ** -0.25 each is the usual d ** -0.5 of their product.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, H) -> (B, F, H)"""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, N, F, H / N)
        heard = F.scaled_dot_product_attention(q, k, v)
        return self.out(heard.transpose(1, 2).flatten(2))


def _pack(network: WhisperNetwork) -> None:
    """Give the linear layers the kernels and layout of `models.cpu_packing` where it can."""
    for layer in network.layers:
        attention, (inner, _, outer) = layer.attention, layer.feed_forward
        if not can_pack(inner.weight):
            return
        attention.qkv = PackedLinear(attention.qkv.weight, attention.qkv.bias)
        attention.out = PackedLinear(attention.out.weight, attention.out.bias)
        layer.feed_forward = nn.Sequential(
            PackedLinear(inner.weight, inner.bias, gelu=True),
            PackedLinear(outer.weight, outer.bias),
        )


# Checkpoints


def read_whisper(path: str | Path) -> tuple[WhisperConfig, dict[str, Tensor]]:
    """The audio encoder in a file or folder: its shapes, and float32 tensors in our names.

    path: OpenAI's file ({dims, model_state_dict}); a Hugging Face folder, or one weight file of
    it; safetensors with `header`. The decoder is left out. For Hugging Face's weights without a
    config.json beside them the shapes are the tensors', and a head is 64 wide.

    Raises CheckpointError, naming the key, for a key of the encoder that is missing, unknown or of
    another shape, and for what is no Whisper.
    """
    path = Path(path)
    content, metadata = load_weights(path)  # views of the mapped file
    if OWN_HEADER in metadata:
        return _ours(path, content, metadata[OWN_HEADER])
    if content.keys() >= {"dims", "model_state_dict"}:
        config = _config(path, content["dims"], _DIMS)
        return config, _renamed(path, config, content["model_state_dict"], "encoder.", _OPENAI)
    for prefix in ("model.encoder.", "encoder."):
        if f"{prefix}embed_positions.weight" in content:
            config = _stated_config(path) or _inferred_config(path, content, prefix)
            return config, _renamed(path, config, content, prefix, _HUGGING_FACE)
    raise CheckpointError(f"{path} is no Whisper: {_what_else(path, content)}")


def _what_else(path: Path, content: Mapping[Any, Any]) -> str:
    keys = [str(key) for key in content]
    if what := stranger(keys):
        return f"it seems to be {what}"
    try:
        other = read_encoder_file(path)
    except CheckpointError:
        return (
            "it has neither dims and model_state_dict, as OpenAI's files do, nor Hugging Face's "
            f"encoder.embed_positions.weight; it has {', '.join(sorted(keys)[:3]) or 'nothing'}"
        )
    names = names_for(other.family, other.config.width)
    return f"it is {FAMILIES[other.family]}, for {' or '.join(names) or 'no encoder here'}"


def header(config: WhisperConfig) -> dict[str, str]:
    """The metadata that make safetensors of `read_whisper`'s tensors a file of ours."""
    return {OWN_HEADER: json.dumps({"kind": "whisper", "config": asdict(config)})}


# What a weight or a part of a layer is called here -> by OpenAI and by Hugging Face.
_OPENAI, _HUGGING_FACE = 0, 1
_LAYERS = ("blocks", "layers")
_NAMES = {
    "positions": ("positional_embedding", "embed_positions.weight"),
    "norm.weight": ("ln_post.weight", "layer_norm.weight"),
    "norm.bias": ("ln_post.bias", "layer_norm.bias"),
}
_LAYER_NAMES = {
    "attention.query": ("attn.query", "self_attn.q_proj"),
    "attention.key": ("attn.key", "self_attn.k_proj"),
    "attention.value": ("attn.value", "self_attn.v_proj"),
    "attention.out": ("attn.out", "self_attn.out_proj"),
    "attention_norm": ("attn_ln", "self_attn_layer_norm"),
    "feed_forward.0": ("mlp.0", "fc1"),
    "feed_forward.2": ("mlp.2", "fc2"),
    "feed_forward_norm": ("mlp_ln", "final_layer_norm"),
}
_BESIDE_ENCODER = ("decoder.", "model.decoder.", "proj_out.")

# Our field -> OpenAI's dims, Hugging Face's config.json.
_DIMS = {
    "n_mels": "n_mels",
    "width": "n_audio_state",
    "heads": "n_audio_head",
    "layers": "n_audio_layer",
}
_CONFIG_JSON = {
    "n_mels": "num_mel_bins",
    "width": "d_model",
    "heads": "encoder_attention_heads",
    "layers": "encoder_layers",
    "feed_forward": "encoder_ffn_dim",
}


def _config(path: Path, stated: Any, names: Mapping[str, str]) -> WhisperConfig:
    """Shapes as a file states them. names: our field -> its key there."""
    try:
        shapes = {ours: int(stated[theirs]) for ours, theirs in names.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not state the encoder's shapes: {error}") from error
    config = WhisperConfig(**{"feed_forward": 4 * shapes["width"]} | shapes)
    if min(asdict(config).values()) < 1 or config.width % config.heads:
        raise CheckpointError(f"{path} states shapes that no network has: {config}")
    return config


def _stated_config(path: Path) -> WhisperConfig | None:
    """Of the config.json in a folder or beside a file; None where there is none of a Whisper."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    stated = json_beside(path, "config.json")
    if stated.get("model_type") != "whisper":
        return None
    if stated.get("activation_function", "gelu") != "gelu":
        raise CheckpointError(f"{file} asks for {stated['activation_function']}, not for gelu")
    return _config(file, stated, _CONFIG_JSON)


def _inferred_config(path: Path, tensors: Mapping[str, Any], prefix: str) -> WhisperConfig:
    """By the shapes of Hugging Face's tensors."""
    try:
        width, n_mels, _ = tensors[f"{prefix}conv1.weight"].shape
        feed_forward, _ = tensors[f"{prefix}layers.0.fc1.weight"].shape
    except (KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} does not show the encoder's shapes: {error}") from error
    if width % _HEAD_DIM:
        raise CheckpointError(
            f"{path} needs its config.json beside it: how many heads a width of {width} has "
            f"cannot be told from the weights"
        )
    layers = {key.removeprefix(f"{prefix}layers.").split(".")[0] for key in tensors}
    return WhisperConfig(
        n_mels=n_mels,
        width=width,
        heads=width // _HEAD_DIM,
        layers=sum(layer.isdigit() for layer in layers),
        feed_forward=feed_forward,
    )


def _ours(path: Path, tensors: dict[str, Tensor], cantor: str) -> tuple[WhisperConfig, Any]:
    """A file with `header`."""
    try:
        stated = json.loads(cantor)
        kind = stated["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} has a damaged header: {error}") from error
    if kind != "whisper":
        raise CheckpointError(f"{path} is a {kind} encoder, no Whisper")
    names = {field.name: field.name for field in fields(WhisperConfig)}
    config = _config(path, stated.get("config"), names)
    _check(path, tensors, _shapes(config))
    return config, {key: tensor.float() for key, tensor in tensors.items()}


def _shapes(config: WhisperConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = WhisperNetwork(config)
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


def _renamed(
    path: Path, config: WhisperConfig, tensors: Any, prefix: str, whose: int
) -> dict[str, Tensor]:
    """Tensors in our names, query, key and value made one matrix. whose: column of `_NAMES`."""
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: model_state_dict holds no tensors by name")
    tensors = {k: v for k, v in tensors.items() if not str(k).startswith(_BESIDE_ENCODER)}
    parts = dict(_parts(config))
    theirs = {ours: prefix + _their_name(ours, whose) for ours in parts}
    _check(path, tensors, {theirs[ours]: shape for ours, shape in parts.items()})

    def tensor(ours: str) -> Tensor:
        if ours not in theirs:  # the keys' bias, which nobody has
            return torch.zeros(config.width)
        return tensors[theirs[ours]].to(torch.float32, copy=True)

    return {
        key: torch.cat([tensor(part) for part in _thirds(key)]) if "qkv" in key else tensor(key)
        for key in _shapes(config)
    }


def _parts(config: WhisperConfig) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the weights as foreign files have them, query, key and value apart."""
    for name, shape in _shapes(config).items():
        if "qkv" not in name:
            yield name, shape
            continue
        for part in _thirds(name):
            if not part.endswith("key.bias"):
                yield part, (config.width, *shape[1:])


def _thirds(name: str) -> list[str]:
    return [name.replace("qkv", part) for part in ("query", "key", "value")]


def _their_name(ours: str, whose: int) -> str:
    if not ours.startswith("layers."):
        return _NAMES[ours][whose] if ours in _NAMES else ours
    _, index, name = ours.split(".", 2)
    part, _, kind = name.rpartition(".")
    return f"{_LAYERS[whose]}.{index}.{_LAYER_NAMES[part][whose]}.{kind}"


def _check(path: Path, tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError where `tensors` are not exactly those that `shapes` names."""
    for key, shape in shapes.items():
        if not isinstance(tensors.get(key), Tensor):
            raise CheckpointError(f"{path} lacks {key}, which its Whisper encoder needs")
        if tuple(tensors[key].shape) != shape:
            raise CheckpointError(
                f"{path}: {key} is {list(tensors[key].shape)}, but its encoder needs {list(shape)}"
            )
    for key in tensors:
        if key not in shapes:
            raise CheckpointError(f"{path} has {key}, which no Whisper encoder of its shape has")
