"""Sample rate conversion, at once or block by block with the same result."""

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

BLOCK_SAMPLES = 1 << 16  # input of one step of the torchaudio backend
MAX_KERNEL_VALUES = 1 << 23  # torchaudio stores one filter for each phase of the ratio


@dataclass(frozen=True, kw_only=True)
class ResampleConfig:
    """Settings of the resampler.

    backend: "soxr" (libsoxr at `quality`), or "torchaudio" (a Hann-windowed sinc with
    `lowpass_filter_width` zero crossings on each side; for models trained on such audio).
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
    """Resampler of a signal in blocks of any length; its outputs, joined, are the result."""

    def push(self, block: Array, last: bool) -> Array:
        """Take the next input (T,) and return finished output. `last`: this is the final block."""
        ...


def resample(wav: Array, orig_rate: int, target_rate: int, cfg: ResampleConfig) -> Array:
    """Resample (T,) at `orig_rate` to ceil(T * target_rate / orig_rate) samples at `target_rate`.

    The length equals librosa's, and torchaudio's except where its float32 rounds it wrong. Output k
    lies at input k * orig_rate / target_rate, with zeros before and after the signal. For equal
    rates `wav` itself is returned. Bit-identical to `stream_resampler` with blocks of any length.

    Raises: BadInput: when the backend does not support the ratio of the rates (UNSUPPORTED).
    """
    if orig_rate == target_rate:
        return wav
    return stream_resampler(orig_rate, target_rate, cfg).push(wav, last=True)


def stream_resampler(orig_rate: int, target_rate: int, cfg: ResampleConfig) -> StreamResampler:
    """Return a resampler for a signal in blocks. Memory does not grow with the signal.

    Raises: BadInput: when the backend does not support the ratio of the rates (UNSUPPORTED);
    ValueError: when a rate is not positive.
    """
    if orig_rate < 1 or target_rate < 1:
        raise ValueError(f"sample rates must be positive: {orig_rate} Hz to {target_rate} Hz")
    if orig_rate == target_rate:
        return _Identity()
    return _BACKENDS[cfg.backend](orig_rate, target_rate, cfg)


class _Identity:
    """Pass-through for equal rates."""

    def push(self, block: Array, last: bool) -> Array:
        return block


class _Soxr:
    """libsoxr. Its output does not depend on the blocks; it rounds the length to the nearest."""

    def __init__(self, orig_rate: int, target_rate: int, cfg: ResampleConfig) -> None:
        self._length = _Length(orig_rate, target_rate)
        self._stream = soxr.ResampleStream(
            orig_rate, target_rate, 1, dtype="float32", quality=cfg.quality
        )
        # Input for one more output, because libsoxr may round the last one away.
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
    """`torchaudio.transforms.Resample` over overlapping blocks that start at fixed samples.

    Every block but the last has the same shape, wherever the pushed blocks end, so the convolution
    gives the same bits. One call on the whole signal differs by rounding only.
    """

    def __init__(self, orig_rate: int, target_rate: int, cfg: ResampleConfig) -> None:
        self._length = _Length(orig_rate, target_rate)
        # The ratio in lowest terms: inputs and outputs of one stride.
        divisor = math.gcd(orig_rate, target_rate)
        self._stride_in, self._stride_out = orig_rate // divisor, target_rate // divisor
        reach = cfg.lowpass_filter_width * max(1.0, orig_rate / target_rate) / 0.99
        if self._stride_out * (self._stride_in + 2 * reach) > MAX_KERNEL_VALUES:
            raise BadInput(
                Reason.UNSUPPORTED,
                f"resample.backend=torchaudio cannot convert {orig_rate} Hz to {target_rate} Hz: "
                "the ratio has no small terms. Use resample.backend=soxr",
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
            # torchaudio rounds the end of a signal in float32, so it must not be the end here.
            after = np.zeros(self._context, np.float32)
            self._waiting = np.concatenate([self._waiting, after])
            while (unwritten := self._length.unwritten()) > 0:  # at most two steps are left
                done.append(self._convolve(self._waiting[:size])[:unwritten])
                self._waiting = self._waiting[self._step_in :]
                self._length.written += len(done[-1])
        return np.concatenate(done)

    def _convolve(self, piece: Array) -> Array:
        """Resample the input of one step, given with context on both sides."""
        import torch

        resampled = self._transform(torch.from_numpy(np.ascontiguousarray(piece))).numpy()
        return np.asarray(resampled[self._skip : self._skip + self._step_out])


@dataclass
class _Length:
    """Counts of samples read and written, and the number still to write at the end."""

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
