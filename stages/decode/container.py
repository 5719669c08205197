"""The audio of any container, read with FFmpeg (PyAV), and the faults that show on the way.

FFmpeg gets one open file. It may use only the demuxers listed here and no protocol, so a playlist
or a script in disguise cannot make it open other files. What a file states about its length comes
from the container's fields; damage comes from packet flags, decoding errors and checksums.

Tested by tests/stages/decode/test_odd_files.py, tests/stages/decode/test_decoder.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import av.error
import av.logging
import numpy as np
from numpy.typing import NDArray

from stages.decode.frames import frame_bytes, is_sync
from stages.decode.header_claims import is_tag
from stages.decode.source import SourceFile
from stages.errors import BadInput, Reason

Block = NDArray[np.float32]  # (T, C)

# FFmpeg's names of the demuxers of audio and video files
DEMUXERS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,avr,caf,dsf,dts,dtshd,eac3,epaf,flac,flv,gsm,iff,"
    "ircam,loas,matroska,mlp,mov,mp3,mpc,mpc8,mpeg,mpegts,nistsphere,ogg,oma,pvf,rm,shn,sox,tak,"
    "truehd,tta,voc,w64,wav,wsd,wv,xwma"
)
# Report wrong checksums and broken bitstreams as errors, instead of guessing the audio.
STRICT = "crccheck+bitstream+buffer+explode"
BLOCK_SAMPLES = 1 << 16  # per channel; blocks have at least so many, but for the last
MAX_PADDING = 8192  # samples: the longest block of Vorbis
GAP_S = 0.05  # a jump of the time stamps that deserves a note
MAX_FILLED_S = 600.0  # silence that one gap is filled with at most

# Containers whose duration field counts the samples
EXACT = frozenset("flac wv tta ape tak nistsphere shn".split())
# Containers whose duration field is rounded, or includes the delay of the codec
ROUNDED = frozenset("mov matroska asf flv avi mpc mpc8 dsf".split())
ROUNDED_TOLERANCE_S = 0.5
# Streams of frames that state their size
FRAMED = frozenset("mp3 aac ac3 eac3".split())
# Formats without a length and without frames that state theirs: a cut may not be noticed
NO_LENGTH = frozenset("ircam pvf epaf mpegts mpeg".split())


@dataclass
class Faults:
    """Damage of one file, in the order in which decoding meets it."""

    first: tuple[float, str] | None = None  # seconds, description
    count: int = 0
    audio_after: bool = False  # audio follows the last fault, so the file is not just cut

    def add(self, seconds: float, words: str) -> None:
        self.first = self.first or (seconds, words)
        self.count += 1
        self.audio_after = False

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        if self.first is None:
            return "none"
        others = f" (and {self.count - 1} more)" if self.count > 1 else ""
        return f"{self.first[1]} at {self.first[0]:.2f} s{others}"


class AudioStream:
    """The first audio stream of an opened file. `faults` and `notes` fill up while it is read."""

    def __init__(self, container: Any, complete: bool) -> None:
        if not container.streams.audio:
            kinds = " and ".join(sorted({stream.type for stream in container.streams}))
            raise BadInput(Reason.UNREADABLE, f"it has no sound, only {kinds or 'an empty header'}")
        self._container = container
        self._stream = container.streams.audio[0]
        codec = self._stream.codec_context
        if codec is None:
            raise BadInput(Reason.UNSUPPORTED, "FFmpeg has no decoder for its audio")
        self.name: str = container.format.name.partition(",")[0]
        self.codec: str = codec.codec.canonical_name
        self.sample_rate: int = codec.sample_rate
        self.channels: int = codec.channels
        self._complete = complete
        self.faults = Faults()
        self.notes: list[str] = []
        if (streams := len(container.streams.audio)) > 1:
            self.notes.append(f"it has {streams} audio streams; the first is read")
        self.packets = 0
        self.end_byte: int | None = None  # behind the last packet; too low if bytes were skipped
        self.stray_bytes = 0  # behind the last frame
        self.last_is_partial = False  # the last packet is shorter than its frame header states
        self._total = 0  # samples yielded or waiting
        self._end_s = 0.0  # end of the last packet of any stream, by the container's clock
        start = self._stream.start_time
        # time stamp at which the next frame should start
        self._clock_s = None if start is None else float(start * self._stream.time_base)
        self._jumps = 0

    @property
    def format(self) -> str:
        names = self.codec if self.codec == self.name else f"{self.name} {self.codec}"
        return names.upper()

    @property
    def is_framed(self) -> bool:
        """Tell whether the file is nothing but frames, which state their sizes."""
        return self.name in FRAMED

    @property
    def stated_s(self) -> float | None:
        """Duration that the container states or FFmpeg estimates, in seconds."""
        stream, container = self._stream, self._container
        if stream.duration:
            return float(stream.duration * stream.time_base)
        return container.duration / av.time_base if container.duration else None

    def stated_samples(self) -> int | None:
        """Return the exact number of samples per channel that the container states, if it does."""
        if self.name not in EXACT or self.stated_s is None:
            return None
        return round(self.stated_s * self.sample_rate)

    def shortage(self) -> str | None:
        """Return, after reading, in what way the container's tables promise more than was there."""
        if self.name not in ROUNDED or self.stated_s is None:
            return None
        reached = max(self._end_s, self._total / self.sample_rate)
        stated_packets = self._stream.frames if self.name == "mov" else 0
        if self.packets < stated_packets and reached < self.stated_s - 0.005:
            return f"its index lists {stated_packets} packets, the file has {self.packets}"
        if reached < self.stated_s - ROUNDED_TOLERANCE_S:
            return f"its header states {self.stated_s:.2f} s, the file has {reached:.2f} s"
        return None

    def surplus(self) -> str | None:
        """Return, after reading, that there was much more audio than the container states."""
        seconds = self._total / self.sample_rate
        if self.is_framed or self.name in EXACT | NO_LENGTH | {"ogg"} or not self.stated_s:
            return None  # compared otherwise, or an estimate of FFmpeg's
        if seconds < self.stated_s + ROUNDED_TOLERANCE_S:
            return None
        return f"its header states {self.stated_s:.2f} s, all {seconds:.2f} s are read"

    def blocks(self, fill_gaps: bool, skip: int = 0, end: int | None = None) -> Iterator[Block]:
        """Yield all samples as float32 blocks (T, C).

        fill_gaps: put silence where damage took audio away, as long as the time stamps tell.
        skip: samples to leave out at the start. end: number of samples, if FFmpeg may decode a few
        more, which the encoder added.

        Raises: BadInput: when the sample rate changes on the way; OSError: when the storage fails.
        """
        waiting: list[Block] = []
        samples = 0
        for frame in self._frames():
            if frame.sample_rate != self.sample_rate:
                raise BadInput(
                    Reason.UNSUPPORTED,
                    f"its sample rate changes from {self.sample_rate} to {frame.sample_rate} Hz "
                    f"at {self._total / self.sample_rate:.2f} s; convert it to one rate first",
                )
            parts = [as_float(frame)[skip:]]
            skip = max(0, skip - frame.samples)
            channels = parts[0].shape[1]
            if (gap := self._gap(frame)) and fill_gaps and self.faults:
                parts.insert(0, np.zeros((gap, channels), np.float32))
            if waiting and (samples >= BLOCK_SAMPLES or channels != waiting[0].shape[1]):
                yield np.concatenate(waiting)
                waiting, samples = [], 0
            waiting += parts
            count = sum(map(len, parts))
            samples += count
            self._total += count
        if waiting:
            last = np.concatenate(waiting)
            surplus = 0 if end is None else self._total - end
            yield last[:-surplus] if 0 < surplus < min(len(last), MAX_PADDING) else last
        if self._jumps and not self.faults:
            self.notes.append(f"the audio is joined where its time stamps jump ({self._jumps} x)")

    def _frames(self) -> Iterator[Any]:
        with av.logging.Capture() as complaints:
            for packet in self._demuxed():
                if packet.pts is not None and packet.time_base is not None:
                    end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                    self._end_s = max(self._end_s, end)
                if packet.stream is not self._stream:
                    continue
                if packet.size:
                    if self.is_framed and not self._is_frame(packet):
                        continue
                    self.packets += 1
                complaints.clear()
                faults = self.faults.count
                yield from self._decoded(packet)
                if complaints and self.faults.count == faults:
                    # Some decoders report damage to the log only, and guess the audio.
                    self._fault("damaged audio")
                if packet.is_corrupt and not self._complete:
                    self._fault("an incomplete packet")

    def _decoded(self, packet: Any) -> Iterator[Any]:
        try:
            frames = packet.decode()
        except av.error.EOFError:
            return
        except av.error.MemoryError:
            raise
        except av.error.FFmpegError:
            if not is_tag(bytes(packet)[:8]):
                self._fault("undecodable audio")
            return
        for frame in frames:
            if frame.samples:
                yield frame
                self.faults.audio_after |= packet.size > 0

    def _is_frame(self, packet: Any) -> bool:
        """Compare a packet with its frame header.

        FFmpeg adds stray bytes to the frame before them, or gives packets of nothing else.
        """
        self.end_byte = None if packet.pos is None else packet.pos + packet.size
        data = bytes(packet)
        if is_tag(data):  # a frame may follow it in the packet
            return True
        if not is_sync(data):
            self.stray_bytes += len(data) if any(data) else 0
            return False
        if self.packets and (self.stray_bytes or self.last_is_partial):
            self._fault("bytes that are no frame" if self.stray_bytes else "half a frame")
        expected = frame_bytes(data[:8]) or len(data)
        stray = data[expected:]
        self.stray_bytes = 0 if is_tag(stray) or not any(stray) else len(stray)
        self.last_is_partial = len(data) < expected
        return True

    def _demuxed(self) -> Iterator[Any]:
        try:
            yield from self._container.demux()
        except av.error.MemoryError:
            raise
        except av.error.FFmpegError:
            self._fault("an unreadable packet")

    def _fault(self, words: str) -> None:
        self.faults.add(self._total / self.sample_rate, words)

    def _gap(self, frame: Any) -> int:
        """Return the samples between the end of the last frame and the start of this one."""
        if frame.pts is None:
            return 0
        start = float(frame.pts * frame.time_base)
        gap_s = 0.0 if self._clock_s is None else start - self._clock_s
        self._clock_s = start + frame.samples / frame.sample_rate
        if gap_s < GAP_S:
            return 0
        if self._total or self.name == "mov":  # only MP4 states the start to the sample
            self._jumps += 1
        gap = min(gap_s, MAX_FILLED_S) * self.sample_rate
        return round(gap)


@contextlib.contextmanager
def open_stream(
    source: SourceFile, complete: bool = False, one_page: bool = False
) -> Iterator[AudioStream]:
    """Open the first audio stream of a file.

    complete: all bytes that its header states are there, whatever FFmpeg thinks of its last packet.
    one_page: it is an Ogg file with all audio in one page.

    Raises: BadInput: when FFmpeg does not know the format, or there is no audio.
    """
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    options = {
        "format_whitelist": DEMUXERS,
        "protocol_whitelist": "none",
        "err_detect": STRICT,
    }
    try:
        container = av.open(source, options=options, metadata_errors="replace")
    except av.error.MemoryError:
        raise
    except av.error.FFmpegError:
        words = "no known audio format, or its header is damaged"
        raise BadInput(Reason.UNREADABLE, words) from None
    with contextlib.closing(container):
        stream = AudioStream(container, complete)
        codec = stream._stream.codec_context
        codec.thread_count = 1
        codec.options = {"err_detect": STRICT}
        alac_in_caf = (stream.name, stream.codec) == ("caf", "alac")  # its last frame is short
        if alac_in_caf or (one_page and stream.codec == "vorbis"):
            codec.options |= {"flags2": "+skip_manual"}  # else FFmpeg takes too much off the end
        yield stream


def as_float(frame: Any) -> Block:
    """Return the samples of a frame as float32 (T, C), full scale at 1."""
    samples: NDArray[Any] = frame.to_ndarray()
    samples = samples.T if frame.format.is_planar else samples.reshape(frame.samples, -1)
    floats: Block = samples.astype(np.float32)
    if samples.dtype == np.uint8:
        floats -= 128
        floats *= np.float32(1 / 128)
    if samples.dtype.kind == "i":
        floats *= np.float32(2.0 ** (1 - 8 * samples.dtype.itemsize))
    return floats
