"""The settings that change the output: which they are, their hash, and whether two runs agree.

A setting at its neutral value is off: the output is what it was before the setting existed. Such
settings are not recorded in datasets and converted folders, and an absent one counts as off. So a
new setting that is off by default changes no fingerprint and locks no earlier run out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin, get_type_hints

from pipeline.settings import flatten

# Keys that change where and how fast a run works, not what it writes. The SHA-256 of a file of
# weights counts in place of its path.
_NOT_IN_FINGERPRINT = {
    "decode.timeout_s",
    "decode.memory_mb",
    "f0.device",
    "f0.checkpoint",
    "xvector.device",
    "xvector.checkpoint",
}

_NOT_OF_AN_ENCODER = {"device", "dtype", "checkpoint", "codebook"}

_ABSENT = object()  # in place of a neutral value: the setting is never off, and always recorded


def counted(config: object) -> dict[str, Any]:
    """Return the settings that change the output and are not off, by key, files left out.

    A section by name counts by its presence too: `{"encoders.log-mel": True, ...}`.
    """
    settings = {key: value for key, value in flatten(config).items() if changes_output(key)}
    return _in_use(settings, neutral_values(type(config)))


def changes_output(key: str) -> bool:
    """Tell whether a setting changes what is written, and not only where and how fast."""
    section, _, rest = key.partition(".")
    if section in ("encoder", "encoders"):
        return rest.rpartition(".")[2] not in _NOT_OF_AN_ENCODER
    return section not in ("plan", "workers") and key not in _NOT_IN_FINGERPRINT


def neutral_values(schema: type[Any]) -> dict[str, Any]:
    """Return the value at which each setting of a dataclass is off, by key.

    It is the default where that is None, False or empty, or what the field declares:
    `field(default="none", metadata={"neutral": "none"})`. Declare it where another value means off,
    and where a default of None, False or empty is changed. A setting without either is never off:
    False is not neutral for a bool that is True by default, nor for a `bool | None`.
    Keys of sections by name have a star in place of the name: "encoders.*.int8".
    """
    hints = get_type_hints(schema)
    neutral: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            neutral |= _prefixed(field.name, hint)
        elif get_origin(hint) is dict:
            named = f"{field.name}.*"
            neutral |= {named: None, **_prefixed(named, get_args(hint)[1])}
        else:
            neutral[field.name] = _neutral_value(field)
    return neutral


def _prefixed(prefix: str, section: Any) -> dict[str, Any]:
    return {f"{prefix}.{key}": value for key, value in neutral_values(section).items()}


def _neutral_value(field: dataclasses.Field[Any]) -> Any:
    if "neutral" in field.metadata:
        return field.metadata["neutral"]
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if isinstance(default, tuple | list | dict) and not default:
        return [] if isinstance(default, tuple) else default  # as JSON gives it back
    return default if default is None or default is False else _ABSENT


def with_settings_off(recorded: Mapping[str, Any], config: object) -> dict[str, Any]:
    """Return the recorded settings, and those of `config` that are off at their neutral values.

    They are in the order of `config`; recorded settings that it does not have come last.
    """
    neutral = neutral_values(type(config))
    settings = {}
    for key in flatten(config):
        if key in recorded:
            settings[key] = recorded[key]
        elif changes_output(key) and neutral.get(key, _ABSENT) is not _ABSENT:
            settings[key] = neutral[key]
    return settings | dict(recorded)


def differences(
    recorded: Mapping[str, Any], settings: Mapping[str, Any], neutral: Mapping[str, Any]
) -> list[str]:
    """Return "key was ... and is ..." for each setting that differs from the recorded ones.

    neutral: from `neutral_values`. An absent setting counts as off. Other keys, such as the SHA-256
    of a checkpoint, are off where they are null.
    """
    before, now = (_in_use(_as_json(each), neutral) for each in (recorded, settings))
    lines = []
    for key in sorted(before.keys() | now.keys()):
        off = _neutral_of(key, neutral)
        was, value = before.get(key, off), now.get(key, off)
        if was != value:
            lines.append(f"{key} was {_shown(was)} and is {_shown(value)}")
    return lines


def _in_use(settings: Mapping[str, Any], neutral: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are not off, and `True` for each section by name."""
    used = {key: value for key, value in settings.items() if not _is_off(key, value, neutral)}
    sections = (".".join(key.split(".")[:2]) for key in settings)
    return used | {key: True for key in sections if f"{key.partition('.')[0]}.*" in neutral}


def _is_off(key: str, value: Any, neutral: Mapping[str, Any]) -> bool:
    off = _neutral_of(key, neutral)
    return bool(value == off) and isinstance(value, bool) == isinstance(off, bool)


def _neutral_of(key: str, neutral: Mapping[str, Any]) -> Any:
    section, _, rest = key.partition(".")
    if f"{section}.*" in neutral:
        _, _, setting = rest.partition(".")
        key = f"{section}.*.{setting}" if setting else f"{section}.*"
    return neutral.get(key)


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings as JSON gives them back, and dictionaries in them by their own keys."""
    return dict(_flat(json.loads(json.dumps(settings))))


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from ((f"{key}.{name}", each) for name, each in _flat(value))
        else:
            yield key, value


def _shown(value: Any) -> str:
    """Return a value as YAML would have it."""
    if value is _ABSENT:
        return "not recorded"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of recorded settings."""
    canonical = json.dumps(settings, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
