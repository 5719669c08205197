"""Encoders of the wav2vec 2.0 family (HuBERT, ContentVec, WavLM, HuBERT-Soft, DPHuBERT)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.batching import Batcher, windows
from models.encoders.cpu_packing import TiledStem, pack
from models.encoders.encoder import DType, check_clips
from models.encoders.int8 import require_int8
from models.encoders.wav2vec2 import Wav2Vec2

WINDOW_FRAMES = 3000  # 60 s: longer clips run in windows
OVERLAP_FRAMES = 500
_GPU_BATCH_S = 480.0  # padded audio in one batch on a GPU: about 15 GB of the stem's activations


class SslEncoder:
    """`Encoder` for a network of the family: (T,) -> (F, D) at 50 frames a second.

    Frames are those of the network's convolutions: floor((T + 2 pad - 400) / 320) + 1; a clip too
    short for one frame is padded with zeros.

    On a GPU clips run in padded batches. On a CPU they run one by one: a few seconds of audio use
    the whole processor, and nothing is padded. (Batches of four equal clips took 26 % less time at
    1 s, where reading the weights matters, 8 % at 2 s, 1.5 % at 5 s; without the stem.)

    A clip of up to 60 s runs in one piece. In a longer one attention, whose cost is quadratic, runs
    in windows of 60 s that overlap by 10 s and are joined in the middle of the overlap; the stem
    and its norm still cover the whole clip. The windows affect mainly frames within 5 s of a
    window's end, which are dropped.
    """

    sample_rate = 16000

    def __init__(
        self,
        name: str,
        network: Wav2Vec2,
        device: str = "cpu",
        dtype: DType = "float32",
        int8: bool = False,
    ) -> None:
        """Take over `network`: it is moved, cast, and on a CPU packed for inference.

        int8: run most products in 8-bit integers, on a CPU (`models.encoders.int8`).

        Raises: ValueError: when int8 is not supported here.
        """
        self.name = name
        self.config = network.config
        self.hop_length = network.config.hop_length
        self.dim = network.config.dim
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype)
        if int8:
            require_int8(self.device, self.dtype)
        self.network = network.eval().to(self.device, self.dtype)
        self.stem = TiledStem(self.network, int8)
        if self.device.type == "cpu":
            pack(self.network, int8)
        self.one_by_one = self.device.type == "cpu"
        self.batcher = Batcher(int(_GPU_BATCH_S * self.sample_rate))

    @torch.inference_mode()
    def encode(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Encode as `Encoder.encode`."""
        shortest = self.config.reach - 2 * self.config.pad
        padded = [F.pad(wav, (0, max(0, shortest - len(wav)))) for wav in check_clips(wavs)]
        lengths = [len(wav) for wav in padded]
        if self.one_by_one:
            return [self._encode_alone(wav) for wav in padded]

        def windowed(num_samples: int) -> bool:
            return self.config.num_frames(num_samples) > WINDOW_FRAMES

        def run(batch: list[int]) -> list[Tensor]:
            if len(batch) == 1 and windowed(lengths[batch[0]]):
                return [self._encode_alone(padded[batch[0]])]
            return self._encode_batch([padded[i] for i in batch])

        # A clip that needs windows runs alone: for the batcher it is as long as a whole batch.
        sizes = [self.batcher.budget if windowed(n) else n for n in lengths]
        return self.batcher.map(sizes, run)

    def _encode_batch(self, wavs: list[Tensor]) -> list[Tensor]:
        rows = torch.nn.utils.rnn.pad_sequence([wav.to(self.device) for wav in wavs], True)
        lengths = [len(wav) for wav in wavs]
        units = self.network(rows, lengths).float().cpu()
        return [row[: self.config.num_frames(n)] for row, n in zip(units, lengths, strict=True)]

    def _encode_alone(self, wav: Tensor) -> Tensor:
        features = self.stem(wav)
        units = torch.empty(len(features), self.dim)
        for window in windows(len(features), WINDOW_FRAMES, OVERLAP_FRAMES):
            piece = features[None, window.start : window.stop]
            context = self.network.context(piece, [piece.shape[1]])[0]
            kept = slice(window.first - window.start, window.last - window.start)
            units[window.first : window.last] = context[kept].float().cpu()
        return units
