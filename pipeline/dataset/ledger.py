"""The ledger: one entry for every song, in the footer of the shard that its task wrote.

Tested by tests/pipeline/extract/test_command.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipeline.songs.balance import FILTERED, KEPT, QUARANTINED
from stages.errors import BadInput, Dropped

if TYPE_CHECKING:
    from pipeline.songs.plan import PlannedSong
    from stages.chain import PreparedSong


@dataclass(frozen=True)
class SongEntry:
    """The outcome of one song. Seconds are of the resampled song."""

    song_id: str
    speaker: str
    status: str  # kept | filtered | quarantined
    reason: str | None
    detail: str | None
    clips: int
    duration_s: float
    kept_s: float
    dropped: list[Dropped]
    size: int
    mtime_ns: int
    sha256: str | None  # of the source file; None when it could not be read
    source: str | None  # "44100 Hz, 2 ch, FLAC"

    @staticmethod
    def from_dict(values: dict[str, Any]) -> SongEntry:
        dropped = [Dropped(d["reason"], d["clips"], d["seconds"]) for d in values["dropped"]]
        return SongEntry(**{**values, "dropped": dropped})


def prepared_entry(planned: PlannedSong, song: PreparedSong, sha256: str | None) -> SongEntry:
    """Return the entry of a song that was read: kept, or filtered when it has no clips.

    sha256: hash of its file.
    """
    reason, why = (None, "") if song.clips else song.why_empty()
    detail = "; ".join(filter(None, (why, song.note))) or None
    kept_samples = sum(clip.span.stop - clip.span.start for clip in song.clips)
    header = song.header
    return SongEntry(
        planned.song_id,
        planned.speaker,
        KEPT if song.clips else FILTERED,
        reason,
        detail,
        clips=len(song.clips),
        duration_s=song.duration_s,
        kept_s=kept_samples / song.sample_rate,
        dropped=song.dropped,
        size=planned.size,
        mtime_ns=planned.mtime_ns,
        sha256=sha256,
        source=f"{header.sample_rate} Hz, {header.channels} ch, {header.format}",
    )


def quarantined_entry(planned: PlannedSong, fault: BadInput, sha256: str | None) -> SongEntry:
    """Return the entry of a song that cannot be used. sha256: hash of its file, if readable."""
    return SongEntry(
        planned.song_id,
        planned.speaker,
        QUARANTINED,
        fault.reason,
        fault.detail,
        clips=0,
        duration_s=0.0,
        kept_s=0.0,
        dropped=[],
        size=planned.size,
        mtime_ns=planned.mtime_ns,
        sha256=sha256,
        source=None,
    )


def entry_record(entry: SongEntry) -> dict[str, Any]:
    """Return a flat row for the exported table."""
    record = asdict(entry)
    record["dropped"] = "; ".join(f"{d.reason} {d.seconds:.2f} s" for d in entry.dropped)
    return record
