"""Pages of HTML that need nothing but a browser: their frame, words, tables, figures and style.

What comes from outside goes through `escaped` or `escaped_name`; the rest is put in as it is.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def html_page(
    title: str, heading: str, sections: Iterable[str], *, style: str = "", script: str = ""
) -> Iterator[str]:
    """The page, part by part.

    title: text. heading: HTML within <header>. style: beyond that of all pages. script: the only
    one that the browser will run.
    """
    allowed = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        allowed += f"; script-src 'sha256-{digest}'"
    yield f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<meta name="color-scheme" content="light dark" />
<meta http-equiv="Content-Security-Policy" content="{allowed}" />
<title>{escaped(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
<main>
<header>{heading}</header>
"""
    yield from sections
    yield f"</main>\n<script>{script}</script>\n" if script else "</main>\n"
    yield "</body>\n</html>\n"


def escaped(value: object) -> str:
    """Escaped for HTML, with U+FFFD for what no page may hold: controls, surrogates, U+FFFE."""

    def allowed(c: str) -> bool:
        return unicodedata.category(c) not in ("Cc", "Cs") and ord(c) & 0xFFFE != 0xFFFE

    clean = "".join(c if allowed(c) else "\ufffd" for c in str(value))
    return html.escape(clean)


def escaped_name(value: object) -> str:
    """A name that somebody else chose: escaped, and its writing direction kept to itself."""
    return f"<bdi>{escaped(value)}</bdi>"


def seconds_in_words(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.2f} h"
    if seconds >= 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.1f} s"


def note_name(midi: float) -> str:
    """`A4` for 69."""
    names = ("C", "C♯", "D", "D♯", "E", "F", "F♯", "G", "G♯", "A", "A♯", "B")
    return f"{names[round(midi) % 12]}{round(midi) // 12 - 1}"


def html_section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>\n"


def html_table(
    label: str, kind: str, heads: list[str], rows: list[list[str]], last_head: str = ""
) -> str:
    """A table of HTML cells, the first of each row its heading; last_head: of a further column.

    It scrolls sideways where it does not fit, by keyboard too. On a narrow screen each row becomes
    a block and its cells carry their column's name.
    """
    columns = "".join(f'<th scope="col">{head}</th>' for head in heads)
    columns += f'<th scope="col">{last_head}</th>' if last_head else ""
    body = ""
    for first, *cells in rows:
        body += f'<tr><th scope="row">{first}</th>'
        for cell, head in zip(cells, [*heads[1:], ""], strict=False):
            body += f'<td data-label="{head}">{cell}</td>'
        body += "</tr>"
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">'
        f'<table class="{kind}"><thead><tr>{columns}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def html_numbers(numbers: Iterable[tuple[str, str, str]]) -> str:
    """Figures in a grid, each (value, label, detail)."""
    cells = "".join(
        f"<div><dt>{label}</dt><dd><strong>{value}</strong><span>{detail}</span></dd></div>"
        for value, label, detail in numbers
    )
    return f'<dl class="numbers">{cells}</dl>'


def html_settings(settings: Mapping[str, object], defaults: Mapping[str, object]) -> str:
    """A table of settings by section.key, in their order; what differs from its default is bold,
    the default beside it."""
    rows = []
    for key, value in settings.items():
        shown, default = escaped(_value(value)), ""
        if differs(key, settings, defaults):
            shown, default = f"<b>{shown}</b>", escaped(_value(defaults[key]))
        breakable = escaped(key).replace(".", ".<wbr />").replace("_", "_<wbr />")
        rows.append([f"<code>{breakable}</code>", shown, default])
    return html_table("Settings", "settings", ["key", "value", "default"], rows)


def differs(key: str, settings: Mapping[str, object], defaults: Mapping[str, object]) -> bool:
    """Whether a setting has a default and another value."""
    return key in defaults and defaults[key] != settings[key]


def _value(value: object) -> str:
    return "none" if value is None else str(value)


# ---- figures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Theme:
    """Colours of a figure, as those of the page around it."""

    ink: str
    faint: str
    accent: str
    other: str  # against the accent


LIGHT = Theme(ink="#3c4450", faint="#dcdfe4", accent="#1f7a8c", other="#c2571a")
DARK = Theme(ink="#b9c0ca", faint="#343b45", accent="#5fb6c6", other="#f0a35e")


def picture(draw: Callable[[Figure, Theme], None], alt: str, width: float, height: float) -> str:
    """A figure of `width` by `height` inches, once for light pages and once for dark ones."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    uris = []
    for theme in (LIGHT, DARK):
        look: Any = {
            "font.size": 9.0,
            "text.color": theme.ink,
            "axes.labelcolor": theme.ink,
            "axes.edgecolor": theme.faint,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": theme.ink,
            "ytick.color": theme.ink,
            "grid.color": theme.faint,
            "axes.axisbelow": True,
        }
        with rc_context(look):
            figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
            FigureCanvasAgg(figure)
            draw(figure, theme)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", transparent=True)
        uris.append(data_uri("image/png", buffer.getvalue()))
    size = f'width="{round(96 * width)}" height="{round(96 * height)}"'
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{uris[1]}" />'
        f'<img src="{uris[0]}" alt="{escaped(alt)}" {size} /></picture>'
    )


def data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


_STYLE = """
:root { --paper: #fbfbfa; --card: #ffffff; --ink: #1e242c; --soft: #5a6470; --line: #e1e4e8;
  --accent: #1f7a8c; --tint: #cfe5e9; --alert: #a4371f; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --card: #1b2027; --ink: #e3e7ec;
  --soft: #9aa5b1; --line: #2e353e; --accent: #5fb6c6; --tint: #28505a; --alert: #ef8d72; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", "Liberation Sans", "DejaVu Sans", sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
section { margin-top: 2.5rem; }
section > h3 { margin-top: 1.5rem; }
p { margin: .5rem 0; max-width: 70ch; overflow-wrap: anywhere; }
header p, section > p, figcaption, small { color: var(--soft); }
section > p, figcaption, small { font-size: .875rem; }
code { font: .875em/1.4 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.alert { border: 1px solid var(--alert); border-left-width: 6px; border-radius: 4px;
  padding: 1rem 1.25rem; }
.alert h2 { color: var(--alert); }
.alert ul { margin: 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1px;
  margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  overflow: hidden; }
.numbers div { outline: 1px solid var(--line); padding: .8rem 1rem; display: flex;
  flex-direction: column-reverse; justify-content: flex-end; }
.numbers dt { font-weight: 600; font-size: .9rem; }
.numbers dd { margin: 0; display: contents; }
.numbers strong { font-size: 1.6rem; line-height: 1.2; font-weight: 600; order: 1;
  font-variant-numeric: tabular-nums; }
.numbers dt { order: 0; }
.numbers span { color: var(--soft); font-size: .8rem; order: -1; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 4px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .45rem 1.1rem .45rem 0;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; font-size: .85rem; white-space: nowrap; }
tbody th { font-weight: 600; overflow-wrap: anywhere; min-width: 7rem; }
td { font-variant-numeric: tabular-nums; }
small { display: block; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
  gap: 1rem; }
figure { margin: 0; padding: 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; min-width: 0; }
figure img { display: block; width: 100%; height: auto; }
figure h3 { overflow-wrap: anywhere; }
audio { display: block; width: 100%; margin: .6rem 0; }
.settings th { font-weight: 400; width: 20rem; }
.settings tr > :nth-child(n) { padding: .2rem .6rem .2rem 0; }
.settings code { overflow-wrap: normal; }
.settings td:last-child { color: var(--soft); }
@media (max-width: 44rem) {
  main { padding: 1.25rem 1rem 3rem; }
  .numbers { grid-template-columns: 1fr 1fr; }
  :not(.settings) > thead, :not(.settings) > tbody > tr > td:empty { display: none; }
  :not(.settings) > tbody > tr { display: grid; grid-template-columns: repeat(2, auto);
    justify-content: start; column-gap: 1.5rem; padding: .6rem 0;
    border-bottom: 1px solid var(--line); }
  :not(.settings) > tbody > tr > * { border: 0; padding: .1rem 0; }
  .settings th { width: auto; }
}
.unseen { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
"""
