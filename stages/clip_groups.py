"""Clips in groups, so that a long song's clips are not all held decoded at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from stages.types import Array

_GROUP_S = 600.0


def in_groups(clips: Iterable[Array], sample_rate: int) -> Iterator[list[Array]]:
    """Clips (T,), in order, about ten minutes of audio at a time."""
    group: list[Array] = []
    for clip in clips:
        group.append(clip)
        if sum(map(len, group)) > _GROUP_S * sample_rate:
            yield group
            group = []
    if group:
        yield group
