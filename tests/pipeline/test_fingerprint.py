"""The settings that are recorded, and the comparison of two runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from pipeline.convert.config import ConvertConfig
from pipeline.extract.config import ExtractConfig, load_config
from pipeline.fingerprint import counted, differences, fingerprint, neutral_values
from pipeline.settings import flatten
from pipeline.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Settings of an early version."""

    order: int = 4
    keep_edges: bool = True
    normalize: bool | None = None


@dataclass(frozen=True, kw_only=True)
class GrownFilter(Filter):
    """The same of a later version; each new setting is off by default."""

    limit_db: float | None = None
    repair: bool = False
    names: tuple[str, ...] = ()
    window: Literal["none", "hann"] = field(default="none", metadata={"neutral": "none"})
    gain: float = field(default=1.5, metadata={"neutral": 1.0})


@dataclass(frozen=True, kw_only=True)
class Early:
    filter: Filter = field(default_factory=Filter)


@dataclass(frozen=True, kw_only=True)
class Late:
    filter: GrownFilter = field(default_factory=GrownFilter)
    filters: dict[str, GrownFilter] = field(default_factory=dict)


NEUTRAL = neutral_values(Late)


def test_a_setting_that_is_off_does_not_count() -> None:
    assert counted(Late(filter=GrownFilter(gain=1.0))) == counted(Early())
    assert counted(Early()) == {"filter.order": 4, "filter.keep_edges": True}
    on = GrownFilter(limit_db=0.0, repair=True, names=("a",), window="hann")
    assert counted(Late(filter=on)) == counted(Early()) | {
        "filter.limit_db": 0.0,
        "filter.repair": True,
        "filter.names": ["a"],
        "filter.window": "hann",
        "filter.gain": 1.5,
    }


def test_false_counts_where_it_is_not_neutral() -> None:
    off = Filter(keep_edges=False, normalize=False)
    assert counted(Early(filter=off)) == {
        "filter.order": 4,
        "filter.keep_edges": False,
        "filter.normalize": False,
    }
    recorded = flatten(Early(filter=off))
    assert differences(recorded, counted(Early()), neutral_values(Early)) == [
        "filter.keep_edges was false and is true",
        "filter.normalize was false and is null",
    ]


def test_what_was_recorded_before_a_setting_existed_agrees_while_it_is_off() -> None:
    recorded = flatten(Early())
    assert differences(recorded, counted(Late(filter=GrownFilter(gain=1.0))), NEUTRAL) == []
    assert differences(recorded, counted(Late(filter=GrownFilter(window="hann"))), NEUTRAL) == [
        "filter.gain was 1.0 and is 1.5",
        "filter.window was none and is hann",
    ]
    assert differences(
        recorded, flatten(Late(filter=GrownFilter(limit_db=0.0, gain=1.0))), NEUTRAL
    ) == ["filter.limit_db was null and is 0.0"]


def test_settings_that_were_recorded_while_off_agree_with_those_left_out() -> None:
    config = Late(filter=GrownFilter(gain=1.0))
    assert flatten(config) != counted(config)
    assert differences(flatten(config), counted(config), NEUTRAL) == []
    assert differences(counted(config), flatten(config), NEUTRAL) == []


def test_a_section_by_name_counts_though_all_of_it_is_off() -> None:
    empty = Late(filters={"a": GrownFilter(gain=1.0)})
    settings = counted(empty)
    assert settings["filters.a"] is True
    assert "filters.a was null and is true" in differences(counted(Late()), settings, NEUTRAL)
    assert "filters.a was true and is null" in differences(flatten(empty), flatten(Late()), NEUTRAL)
    assert differences(flatten(empty), settings, NEUTRAL) == []


def test_a_setting_that_is_never_off_must_be_recorded() -> None:
    recorded = {"filter.order": 4}
    assert differences(recorded, flatten(Early()), neutral_values(Early)) == [
        "filter.keep_edges was not recorded and is true"
    ]


def test_other_keys_count_unless_they_are_null() -> None:
    neutral = neutral_values(Early)
    assert differences({}, {"sha256": None}, neutral) == []
    assert differences({"sha256": "a"}, {"sha256": "b"}, neutral) == ["sha256 was a and is b"]
    assert differences({"sha256": "a"}, {}, neutral) == ["sha256 was a and is null"]


def test_a_nested_value_is_named_by_its_own_key() -> None:
    before, now = ({"data.encoder": {"name": "mfcc", "dim": dim}} for dim in (39, 80))
    assert differences(before, now, {}) == ["data.encoder.dim was 39 and is 80"]
    grown = {"data.encoder": {"name": "mfcc", "dim": 39, "codebook": None}}
    assert differences(before, grown, {}) == []


def test_values_are_compared_as_json_gives_them_back() -> None:
    assert differences({"a": [1, 2.0]}, {"a": (1.0, 2)}, {}) == []
    assert differences({"a": False}, {"a": None}, {"a": None}) == ["a was false and is null"]


@pytest.mark.parametrize("schema", [ExtractConfig, ConvertConfig, TrainConfig])
def test_neutral_values_are_what_the_settings_of_commands_can_be(schema: type) -> None:
    """All that is off by default leaves no trace; a True that is never off stays."""
    neutral, defaults = neutral_values(schema), flatten(schema())
    for key, value in defaults.items():
        off = value is None or value is False or value == []
        assert not off or neutral[key] in (value, None), key
        assert (key not in counted(schema())) or not off, key
    assert all(neutral[key] is not False for key, value in defaults.items() if value is True)


def test_every_bool_of_extract_is_off_where_it_is_false() -> None:
    """A bool whose False is not off would have to declare it; `bool | None` has None."""
    neutral = neutral_values(ExtractConfig)
    assert neutral["encoder.normalize_wav"] is None
    assert neutral["encoders.*.normalize_wav"] is None
    assert [key for key, value in neutral.items() if value is False] == [
        "f0.repair_octaves",
        "f0.interpolate",
        "encoder.int8",
        "encoders.*.int8",
    ]


def test_the_fingerprint_is_of_recorded_settings_as_they_are() -> None:
    config = load_config()
    assert fingerprint(counted(config)) != fingerprint(flatten(config))
    assert fingerprint({"b": 1, "a": [2]}) == fingerprint({"a": [2], "b": 1})
