"""What became of every song: one entry each, in the footer of the shard that its task wrote.

`settle` is where a song's own faults (`BadInput`) end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipeline.songs.balance import FILTERED, KEPT, QUARANTINED
from pipeline.songs.source_file import check_unchanged
from stages.errors import BadInput, Dropped, Reason

if TYPE_CHECKING:
    from pipeline.songs.plan import PlannedSong
    from stages.chain import PreparedSong


@dataclass(frozen=True)
class SongEntry:
    """What became of one song. Seconds are of the resampled song."""

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
        dropped = [
            Dropped(Reason(d["reason"]), d["clips"], d["seconds"]) for d in values["dropped"]
        ]
        return SongEntry(**{**values, "dropped": dropped})


def settle(
    planned: PlannedSong, path: bytes, prepare: Callable[[bytes], PreparedSong]
) -> tuple[PreparedSong | None, SongEntry]:
    """Run `prepare` on a song and write its entry; the song is None when nothing was kept.

    Raises: whatever is not the song's own fault.
    """
    sha256 = None
    try:
        sha256 = check_unchanged(planned, path)
        song = prepare(path)
    except BadInput as fault:
        return None, quarantine(planned, fault, sha256)
    reason, detail = (None, song.note or None) if song.clips else song.why_empty()
    kept_samples = sum(clip.span.stop - clip.span.start for clip in song.clips)
    header = song.header
    entry = SongEntry(
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
    return (song if song.clips else None), entry


def quarantine(planned: PlannedSong, fault: BadInput, sha256: str | None) -> SongEntry:
    """The entry of a song that is at fault. sha256: of its file, if that could be read."""
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
    """A flat row for the exported table."""
    record = asdict(entry)
    record["dropped"] = "; ".join(f"{d.reason} {d.seconds:.2f} s" for d in entry.dropped)
    return record
