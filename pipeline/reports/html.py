"""Pages of HTML: one file each that needs nothing but a browser.

`templates/` holds the words, the layout and the style. Jinja2 escapes every value; characters that
neither HTML nor XML allows appear as U+FFFD.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.reports.words import (
    measure_in_words,
    midi_to_hz,
    note_name,
    number_in_words,
    reason_in_words,
    seconds_in_words,
)

# Control characters, surrogates, and the last two code points of each plane.
_NO_CHARACTER = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff"
    + "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
    + "]"
)


def render_page(template: str, page: object) -> Iterator[str]:
    """Yield the parts of a page in order. page: the template's data, under the name `page`."""
    yield from _environment().get_template(template).generate(page=page)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pipeline.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def source_hash(script: str) -> str:
        """Return the source of a script in a Content-Security-Policy."""
        text = environment.get_template(script).render()
        return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"

    environment.filters |= {
        "data_uri": data_uri,
        "hz": midi_to_hz,
        "measure": measure_in_words,
        "note": note_name,
        "number": number_in_words,
        "reason": reason_in_words,
        "seconds": seconds_in_words,
        "source_hash": source_hash,
    }
    return environment


def _printable(value: object) -> object:
    """Replace what no page may hold; markup comes from a template, where that was done."""
    if isinstance(value, Markup):
        return value
    text = str(value)
    return text if text.isprintable() else _NO_CHARACTER.sub("\ufffd", text)


def data_uri(data: bytes, kind: str) -> str:
    """Return bytes as a URI. kind: their media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True)
class Setting:
    """A setting by section.key, its value in words, and its default when the two differ."""

    key: str
    value: str
    default: str | None

    @property
    def words(self) -> list[str]:
        """Parts of the key between which a line may break."""
        return re.findall(r"[^._]+[._]*|[._]+", self.key)


def list_settings(
    settings: Mapping[str, object], defaults: Mapping[str, object]
) -> tuple[Setting, ...]:
    """Return the settings in their order. defaults: by section.key; may lack keys."""

    def default(key: str) -> str | None:
        differs = key in defaults and defaults[key] != settings[key]
        return _value(defaults[key]) if differs else None

    return tuple(Setting(key, _value(value), default(key)) for key, value in settings.items())


def _value(value: object) -> str:
    return "none" if value is None else str(value)
