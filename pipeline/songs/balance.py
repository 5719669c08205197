"""The balance of a run: planned songs against the latest ledger entry of each.

Tested by tests/pipeline/extract/test_command.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

KEPT, FILTERED, QUARANTINED = "kept", "filtered", "quarantined"


class Entry(Protocol):
    """An entry of a ledger: the status of a song, and the reason for it."""

    @property
    def status(self) -> str: ...
    @property
    def reason(self) -> str | None: ...


E = TypeVar("E", bound=Entry)


@dataclass
class Balance(Generic[E]):
    """The latest entry of every song, and the problems in the account."""

    planned: int = 0
    entries: dict[str, E] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def count(self, status: str) -> int:
        return sum(entry.status == status for entry in self.entries.values())

    def reasons(self, status: str) -> Counter[str]:
        return Counter(
            entry.reason or "" for entry in self.entries.values() if entry.status == status
        )
