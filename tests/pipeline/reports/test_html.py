"""Templates of the pages: strict, escaped, free of addresses, and shipped with the package."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from jinja2 import UndefinedError

import pipeline.reports
from pipeline.reports.html import data_uri, list_settings, render_page

TEMPLATES = Path(pipeline.reports.__path__[0]) / "templates"
ROOT = Path(__file__).resolve().parents[3]


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="title"):
        "".join(render_page("conversion.html", {"about": {}}))


def test_no_template_turns_escaping_off() -> None:
    for path in TEMPLATES.iterdir():
        text = path.read_text()
        assert not re.search(r"\|\s*safe\b|autoescape|Markup", text), path.name
        assert not re.search(r"https?:|url\(|@import", text), path.name


def test_templates_are_package_data() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["pipeline.reports"]
    files = [path.relative_to(TEMPLATES.parent).as_posix() for path in TEMPLATES.rglob("*.*")]
    assert "templates/base.html" in files
    assert all(any(fnmatch(file, pattern) for pattern in patterns) for file in files)


def test_settings_know_whether_they_differ() -> None:
    settings = {"a.b_c": 1, "a.new": 2, "a.off": None, "a.on": 3}
    rows = list_settings(settings, {"a.b_c": 1, "a.off": 0.5, "a.on": None})
    assert [(row.key, row.value, row.default) for row in rows] == [
        ("a.b_c", "1", None),
        ("a.new", "2", None),
        ("a.off", "none", "0.5"),
        ("a.on", "3", "none"),
    ]
    assert rows[0].words == ["a.", "b_", "c"]


def test_a_data_uri_has_its_media_type() -> None:
    assert data_uri(b"abc", "image/png") == "data:image/png;base64,YWJj"
