"""The device of a command: auto, cpu or cuda."""

from __future__ import annotations

from pipeline.errors import UserError


def choose_device(device: str, setting: str = "--device") -> str:
    """Return "cpu" or "cuda" for auto, cpu or cuda; auto is cuda where torch has one.

    setting: the key or option that set it, for messages.

    Raises: UserError: when it is none of the three, or cuda on a machine that has none.
    """
    from models.device import resolve_device  # torch takes seconds to import

    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"{setting} is '{device}'; set it to auto, cpu or cuda")
    try:
        return resolve_device(device, setting)
    except ValueError as error:
        raise UserError(str(error)) from error
