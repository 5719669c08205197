"""Settings of the text-conditioned synthesizer. The defaults are Bert-VITS2's.

Tested by tests/models/synthesizer/text/test_synthesizer.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models.synthesizer.config import SPEAKER_LAYER, ModelConfig

_UNSUPPORTED = ("share_flow", "depthwise_conv", "predict_f0", "volume_embedding")


@dataclass(frozen=True, kw_only=True)
class TextSynthesizerConfig(ModelConfig):
    """Settings of the networks and of their data: everything needed to build them.

    `share_flow`, `depthwise_conv`, `predict_f0` and `volume_embedding` of ModelConfig are not
    supported.
    """

    n_speakers: int  # 2 or more; 0: the speaker comes from a reference spectrogram
    n_fft: int = 2048
    n_symbols: int = 112
    n_tones: int = 11
    n_languages: int = 3
    bert_channels: int = 1024  # width of the Chinese language model
    ja_bert_channels: int = 768  # width of the Japanese language model
    decoder: Literal["hifigan"] = "hifigan"
    upsample_kernel_sizes: tuple[int, ...] = (16, 16, 8, 2, 2)
    gin_channels: int = 256
    flow: Literal["residual", "transformer"] = "transformer"
    n_flow_layers: int = 3  # layers of a transformer flow; Bert-VITS2's residual flows have 4
    predict_f0: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _UNSUPPORTED:
            if getattr(self, name):
                raise ValueError(
                    f"model.{name} is not supported by the text-conditioned synthesizer; "
                    "leave it false"
                )
        if self.decoder != "hifigan":
            raise ValueError(
                f"model.decoder is {self.decoder}; the text-conditioned synthesizer has no f0 for "
                "a sine source and supports only hifigan"
            )
        if self.n_speakers < 0 or self.n_speakers == 1:
            raise ValueError(
                f"model.n_speakers is {self.n_speakers}; it must be 2 or more, or 0 to take the "
                "speaker from a reference spectrogram"
            )
        if self.gin_channels < 1:
            raise ValueError(
                f"model.gin_channels is {self.gin_channels}; the text-conditioned synthesizer "
                "needs a speaker embedding of 1 channel or more"
            )
        layers = {"n_layers": self.n_layers}
        if self.flow == "transformer":
            layers["n_flow_layers"] = self.n_flow_layers
        for name, count in layers.items():
            if count <= SPEAKER_LAYER:
                raise ValueError(
                    f"model.{name} is {count}; the speaker embedding is added before layer "
                    f"{SPEAKER_LAYER + 1}, so it must be {SPEAKER_LAYER + 1} or more"
                )

    @property
    def spec_channels(self) -> int:
        return self.n_fft // 2 + 1
