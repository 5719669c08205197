"""Declarations of measures and limits; columns, settings and documentation follow from them.

Tested by tests/stages/quality/test_config.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Subject = TypeVar("Subject")


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A setting `quality.<key>` beyond which clips are left out; None keeps all.

    key: "min_..." leaves out smaller values, "max_..." larger ones.
    lowest, highest: what it may be set to.
    below: key of another limit that must be larger, where both are set.
    """

    key: str
    lowest: float = -math.inf
    highest: float = math.inf
    below: str | None = None

    def excludes(self, value: float, limit: float) -> bool:
        """Tell whether a clip of this value is left out at this limit."""
        return value < limit if self.key.startswith("min_") else value > limit

    def check(self, limit: float) -> None:
        """Raises: ValueError: when the setting cannot have this value."""
        if not (self.lowest <= limit <= self.highest and math.isfinite(limit)):
            raise ValueError(f"quality.{self.key} must {self._range()}, not {limit}")

    def _range(self) -> str:
        if math.isfinite(self.highest):
            return f"lie between {self.lowest:g} and {self.highest:g}"
        if math.isfinite(self.lowest):
            return f"be {self.lowest:g} or more"
        return "be a finite number"


@dataclass(frozen=True, kw_only=True)
class Measure(Generic[Subject]):
    """A number that says something about a clip; finite for every clip.

    name: the column in shards. unit: "" where there is none. meaning: a phrase for people.
    reason: the word in ledgers and reports for clips that its limits leave out.
    since: the first schema version that has it.
    measure: its value for a clip. It must not depend on the clip's level, since songs change level
      before clips exist.
    stored: whether it is a column; else it serves for its limits alone.
    changed: the first schema version with this `measure`, where earlier ones had `earlier`: a
      dataset keeps the values of its version.
    """

    name: str
    unit: str
    meaning: str
    reason: str
    since: int
    measure: Callable[[Subject], float]
    limits: tuple[Limit, ...] = ()
    stored: bool = True
    changed: int | None = None
    earlier: Callable[[Subject], float] | None = None

    def revision(self, version: int) -> int:
        """Return the schema version that the measure's values of `version` go back to."""
        if self.changed is not None and version >= self.changed:
            return self.changed
        return self.since

    def value(self, clip: Subject, version: int | None = None) -> float:
        """Return the value for a clip, as a schema version has it. None: the present one."""
        measure = self.measure
        if self.earlier is not None and version is not None and version < (self.changed or 0):
            measure = self.earlier
        return float(measure(clip))


def measure_all(
    measures: Sequence[Measure[Subject]], clip: Subject, version: int | None = None
) -> dict[str, float]:
    """Return the values of a clip by name, as a schema version has them."""
    return {measure.name: measure.value(clip, version) for measure in measures}


def first_beyond(
    measures: Sequence[Measure[Any]], values: Mapping[str, float], config: object
) -> str | None:
    """Return the reason of the first measure beyond a limit; None where all are within.

    config: has the limits as attributes, by key.
    """
    for measure in measures:
        for limit in measure.limits:
            setting = getattr(config, limit.key)
            if setting is not None and limit.excludes(values[measure.name], setting):
                return measure.reason
    return None
