"""What every command that writes one file, or computes on a device, asks for alike."""

from __future__ import annotations

from pathlib import Path

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


def require_safetensors(out: Path) -> None:
    """Raises UserError where `out` cannot be a file to write in that format."""
    if out.is_dir():
        raise UserError(
            f"{out} is a folder; name the file to write, such as {out / 'a.safetensors'}"
        )
    if out.suffix != ".safetensors":
        raise UserError(f"{out} must end in .safetensors, the format that is written")
    if out.parent.exists() and not out.parent.is_dir():
        raise UserError(f"{out.parent} is a file, not a folder to write into")
