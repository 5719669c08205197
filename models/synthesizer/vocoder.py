"""The NSF-HiFiGAN vocoder: mel spectrogram and f0 to audio.

Source: vdecoder/nsf_hifigan of so-vits-svc (commit 730930d); the checkpoints are OpenVPI's, a file
`model` and a config.json in the same folder.

B batch, M mel bins, N harmonics, F frames, T samples = F * hop_length.
"""

from __future__ import annotations

import math
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.bounded_meta import most_parameters
from models.checkpoint import CheckpointError, load_foreign, sibling_json
from models.synthesizer.blocks.decoder import SourceFilter, prepare_for_inference
from models.synthesizer.blocks.noise import Noise
from models.synthesizer.blocks.source import HARMONICS, SineSource, first_phase, sines
from models.synthesizer.blocks.weight_norm import fold_weight_norm
from models.synthesizer.config import MelConfig, ModelConfig, require_at_least
from models.synthesizer.json_fields import typed
from models.synthesizer.sovits.files import OTHER_KINDS, state_dict_in
from models.synthesizer.tensor_layout import layout_of, matching_tensors

_NETWORK = (
    "resblock",
    "resblock_kernel_sizes",
    "resblock_dilation_sizes",
    "upsample_rates",
    "upsample_initial_channel",
    "upsample_kernel_sizes",
)
_MEL = {
    "n_fft": "n_fft",
    "win_length": "win_size",
    "n_mels": "num_mels",
    "f_min": "fmin",
    "f_max": "fmax",
}
_VOCODER = "a vocoder"
# Prefixes of keys that identify other files, and the kind of those files.
_OTHER_KINDS = (
    *(kind for kind in OTHER_KINDS if kind[1] != _VOCODER),
    ("enc_p.", "a voice, which takes units"),
    ("dec.", "a voice, which takes units"),
    ("discriminators.", "a discriminator, which only training needs"),
    ("mpd", "a vocoder's discriminators (do_*), which only training needs"),
    ("generator.", "a vocoder's training checkpoint; only its generator is needed"),
)


@dataclass(frozen=True, kw_only=True)
class VocoderConfig:
    """Settings of a vocoder. network: its `inter_channels` is the number of mel bins."""

    sample_rate: int
    mel: MelConfig
    network: ModelConfig

    @property
    def hop_length(self) -> int:
        return self.network.hop_length


class Vocoder(SourceFilter):
    """NSF-HiFiGAN for mel spectrograms (B, M, F)."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__(config.network, VocoderSource(config.sample_rate, config.hop_length))
        self.config = config


class VocoderSource(SineSource):
    """The sine source of vocoders in training; in inference (`infer`) it is a SineSource."""

    @torch.no_grad()
    def waves(self, f0: Tensor, noise: Noise, phase: Tensor | None = None) -> Tensor:
        """Generate (B, N, T) as SineSource does, except for the random phase without `phase`.

        Every sample of the first frame advances by it, so the overtones are out of tune there.
        """
        if phase is not None:
            return super().waves(f0, noise, phase)
        numbers = torch.arange(1, HARMONICS + 1, dtype=f0.dtype, device=f0.device)
        advance = (f0[:, :1] * numbers / self.sample_rate % 1 + first_phase(f0, noise)).double()
        sample = torch.arange(1, self.hop_length + 1, dtype=torch.float64, device=f0.device)
        cycles = advance.unsqueeze(-1) * sample
        first = torch.sin(2 * math.pi * (cycles - cycles.round()).to(f0.dtype))
        reached = advance * self.hop_length
        waves = torch.cat([first, sines(f0[:, 1:], self.sample_rate, self.hop_length, reached)], 2)
        return self._with_noise(waves, f0, noise.normal(waves))


def load_vocoder(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Vocoder:
    """Load a vocoder from a file and its config.json, ready for inference.

    Raises: CheckpointError: when settings or tensors are missing, unknown or do not match, or the
    file has another network.
    """
    path = Path(path)
    content = _generator(path)
    config = _read_config(path)
    folded = "conv_pre.weight" in content

    def build() -> Vocoder:
        network = Vocoder(config)
        return fold_weight_norm(network) if folded else network

    described = "the vocoder that config.json describes"
    try:
        layout = layout_of(build, most_parameters(len(content)))
    except ValueError as error:
        raise CheckpointError(f"{path} does not match {described}: {error}") from error
    tensors = matching_tensors(path, described, content, layout)
    with torch.device("meta"):
        network = build()
    network.load_state_dict(tensors, assign=True)
    return prepare_for_inference(network).to(device)


def _generator(path: Path) -> dict[str, Any]:
    """Return the state dict in the file, unless the file is of another known kind."""
    content = state_dict_in(path, load_foreign(path))
    names = [str(name) for name in content]
    for start, what in _OTHER_KINDS:
        if any(name.startswith(start) for name in names):
            raise CheckpointError(f"{path} is {what}, not an NSF-HiFiGAN vocoder")
    if "conv_pre.bias" in names and "m_source.l_linear.weight" not in names:
        raise CheckpointError(f"{path} is a vocoder without a sine source, not NSF-HiFiGAN")
    return content


def _read_config(path: Path) -> VocoderConfig:
    """Read the config.json next to `path`."""
    described = path.parent / "config.json"
    content = sibling_json(path, described.name)
    if not content:
        raise CheckpointError(
            f"{path} needs its config.json in the same folder, but {described} is empty or missing"
        )
    try:
        return _config_of(content)
    except ValueError as error:
        raise CheckpointError(f"{described}: {error}") from error


def _config_of(content: Mapping[str, Any]) -> VocoderConfig:
    missing = [
        name
        for name in (*_NETWORK, *_MEL.values(), "sampling_rate", "hop_size")
        if name not in content
    ]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; it does not "
            "describe an NSF-HiFiGAN vocoder"
        )
    if content.get("mini_nsf"):
        raise ValueError("mini_nsf is true, which is not supported")
    hints = typing.get_type_hints(ModelConfig)
    network = {name: typed(hints[name], content[name], name) for name in _NETWORK}
    used = 2 if network["resblock"] == "2" else 3  # entries used of each list
    dilations = tuple(each[:used] for each in network["resblock_dilation_sizes"])
    require_at_least(1, "resblock_dilation_sizes", min(min(each, default=0) for each in dilations))
    network["resblock_dilation_sizes"] = dilations
    hints = typing.get_type_hints(MelConfig)
    mel = {field: typed(hints[field], content[key], key) for field, key in _MEL.items()}
    rate, hop_length = (typed(int, content[name], name) for name in ("sampling_rate", "hop_size"))
    require_at_least(1, "sampling_rate", rate)
    config = VocoderConfig(
        sample_rate=rate,
        mel=MelConfig(**mel),
        network=ModelConfig(**network, inter_channels=mel["n_mels"]),
    )
    if hop_length != config.hop_length:
        raise ValueError(
            f"hop_size is {hop_length}, but the product of upsample_rates is {config.hop_length}"
        )
    return config
