"""Settings: frozen dataclasses, filled from YAML files and key=value overrides.

A schema is a dataclass whose fields are sections. A section is a dataclass, or a dictionary of
named ones (`dict[str, Section]`), whose keys are written section.name.key=value.

Tested by tests/pipeline/extract/test_config.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import math
import os
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.errors import UserError, one_line
from stages.errors import BadInput, Reason
from stages.open_file import open_source

T = TypeVar("T")
Hints = Mapping[str, Any]

_MOST_DEPTH = 20
_MOST_ALIASES = 20

_WORDS = {int: "whole numbers", float: "numbers", str: "strings"}


def load_settings(schema: type[T], path: Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Read settings: defaults, then the YAML file at `path`, then `key=value` overrides.

    Raises: UserError: when a key, a value or a line is wrong (the message names it).
    """
    return build_settings(schema, read_settings(schema, path, overrides))


def read_settings(
    schema: type[Any], path: Path | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the values of the file, updated with the overrides, by section and without defaults.

    An override `section.name=null` of a named section is None.
    Raises: UserError: when a key, a value or a line is wrong.
    """
    file = {} if path is None else check_settings(schema, _read_yaml(path), str(path))
    words = check_settings(schema, _parse_overrides(schema, overrides), "override")
    with _faults_as_user_errors():
        merged: Any = OmegaConf.to_container(OmegaConf.merge(file, words))
    return dict(merged)


def check_settings(schema: type[Any], values: dict[str, Any], where: str) -> dict[str, Any]:
    """Check `values`, change them in place and return them.

    An empty section becomes {}, lists become tuples, and numbers become strings if the key takes
    certain strings only. where: origin of the values, for messages.
    Raises: UserError: when there is an unknown key (with a suggestion), a wrong list or an
    interpolation.
    """
    known = _sections(schema)
    for name, entries in values.items():
        _refuse_other_than_text(name, f"{where}: the section")
        if name not in known:
            raise UserError(f"{where}: unknown section '{name}'{suggest(name, known)}")
        if entries is None:
            values[name] = {}
        elif known[name].by_name:
            _check_named(schema, name, entries, where)
        else:
            _check_keys(schema, name, entries, known[name].keys, where)
    return values


def build_settings(schema: type[T], *layers: Mapping[str, Any]) -> T:
    """Build the settings from defaults and layers of checked values; later layers win.

    Raises: UserError: when a value has the wrong type or is out of range.
    """
    with _faults_as_user_errors():
        merged = OmegaConf.merge(OmegaConf.structured(schema), *layers)
        values: Any = OmegaConf.to_container(merged)
        for key, value in _flat(schema, values).items():
            if any(
                isinstance(number, float) and not math.isfinite(number) for number in _leaves(value)
            ):
                raise UserError(f"{key} is {value}; it must be a finite number")
        settings: T = _build(schema, values)
    return settings


def flatten(settings: Any) -> dict[str, Any]:
    """Return every key with its value: `{"slice.threshold_db": -40.0, ...}`.

    Tuples become lists, as they are after JSON.
    """
    return _flat(type(settings), dataclasses.asdict(settings))


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Write sections as YAML, which `load_settings` reads; a list is one line."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def suggest(word: str, known: Iterable[object]) -> str:
    """Return the end of a message about an unknown word: the nearest known word, or all."""
    names = sorted(str(each) for each in known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else f" (known: {', '.join(names)})"


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """A dumper that writes tuples in brackets on one line."""


_Dumper.add_representer(
    tuple,
    lambda dumper, value: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", value, flow_style=True
    ),
)


@contextmanager
def _faults_as_user_errors() -> Iterator[None]:
    """Turn errors of OmegaConf, and values that a schema refuses, into UserError."""
    try:
        yield
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise UserError(f"{key}{str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise UserError(str(error)) from error


@dataclass(frozen=True)
class _Section:
    keys: Hints  # keys of the section, or of each named section
    by_name: bool


def _sections(schema: type[Any]) -> dict[str, _Section]:
    sections = {}
    for name, hint in get_type_hints(schema).items():
        by_name = get_origin(hint) is dict
        section = get_args(hint)[1] if by_name else hint
        sections[name] = _Section(get_type_hints(section), by_name)
    return sections


def _build(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build `kind` from plain values. OmegaConf's own conversion leaves lists inside tuples."""
    hints = get_type_hints(kind)
    return kind(**{name: _as(hints[name], value) for name, value in values.items()})


def _as(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value)  # type: ignore[arg-type]
    if isinstance(value, dict):
        return {name: _build(get_args(hint)[1], each) for name, each in value.items()}
    return _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _lists(value: Any) -> Any:
    return list(map(_lists, value)) if isinstance(value, list | tuple) else value


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the value, or the values in it if it is a list."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _flat(schema: type[Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    known = _sections(schema)
    flat: dict[str, Any] = {}
    for section, values in sections.items():
        for name, value in values.items():
            if known[section].by_name:
                flat |= {f"{section}.{name}.{key}": _lists(each) for key, each in value.items()}
            else:
                flat[f"{section}.{name}"] = _lists(value)
    return flat


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with open(open_source(os.fsencode(path)), encoding="utf-8") as file:
            text = file.read()
        _refuse_bombs(text, path)
        loaded = OmegaConf.load(io.StringIO(text))
    except BadInput as fault:
        if fault.reason == Reason.MISSING:
            raise UserError(f"the configuration file {path} does not exist") from fault
        raise UserError(f"cannot read settings from {path}: {fault.detail}") from fault
    except OSError as error:  # OmegaConf also raises it, without strerror, for a single number
        raise UserError(f"cannot read settings from {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from error
    except OmegaConfBaseException as error:  # null as a key
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    except (ValueError, TypeError) as error:  # 2024-99-99, a number of too many digits, {[a]: b}
        raise UserError(f"{path} has a value that YAML cannot read: {one_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} must have `section: {{key: value}}`, not a list")
    return dict(OmegaConf.to_container(loaded, resolve=False))  # type: ignore[arg-type]


def _refuse_bombs(text: str, path: Path) -> None:
    """Refuse nesting that crashes the parser, and aliases that multiply.

    Raises: UserError: when there is more of either than settings need; YAMLError: when it is no
    YAML.
    """
    depth = aliases = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if depth > _MOST_DEPTH:
            raise UserError(f"{path}: its values are nested too deeply")
        if aliases > _MOST_ALIASES:
            raise UserError(f"{path} has more than {_MOST_ALIASES} aliases (*name); write them out")


def _parse_overrides(schema: type[Any], overrides: Sequence[str]) -> dict[str, Any]:
    by_name = {name for name, section in _sections(schema).items() if section.by_name}
    nested: dict[str, Any] = {}
    seen: dict[str, str] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or "." not in key:
            raise UserError(f"'{item}' is not an override; write section.key=value")
        if key in seen:
            raise UserError(f"{key} is given twice: '{seen[key]}' and '{item}'")
        seen[key] = item
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"the value of '{item[:100]}' is not valid YAML") from error
        section, _, name = key.partition(".")
        if section in by_name and "." in name:
            name, _, setting = name.partition(".")
            value = {setting: value}
        values = nested.setdefault(section, {})
        before = values.setdefault(name, value)
        if before is not value:
            both = isinstance(before, dict) and isinstance(value, dict)
            if not both or before.keys() & value.keys():
                raise UserError(f"'{item}' sets a key that another override sets; give one of them")
            before |= value
    return nested


def _check_named(schema: type[Any], section: str, named: Any, where: str) -> None:
    """Check the settings of named sections. An override of null removes one."""
    if not isinstance(named, dict):
        raise UserError(f"{where}: '{section}' must have `name: {{key: value}}`, not {named!r}")
    for name, entries in named.items():
        _refuse_other_than_text(name, f"{where}: in '{section}', the name")
        if entries is not None:
            keys = _sections(schema)[section].keys
            _check_keys(schema, f"{section}.{name}", entries, keys, where)
        elif where != "override":
            raise UserError(f"{where}: {section}.{name} is empty; write {{}} for its defaults")


def _check_keys(schema: type[Any], section: str, entries: Any, known: Hints, where: str) -> None:
    if not isinstance(entries, dict):
        raise UserError(f"{where}: '{section}' must have keys, not {entries!r}")
    for name, value in entries.items():
        _refuse_other_than_text(name, f"{where}: in '{section}', the key")
        full = f"{section}.{name}"
        if name not in known:
            every = [f"{s}.{n}" for s, at in _sections(schema).items() for n in _own_keys(at)]
            every += [f"{section}.{n}" for n in known]
            raise UserError(f"{where}: unknown key '{full}'{suggest(full, every)}")
        if any(isinstance(each, str) and "${" in each for each in _leaves(value)):
            raise UserError(f"{where}: {full} has '${{'; interpolation is not supported")
        if any(each == "???" for each in _leaves(value)):  # OmegaConf would treat it as missing
            raise UserError(f"{where}: {full} is '???'; give it a value or leave it out")
        entries[name] = _of_kind(known[name], value, f"{where}: {full}")


def _own_keys(section: _Section) -> Iterable[str]:
    return () if section.by_name else section.keys


def _of_kind(hint: Any, value: Any, what: str) -> Any:
    """Convert `value` where `hint` is a tuple or a literal, which OmegaConf reports unclearly."""
    options = [hint]
    if get_origin(hint) in (Union, types.UnionType):
        options = list(get_args(hint))
        if value is None and type(None) in options:
            return None
    for option in options:
        if get_origin(option) is tuple:
            return _tuple_of(option, value, what)
        if get_origin(option) is Literal and type(value) is int and str(value) in get_args(option):
            return str(value)
    return value


def _tuple_of(hint: Any, value: Any, what: str) -> tuple[Any, ...]:
    """Convert a list to the tuple type `hint`.

    Raises: UserError: when it is not such a list.
    """
    if not isinstance(value, list | tuple):
        raise UserError(f"{what} must be a list in brackets, [a, b], not {value!r}")
    kinds = get_args(hint)
    if kinds[-1] is ...:
        kinds = (kinds[0],) * len(value)
    elif len(kinds) != len(value):
        raise UserError(f"{what} must have {len(kinds)} {_WORDS[kinds[0]]}, not {len(value)}")
    return tuple(_member(kind, each, what) for kind, each in zip(kinds, value, strict=True))


def _member(kind: Any, value: Any, what: str) -> Any:
    if get_origin(kind) is tuple:
        return _tuple_of(kind, value, f"{what}, each entry,")
    if kind is float and isinstance(value, str):  # YAML reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UserError(f"{what} has {value!r}{suggest(str(value), get_args(kind))}")
        return value
    accepted = (int, float) if kind is float else (kind,)
    if type(value) not in accepted:
        raise UserError(f"{what} must have {_WORDS[kind]}, not {value!r}")
    return kind(value)


def _refuse_other_than_text(name: object, what: str) -> None:
    if not isinstance(name, str):
        raise UserError(f"{what} {name!r} is not text (YAML reads on, off, yes and no as booleans)")
