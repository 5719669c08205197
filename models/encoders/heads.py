"""Heads of fine-tuned networks: x-vector, frame and clip classification, CTC.

The heads of WavLM and related models in transformers, on the network of `models.encoders.wav2vec2`.
The models in transformers are inexact for batches of clips of different lengths (the stem's norm
includes the padding, and the x-vector counts frames as if its convolutions were not dilated:
vectors with a standard deviation of 0.14 are off by 0.035), need transformers at run time, and take
1.6 times the processor time. `load_head` reads the folders of transformers; parameter names are the
same as there, and a single clip gives the same result.

In one case transformers 5 differs from the release that the checkpoints were trained with: its sum
over the layers of a pre-norm network takes the last layer without the final norm. Here it has the
norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.bounded_meta import bounded_meta, most_parameters
from models.checkpoint import CheckpointError, load_weights, sibling_json
from models.encoders.adapter import Adapter
from models.encoders.layouts import read_encoder_file
from models.encoders.layouts.key_layouts import HUGGING_FACE
from models.encoders.masking import SpecAugment, SpecAugmentConfig
from models.encoders.wav2vec2 import Wav2Vec2, Wav2Vec2Config, normalized

_PREPROCESSOR = "preprocessor_config.json"
_DILATION_OF_WAVLM = (1, 2, 3, 1, 1)


class HeadedNetwork(nn.Module):
    """A network with a head.

    normalize_wav: apply `standardized` to each clip first.
    """

    def __init__(self, network: Wav2Vec2, head: Head, normalize_wav: bool = False) -> None:
        super().__init__()
        self.network, self.head, self.normalize_wav = network, head, normalize_wav

    def forward(self, wavs: Tensor, num_samples: list[int] | None = None) -> Any:
        """Return the head's output for (B, T); num_samples as in `Wav2Vec2.forward`."""
        num_samples = num_samples or [wavs.shape[1]] * len(wavs)
        if self.normalize_wav:
            wavs = standardized(wavs, num_samples)
        frames = [self.network.config.num_frames(n) for n in num_samples]
        return self.head(self.network(wavs, num_samples), frames)


def standardized(wavs: Tensor, num_samples: Sequence[int]) -> Tensor:
    """Normalise each clip (B, T) to mean 0 and variance 1 over its own samples, as transformers.

    The epsilon is 1e-7, fairseq's is 1e-5, which makes a difference in quiet clips.
    """
    return normalized(wavs, torch.tensor(num_samples, device=wavs.device), 1e-7)


class LayerSum(Wav2Vec2):
    """A network that returns a learnt mean of the first layer's input and all layers' outputs."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__(config)
        n = len(config.layers) + 1
        self.layer_weights = nn.Parameter(torch.full((n,), 1 / n))

    def context(self, features: Tensor, num_frames: list[int]) -> Tensor:
        """Map features (B, F, C) to (B, F, H)."""
        shares = self.layer_weights.softmax(0).unbind()
        states = self.hidden_states(features, num_frames)
        x = shares[0] * states[0]
        for share, state in zip(shares[1:], states[1:], strict=True):
            x = x + share * state
        return x


class XVectorHead(nn.Module):
    """X-vector head: time-delay layers, statistics over the clip, a projection.

    Snyder et al. (2018). A clip needs `min_frames` frames, so that the time-delay layers return two
    frames and their standard deviation exists.
    """

    def __init__(
        self, width: int, layers: Sequence[tuple[int, int, int]], dim: int, speakers: int
    ) -> None:
        """Build the head. layers: (channels, kernel, dilation) of each. speakers: in training."""
        super().__init__()
        channels = [layers[0][0], *(c for c, _, _ in layers)]
        self.projector = nn.Linear(width, channels[0])
        self.tdnn = nn.ModuleList(
            TimeDelayLayer(n_in, *layer) for n_in, layer in zip(channels, layers, strict=False)
        )
        self.feature_extractor = nn.Linear(2 * channels[-1], dim)
        self.classifier = nn.Linear(dim, dim)
        self.objective = AdditiveMarginSoftmax(dim, speakers)
        self.lost_frames = sum((kernel - 1) * dilation for _, kernel, dilation in layers)

    @property
    def dim(self) -> int:
        """Width E of the vector."""
        return self.feature_extractor.out_features

    @property
    def min_frames(self) -> int:
        return self.lost_frames + 2

    def forward(self, x: Tensor, num_frames: Sequence[int]) -> Tensor:
        """Embed (B, F, H) as (B, E), not normalised.

        Raises: ValueError: when a clip has too few frames.
        """
        if min(num_frames) < self.min_frames:
            raise ValueError(
                f"an x-vector needs {self.min_frames} frames, but a clip has {min(num_frames)}"
            )
        x = self.projector(x)
        for layer in self.tdnn:
            x = layer(x)
        own = [row[: n - self.lost_frames].float() for row, n in zip(x, num_frames, strict=True)]
        statistics = [torch.cat([frames.mean(0), frames.std(0)]) for frames in own]
        return self.feature_extractor(torch.stack(statistics).to(x))

    def loss(self, vectors: Tensor, speakers: Tensor) -> Tensor:
        """Compute the loss () of vectors (B, E) of `forward` for true speakers (B,) int64."""
        return self.objective(self.classifier(vectors), speakers)


class TimeDelayLayer(nn.Module):
    """A dilated convolution over frames with ReLU. Its weight is stored as a linear layer's."""

    def __init__(self, n_in: int, n_out: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.size, self.dilation = kernel, dilation
        self.kernel = nn.Linear(n_in * kernel, n_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, F, n_in) to (B, F - (kernel - 1) * dilation, n_out)."""
        weight = self.kernel.weight.unflatten(1, (self.size, -1)).transpose(1, 2)
        x = F.conv1d(x.transpose(1, 2), weight, self.kernel.bias, dilation=self.dilation)
        return F.relu(x).transpose(1, 2)


class AdditiveMarginSoftmax(nn.Module):
    """Cross-entropy of scaled cosines with a margin for the true speaker: Wang et al. (2018)."""

    def __init__(self, dim: int, speakers: int, scale: float = 30.0, margin: float = 0.4) -> None:
        super().__init__()
        self.scale, self.margin = scale, margin
        self.weight = nn.Parameter(torch.randn(dim, speakers))

    def forward(self, x: Tensor, speakers: Tensor) -> Tensor:
        """Compute the loss () of vectors (B, E) and speakers (B,) int64."""
        cosine = F.normalize(x, dim=1) @ F.normalize(self.weight, dim=0)  # (B, S)
        margin = self.margin * F.one_hot(speakers, cosine.shape[1])
        return F.cross_entropy(self.scale * (cosine - margin), speakers)


class FrameHead(nn.Module):
    """Frame classification head, for example for speaker diarization."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor, num_frames: Sequence[int]) -> Tensor:
        """Map (B, F, H) to logits (B, F, classes); undefined beyond a clip's own frames."""
        return self.classifier(x)


class ClipHead(nn.Module):
    """Clip classification head, from the mean over a clip's own frames."""

    def __init__(self, width: int, inner: int, classes: int) -> None:
        super().__init__()
        self.projector = nn.Linear(width, inner)
        self.classifier = nn.Linear(inner, classes)

    def forward(self, x: Tensor, num_frames: Sequence[int]) -> Tensor:
        """Map (B, F, H) to logits (B, classes)."""
        x = self.projector(x)
        means = [row[:n].mean(0) for row, n in zip(x, num_frames, strict=True)]
        return self.classifier(torch.stack(means))


class CtcHead(nn.Module):
    """CTC head (Graves et al., 2006): logits of tokens per frame, optionally after an adapter."""

    def __init__(
        self,
        width: int,
        tokens: int,
        *,
        adapter: Adapter | None = None,
        dropout: float = 0.0,
        blank: int = 0,
        reduction: str = "mean",
        zero_infinity: bool = False,
    ) -> None:
        """Build the head. width: of the adapter's output, or of the network without one.

        reduction: "mean" or "sum" of the clips' losses. zero_infinity: a clip with fewer frames
        than tokens counts 0.
        """
        super().__init__()
        self.adapter = adapter
        self.dropout = nn.Dropout(dropout)
        self.lm_head = nn.Linear(width, tokens)
        self.blank, self.reduction, self.zero_infinity = blank, reduction, zero_infinity

    def forward(self, x: Tensor, num_frames: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Map (B, F, H) to logits (B, F', tokens) and the frames of each clip."""
        frames = list(num_frames)
        if self.adapter is not None:
            x, frames = self.adapter(x, frames)
        return self.lm_head(self.dropout(x)), frames

    def loss(self, logits: Tensor, num_frames: Sequence[int], tokens: Tensor) -> Tensor:
        """Compute the loss () of logits for true tokens (B, L) int64, below 0 in padding."""
        return F.ctc_loss(
            logits.float().log_softmax(2).transpose(0, 1),
            tokens[tokens >= 0],
            torch.tensor(num_frames),
            (tokens >= 0).sum(1),
            blank=self.blank,
            reduction=self.reduction,
            zero_infinity=self.zero_infinity,
        )


Head = XVectorHead | FrameHead | ClipHead | CtcHead


def load_head(
    path: str | Path, *, normalize_wav: bool | None = None, seed: int = 0
) -> HeadedNetwork:
    """Load a fine-tuned WavLM or HuBERT of transformers, in evaluation mode, float32, on the CPU.

    path: its folder, or the weights file in it. The parameters determine the head; all of them
    must be present, and no other.

    normalize_wav: None: as in preprocessor_config.json. seed: of the masked spans and the adapter's
    skipped layers in training.

    Raises: CheckpointError: when the network has no such head, or parameters that do not match its
    configuration.
    """
    path = Path(path)
    backbone, state = read_encoder_file(path).take(normalize_wav=False)
    config = _required_json(path, "config.json")
    rng = np.random.RandomState(seed)
    content, _ = load_weights(path)
    tensors = {k: t for k, t in content.items() if isinstance(t, Tensor)}
    signature = HUGGING_FACE.signature
    prefix = next((k.removesuffix(signature) for k in tensors if k.endswith(signature)), "")
    outer = {k: t for k, t in tensors.items() if not k.startswith(prefix)}
    adapter = f"{prefix}adapter."
    outer |= {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(adapter)}

    try:
        with bounded_meta(most_parameters(len(outer))):
            described = _head_of(config, backbone.width, outer, path, rng)
        layer_sum = config.get("use_weighted_layer_sum") and not isinstance(described, CtcHead)
        expected = described.state_dict()
        if layer_sum:
            with torch.device("meta"):
                expected["layer_weights"] = LayerSum(backbone).layer_weights
        _check(expected, outer, path)
        head = _head_of(config, backbone.width, outer, path, rng)
    except CheckpointError:
        raise
    except (ValueError, TypeError, LookupError) as error:
        raise CheckpointError(f"{path} has a head of an invalid shape: {error}") from error
    network = (LayerSum if layer_sum else Wav2Vec2)(backbone)
    if isinstance(network, LayerSum):
        state["layer_weights"] = outer.pop("layer_weights")
    network.load_state_dict(state)
    head.load_state_dict(outer)
    mask_embedding = tensors.get(f"{prefix}masked_spec_embed")
    if mask_embedding is not None and config.get("apply_spec_augment", True):
        network.masking = SpecAugment(_masking_of(config), backbone.width, rng)
        network.masking.load_state_dict({"embedding": mask_embedding})
    if normalize_wav is None:
        normalize_wav = bool(_required_json(path, _PREPROCESSOR).get("do_normalize", True))
    return HeadedNetwork(network, head, normalize_wav).eval()


def _head_of(
    config: dict[str, Any],
    width: int,
    tensors: Mapping[str, Tensor],
    path: Path,
    rng: np.random.RandomState,
) -> Head:
    """Build the head for these parameters, without loading them."""
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    try:
        if "lm_head.weight" in shapes:
            adapter = _adapter_of(config, width, rng) if config.get("add_adapter") else None
            tokens, n_in = shapes["lm_head.weight"]
            return CtcHead(
                n_in,
                tokens,
                adapter=adapter,
                dropout=config.get("final_dropout", 0.0),
                blank=config.get("pad_token_id") or 0,
                reduction=config.get("ctc_loss_reduction", "mean"),
                zero_infinity=config.get("ctc_zero_infinity", False),
            )
        if "tdnn.0.kernel.weight" in shapes:
            layers = _time_delays_of(config, shapes, path)
            dim, speakers = shapes["objective.weight"]
            return XVectorHead(width, layers, dim, speakers)
        if "projector.weight" in shapes:
            return ClipHead(width, shapes["projector.weight"][0], shapes["classifier.weight"][0])
        if "classifier.weight" in shapes:
            return FrameHead(width, shapes["classifier.weight"][0])
    except KeyError as error:
        raise CheckpointError(f"{path} lacks the parameter {error.args[0]!r}") from error
    except CheckpointError:
        raise
    except (ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path} has a head of an invalid shape: {error}") from error
    raise CheckpointError(
        f"{path} has no head: no x-vector head (tdnn), classifier or CTC head (lm_head)"
    )


def _time_delays_of(
    config: dict[str, Any], shapes: Mapping[str, torch.Size], path: Path
) -> list[tuple[int, int, int]]:
    """Return (channels, kernel, dilation) of each layer; only the dilation is in the config."""
    n = sum(key.startswith("tdnn.") and key.endswith(".kernel.weight") for key in shapes)
    dilation = config.get("tdnn_dilation") or _DILATION_OF_WAVLM
    if len(dilation) != n:
        raise CheckpointError(
            f"{path} has {n} time-delay layers, but its config.json has {len(dilation)} dilations"
        )
    layers = []
    n_in = shapes["projector.weight"][0]
    for i in range(n):
        n_out, taps = shapes[f"tdnn.{i}.kernel.weight"]
        layers.append((n_out, taps // n_in, dilation[i]))
        n_in = n_out
    return layers


def _adapter_of(config: dict[str, Any], width: int, rng: np.random.RandomState) -> Adapter:
    return Adapter(
        width,
        config.get("output_hidden_size") or width,
        num_layers=config.get("num_adapter_layers", 3),
        kernel=config.get("adapter_kernel_size", 3),
        stride=config.get("adapter_stride", 2),
        layer_drop=config.get("layerdrop", 0.0),
        rng=rng,
    )


def _masking_of(config: dict[str, Any]) -> SpecAugmentConfig:
    return SpecAugmentConfig(
        time_probability=config.get("mask_time_prob", 0.05),
        time_length=config.get("mask_time_length", 10),
        time_min_masks=config.get("mask_time_min_masks", 2),
        feature_probability=config.get("mask_feature_prob", 0.0),
        feature_length=config.get("mask_feature_length", 10),
        feature_min_masks=config.get("mask_feature_min_masks", 0),
    )


def _check(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Check that exactly the expected parameters are present, with their shapes."""
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in tensors:
            raise CheckpointError(f"{path} lacks the parameter {key!r}")
        if key not in expected:
            raise CheckpointError(f"{path} has the unknown parameter {key!r}")
        if tensors[key].shape != expected[key].shape:
            raise CheckpointError(
                f"{path} has {key!r} of shape {tuple(tensors[key].shape)}; "
                f"it must be {tuple(expected[key].shape)}"
            )


def _required_json(path: Path, name: str) -> dict[str, Any]:
    content = sibling_json(path, name)
    if not content:
        folder = path if path.is_dir() else path.parent
        raise CheckpointError(f"{folder / name} is missing or empty: copy it from the source")
    return content
