"""From one sample rate to another, at once or block by block with the same result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import soxr

from models.torchaudio_compat import import_torchaudio
from stages.errors import BadInput, Reason
from stages.types import Array

BLOCK_SAMPLES = 1 << 16  # of input in one step of the torchaudio backend
MAX_KERNEL_VALUES = 1 << 23  # torchaudio keeps one filter for each phase of the rates' ratio


@dataclass(frozen=True, kw_only=True)
class ResampleConfig:
    """How songs are resampled.

    backend: "soxr" (libsoxr, with its `quality`), or "torchaudio" (a Hann-windowed sinc that
    reaches `lowpass_filter_width` zero crossings to each side; for models trained on such audio).
    The two differ near the upper band edge: do not mix them in one dataset.
    """

    backend: Literal["soxr", "torchaudio"] = "soxr"
    quality: Literal["HQ", "VHQ"] = "VHQ"
    lowpass_filter_width: int = 6

    def __post_init__(self) -> None:
        if not 1 <= self.lowpass_filter_width <= 1024:
            raise ValueError(
                f"resample.lowpass_filter_width is {self.lowpass_filter_width}; "
                "it must lie in 1 to 1024"
            )


class StreamResampler(Protocol):
    """Takes a signal in blocks of any lengths; what it returns, joined, is the resampled signal."""

    def push(self, block: Array, last: bool) -> Array:
        """The next input (T,) -> the output that it completes. `last` once: the final block."""
        ...


def resample(wav: Array, orig_rate: int, target_rate: int, cfg: ResampleConfig) -> Array:
    """Samples (T,) at `orig_rate` -> ceil(T * target_rate / orig_rate) samples at `target_rate`.

    The length is librosa's, and torchaudio's where that does not suffer from its float32. Output k
    lies at input k * orig_rate / target_rate; the signal is continued by zeros at both ends. Equal
    rates return `wav` itself. Bit for bit what `stream_resampler` gives in blocks of any lengths.

    Raises: BadInput (UNSUPPORTED) where the backend cannot hold the ratio of the rates.
    """
    if orig_rate == target_rate:
        return wav
    return stream_resampler(orig_rate, target_rate, cfg).push(wav, last=True)


def stream_resampler(orig_rate: int, target_rate: int, cfg: ResampleConfig) -> StreamResampler:
    """`resample` for a signal that comes in blocks. Memory does not grow with its length.

    Raises: as `resample`.
    """
    if orig_rate < 1 or target_rate < 1:
        raise ValueError(f"sample rates must be positive: {orig_rate} Hz to {target_rate} Hz")
    if orig_rate == target_rate:
        return _Identity()
    return _BACKENDS[cfg.backend](orig_rate, target_rate, cfg)


class _Identity:
    """Equal rates."""

    def push(self, block: Array, last: bool) -> Array:
        return block


class _Soxr:
    """libsoxr. It gives the same bits for any blocks, and rounds the length to the nearest."""

    def __init__(self, orig_rate: int, target_rate: int, cfg: ResampleConfig) -> None:
        self._length = _Length(orig_rate, target_rate)
        self._stream = soxr.ResampleStream(
            orig_rate, target_rate, 1, dtype="float32", quality=cfg.quality
        )
        # One output more, so that the last one is computed where libsoxr would round it away.
        self._tail = np.zeros(-(-orig_rate // target_rate), np.float32)

    def push(self, block: Array, last: bool) -> Array:
        self._length.read += len(block)
        done = self._stream.resample_chunk(np.ascontiguousarray(block), last=False)
        if last:
            rest = self._stream.resample_chunk(self._tail, last=True)
            done = np.concatenate([done, rest])[: self._length.unwritten()]
        self._length.written += len(done)
        return np.asarray(done)


class _Torchaudio:
    """`torchaudio.transforms.Resample` over blocks that start at fixed samples, with overlap.

    Every block but the last has the same shape wherever the pushed ones end, so convolution runs
    the same way and gives the same bits; they differ from those of one call on the whole signal
    by rounding only.
    """

    def __init__(self, orig_rate: int, target_rate: int, cfg: ResampleConfig) -> None:
        self._length = _Length(orig_rate, target_rate)
        # Reduced by their divisor: so many inputs are taken for so many outputs at each stride.
        divisor = math.gcd(orig_rate, target_rate)
        self._stride_in, self._stride_out = orig_rate // divisor, target_rate // divisor
        reach = cfg.lowpass_filter_width * max(1.0, orig_rate / target_rate) / 0.99
        if self._stride_out * (self._stride_in + 2 * reach) > MAX_KERNEL_VALUES:
            raise BadInput(
                Reason.UNSUPPORTED,
                f"resample.backend=torchaudio cannot turn {orig_rate} Hz into {target_rate} Hz, "
                "whose ratio has no small terms; resample.backend=soxr can",
            )
        transforms = import_torchaudio().transforms
        self._transform = transforms.Resample(
            orig_rate, target_rate, lowpass_filter_width=cfg.lowpass_filter_width
        )
        context = -(-int(self._transform.width) // self._stride_in)  # strides on each side
        self._context = context * self._stride_in
        self._skip = context * self._stride_out
        strides = max(1, BLOCK_SAMPLES // self._stride_in)
        self._step_in, self._step_out = strides * self._stride_in, strides * self._stride_out
        self._waiting: Array = np.zeros(self._context, np.float32)

    def push(self, block: Array, last: bool) -> Array:
        self._length.read += len(block)
        self._waiting = np.concatenate([self._waiting, block])
        done: list[Array] = [np.zeros(0, np.float32)]
        size = self._step_in + 2 * self._context
        start = 0
        while len(self._waiting) - start >= size:
            done.append(self._convolve(self._waiting[start : start + size]))
            start += self._step_in
        self._waiting = self._waiting[start:]
        self._length.written += sum(map(len, done))
        if last:
            # torchaudio rounds a signal's end in float32: it must not lie where ours does.
            after = np.zeros(self._context, np.float32)
            self._waiting = np.concatenate([self._waiting, after])
            while (unwritten := self._length.unwritten()) > 0:  # at most two steps are left
                done.append(self._convolve(self._waiting[:size])[:unwritten])
                self._waiting = self._waiting[self._step_in :]
                self._length.written += len(done[-1])
        return np.concatenate(done)

    def _convolve(self, piece: Array) -> Array:
        """A step's input between its two contexts -> the step's output."""
        import torch

        resampled = self._transform(torch.from_numpy(np.ascontiguousarray(piece))).numpy()
        return np.asarray(resampled[self._skip : self._skip + self._step_out])


@dataclass
class _Length:
    """How many samples came in and went out, and how many are owed at the end."""

    orig_rate: int
    target_rate: int
    read: int = 0
    written: int = 0

    def unwritten(self) -> int:
        return -(-self.read * self.target_rate // self.orig_rate) - self.written


_BACKENDS: dict[str, Callable[[int, int, ResampleConfig], StreamResampler]] = {
    "soxr": _Soxr,
    "torchaudio": _Torchaudio,
}
