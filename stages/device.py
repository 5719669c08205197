"""Where a network runs."""

from __future__ import annotations


def resolve_device(choice: str) -> str:
    """ "cpu" or "cuda" for a setting: "auto" is CUDA where torch has any. Imports torch.

    Raises ValueError for "cuda" where there is none.
    """
    import torch

    there = torch.cuda.is_available()
    if choice == "cuda" and not there:
        raise ValueError("device is cuda, but torch finds no CUDA device on this machine")
    return ("cuda" if there else "cpu") if choice == "auto" else choice
