"""Settings of a synthesizer's networks and of its spectrograms.

The names are those of VITS and HiFi-GAN; `sovits.config` maps so-vits-svc's names to them.

Tested by tests/models/synthesizer/sovits/test_config.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

SPEAKER_LAYER = 2  # layer of a text transformer that gets the speaker embedding, from 0
# Limits of what no tensor's shape limits, far above any real setting.
MOST_HZ = 1_000_000
MOST_FFT = 1 << 17
_MOST_MELS = 4096
_MOST_UPSAMPLINGS = 16
_DISCRIMINATOR_CHANNELS = (64, 128, 256, 512, 1024)
_COUNTS = (
    "inter_channels",
    "hidden_channels",
    "filter_channels",
    "n_heads",
    "n_layers",
    "kernel_size",
    "gin_channels",
    "n_flows",
    "n_flow_layers",
)


def require_at_least(least: float, name: str, value: float) -> None:
    """Check a lower limit.

    Raises: ValueError: when the value is below it (the message names the setting).
    """
    if not value >= least:
        raise ValueError(f"{name} is {value}; it must be {least} or more")


def require_at_most(most: float, name: str, value: float) -> None:
    """Check an upper limit.

    Raises: ValueError: when the value is above it (the message names the setting).
    """
    if not value <= most:
        raise ValueError(f"{name} is {value}; it must be {most} or less")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Settings of the networks that are free to choose. The defaults are so-vits-svc's."""

    inter_channels: int = 192  # width of the latent z
    hidden_channels: int = 192
    filter_channels: int = 768  # inside the feed-forward layers
    n_heads: int = 2
    n_layers: int = 6  # of the prior encoder and the f0 predictor
    kernel_size: int = 3
    dropout: float = 0.1
    decoder: Literal["nsf-hifigan", "nsf-snake-hifigan"] = "nsf-hifigan"
    resblock: Literal["1", "2"] = "1"
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    upsample_rates: tuple[int, ...] = (8, 8, 2, 2, 2)  # their product is the hop length
    upsample_initial_channel: int = 512
    upsample_kernel_sizes: tuple[int, ...] = (16, 16, 4, 4, 4)
    gin_channels: int = 768  # width of the speaker embedding
    flow: Literal["residual", "transformer"] = "residual"
    n_flows: int = 4  # so-vits-svc always has 4 residual flows, of n_flow_layer layers each
    n_flow_layers: int = 4  # layers of the network in each flow; so-vits-svc's transformers: 3
    share_flow: bool = False  # one network for all flows
    depthwise_conv: bool = False  # depthwise-separable convolutions in WN
    predict_f0: bool = True  # has an f0 predictor, which can replace the source's melody
    volume_embedding: bool = False
    spectral_norm: bool = False  # spectral in place of weight normalisation in the discriminators
    discriminator_channels: int = 1024  # width of their widest layers; fixed in so-vits-svc

    def __post_init__(self) -> None:
        for name in _COUNTS:
            require_at_least(1, f"model.{name}", getattr(self, name))
        if not 1 <= len(self.upsample_rates) <= _MOST_UPSAMPLINGS:
            raise ValueError(
                f"model.upsample_rates has {len(self.upsample_rates)} numbers; it must have 1 to "
                f"{_MOST_UPSAMPLINGS}"
            )
        if len(self.upsample_rates) != len(self.upsample_kernel_sizes):
            raise ValueError(
                f"model.upsample_rates has {len(self.upsample_rates)} numbers and "
                f"model.upsample_kernel_sizes {len(self.upsample_kernel_sizes)}; they must have as "
                "many"
            )
        for rate, kernel in zip(self.upsample_rates, self.upsample_kernel_sizes, strict=True):
            if rate < 1 or kernel < rate or (kernel - rate) % 2:
                raise ValueError(
                    f"model.upsample_kernel_sizes has {kernel} for the rate {rate} of "
                    "model.upsample_rates; it must be equal or larger by an even number"
                )
        require_at_least(
            2 ** len(self.upsample_rates),  # each upsampling halves the channels
            "model.upsample_initial_channel",
            self.upsample_initial_channel,
        )
        if len(self.resblock_kernel_sizes) != len(self.resblock_dilation_sizes):
            raise ValueError(
                "model.resblock_kernel_sizes and model.resblock_dilation_sizes differ in length; "
                "each kernel needs its dilations"
            )
        if self.hidden_channels % self.n_heads:
            raise ValueError(
                f"model.hidden_channels is {self.hidden_channels}; it must be a multiple of "
                f"model.n_heads, {self.n_heads}"
            )
        if self.inter_channels % 2:
            raise ValueError(f"model.inter_channels is {self.inter_channels}; it must be even")
        if self.discriminator_channels not in _DISCRIMINATOR_CHANNELS:
            raise ValueError(
                f"model.discriminator_channels is {self.discriminator_channels}; it must be one of "
                f"{', '.join(map(str, _DISCRIMINATOR_CHANNELS))}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is {self.dropout}; it must be in 0 to 1")

    @property
    def hop_length(self) -> int:
        """Output samples per frame."""
        return math.prod(self.upsample_rates)


@dataclass(frozen=True, kw_only=True)
class SynthesizerConfig(ModelConfig):
    """Settings of the networks and of their data: everything needed to build them.

    source_rate: the sample rate that the sine source assumes. so-vits-svc always uses 44100, at any
    rate of the audio, and its voices are trained that way.
    """

    units_dim: int
    n_speakers: int
    sample_rate: int = 44100
    n_fft: int = 2048
    source_rate: int = 44100

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("units_dim", "n_speakers", "n_fft"):
            require_at_least(1, f"model.{name}", getattr(self, name))
        for name in ("sample_rate", "source_rate"):
            require_at_least(1, name, getattr(self, name))
            require_at_most(MOST_HZ, name, getattr(self, name))
        require_at_most(MOST_FFT, "n_fft", self.n_fft)
        require_at_most(MOST_HZ, "the product of model.upsample_rates", self.hop_length)

    @property
    def spec_channels(self) -> int:
        return self.n_fft // 2 + 1


@dataclass(frozen=True, kw_only=True)
class MelConfig:
    """Settings of the linear (posterior encoder) and mel (loss) spectrograms. Hz and samples."""

    n_fft: int = 2048
    win_length: int = 2048
    n_mels: int = 80
    f_min: float = 0.0
    f_max: float | None = None  # None: half the sample rate

    def __post_init__(self) -> None:
        require_at_least(1, "mel.n_mels", self.n_mels)
        require_at_most(_MOST_MELS, "mel.n_mels", self.n_mels)
        require_at_most(MOST_FFT, "mel.n_fft", self.n_fft)
        require_at_least(0, "mel.f_min", self.f_min)
        if self.f_max is not None and not self.f_max > self.f_min:
            raise ValueError(f"mel.f_max is {self.f_max}; it must be above mel.f_min, {self.f_min}")
        if not 1 < self.win_length <= self.n_fft:
            raise ValueError(
                f"mel.win_length is {self.win_length}; it must be in 2 to mel.n_fft, {self.n_fft}"
            )
