"""Groups of clips, so that the clips of a long song are not all in memory at once.

Tested by tests/stages/test_units.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from stages.types import Array

_GROUP_S = 600.0


def in_groups(clips: Iterable[Array], sample_rate: int) -> Iterator[list[Array]]:
    """Yield the clips (T,) in order, in groups of about ten minutes of audio."""
    group: list[Array] = []
    for clip in clips:
        group.append(clip)
        if sum(map(len, group)) > _GROUP_S * sample_rate:
            yield group
            group = []
    if group:
        yield group
