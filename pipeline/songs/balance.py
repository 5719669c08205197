"""The balance of a run: planned songs against the latest entry of each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

KEPT, FILTERED, QUARANTINED = "kept", "filtered", "quarantined"


class Fate(Protocol):
    """What every entry of a ledger says of its song."""

    @property
    def status(self) -> str: ...
    @property
    def reason(self) -> str | None: ...


E = TypeVar("E", bound=Fate)


@dataclass
class Balance(Generic[E]):
    """The latest entry of every song, and what does not balance."""

    planned: int = 0
    entries: dict[str, E] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def count(self, status: str) -> int:
        return sum(entry.status == status for entry in self.entries.values())

    def reasons(self, status: str) -> Counter[str]:
        return Counter(
            entry.reason or "" for entry in self.entries.values() if entry.status == status
        )
