"""Encoders of clips to units. Each is an entry of `ENCODERS` and implements `Encoder`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch

from models.device import resolve_device
from models.encoders.encoder import DType, Encoder, check_clips
from models.encoders.encoder_names import NAMES
from models.encoders.int8 import require_int8
from models.encoders.layouts import check_fit, read_encoder
from models.encoders.onnx import KINDS, load_onnx
from models.encoders.spectral import LogMel, Mfcc
from models.encoders.ssl import SslEncoder
from models.encoders.wav2vec2 import Wav2Vec2
from models.encoders.whisper import load_whisper

__all__ = ["ENCODERS", "WITHOUT_WEIGHTS", "Encoder", "check_clips", "check_encoder", "load_encoder"]


def _mfcc(checkpoint: str | None, device: str) -> Encoder:
    _refuse_checkpoint("mfcc", checkpoint)
    return Mfcc(device)


def _log_mel(checkpoint: str | None, device: str, n_mels: int = 80) -> Encoder:
    _refuse_checkpoint("log-mel", checkpoint)
    return LogMel(n_mels, device)


def _ssl(
    name: str,
    checkpoint: str | None,
    device: str,
    dtype: DType = "float32",
    int8: bool = False,
    normalize_wav: bool | None = None,
) -> Encoder:
    if checkpoint is None:
        raise ValueError(f"encoder.checkpoint is empty: {name} needs a file or folder of weights")
    config, tensors = read_encoder(name, checkpoint, normalize_wav)
    with torch.device("meta"):  # no memory and no random numbers, since all weights are replaced
        network = Wav2Vec2(config)
    network.load_state_dict(tensors, assign=True)
    del tensors  # so that packing can free them layer by layer
    return SslEncoder(name, network, device, dtype, int8)


WITHOUT_WEIGHTS = ("mfcc", "log-mel")  # these need no checkpoint

# name -> builder(checkpoint, device, **options)
ENCODERS: dict[str, Callable[..., Encoder]] = {
    "mfcc": _mfcc,
    "log-mel": _log_mel,
    **{name: partial(_ssl, name) for name in NAMES},
    **{name: partial(load_whisper, name) for name in ("whisper-ppg", "whisper-ppg-large")},
    **{name: partial(load_onnx, name) for name in KINDS},
}


def load_encoder(
    name: str, checkpoint: str | None = None, device: str = "cpu", **options: Any
) -> Encoder:
    """Load the encoder `name` on `device` ("cpu", "cuda", "cuda:1", "auto").

    options: depend on the encoder. Networks: dtype="float32", "float16" or "bfloat16". The wav2vec
    2.0 family: int8=True (CPU) and normalize_wav (None: as trained voice models expect). log-mel:
    n_mels=80.

    Raises: ValueError: when a name, option, dtype or device is unknown, or the checkpoint is
    missing or not expected; CheckpointError: when the file is not this encoder's.
    """
    _require_options(name, options)
    device = resolve_device(device)
    if torch.device(device).type == "cuda":
        # By default convolutions would round to 10 bits (TF32); matrix products do not.
        torch.backends.cudnn.allow_tf32 = False
    return ENCODERS[name](checkpoint, device, **options)


def check_encoder(name: str, checkpoint: str | None = None, **options: Any) -> None:
    """Check that `load_encoder` would succeed on a CPU.

    Reads only shapes, not weights, for the wav2vec 2.0 family.

    Raises: ValueError: when `load_encoder` would raise it.
    """
    if name not in NAMES or checkpoint is None:
        load_encoder(name, checkpoint, **options)
        return
    _require_options(name, options)
    check_fit(name, checkpoint)
    if options.get("int8"):
        require_int8(torch.device("cpu"), getattr(torch, options.get("dtype", "float32")))


def _require_options(name: str, options: dict[str, Any]) -> None:
    if name not in ENCODERS:
        raise ValueError(f"encoder {name!r} is unknown; choose from {', '.join(sorted(ENCODERS))}")
    parameters = inspect.signature(ENCODERS[name]).parameters
    for option in options:
        if option not in parameters:
            raise ValueError(f"encoder.{option} is set, but {name} does not have this option")
    if (dtype := options.get("dtype", "float32")) not in get_args(DType):
        raise ValueError(f"encoder.dtype is {dtype!r}; choose from {', '.join(get_args(DType))}")


def _refuse_checkpoint(name: str, checkpoint: str | None) -> None:
    if checkpoint is not None:
        raise ValueError(f"encoder.checkpoint must be empty: {name} has no weights")
