"""What every command that writes one file, or computes on a device, asks for alike."""

from __future__ import annotations

from pipeline.errors import UserError


def choose_device(choice: str, option: str = "--device") -> str:
    """ "cpu" or "cuda" for `option` auto, cpu or cuda. Raises UserError."""
    import torch

    if choice not in ("auto", "cpu", "cuda"):
        raise UserError(f"{option} is '{choice}'; it is auto, cpu or cuda")
    there = torch.cuda.is_available()
    if choice == "cuda" and not there:
        raise UserError(f"{option} is cuda, but torch finds no CUDA device; use auto or cpu")
    return "cuda" if there and choice != "cpu" else "cpu"
