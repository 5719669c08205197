"""Typed reading of JSON values into dataclasses.

Tested by tests/models/synthesizer/test_voice.py.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal

from models.input_file import shown


def typed(kind: Any, value: Any, where: str) -> Any:
    """Convert a JSON value to `kind`: a dataclass, tuple, dict, Literal, ..., or None.

    where: the path of the value, for errors.

    Raises: ValueError: when the value has another type (the message names the field).
    """
    if dataclasses.is_dataclass(kind):
        return _typed_fields(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        inner = next(a for a in arguments if a is not type(None))
        return None if value is None else typed(inner, value, where)
    if origin is Literal:
        if value in arguments and type(value) in map(type, arguments):
            return value
        choices = ", ".join(map(str, arguments))
        raise ValueError(f"{where} is {shown(value)}; choose from {choices}")
    if origin is dict and isinstance(value, dict):
        return {name: typed(arguments[1], one, f"{where}.{name}") for name, one in value.items()}
    if kind is Any:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(typed(arguments[0], one, f"{where}[{i}]") for i, one in enumerate(value))
    if kind is float and type(value) is int and abs(value) < 1 << 1000:
        return float(value)
    if kind is int and type(value) is int and abs(value) >> 62:
        raise ValueError(f"{where} is {shown(value)}; it must be below 2^62")
    if kind is float and type(value) is float and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; it must be a finite number")
    if type(value) is not kind:
        raise ValueError(f"{where} is {shown(value)}; it must be a {_type_name(kind)}")
    return value


def _typed_fields(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {shown(value)}; it must be an object with fields")
    within = f"{where}." if where else ""
    names = [field.name for field in dataclasses.fields(kind)]
    missing = [within + name for name in names if name not in value]
    unknown = [within + name for name in value if name not in names]
    if missing:
        raise ValueError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    if unknown:
        raise ValueError(f"{', '.join(unknown)} {'is' if len(unknown) == 1 else 'are'} unknown")
    hints = typing.get_type_hints(kind)
    return kind(**{name: typed(hints[name], value[name], within + name) for name in names})


def _type_name(kind: Any) -> str:
    names = {int: "whole number", float: "number", str: "text", bool: "boolean"}
    return names.get(kind, "list")
