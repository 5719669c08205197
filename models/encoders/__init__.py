"""Encoders: what turns a clip into units. One is a line in `ENCODERS`, and meets `Encoder`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from models.encoders.encoder import Encoder, checked
from models.encoders.spectral import LogMel, Mfcc

__all__ = ["ENCODERS", "Encoder", "checked", "load_encoder"]


def _mfcc(checkpoint: str | None, device: str) -> Encoder:
    _refuse_checkpoint("mfcc", checkpoint)
    return Mfcc(device)


def _log_mel(checkpoint: str | None, device: str, n_mels: int = 80) -> Encoder:
    _refuse_checkpoint("log-mel", checkpoint)
    return LogMel(n_mels, device)


# name -> builder(checkpoint, device, **options)
ENCODERS: dict[str, Callable[..., Encoder]] = {
    "mfcc": _mfcc,
    "log-mel": _log_mel,
}


def load_encoder(
    name: str, checkpoint: str | None = None, device: str = "cpu", **options: Any
) -> Encoder:
    """The encoder `name`, ready on `device` ("cpu", "cuda", "cuda:1").

    options: what its builder takes beyond that (log-mel: n_mels=80).
    Raises ValueError for an unknown name, and for a checkpoint where there is nothing to load.
    """
    if name not in ENCODERS:
        raise ValueError(f"encoder {name!r} is unknown; there are {', '.join(sorted(ENCODERS))}")
    return ENCODERS[name](checkpoint, device, **options)


def _refuse_checkpoint(name: str, checkpoint: str | None) -> None:
    if checkpoint is not None:
        raise ValueError(f"encoder.checkpoint must be empty: {name} has no weights")
