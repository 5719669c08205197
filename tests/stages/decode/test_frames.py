"""Headers of frames of MPEG audio, AC-3 and ADTS, and the tags in MP3 files."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile as sf
from numpy.typing import NDArray

from stages.decode.frames import checksum_holds, crc16, frame_bytes, is_sync, mp3_tag
from tests.helpers.coded_audio import write_coded


def plain_crc16(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0xA001 if crc & 1 else crc >> 1
    return crc


@pytest.mark.parametrize("length", [0, 1, 9, 4095, 4096, 4097, 20_001])
def test_crc16_is_that_of_the_definition(length: int) -> None:
    data = np.random.default_rng(length).bytes(length)
    assert crc16(data) == plain_crc16(data)


def test_crc16_check_value() -> None:
    assert crc16(b"123456789") == 0xBB3D  # CRC-16/ARC


def tone(seconds: float = 2, rate: int = 44100) -> NDArray[np.float64]:
    return 0.3 * np.sin(np.arange(int(seconds * rate)) / 20)


def mp3(mode: str, rate: int = 44100) -> bytes:
    buffer = io.BytesIO()
    settings = {"bitrate_mode": mode, "compression_level": 0.5}
    sf.write(buffer, tone(2, rate), rate, format="MP3", **settings)
    return buffer.getvalue()


@pytest.mark.parametrize("rate", [44100, 48000, 22050, 8000])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_tag_of_lame(mode: str, rate: int) -> None:
    data = mp3(mode, rate)
    for before in (b"", b"ID3\x04\0\0\0\0\x02\0" + bytes(256)):
        whole = before + data
        tag = mp3_tag(lambda offset, count, whole=whole: whole[offset : offset + count])
        assert tag is not None and tag.gapless
        assert tag.num_samples == 2 * rate
    assert tag.music is not None
    assert checksum_holds(tag, lambda offset, count: whole[offset : offset + count])
    damaged = bytearray(whole)
    damaged[-100] ^= 1
    assert not checksum_holds(tag, lambda offset, count: bytes(damaged[offset : offset + count]))


def test_files_without_a_tag() -> None:
    for data in (b"", b"text" * 1000, b"\xff" * 1000, tone().tobytes()):
        assert mp3_tag(lambda offset, count, data=data: data[offset : offset + count]) is None


@pytest.mark.parametrize(
    ("suffix", "codec", "rate"),
    [
        *(("mp3", "libmp3lame", rate) for rate in (44100, 48000, 24000, 11025)),
        *(("mp2", "mp2", rate) for rate in (44100, 48000, 24000)),
        *(("ac3", "ac3", rate) for rate in (32000, 44100, 48000)),
        *(("eac3", "eac3", rate) for rate in (44100, 48000)),
        *(("aac", "aac", rate) for rate in (44100, 16000)),
    ],
)
def test_frames_state_the_size_that_ffmpeg_reads(
    suffix: str, codec: str, rate: int, tmp_path: Path
) -> None:
    path = write_coded(tmp_path / f"song.{suffix}", tone(2, rate), rate, codec)
    with av.open(path) as opened:
        packets = [bytes(packet) for packet in opened.demux(audio=0) if packet.size]
    assert len(packets) > 30
    for packet in packets:
        assert is_sync(packet)
        assert frame_bytes(packet[:8]) == len(packet)
