"""One opened file: what it states about itself, its samples, and the judgement of both.

Four kinds of evidence meet here: the bytes that a header declares, the fields of the container, the
structure with its checksums, and the faults that decoding meets.

Tested by tests/stages/decode/test_decoder.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from stages.decode.container import NO_LENGTH, AudioStream, Block, Faults, open_stream
from stages.decode.decoder import DecodeConfig, Header
from stages.decode.frames import Mp3Tag, checksum_holds, mp3_tag
from stages.decode.header_claims import Claim, is_tag, read_claim, skip_id3
from stages.decode.plain import open_plain, plain_blocks
from stages.decode.source import SourceFile
from stages.decode.structure import Read, Structure, check_matroska, check_ogg
from stages.errors import BadInput, Reason

MIN_RATE_HZ, MAX_RATE_HZ = 1000, 1_000_000
UNKNOWN_S = 0.1  # so much unknown data behind the audio may be audio
FRAME_TOLERANCE = 1  # frames by which tags of MP3 encoders differ: some count the tag's own
MP3_DECODER_DELAY = 529  # samples by which any decoder is late; taken off where no tag counts them
ASSUMED_BYTES_PER_S = 16000  # 128 kbit/s, for the estimate where nothing states a length
FLAC_RATIO = 0.6  # assumed compression, likewise
# First bytes of formats that FFmpeg does not know behind an ID3v2 tag
NO_ID3_BEFORE = (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM", b"caff", b".snd", b"riff", b"OggS")


@dataclass
class Song:
    """An opened audio file."""

    header: Header
    declared: int | None  # samples per channel, if the file states them
    read_blocks: Callable[[], Iterator[Block]]
    cfg: DecodeConfig
    notes: list[str]
    faults: Faults = field(default_factory=Faults)
    stream: AudioStream | None = None  # None for plain samples
    mp3: Mp3Tag | None = None
    skipped_bytes: Callable[[], int] = lambda: 0  # bytes that FFmpeg has skipped, after reading

    def judge(self, total: int) -> list[str]:
        """Compare `total` decoded samples per channel with all that the file states.

        Returns notes on what is odd about a song that can be used.

        Raises: BadInput: when the song is cut, damaged or empty.
        """
        faults = self.faults
        if total == 0:
            if faults:
                raise BadInput(Reason.UNREADABLE, f"nothing can be decoded: {faults}")
            raise BadInput(Reason.EMPTY, "it has a header and no samples")
        shortage = self._shortage(total)
        words = "; ".join([*([shortage] if shortage else []), *([f"{faults}"] if faults else [])])
        notes = [*self.notes, *self._surplus(total)]
        if faults and faults.audio_after:
            if self.cfg.damaged == "quarantine":
                raise BadInput(Reason.DAMAGED, words)
            notes.append(f"damaged: {words}; kept because decode.damaged is keep")
        elif shortage:
            raise BadInput(Reason.TRUNCATED, words)
        elif faults and (self.declared is not None or self._may_have_junk_behind()):
            notes.append("what follows the audio cannot be decoded, and is left out")
        elif faults:
            raise BadInput(Reason.TRUNCATED, f"it ends in {words}")
        return notes

    def _may_have_junk_behind(self) -> bool:
        """Tell whether the file is a bare stream of whole frames, behind which tags may lie."""
        return self.stream is not None and self.stream.is_framed and not self.stream.last_is_partial

    def _shortage(self, total: int) -> str | None:
        """Return in what way there is less than the file states, if there is."""
        if self.declared is not None and total < self.declared:
            return f"the header declares {self.declared} samples, the file has {total}"
        if self.stream is None:
            return None
        if self.mp3 and self.stream.packets < self.mp3.frames - FRAME_TOLERANCE:
            return f"its tag states {self.mp3.frames} frames, the file has {self.stream.packets}"
        return self.stream.shortage()

    def _surplus(self, total: int) -> Iterator[str]:
        """Yield notes on audio that the file does not state, and on bytes that are none."""
        if self.declared is not None and total > self.declared:
            yield f"its header states {self.declared} samples, all {total} are read"
        if self.stream is None:
            return
        yield from self.stream.notes
        if longer := self.stream.surplus():
            yield longer
        packets = self.stream.packets
        if self.mp3 and packets > self.mp3.frames + FRAME_TOLERANCE:
            yield f"its tag states {self.mp3.frames} frames, all {packets} are read"
        if self.stream.last_is_partial:
            yield "it ends inside a frame, so its end may be missing"
        if skipped := self.stream.stray_bytes or self.skipped_bytes():
            yield f"{skipped} of its bytes are no audio and left out"


@contextlib.contextmanager
def open_song(path: bytes, cfg: DecodeConfig, thorough: bool) -> Iterator[Song]:
    """Open an audio file; `thorough`: also check the structure and the checksums of all of it.

    Raises: BadInput: when the header shows that the file cannot be used.
    """
    with contextlib.closing(SourceFile(path)) as source:
        tags = skip_id3(source.read_at)
        begin = tags if tags and source.read_at(tags, 4) in NO_ID3_BEFORE else 0

        def read(offset: int, count: int) -> bytes:
            return source.read_at(begin + offset, count)

        size = source.size - begin
        claim = read_claim(read, size)
        if claim.contradiction:
            raise BadInput(Reason.UNSUPPORTED, claim.contradiction)
        if claim.shortage:
            raise BadInput(Reason.TRUNCATED, claim.shortage)
        if claim.num_samples == 0:
            raise BadInput(Reason.EMPTY, "it has a header and no samples")
        source.present(claim.prefix, begin + claim.start)
        if claim.by_libsndfile:
            with _open_plain(source, claim, cfg) as song:
                yield song
        else:
            with _open_container(source, claim, read, size, cfg, thorough) as song:
                yield song


@contextlib.contextmanager
def _open_plain(source: SourceFile, claim: Claim, cfg: DecodeConfig) -> Iterator[Song]:
    with open_plain(source) as sound:
        declared = claim.num_samples or sound.frames
        names = f"{sound.format} {sound.subtype}"
        header = Header(sound.samplerate, sound.channels, declared, names)
        _check_limits(header, exact=True, cfg=cfg)
        yield Song(
            header,
            declared,
            lambda: plain_blocks(source, sound),
            cfg,
            _notes_on_claim(claim, header.sample_rate),
        )


@contextlib.contextmanager
def _open_container(
    source: SourceFile, claim: Claim, read: Read, size: int, cfg: DecodeConfig, thorough: bool
) -> Iterator[Song]:
    structure = _structure(read, size) if thorough else Structure()
    if structure.cut:
        raise BadInput(Reason.TRUNCATED, f"the file {structure.cut}")
    with open_stream(source, claim.num_bytes > 0, structure.one_page) as stream:
        declared = stream.stated_samples() if claim.num_samples is None else claim.num_samples
        tag = mp3_tag(read) if stream.name == "mp3" else None
        header = _header(stream, declared, tag, read, size)
        _check_limits(header, exact=declared is not None, cfg=cfg)
        notes = _notes_on_claim(claim, header.sample_rate)
        if stream.name in NO_LENGTH:
            notes.append(f"the format {stream.name} states no length, so a cut may go unnoticed")
        if structure.joined > 1:
            notes.append(f"it is {structure.joined} files joined, all of them read")
        if thorough and tag and not checksum_holds(tag, read):
            notes.append(
                "its audio does not match the checksum in its LAME tag: it was edited after "
                "encoding, or is damaged"
            )
        if structure.damage:
            seconds = structure.damage.fraction * header.duration_s
            stream.faults.add(seconds, f"{structure.damage.words}, about")

        skip = MP3_DECODER_DELAY if stream.codec == "mp3" and not (tag and tag.gapless) else 0
        end = tag.num_samples if tag and tag.gapless else None
        if (stream.name, stream.codec) == ("ogg", "vorbis") and structure.joined == 1:
            end = header.num_samples

        def skipped_bytes() -> int:
            last = stream.end_byte
            if last is None or is_tag(read(last, 8)) or not any(read(last, 4096)):
                return 0
            return max(0, size - last)

        yield Song(
            header,
            declared,
            lambda: stream.blocks(cfg.damaged == "keep", skip, end),
            cfg,
            notes,
            stream.faults,
            stream,
            tag,
            skipped_bytes,
        )


def _structure(read: Read, size: int) -> Structure:
    magic = read(0, 4)
    if magic == b"OggS":
        return check_ogg(read, size)
    if magic == b"\x1a\x45\xdf\xa3":
        return check_matroska(read, size)
    return Structure()


def _header(
    stream: AudioStream, declared: int | None, tag: Mp3Tag | None, read: Read, size: int
) -> Header:
    """Return the header of a container; its length is an estimate where none is declared."""
    rate, channels = stream.sample_rate, stream.channels
    opus_pre_skip = 0
    if (stream.name, stream.codec) == ("ogg", "opus") and b"OpusHead" in (head := read(0, 4096)):
        at = head.index(b"OpusHead") + 10
        opus_pre_skip = int.from_bytes(head[at : at + 2], "little")
    if declared is not None:
        length = declared
    elif tag:
        length = tag.num_samples
    elif stream.stated_s:
        length = round(stream.stated_s * rate) - opus_pre_skip
    elif stream.codec == "flac":
        length = int(size / (2 * channels * FLAC_RATIO))
    else:
        length = size * rate // ASSUMED_BYTES_PER_S
    return Header(rate, channels, length, stream.format)


def _check_limits(header: Header, exact: bool, cfg: DecodeConfig) -> None:
    if header.channels > cfg.max_channels:
        raise BadInput(
            Reason.TOO_MANY_CHANNELS,
            f"it has {header.channels} channels; decode.max_channels is {cfg.max_channels}",
        )
    if not MIN_RATE_HZ <= header.sample_rate <= MAX_RATE_HZ:
        raise BadInput(Reason.UNSUPPORTED, f"its sample rate is {header.sample_rate} Hz")
    if exact:  # a song is not refused for an estimate
        check_duration(header.duration_s, cfg)


def check_duration(seconds: float, cfg: DecodeConfig) -> None:
    """Refuse a song that is longer than the limit.

    Raises: BadInput: when it is.
    """
    if seconds > cfg.max_hours * 3600:
        raise BadInput(
            Reason.TOO_LONG,
            f"it lasts {seconds / 3600:.2f} hours or more; decode.max_hours is {cfg.max_hours:g}",
        )


def _notes_on_claim(claim: Claim, sample_rate: int) -> list[str]:
    """Return notes on bytes behind the audio.

    Raises: BadInput: when they may be audio that the header leaves out.
    """
    if not claim.unknown_bytes:
        return []
    if claim.frame_bytes and claim.unknown_bytes / claim.frame_bytes > UNKNOWN_S * sample_rate:
        raise BadInput(
            Reason.TRUNCATED,
            f"the header declares {claim.num_samples} samples, and {claim.unknown_bytes} bytes "
            "that are no chunk follow them; the header may be older than the audio",
        )
    return [f"{claim.unknown_bytes} bytes behind the audio are unknown and left out"]
