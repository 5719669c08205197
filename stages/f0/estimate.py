"""f0 estimation of clips with the configured method."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import numpy as np

from stages.clip_groups import in_groups
from stages.f0.config import METHODS, NETWORKS, F0Config
from stages.f0.ensemble import combine
from stages.f0.networks import check_network, network
from stages.f0.post import refine
from stages.f0.sovits_compat import SOVITS_METHODS
from stages.frames import Track, num_frames, resize_contour
from stages.types import Array

Method = Callable[[Sequence[Array], int, F0Config], Iterable[Track]]


def load_method(name: str) -> Method:
    """Return the method `name` of METHODS as a function of many clips.

    For each clip, in order, it returns f0 in Hz (0 = unvoiced) and the sample that each value
    belongs to, ascending: both (N,), with N of its choosing, 0 if the clip is too short. It gets
    finite, non-silent clips of one sample and more, about ten minutes at a time. The result for a
    clip does not depend on the others.
    """
    module, _, function = METHODS[name].partition(":")
    estimator = getattr(importlib.import_module(module), function)
    return cast(Method, estimator) if name in NETWORKS else _clip_by_clip(estimator)


def _clip_by_clip(estimator: Callable[[Array, int, F0Config], Track]) -> Method:
    """Return the estimator of one clip as a method of many."""

    def method(wavs: Sequence[Array], sample_rate: int, cfg: F0Config) -> Iterator[Track]:
        return (estimator(wav, sample_rate, cfg) for wav in wavs)

    return method


def check_networks(cfg: F0Config) -> None:
    """Check the weights of all configured networks without loading them.

    Raises: ValueError: when weights are missing or belong to another network.
    """
    for name in cfg.networks:
        check_network(name, cfg)


def load_networks(cfg: F0Config) -> None:
    """Load the configured networks; this process keeps them.

    Raises: ValueError: when weights or the device cannot be used.
    """
    for name in cfg.networks:
        network(name, cfg)


def estimate_f0(wav: Array, sample_rate: int, cfg: F0Config, n_frames: int | None = None) -> Array:
    """Estimate the pitch at samples 0, hop, 2 * hop, ...: float32 (F,) in Hz, 0 = unvoiced.

    wav: (T,) float32. n_frames: F, None for T // hop_length; frames beyond the clip are unvoiced.
    Silence is unvoiced, and so is a pitch with fewer than two periods in the clip.

    Raises: ValueError: when samples are not finite, the clip is not (T,), the sample rate is too
    low for f0_max, or weights cannot be read.
    """
    counts = None if n_frames is None else [n_frames]
    return next(estimate_clips([wav], sample_rate, cfg, counts))


def estimate_clips(
    wavs: Iterable[Array], sample_rate: int, cfg: F0Config, n_frames: Sequence[int] | None = None
) -> Iterator[Array]:
    """Apply `estimate_f0` to many clips, in order; networks process them in batches."""
    if cfg.f0_max >= sample_rate / 2:
        raise ValueError(
            f"f0.f0_max ({cfg.f0_max} Hz) must be below half the sample rate ({sample_rate} Hz)"
        )
    counts = None if n_frames is None else iter(n_frames)
    for group in in_groups(map(_checked, wavs), sample_rate):
        frames = [num_frames(len(wav), cfg.hop_length) for wav in group]
        if counts is not None:
            frames = [next(counts) for _ in group]
        audible = [i for i, wav in enumerate(group) if frames[i] and wav.any()]
        contours = [np.zeros(count, dtype=np.float32) for count in frames]
        estimated = _contours(
            [group[i] for i in audible], sample_rate, cfg, [frames[i] for i in audible]
        )
        for i, f0 in zip(audible, estimated, strict=True):
            contours[i] = f0
        for wav, f0 in zip(group, contours, strict=True):
            yield refine(f0, wav, sample_rate, cfg.hop_length, cfg)


def _contours(
    wavs: Sequence[Array], sample_rate: int, cfg: F0Config, n_frames: Sequence[int]
) -> Iterable[Array]:
    """Estimate contours on the frame clock, before the steps of `PostConfig`."""
    if cfg.align == "peer":
        return (
            SOVITS_METHODS[cfg.method](wav, sample_rate, cfg, frames).astype(np.float32)
            for wav, frames in zip(wavs, n_frames, strict=True)
        )
    members = [_on_frames(name, wavs, sample_rate, cfg, n_frames) for name in cfg.members]
    if cfg.method != "ensemble":
        return members[0]
    return (combine(np.stack(tracks)) for tracks in zip(*members, strict=True))


def _on_frames(
    method: str, wavs: Sequence[Array], sample_rate: int, cfg: F0Config, n_frames: Sequence[int]
) -> Iterator[Array]:
    tracks = load_method(method)(wavs, sample_rate, cfg)
    for wav, (f0, positions), frames in zip(wavs, tracks, n_frames, strict=True):
        lowest = max(cfg.f0_min, 2 * sample_rate / len(wav))
        in_range = (f0 >= lowest) & (f0 <= cfg.f0_max)
        contour = resize_contour(np.where(in_range, f0, 0.0), positions, frames, cfg.hop_length)
        contour[math.ceil(len(wav) / cfg.hop_length) :] = 0  # the last source step may reach there
        yield contour


def _checked(wav: Array) -> Array:
    """Return the clip as contiguous float32."""
    if wav.ndim != 1:
        raise ValueError(f"f0 estimation needs a mono clip (T,), not {wav.shape}")
    wav = np.ascontiguousarray(wav, np.float32)
    if not np.isfinite(wav).all():
        raise ValueError("f0 estimation needs finite samples; this clip has NaN or infinity")
    return wav
