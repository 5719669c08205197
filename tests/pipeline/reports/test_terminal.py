from __future__ import annotations

import pytest
from rich.markdown import Markdown
from rich.text import Text

from pipeline.errors import first_names, printable
from pipeline.reports.command_summary import Summary, show_summary, text_table
from pipeline.reports.terminal import TerminalConsole

HOSTILE = "a\x1b[31mb\x07\x08\x9bc\r\x7f\x00\td\u202ee\u2028f\udce9g"
SHOWN = r"a\x1b[31mb\x07\x08\x9bc\r\x7f\x00\td\u202ee\u2028f\xe9g"


def test_control_characters_are_escaped_and_letters_of_all_languages_are_not() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("one\ntwo") == r"one\ntwo"
    assert printable("one\ntwo\x1b", keep="\n") == "one\ntwo\\x1b"
    for name in ("Zoé", "歌", "שלום", "👩\u200d🎤", "a b", r"\x1b"):
        assert printable(name) == name
    assert first_names(["\x1b", "b", "c", "d"]) == r"\x1b, b, c and 1 more"


def test_no_way_of_printing_gets_round_the_escape(capsys: pytest.CaptureFixture[str]) -> None:
    console = TerminalConsole()
    parts = [f"{HOSTILE}\n", text_table([[HOSTILE, "cell"]], (HOSTILE, "header"))]
    show_summary(console, Summary(parts=parts, figures={}))
    console.print(HOSTILE, Text(HOSTILE), Markdown(HOSTILE), text_table([["x"]], (HOSTILE,)))
    console.print(f"[bold]{HOSTILE}[/] :cat: [/x]", soft_wrap=True)
    TerminalConsole(stderr=True, soft_wrap=True).print(HOSTILE)
    out, err = capsys.readouterr()
    assert (out + err).replace("\n", "").isprintable()
    assert SHOWN + r"\n" in out and f"{SHOWN}  cell" in out and SHOWN in err
    assert f"[bold]{SHOWN}[/] :cat: [/x]" in out
