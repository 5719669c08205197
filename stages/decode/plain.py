"""Uncompressed samples in WAVE and AIFF files, read with libsndfile.

FFmpeg misreads big-endian WAVE (RIFX) and 24 bits in blocks of 32, and stops at AIFF and RF64
headers whose writer could not seek back; libsndfile reads all of them.

Tested by tests/stages/decode/test_decoder.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import soundfile

from stages.decode.container import BLOCK_SAMPLES, Block
from stages.decode.source import SourceFile
from stages.errors import BadInput, Reason

SFE_MALLOC_FAILED = 17
SF_UNSUPPORTED_ENCODING = 4


class PlainSound(soundfile.SoundFile):  # type: ignore[misc]
    """A SoundFile that is read once, from start to end: soundfile seeks after every other read."""

    def seekable(self) -> bool:
        return False


@contextlib.contextmanager
def open_plain(source: SourceFile) -> Iterator[PlainSound]:
    """Open the view that `source` presents.

    Raises: BadInput: when libsndfile cannot read it; OSError: when the storage fails.
    """
    try:
        sound = PlainSound(source)
    except soundfile.LibsndfileError as error:
        source.check()
        raise _unreadable(error) from None
    with sound:
        source.check()
        yield sound


def plain_blocks(source: SourceFile, sound: PlainSound) -> Iterator[Block]:
    """Yield the samples as float32 blocks (T, C). A block is valid until the next one.

    Raises: BadInput: when libsndfile cannot read on; OSError: when the storage fails.
    """
    count = size = max(1, BLOCK_SAMPLES * 2 // sound.channels)
    buffer = np.empty((size, sound.channels), np.float32)
    view = buffer.data.cast("B")
    while count == size:
        try:
            count = sound.buffer_read_into(view, "float32")
        except soundfile.LibsndfileError as error:
            source.check()
            raise _unreadable(error) from None
        source.check()
        if count:
            yield buffer[:count]


def _unreadable(error: soundfile.LibsndfileError) -> Exception:
    if error.code == SFE_MALLOC_FAILED:
        return MemoryError()
    reason = Reason.UNSUPPORTED if error.code == SF_UNSUPPORTED_ENCODING else Reason.UNREADABLE
    return BadInput(reason, f"libsndfile: {error.error_string}")
