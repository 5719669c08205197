"""The device that a network runs on."""

from __future__ import annotations

import torch


def resolve_device(device: str, setting: str = "device") -> str:
    """Return a torch device: for "auto" cuda where torch has one and cpu elsewhere.

    device: auto, cpu, cuda, or another name that torch knows, such as cuda:1.
    setting: the key or option that set it, for messages.

    Raises: ValueError: when torch does not know the device, or has no CUDA device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(
            f"{setting} is {device!r}, which torch does not know; write cpu, cuda or cuda:1"
        ) from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"{setting} is {device}, but torch finds no CUDA device on this machine; set it to "
            "auto or cpu"
        )
    return device
