"""Whisper's audio encoder as a content encoder; so-vits-svc calls its output a PPG.

    waveform -> log-mel spectrum of 30 s -> two convolutions -> + positions -> transformer -> norm

Radford et al., 2022. The network's input is always 30 s: a shorter clip is padded with zeros, and
its frames attend to those too. A shorter window would change the units.

A clip of N samples has max(1, N // 320) frames. A clip longer than 30 s runs in windows of 30 s
that start every 25 s; the last one ends with the clip. Two windows are joined in the middle of
their overlap, so a frame has 2.5 s or more of context on either side, and the frames up to the
first seam are those of the first 30 s alone. Each window has its own spectral floor, 8 decades
below its maximum.

Whisper encodes a frame's position in its window, so two windows encode the same sound differently.
The error at a seam, one window's frames against the other's: 0.4 to 0.6 RMS at a standard deviation
of 1 (whole songs, random weights of medium's shape; trained ones were not available). It is as
large in the rest of the overlap, so it comes from the position, not from the end of a window.

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
from models.bounded_meta import bounded_meta
from models.checkpoint import OWN_HEADER, CheckpointError, load_weights, sibling_json
from models.cpu_packing import PackedLinear, can_pack
from models.encoders.encoder import DType, check_clips
from models.encoders.encoder_names import FAMILIES, names_for, other_kind
from models.encoders.layouts import read_encoder_file
from models.input_file import parse_json, shown

SAMPLE_RATE = 16000
HOP_LENGTH = 320
WINDOW_FRAMES = 1500
WINDOW_SAMPLES = WINDOW_FRAMES * HOP_LENGTH
OVERLAP_FRAMES = 250

_N_FFT = 400
_MEL_HOP = 160
_HEAD_DIM = 64  # in every published Whisper
_GPU_WINDOWS = 16  # per call of the network: 1 GB of activations in the large one


@dataclass(frozen=True, kw_only=True)
class WhisperConfig:
    """Shape of an audio encoder. feed_forward: inner width of each layer's feed-forward."""

    n_mels: int = 80
    width: int
    heads: int
    layers: int
    feed_forward: int


class WhisperEncoder:
    """Whisper encoder: (T,) -> (max(1, T // 320), width). Frames and windows: see the module."""

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
        """Build the network from the output of `read_whisper`."""
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
        # One window keeps a CPU busy; more would only take more memory.
        at_once = 1 if self.device.type == "cpu" else _GPU_WINDOWS
        self.batcher = Batcher(at_once * WINDOW_FRAMES)

    @torch.inference_mode()
    def encode(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Encode as `Encoder.encode`."""
        clip_windows = [
            (i, window)
            for i, wav in enumerate(check_clips(wavs))
            for window in windows(whisper_num_frames(len(wav)), WINDOW_FRAMES, OVERLAP_FRAMES)
        ]

        def run(batch: list[int]) -> list[Tensor]:
            part = [clip_windows[at] for at in batch]
            frames = self._frames([_cut(wavs[i], window.start) for i, window in part])
            return [
                row[window.first - window.start : window.last - window.start].cpu().float().clone()
                for row, (_, window) in zip(frames, part, strict=True)
            ]

        units: list[list[Tensor]] = [[] for _ in wavs]
        pieces = self.batcher.map([WINDOW_FRAMES] * len(clip_windows), run)
        for (i, _), piece in zip(clip_windows, pieces, strict=True):
            units[i].append(piece)
        return [torch.cat(pieces) for pieces in units]

    def _frames(self, wavs: Sequence[Tensor]) -> Tensor:
        """Encode windows of at most 30 s, (T,) each, to (B, 1500, H)."""
        padded = [F.pad(wav.to(self.device), (0, WINDOW_SAMPLES - len(wav))) for wav in wavs]
        mel = whisper_log_mel(torch.stack(padded), self.filters)
        return self.network(mel.to(self.dtype))


def load_whisper(
    name: str, checkpoint: str | None, device: str = "cpu", dtype: DType = "float32"
) -> WhisperEncoder:
    """Load the encoder `name`, whisper-ppg (medium) or whisper-ppg-large, from any Whisper file.

    Raises: CheckpointError: when the file is not a Whisper or fits the other name; ValueError: when
    there is no file.
    """
    if checkpoint is None:
        raise ValueError(f"encoder.checkpoint is empty: {name} needs Whisper's weights")
    config, tensors = read_whisper(checkpoint)
    other = _NAME_OF_WIDTH.get(config.width, name)
    if other != name:
        raise CheckpointError(
            f"{checkpoint} is a Whisper of width {config.width}: its encoder.name is {other}, "
            f"not {name}"
        )
    return WhisperEncoder(name, config, tensors, device, dtype)


_NAME_OF_WIDTH = {1024: "whisper-ppg", 1280: "whisper-ppg-large"}


def whisper_num_frames(num_samples: int) -> int:
    """Return the number of frames of a clip."""
    return max(1, num_samples // HOP_LENGTH)


def _cut(wav: Tensor, start: int) -> Tensor:
    """Cut the window that starts at frame `start` from a clip, without padding."""
    return wav[start * HOP_LENGTH :][:WINDOW_SAMPLES]


# Spectrum


def whisper_mel_filters(n_mels: int) -> Tensor:
    """Build Slaney's mel filters from 0 to 8 kHz: float32 (M, 201)."""
    import librosa  # slow to import

    return torch.from_numpy(librosa.filters.mel(sr=SAMPLE_RATE, n_fft=_N_FFT, n_mels=n_mels))


def whisper_log_mel(wavs: Tensor, filters: Tensor) -> Tensor:
    """Compute (B, T) -> (B, M, T // 160): about -1 to 1, floored 8 decades below each maximum."""
    hann = torch.hann_window(_N_FFT, device=wavs.device)
    spectrum = torch.stft(wavs, _N_FFT, _MEL_HOP, window=hann, return_complex=True)
    power = spectrum[..., :-1].abs().square()
    mel = (filters @ power).clamp(min=1e-10).log10()
    mel = torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 8)
    return (mel + 4) / 4


# Network


class WhisperNetwork(nn.Module):
    """Whisper's audio encoder."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.n_mels, config.width, 3, padding=1)
        self.conv2 = nn.Conv1d(config.width, config.width, 3, stride=2, padding=1)
        self.register_buffer("positions", torch.empty(WINDOW_FRAMES, config.width))
        self.layers = nn.ModuleList(WhisperLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, mel: Tensor) -> Tensor:
        """Encode (B, M, 3000) to (B, 1500, H)."""
        x = F.gelu(self.conv1(mel))
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        x = x + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class WhisperLayer(nn.Module):
    """Pre-norm attention and feed-forward with residuals."""

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
        """Apply to (B, F, H), to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class WhisperAttention(nn.Module):
    """Multi-head self-attention over all frames.

    Query, key and value are one matrix. Whisper's keys have no bias: that third of it is zero. Its
    scaling of query and key by d ** -0.25 each equals the usual d ** -0.5 of their product.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over (B, F, H), to the same shape."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, N, F, H / N)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out(attended.transpose(1, 2).flatten(2))


def _pack(network: WhisperNetwork) -> None:
    """Replace the linear layers by packed ones (`models.cpu_packing`) where possible."""
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
    """Read the audio encoder in a file or folder: its shape, and float32 tensors by Cantor's names.

    path: OpenAI's file ({dims, model_state_dict}); a Hugging Face folder or one of its weight
    files; safetensors with `header`. The decoder is ignored. For Hugging Face's weights without a
    config.json the shape comes from the tensors, with heads of width 64.

    Raises: CheckpointError: when the file is not a Whisper, or a key of the encoder is missing,
    unknown or of another shape (the message names it).
    """
    path = Path(path)
    content, metadata = load_weights(path)  # views of the mapped file
    if OWN_HEADER in metadata:
        return _parse_cantor_file(path, content, metadata[OWN_HEADER])
    if content.keys() >= {"dims", "model_state_dict"}:
        config = _config(path, content["dims"], _DIMS)
        return config, _renamed(path, config, content["model_state_dict"], "encoder.", _OPENAI)
    for prefix in ("model.encoder.", "encoder."):
        if f"{prefix}embed_positions.weight" in content:
            config = _stated_config(path) or _inferred_config(path, content, prefix)
            return config, _renamed(path, config, content, prefix, _HUGGING_FACE)
    raise CheckpointError(f"{path} is not a Whisper: {_kind_of(path, content)}")


def _kind_of(path: Path, content: Mapping[Any, Any]) -> str:
    keys = [str(key) for key in content]
    if what := other_kind(keys):
        return f"it seems to be {what}"
    try:
        other = read_encoder_file(path)
    except CheckpointError:
        return (
            "it has neither OpenAI's keys dims and model_state_dict nor Hugging Face's "
            f"encoder.embed_positions.weight; it has {', '.join(sorted(keys)[:3]) or 'nothing'}"
        )
    names = names_for(other.family, other.config.width)
    return f"it is {FAMILIES[other.family]}, for {' or '.join(names) or 'no supported encoder'}"


def header(config: WhisperConfig) -> dict[str, str]:
    """Return the safetensors metadata of a Whisper file in Cantor's format."""
    return {OWN_HEADER: json.dumps({"kind": "whisper", "config": asdict(config)})}


# Cantor's name of a weight or a part of a layer -> names of OpenAI and Hugging Face.
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
_IGNORED = ("decoder.", "model.decoder.", "proj_out.")

_MOST = 1_000_000  # far above any real number
# Field of WhisperConfig -> key in OpenAI's dims and in Hugging Face's config.json.
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
    """Read the shape that a file states. names: field of WhisperConfig -> key in the file."""
    try:
        shapes = {field: stated[key] for field, key in names.items()}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not state the encoder's shape: {error}") from error
    wrong = [n for n, v in shapes.items() if type(v) is not int or not 1 <= v <= _MOST]
    if wrong:
        raise CheckpointError(
            f"{path} states an invalid shape: {names[wrong[0]]} is {shown(shapes[wrong[0]])}; it "
            f"must be a whole number in 1 to {_MOST}"
        )
    config = WhisperConfig(**{"feed_forward": 4 * shapes["width"]} | shapes)
    if config.width % config.heads:
        raise CheckpointError(f"{path} states an invalid shape: {config}")
    return config


def _stated_config(path: Path) -> WhisperConfig | None:
    """Read the shape from Whisper's config.json in the folder; None if there is none."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    stated = sibling_json(path, "config.json")
    if stated.get("model_type") != "whisper":
        return None
    if stated.get("activation_function", "gelu") != "gelu":
        raise CheckpointError(
            f"{file} has activation_function {stated['activation_function']}; only gelu is "
            "supported"
        )
    return _config(file, stated, _CONFIG_JSON)


def _inferred_config(path: Path, tensors: Mapping[str, Any], prefix: str) -> WhisperConfig:
    """Infer the shape from Hugging Face's tensors."""
    try:
        width, n_mels, _ = tensors[f"{prefix}conv1.weight"].shape
        feed_forward, _ = tensors[f"{prefix}layers.0.fc1.weight"].shape
    except (KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} does not determine the encoder's shape: {error}") from error
    if width % _HEAD_DIM:
        raise CheckpointError(
            f"{path} needs its config.json in the same folder: the weights do not "
            f"determine the heads of a width of {width}"
        )
    layers = {key.removeprefix(f"{prefix}layers.").split(".")[0] for key in tensors}
    return WhisperConfig(
        n_mels=n_mels,
        width=width,
        heads=width // _HEAD_DIM,
        layers=sum(layer.isdigit() for layer in layers),
        feed_forward=feed_forward,
    )


def _parse_cantor_file(
    path: Path, tensors: dict[str, Tensor], cantor: str
) -> tuple[WhisperConfig, Any]:
    """Parse a file with `header`."""
    try:
        stated = parse_json(cantor)
        kind = stated["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} has a damaged header: {error}") from error
    if kind != "whisper":
        raise CheckpointError(f"{path} is a {kind} encoder, not a Whisper")
    names = {field.name: field.name for field in fields(WhisperConfig)}
    config = _config(path, stated.get("config"), names)
    _require_layers(path, config, tensors)
    _check(path, tensors, _shapes(config))
    return config, {key: tensor.float() for key, tensor in tensors.items()}


def _require_layers(path: Path, config: WhisperConfig, tensors: Mapping[str, Any]) -> None:
    if config.layers > len(tensors):
        raise CheckpointError(
            f"{path} states {config.layers} layers, but its encoder has {len(tensors)} tensors"
        )


def _shapes(config: WhisperConfig) -> dict[str, tuple[int, ...]]:
    with bounded_meta(None):
        network = WhisperNetwork(config)
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


def _renamed(
    path: Path, config: WhisperConfig, tensors: Any, prefix: str, source: int
) -> dict[str, Tensor]:
    """Rename tensors and fuse query, key and value. source: column of `_NAMES`."""
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: model_state_dict is not a dict of tensors")
    tensors = {k: v for k, v in tensors.items() if not str(k).startswith(_IGNORED)}
    _require_layers(path, config, tensors)
    parts = dict(_parts(config))
    keys = {name: prefix + _foreign_key(name, source) for name in parts}
    _check(path, tensors, {keys[name]: shape for name, shape in parts.items()})

    def tensor(name: str) -> Tensor:
        if name not in keys:  # the keys' bias, which no file has
            return torch.zeros(config.width)
        return tensors[keys[name]].to(torch.float32, copy=True)

    return {
        key: torch.cat([tensor(part) for part in _thirds(key)]) if "qkv" in key else tensor(key)
        for key in _shapes(config)
    }


def _parts(config: WhisperConfig) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of the weights with separate query, key and value."""
    for name, shape in _shapes(config).items():
        if "qkv" not in name:
            yield name, shape
            continue
        for part in _thirds(name):
            if not part.endswith("key.bias"):
                yield part, (config.width, *shape[1:])


def _thirds(name: str) -> list[str]:
    return [name.replace("qkv", part) for part in ("query", "key", "value")]


def _foreign_key(name: str, source: int) -> str:
    if not name.startswith("layers."):
        return _NAMES[name][source] if name in _NAMES else name
    _, index, rest = name.split(".", 2)
    part, _, kind = rest.rpartition(".")
    return f"{_LAYERS[source]}.{index}.{_LAYER_NAMES[part][source]}.{kind}"


def _check(path: Path, tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that `tensors` are exactly those in `shapes`.

    Raises: CheckpointError: when one is missing, unknown or of another shape.
    """
    for key, shape in shapes.items():
        if not isinstance(tensors.get(key), Tensor):
            raise CheckpointError(f"{path} lacks {key}, which its Whisper encoder needs")
        if tuple(tensors[key].shape) != shape:
            raise CheckpointError(
                f"{path}: {key} is {list(tensors[key].shape)}; it must be {list(shape)}"
            )
    for key in tensors:
        if key not in shapes:
            raise CheckpointError(f"{path} has the unknown key {key}")
