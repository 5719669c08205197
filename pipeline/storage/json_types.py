"""Untrusted JSON: comparison of its values with the types of a dataclass.

Tested by tests/pipeline/test_damaged_files.py.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_WORDS: dict[Any, str] = {int: "a whole number", float: "a finite number", str: "text"}


def check_type(kind: Any, value: Any, what: str) -> None:
    """Compare a value of JSON with a type: a dataclass, list, dict, Literal, union or scalar.

    what: a name of the value, for messages.
    Raises: ValueError: when it is another one, or text that is no valid Unicode.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return
    if origin in (Union, types.UnionType):
        if value is not None:
            (inner,) = (each for each in arguments if each is not types.NoneType)
            check_type(inner, value, what)
    elif origin is Literal:
        if not any(value is each or value == each for each in arguments):
            raise ValueError(f"{what} must be {' or '.join(arguments)}, not {reprlib.repr(value)}")
    elif origin is list:
        for number, each in enumerate(_checked(list, value, what, "a list")):
            check_type(arguments[0], each, f"{what}[{number}]")
    elif origin is dict:
        for key, each in _checked(dict, value, what, "an object").items():
            check_type(str, key, f"a key of {what}")
            check_type(arguments[1], each, f"{what}.{key}")
    elif dataclasses.is_dataclass(kind):
        _check_fields(kind, _checked(dict, value, what, "an object"), what)
    elif not _is_scalar(kind, value):
        raise ValueError(f"{what} must be {_WORDS[kind]}, not {reprlib.repr(value)}")


def _checked(kind: type[T], value: Any, what: str, words: str) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"{what} must be {words}, not {reprlib.repr(value)}")
    return value


def _check_fields(kind: Any, values: dict[str, Any], what: str) -> None:
    hints, needed = _fields(kind)
    for key in values:
        if key not in hints:
            raise ValueError(f"{what} has the unknown key {reprlib.repr(key)}")
    for key in needed:
        if key not in values:
            raise ValueError(f"{what} lacks {key}")
    for key, value in values.items():
        check_type(hints[key], value, f"{what}.{key}")


@cache
def _fields(kind: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the types of a dataclass's fields, and the names of those without a default."""
    needed = tuple(
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
    return get_type_hints(kind), needed


def _is_scalar(kind: Any, value: Any) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is str:
        return isinstance(value, str) and value.encode(errors="replace") == value.encode(
            errors="ignore"
        )
    if kind is int:
        return isinstance(value, int) and abs(value) < 2**63
    return isinstance(value, int | float) and abs(value) < 1e308 and math.isfinite(value)
