"""Decoding: good files exactly, bad ones with a reason, and the worker survives."""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import itertools
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import soundfile as sf
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stages.decode import DecodeConfig, Decoder, Header
from stages.decode.container import open_stream
from stages.decode.frames import mpeg_frame
from stages.decode.source import SourceFile
from stages.errors import BadInput, Reason
from stages.resample import ResampleConfig, resample
from tests.helpers.coded_audio import write_coded
from tests.helpers.zoo import make_zoo, sung

RATE = 44100
NATIVE = ResampleConfig()
BLOCK = 1 << 17  # values the child reads at once; songs here are longer where that matters


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def decoder(scratch: Path) -> Iterator[Decoder]:
    with Decoder(DecodeConfig(), scratch) as decoder:
        yield decoder


def song(samples: int = 30_000, channels: int = 1, seed: int = 0) -> NDArray[np.float32]:
    """(T, C) noise-like floats that 8 bits and more can tell from each other."""
    rng = np.random.default_rng(seed)
    return (0.2 * rng.standard_normal((samples, channels))).clip(-1, 0.99).astype(np.float32)


def encoded(
    wav: NDArray[np.float32], rate: int = RATE, subtype: str = "PCM_16", kind: str = "WAV"
) -> bytes:
    buffer = io.BytesIO()
    with sf.SoundFile(buffer, "w", rate, wav.shape[1], subtype, format=kind) as file:
        for start in range(0, len(wav), rate):
            file.write(wav[start : start + rate])
    return buffer.getvalue()


def put(folder: Path, data: bytes, name: str = "song.bin") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def decoded(decoder: Decoder, path: Path | bytes) -> NDArray[np.float32]:
    """Decode all samples at the file's own rate, with checks that hold for every file."""
    header = decoder.probe(path)
    with decoder.decode(path, header.sample_rate, NATIVE) as result:
        wav = result.wav[0 : len(result.wav)]
        assert len(wav) == len(result.wav) == result.source_samples
        scratch_file = result.wav.path
    assert not scratch_file.exists()
    return wav


def refusal(decoder: Decoder, path: Path | bytes | str) -> BadInput:
    """Return the error that decoding raises, and check that scratch is empty."""
    with pytest.raises(BadInput) as caught:
        decoder.decode(path, RATE, NATIVE)
    assert not list(decoder.scratch.glob("song-*"))
    return caught.value


def child_of(decoder: Decoder) -> psutil.Process:
    return psutil.Process(decoder.child_pid)


# ---- good files ---------------------------------------------------------------------------------

SUBTYPES = [
    *(("WAV", s) for s in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")),
    *(("WAV", s) for s in ("ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM", "GSM610")),
    *(("WAVEX", s) for s in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")),
    *(("RF64", s) for s in ("PCM_16", "PCM_24", "FLOAT")),
    *(("W64", s) for s in ("PCM_16", "PCM_24", "FLOAT", "IMA_ADPCM")),
    *(("AIFF", s) for s in ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")),
    *(("AIFF", s) for s in ("ULAW", "ALAW", "IMA_ADPCM")),
    *(("AU", s) for s in ("PCM_16", "PCM_24", "FLOAT", "ULAW", "G721_32")),
    *(("CAF", s) for s in ("PCM_16", "PCM_24", "FLOAT", "ALAC_16", "ALAC_24")),
    *(("FLAC", s) for s in ("PCM_S8", "PCM_16", "PCM_24")),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]


# Decoders of these codecs round differently.
TOLERANCES = {"VORBIS": 1e-6, "OPUS": 2e-3, "MPEG_LAYER_III": 1e-4}
# Libraries predict samples of ADPCM from rounded ones: both are compared with the original.
ROUNDED = {("WAV", "MS_ADPCM"), ("AIFF", "IMA_ADPCM")}


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("kind", "subtype"), SUBTYPES)
def test_every_format_decodes_to_what_libsndfile_reads(
    kind: str, subtype: str, channels: int, decoder: Decoder, tmp_path: Path
) -> None:
    if channels == 2 and subtype in ("GSM610", "G721_32"):
        pytest.skip("mono by definition")
    rate = 48000 if subtype == "OPUS" else RATE
    original = song(BLOCK + 12_345, channels)
    path = put(tmp_path, encoded(original, rate, subtype, kind))
    reference = sf.read(path, dtype="float32", always_2d=True)[0].mean(axis=1)
    got = decoded(decoder, path)
    if (kind, subtype) in ROUNDED:
        assert len(got) == len(reference)
        original = original.mean(axis=1)
        errors = [np.square(wav[: len(original)] - original).mean() for wav in (got, reference)]
        assert errors[0] <= 1.1 * errors[1]
    else:
        if subtype == "GSM610":  # libsndfile states a block more than there is
            assert len(reference) - len(got) in (0, 320)
        # libsndfile writes noise into the end of 24-bit ALAC
        compared = min(len(got), len(reference)) - (64 if subtype == "ALAC_24" else 0)
        tolerance = TOLERANCES.get(subtype, 0)
        np.testing.assert_allclose(got[:compared], reference[:compared], rtol=0, atol=tolerance)
    header = decoder.probe(path)
    assert (header.sample_rate, header.channels) == (rate, channels)


@pytest.mark.parametrize(
    ("kind", "subtype", "rate"),
    [
        *(("WAV", "PCM_16", rate) for rate in (8000, 11025, 96000, 192_000, 384_000)),
        *(("FLAC", "PCM_24", rate) for rate in (8000, 192_000, 384_000)),
        *(("MP3", "MPEG_LAYER_III", rate) for rate in (8000, 22050, 48000)),
        *(("OGG", "VORBIS", rate) for rate in (8000, 96000)),
        *(("OGG", "OPUS", rate) for rate in (8000, 16000, 24000)),
    ],
)
def test_rates(kind: str, subtype: str, rate: int, decoder: Decoder, tmp_path: Path) -> None:
    path = put(tmp_path, encoded(song(rate), rate, subtype, kind))
    assert decoder.probe(path).duration_s == 1.0
    decoded_rate = 48000 if subtype == "OPUS" else rate  # RFC 7845: the header's is informative
    assert len(decoded(decoder, path)) == decoded_rate


@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16")])
def test_six_channels_are_mixed_by_mean_or_the_first_is_taken(
    kind: str, subtype: str, decoder: Decoder, tmp_path: Path, scratch: Path
) -> None:
    wav = song(50_000, 6)
    path = put(tmp_path, encoded(wav, RATE, subtype, kind))
    read = sf.read(path, dtype="float32")[0]
    np.testing.assert_allclose(decoded(decoder, path), read.mean(axis=1), atol=2e-7)
    with Decoder(DecodeConfig(channels="first"), scratch) as first:
        np.testing.assert_array_equal(decoded(first, path), read[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "target"), [(48000, 44100), (44100, 16000), (8000, 44100)])
@pytest.mark.parametrize("backend", ["soxr", "torchaudio"])
def test_resampling_is_that_of_the_resample_stage(
    backend: str, rate: int, target: int, decoder: Decoder, tmp_path: Path
) -> None:
    cfg = ResampleConfig(backend=backend)  # type: ignore[arg-type]
    path = put(tmp_path, encoded(song(2 * BLOCK + 7), rate, "FLOAT"))
    expected = resample(sf.read(path, dtype="float32")[0], rate, target, cfg)
    with decoder.decode(path, target, cfg) as result:
        assert result.header == Header(rate, 1, 2 * BLOCK + 7, "WAV FLOAT")
        np.testing.assert_array_equal(result.wav[0 : len(result.wav)], expected)


def chunk(name: bytes, body: bytes, endian: str = "<") -> bytes:
    return name + struct.pack(endian + "I", len(body)) + body + b"\0" * (len(body) % 2)


def wave(
    *chunks: bytes, riff: bytes = b"RIFF", size: int | None = None, endian: str = "<"
) -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return riff + struct.pack(endian + "I", len(body) if size is None else size) + body


def fmt(rate: int = RATE, endian: str = "<") -> bytes:
    fields = (1, 1, rate, 2 * rate, 2, 16)
    return chunk(b"fmt ", struct.pack(endian + "HHIIHH", *fields), endian)


PCM = (song()[:, 0] * 32767).astype("<i2")
FLOATS = (PCM / np.float32(32768)).astype(np.float32)
EXTENSIBLE_24_IN_32 = chunk(
    b"fmt ",
    struct.pack("<HHIIHH", 0xFFFE, 1, RATE, 4 * RATE, 4, 32)
    + struct.pack("<HHI", 22, 24, 4)
    + bytes.fromhex("0100000000001000800000aa00389b71"),
)
DATA = chunk(b"data", PCM.tobytes())
SHAPES = {
    "plain": wave(fmt(), DATA),
    "odd chunk before, padded": wave(fmt(), chunk(b"LIST", b"INFOx"), DATA),
    "LIST behind": wave(fmt(), DATA, chunk(b"LIST", b"INFOISFT\x04\0\0\0abc\0")),
    "id3 behind": wave(fmt(), DATA, chunk(b"id3 ", b"ID3" + bytes(4097))),
    "bytes behind the RIFF": wave(fmt(), DATA) + b"TAG" + bytes(125),
    "long JUNK before": wave(chunk(b"JUNK", bytes(70_000)), fmt(), DATA),
    "chunk names of data's letters": wave(fmt(), chunk(b"atad", b"data\xff\xff\xff\0"), DATA),
    "RIFX": wave(
        fmt(endian=">"),
        chunk(b"data", PCM.astype(">i2").tobytes(), ">"),
        riff=b"RIFX",
        endian=">",
    ),
    "24 bits in 32": wave(
        EXTENSIBLE_24_IN_32, chunk(b"data", (PCM.astype("<i4") << 16).astype("<i4").tobytes())
    ),
    "last frame incomplete, as declared": wave(fmt(), chunk(b"data", PCM.tobytes() + b"\1")),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_wave_files_of_any_shape(shape: str, decoder: Decoder, tmp_path: Path) -> None:
    path = put(tmp_path, SHAPES[shape])
    np.testing.assert_array_equal(decoded(decoder, path), FLOATS)
    assert decoder.probe(path).num_samples == len(PCM)


PLACEHOLDERS = (0, 0x7F000024, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFDB, 0xFFFFFFFF)


@pytest.mark.parametrize("riff_size", [None, 0, 36, 0xFFFFFFFF])
@pytest.mark.parametrize("size", PLACEHOLDERS)
def test_wave_from_a_writer_that_could_not_seek_is_read_to_its_end(
    size: int, riff_size: int | None, decoder: Decoder, tmp_path: Path
) -> None:
    if size == 0 and riff_size is None:
        riff_size = 36  # a RIFF that ends with the empty data is what such a writer leaves
    data = fmt() + b"data" + struct.pack("<I", size) + PCM.tobytes()
    path = put(tmp_path, wave(data, size=riff_size))
    np.testing.assert_array_equal(decoded(decoder, path), FLOATS)
    assert decoder.probe(path).num_samples == len(PCM)


def test_rf64_from_a_writer_that_could_not_seek(decoder: Decoder, tmp_path: Path) -> None:
    data = b"data\xff\xff\xff\xff" + PCM.tobytes()
    for long_size in (0, 2**64 - 1):
        ds64 = chunk(b"ds64", struct.pack("<QQQI", 0, long_size, 0, 0))
        path = put(tmp_path, wave(ds64, fmt(), data, riff=b"RF64", size=0xFFFFFFFF))
        np.testing.assert_array_equal(decoded(decoder, path), FLOATS)


def aiff(order: str = "cs", frames: int | None = None, sound_size: int | None = None) -> bytes:
    rate = struct.pack(">HQ", 16383 + 15, RATE << (63 - 15))  # 80-bit float: 44100 = 1.x * 2**15
    count = len(PCM) if frames is None else frames
    comm = chunk(b"COMM", struct.pack(">HIH", 1, count, 16) + rate, ">")
    sound = bytearray(chunk(b"SSND", bytes(8) + PCM.astype(">i2").tobytes(), ">"))
    if sound_size is not None:
        sound[4:8] = struct.pack(">I", sound_size)
    body = b"AIFF" + b"".join({"c": comm, "s": bytes(sound)}[part] for part in order)
    return b"FORM" + struct.pack(">I", len(body)) + body


def test_aiff_with_its_audio_before_its_description(decoder: Decoder, tmp_path: Path) -> None:
    np.testing.assert_array_equal(decoded(decoder, put(tmp_path, aiff("sc"))), FLOATS)


@pytest.mark.parametrize(
    ("frames", "size"), [(0, 0), (0x7F000000 // 2, 0x7F000008), (0xFFFFFFFF, 0xFFFFFFFF)]
)
def test_aiff_from_a_writer_that_could_not_seek_is_read_to_its_end(
    frames: int, size: int, decoder: Decoder, tmp_path: Path
) -> None:
    path = put(tmp_path, aiff(frames=frames, sound_size=size))
    np.testing.assert_array_equal(decoded(decoder, path), FLOATS)


def test_flac_that_does_not_state_its_length_is_read_to_its_end(
    decoder: Decoder, tmp_path: Path
) -> None:
    data = bytearray(encoded(song(BLOCK + 999), kind="FLAC"))
    expected = sf.read(io.BytesIO(data), dtype="float32")[0]
    data[21] &= 0xF0  # STREAMINFO: total samples, 36 bits
    data[22:26] = bytes(4)
    path = put(tmp_path, bytes(data))
    np.testing.assert_array_equal(decoded(decoder, path), expected)
    assert 0.3 < decoder.probe(path).num_samples / len(expected) < 3  # an estimate
    with decoder.decode(path, RATE, NATIVE) as result:
        assert result.header.num_samples == len(expected)


def test_content_and_not_the_name_tells_the_format(decoder: Decoder, tmp_path: Path) -> None:
    data = encoded(song(), kind="FLAC")
    for name in ("song.wav", "song.mp3", "song.raw", "song.sd2", "song", "song.m4a"):
        assert decoder.probe(put(tmp_path, data, name)).format == "FLAC"


NAMES = [
    b"not utf-8 \xff\xfe",
    "é NFC".encode(),
    b"e\xcc\x81 NFD",
    b"'\"`$HOME#%41",
    b"a\nb",
    b"x" * 250,
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name(name: bytes, decoder: Decoder, tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as file:
        file.write(SHAPES["plain"])
    np.testing.assert_array_equal(decoded(decoder, path), FLOATS)


def test_real_recordings(real_audio: Path, decoder: Decoder) -> None:
    paths = [p for p in sorted(real_audio.iterdir()) if p.suffix in (".wav", ".flac", ".ogg")]
    assert len(paths) >= 5
    for path in paths:
        expected = sf.read(path, dtype="float32", always_2d=True)[0].mean(axis=1)
        np.testing.assert_allclose(decoded(decoder, path), expected, rtol=0, atol=1e-6)


# ---- MP3 ----------------------------------------------------------------------------------------


ID3V2 = b"ID3\x04\0\0\0\0\x02\0" + bytes(256)
MP3_TAILS = (
    b"TAG" + bytes(125),
    b"APETAGEX" + np.random.default_rng(0).bytes(40_000) + b"APETAGEX" + bytes(24),
    bytes(50_000),
)


def mp3_parts(rate: int, mode: str, channels: int = 1) -> tuple[bytes, bytes, int]:
    """An MP3's frame with the Xing tag, its other frames, its length in samples."""
    wav = song(4 * rate, channels)
    wav[: 2 * rate] = 0.1 * np.sin(np.arange(2 * rate) / 9)[:, None]  # few bits, then many
    buffer = io.BytesIO()
    settings = {"format": "MP3", "bitrate_mode": mode, "compression_level": 0.5}
    with sf.SoundFile(buffer, "w", rate, channels, "MPEG_LAYER_III", **settings) as file:
        file.write(wav)
    data = buffer.getvalue()
    first = mpeg_frame(data[:4])
    assert first is not None and (b"Xing" in data[:200] or b"Info" in data[:200])
    return data[: first.length], data[first.length :], len(wav)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [44100, 22050, 8000])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_mp3_without_a_frame_count_is_read_to_its_end(
    mode: str, rate: int, channels: int, decoder: Decoder, tmp_path: Path
) -> None:
    """libsndfile alone stops where the bit rate of the first frame would end the file."""
    tag, frames, length = mp3_parts(rate, mode, channels)
    full = decoded(decoder, put(tmp_path, tag + frames, "full.mp3"))
    assert len(full) == length
    for data in (frames, ID3V2 + frames, *(frames + tail for tail in MP3_TAILS)):
        path = put(tmp_path, data)
        wav = decoded(decoder, path)
        # The encoder's delay of 576 samples is not trimmed where no tag states it.
        assert length <= len(wav) <= length + 576 + 3 * 1152
        np.testing.assert_allclose(wav[576 + 4000 : 576 + length], full[4000:], atol=1e-4)
        assert 0.5 < decoder.probe(path).num_samples / length < 25  # an estimate
    # Nobody is refused for an estimate.
    with Decoder(DecodeConfig(max_hours=5 / 3600), decoder.scratch) as strict:
        assert len(decoded(strict, path)) == len(wav)


def test_mp3s_laid_end_to_end_are_read_to_the_end(decoder: Decoder, tmp_path: Path) -> None:
    tag, frames, length = mp3_parts(44100, "VARIABLE")
    other, more, rest = mp3_parts(44100, "CONSTANT")
    first = ID3V2 + tag + frames + b"TAG" + bytes(125)
    path = put(tmp_path, first + ID3V2 + other + more)
    assert 0 <= len(decoded(decoder, path)) - length - rest <= 6 * 1152
    put(tmp_path, first + b"APETAGEX" + bytes(70_000))  # nothing but a tag follows
    assert len(decoded(decoder, path)) == length
    # Another rate in between: no song, but no hang and no crash either.
    put(tmp_path, first + b"".join(mp3_parts(22050, "CONSTANT")[:2]) + other + more)
    with contextlib.suppress(BadInput):
        decoder.decode(path, RATE, NATIVE).close()
    assert decoder.probe(path).sample_rate == 44100


def test_mp3_with_a_vbri_tag(decoder: Decoder, tmp_path: Path) -> None:
    tag, frames, length = mp3_parts(44100, "VARIABLE")
    count = -(-(length + 576) // 1152)
    vbri = b"VBRI" + struct.pack(">HHHII", 1, 576, 75, len(frames), count) + bytes(16)
    tag = tag[:4] + bytes(32) + vbri + bytes(len(tag) - 36 - len(vbri))
    path = put(tmp_path, tag + frames)
    assert decoder.probe(path).num_samples == count * 1152
    assert abs(len(decoded(decoder, path)) - length) < 3 * 1152
    put(tmp_path, tag + frames[: len(frames) // 2])
    assert refusal(decoder, path).reason is Reason.TRUNCATED


# ---- cut and damaged files ----------------------------------------------------------------------

CUTTABLE = [
    *(("WAV", s) for s in ("PCM_U8", "PCM_16", "PCM_24", "FLOAT", "IMA_ADPCM", "GSM610")),
    ("WAVEX", "PCM_24"),
    ("RF64", "PCM_16"),
    ("W64", "PCM_16"),
    *(("AIFF", s) for s in ("PCM_16", "PCM_24", "FLOAT", "IMA_ADPCM")),
    ("AU", "PCM_16"),
    ("CAF", "PCM_16"),
    *(("FLAC", s) for s in ("PCM_16", "PCM_24")),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]


@pytest.mark.parametrize(("kind", "subtype"), CUTTABLE)
def test_a_file_cut_anywhere_is_truncated(
    kind: str, subtype: str, decoder: Decoder, tmp_path: Path
) -> None:
    rate = 48000 if subtype == "OPUS" else RATE
    data = encoded(song(3 * rate), rate, subtype, kind)
    last = len(data) * 9 // 10 if kind == "MP3" else len(data) - 2  # MP3: two frames of tolerance
    for keep in (len(data) // 2, len(data) * 3 // 4, last):
        bad = refusal(decoder, put(tmp_path, data[:keep]))
        assert bad.reason is Reason.TRUNCATED, bad
        assert sum(word.strip("(),;").isdigit() for word in bad.detail.split()) >= 1


def ogg_pages(data: bytes) -> list[bytes]:
    pages, at = [], 0
    while at < len(data):
        length = 27 + data[at + 26] + sum(data[at + 27 : at + 27 + data[at + 26]])
        pages.append(data[at : at + length])
        at += length
    return pages


@pytest.mark.parametrize(("subtype", "rate"), [("VORBIS", RATE), ("OPUS", 48000)])
def test_ogg_cut_between_pages(subtype: str, rate: int, decoder: Decoder, tmp_path: Path) -> None:
    pages = ogg_pages(encoded(song(3 * rate), rate, subtype, "OGG"))
    assert len(pages) > 5
    bad = refusal(decoder, put(tmp_path, b"".join(pages[:-1])))
    assert bad.reason is Reason.TRUNCATED
    assert "no end-of-stream page" in bad.detail
    whole = put(tmp_path, b"".join(pages) + b"TAG" + bytes(125))
    assert len(decoded(decoder, whole)) == 3 * rate


def test_ogg_with_pages_missing_inside(decoder: Decoder, tmp_path: Path) -> None:
    pages = ogg_pages(encoded(song(5 * RATE), RATE, "VORBIS", "OGG"))
    del pages[6:9]
    bad = refusal(decoder, put(tmp_path, b"".join(pages)))
    assert bad.reason is Reason.DAMAGED
    assert "missing Ogg pages, about at" in bad.detail


def test_flac_that_breaks_in_the_middle(decoder: Decoder, tmp_path: Path) -> None:
    data = bytearray(encoded(song(2 * BLOCK), kind="FLAC"))
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    bad = refusal(decoder, put(tmp_path, bytes(data)))
    assert bad.reason is Reason.DAMAGED
    assert str(2 * BLOCK) in bad.detail


@given(cut=st.integers(0, 44 + 2 * len(PCM)), declared=st.integers(1, 2**31))
@settings(max_examples=60, deadline=None)
def test_a_wave_decodes_only_if_it_holds_what_it_declares(
    cut: int, declared: int, decoder: Decoder, scratch: Path
) -> None:
    data = fmt() + b"data" + struct.pack("<I", declared) + PCM.tobytes()
    path = put(scratch, wave(data)[:cut], "any.wav")
    held = max(0, cut - 44)
    unknown = held - declared - declared % 2  # bytes behind the audio that are no chunk
    if 0x7F000000 <= declared:
        return  # may be a placeholder
    if declared // 2 == 0 or held < declared:
        assert refusal(decoder, path).reason in (Reason.TRUNCATED, Reason.UNREADABLE, Reason.EMPTY)
    elif unknown / 2 > 0.1 * RATE:
        assert refusal(decoder, path).reason is Reason.TRUNCATED
    else:
        assert len(decoded(decoder, path)) == declared // 2


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_headers_never_break_the_decoder(
    data: st.DataObject, decoder: Decoder, scratch: Path
) -> None:
    """Any first bytes give samples or a BadInput, and the next file works."""
    kind, subtype = data.draw(st.sampled_from([pair for pair in CUTTABLE if pair[0] != "MP3"]))
    rate = 48000 if subtype == "OPUS" else RATE
    damaged = bytearray(encoded(song(3000), rate, subtype, kind))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, 120))] = data.draw(st.integers(0, 255))
    path = put(scratch, bytes(damaged), "any.bin")
    try:
        with decoder.decode(path, RATE, NATIVE) as result:
            wav = result.wav[0 : len(result.wav)]
            assert np.isfinite(wav).all()
    except BadInput as bad:
        assert bad.detail
    assert len(decoded(decoder, put(scratch, SHAPES["plain"], "fine.wav"))) == len(PCM)


# ---- refused files ------------------------------------------------------------------------------


def test_files_that_are_not_there_or_not_files(decoder: Decoder, tmp_path: Path) -> None:
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "fifo.wav")
    (tmp_path / "circle.wav").symlink_to(tmp_path / "circle.wav")
    put(tmp_path, b"", "empty.wav")
    put(tmp_path, b"text\n" * 100, "text.wav")
    put(tmp_path, SHAPES["plain"][:20], "stub.wav")
    put(tmp_path, wave(fmt(), chunk(b"data", b"")), "header.wav")
    put(tmp_path, wave(fmt(), chunk(b"data", b""), chunk(b"LIST", b"INFO")), "header2.wav")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.wav"))
    for name, reason in {
        "missing.wav": Reason.MISSING,
        "circle.wav": Reason.MISSING,
        "text.wav/song.wav": Reason.MISSING,
        "x" * 300: Reason.MISSING,
        "zero\0byte.wav": Reason.MISSING,
        "folder.wav": Reason.UNREADABLE,
        "fifo.wav": Reason.UNREADABLE,
        "socket.wav": Reason.UNREADABLE,
        "empty.wav": Reason.EMPTY,
        "header.wav": Reason.EMPTY,
        "header2.wav": Reason.EMPTY,
        "text.wav": Reason.UNREADABLE,
        "stub.wav": Reason.UNREADABLE,
    }.items():
        path = f"{tmp_path}/{name}"
        assert refusal(decoder, path).reason is reason, name
        with pytest.raises(BadInput) as caught:
            decoder.probe(path)
        assert caught.value.reason is reason, name
    assert "no known audio format" in refusal(decoder, tmp_path / "text.wav").detail


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite(value: float, decoder: Decoder, tmp_path: Path) -> None:
    wav = song(2 * BLOCK, 2)
    wav[[BLOCK - 1, BLOCK + 5, BLOCK + 6], [0, 1, 1]] = value
    bad = refusal(decoder, put(tmp_path, encoded(wav, RATE, "FLOAT")))
    assert bad.reason is Reason.NOT_FINITE
    assert f"3 of {2 * BLOCK} samples" in bad.detail
    assert f"number {BLOCK - 1} " in bad.detail


@pytest.mark.parametrize("value", [1e38, -4e4])
def test_samples_far_beyond_full_scale(value: float, decoder: Decoder, tmp_path: Path) -> None:
    wav = song(2 * RATE, 2)
    wav[RATE, 1] = value
    bad = refusal(decoder, put(tmp_path, encoded(wav, RATE, "FLOAT")))
    assert bad.reason is Reason.OUT_OF_RANGE
    assert f"{abs(value):.3g} times full scale" in bad.detail


def test_floats_that_hold_16_bit_integers_are_audio(decoder: Decoder, tmp_path: Path) -> None:
    wav = np.round(32767 * song(1000))
    with decoder.decode(put(tmp_path, encoded(wav, RATE, "FLOAT")), RATE, NATIVE) as result:
        assert result.channels_peak == np.abs(wav).max() > 1000


def test_limits(tmp_path: Path, scratch: Path, decoder: Decoder) -> None:
    many = put(tmp_path, encoded(song(100, 33)), "many.wav")
    assert refusal(decoder, many).reason is Reason.TOO_MANY_CHANNELS
    for rate in (999, 1_000_001):
        odd = put(tmp_path, encoded(song(100), rate), "odd.wav")
        assert refusal(decoder, odd).reason is Reason.UNSUPPORTED
    long = put(tmp_path, encoded(song(10 * RATE)), "long.wav")
    # No length declared: the limit acts on what has been decoded.
    unknown = put(tmp_path, mp3_parts(RATE, "CONSTANT")[1], "unknown.mp3")
    with Decoder(DecodeConfig(max_channels=33, max_hours=3 / 3600), scratch) as strict:
        assert strict.probe(many).channels == 33
        assert refusal(strict, long).reason is Reason.TOO_LONG
        assert refusal(strict, unknown).reason is Reason.TOO_LONG
        with pytest.raises(BadInput, match=r"decode\.max_hours"):
            strict.probe(long)


def run_unprivileged(script: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python as a user to whom file modes apply, also where the tests run as root."""
    prefix = ["unshare", "-U"] if os.geteuid() == 0 else []
    if prefix and (
        not shutil.which("unshare") or subprocess.run([*prefix, "true"], check=False).returncode
    ):
        pytest.skip("root, and no user namespaces to stop being root in")
    return run_python(script, *args, prefix=prefix)


def run_python(
    script: str, *args: str | Path, prefix: list[str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).resolve().parents[3])
    return subprocess.run(
        [*(prefix or []), sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": root},
    )


DECODE_ONE = """
    import sys
    from pathlib import Path
    from stages.decode import DecodeConfig, Decoder
    from stages.errors import BadInput
    from stages.resample import ResampleConfig
    with Decoder(DecodeConfig(), Path(sys.argv[2])) as decoder:
        try:
            with decoder.decode(sys.argv[1], 48000, ResampleConfig()) as song:
                print(len(song.wav), "av" in sys.modules, "torch" in sys.modules)
        except BadInput as bad:
            print(bad.reason)
        except OSError as fault:
            print(fault.errno, fault.filename, list(Path(sys.argv[2]).glob("song-*")))
"""


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = put(tmp_path, SHAPES["plain"])
    path.chmod(0)
    (tmp_path / "scratch").mkdir(mode=0o777)
    result = run_unprivileged(DECODE_ONE, path, tmp_path / "scratch")
    assert result.stdout.strip() == Reason.NO_PERMISSION, result.stderr


def test_the_zoo(tmp_path: Path, decoder: Decoder) -> None:
    zoo = make_zoo(tmp_path)
    outcomes = decoder.probe_many(os.fsencode(tmp_path) + b"/" + os.fsencode(n) for n in zoo)
    for (name, expected), header in zip(zoo.items(), outcomes, strict=True):
        path = os.fsencode(tmp_path) + b"/" + os.fsencode(name)
        if expected.status == "quarantined":
            assert refusal(decoder, path).reason is expected.reason, name
            assert isinstance(header, Header) or header.reason is expected.reason, name
        else:
            assert isinstance(header, Header), name
            assert len(decoded(decoder, path)) == header.num_samples, name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_channels", 0),
        ("timeout_s", 0.0),
        ("timeout_s", float("nan")),
        ("memory_mb", 0),
        ("max_hours", 0.0),
        ("max_hours", 1e6),
    ],
)
def test_settings_out_of_range_name_their_key(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"decode.{key}"):
        DecodeConfig(**{key: value})  # type: ignore[arg-type]


# ---- many headers -------------------------------------------------------------------------------


def glutton(folder: Path, name: str = "glutton.wav") -> Path:
    """A sparse WAVE whose header, 400 MB, must be copied to read its audio of unknown size."""
    path = folder / name
    with open(path, "wb") as file:
        file.write(wave(b"JUNK" + struct.pack("<I", 400 << 20), size=0xFFFFFFFF))
        file.seek(400 << 20, os.SEEK_CUR)
        file.write(fmt() + b"data\0\0\0\0" + bytes(100))
    return path


@pytest.mark.slow
def test_many_headers_in_order_and_poison_costs_only_itself(tmp_path: Path) -> None:
    names = [put(tmp_path, encoded(song(i + 1)), f"{i:04d}.wav") for i in range(600)]
    poison = glutton(tmp_path)
    missing = tmp_path / "missing.wav"
    paths: list[Path] = [poison, *names[:300], poison, missing, poison, *names[300:], poison]
    with Decoder(DecodeConfig(memory_mb=128), tmp_path) as decoder:
        outcomes = list(decoder.probe_many(iter(paths)))
        assert len(outcomes) == len(paths)
        for path, outcome in zip(paths, outcomes, strict=True):
            if path is poison:
                assert isinstance(outcome, BadInput) and outcome.reason is Reason.OUT_OF_MEMORY
            elif path is missing:
                assert isinstance(outcome, BadInput) and outcome.reason is Reason.MISSING
            else:
                assert isinstance(outcome, Header) and outcome.num_samples == int(path.stem) + 1
        assert list(decoder.probe_many([])) == []


def test_headers_are_asked_for_as_they_are_consumed(tmp_path: Path, decoder: Decoder) -> None:
    path = put(tmp_path, SHAPES["plain"], "x" * 200)
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield path

    outcomes = decoder.probe_many(endless())
    for number, outcome in enumerate(itertools.islice(outcomes, 1000)):
        assert isinstance(outcome, Header)
        if number % 300 == 7:  # another request between two headers does not disturb them
            assert len(decoded(decoder, path)) == len(PCM)
    assert taken < 1000 + 400


# ---- children that crash, hang and swell --------------------------------------------------------


FOREIGN = b"\0\0\0\x20ftypM4A " + bytes(1000)


def misbehave(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the child run `body` when it opens `FOREIGN`: a library that misbehaves on command."""
    script = f"""
        import os, signal, time
        import av
        _open = av.open
        def opened(source, **options):
            if source.read_at(4, 4) == b"ftyp":
                {body}
            return _open(source, **options)
        av.open = opened
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(script))
    monkeypatch.syspath_prepend(folder)


@pytest.mark.slow
def test_a_crash_names_its_signal_and_the_next_file_is_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    note_pid = f"print(os.getpid(), file=open({str(log)!r}, 'a'))"
    body = f"{note_pid}; os.kill(os.getpid(), signal.SIGSEGV)"
    misbehave(tmp_path / "modules", body, monkeypatch)
    poison, fine = put(tmp_path, FOREIGN), put(tmp_path, SHAPES["plain"], "fine.wav")
    with Decoder(DecodeConfig(), tmp_path / "scratch") as decoder:
        bad = refusal(decoder, poison)
        assert bad.reason is Reason.CRASHED
        assert "SIGSEGV" in bad.detail
        assert "Segmentation fault" in bad.detail  # the child's last words
        assert len(log.read_text().split()) == 1  # a new child: its word is taken
        assert len(decoded(decoder, fine)) == len(PCM)
        assert refusal(decoder, poison).reason is Reason.CRASHED
        assert len(set(log.read_text().split())) == 3  # a used one, and then a new one
        outcomes = list(decoder.probe_many([fine, poison, fine, poison, poison, fine]))
        kinds = [getattr(outcome, "reason", None) for outcome in outcomes]
        assert kinds == [None, Reason.CRASHED, None, Reason.CRASHED, Reason.CRASHED, None]


def test_a_hang_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    body = f"print(os.getpid(), file=open({str(log)!r}, 'a')); time.sleep(1000)"
    misbehave(tmp_path / "modules", body, monkeypatch)
    poison, fine = put(tmp_path, FOREIGN), put(tmp_path, SHAPES["plain"], "fine.wav")
    with Decoder(DecodeConfig(timeout_s=0.5), tmp_path / "scratch") as decoder:
        outcomes = list(decoder.probe_many([fine, poison, fine]))
        assert [getattr(o, "reason", None) for o in outcomes] == [None, Reason.TIMED_OUT, None]
        assert refusal(decoder, poison).reason is Reason.TIMED_OUT
        assert len(decoded(decoder, fine)) == len(PCM)
    for pid in map(int, log.read_text().split()):
        assert gone(pid)


def gone(pid: int, within_s: float = 10) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def long_song(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hours of digital silence that take no space: 8 kHz, 16 bit."""
    return silence(tmp_path_factory.mktemp("long") / "long.wav", hours=3)


def silence(path: Path, hours: float, rate: int = 8000) -> Path:
    size = int(hours * 3600 * rate) * 2
    with open(path, "wb") as file:
        file.write(wave(fmt(rate=rate) + b"data" + struct.pack("<I", size), size=36 + size))
        file.truncate(44 + size)
    return path


class Meanwhile(threading.Thread):
    """Sends a signal to the decode child each time it has begun to write a song."""

    def __init__(self, decoder: Decoder, sign: int, times: int) -> None:
        super().__init__(daemon=True)
        self.decoder, self.sign, self.times = decoder, sign, times
        self.struck: list[int] = []

    def run(self) -> None:
        while len(self.struck) < self.times:
            begun = any(path.stat().st_size for path in self.decoder.scratch.glob("song-*"))
            pid = self.decoder.child_pid
            if begun and pid is not None and pid not in self.struck:
                os.kill(pid, self.sign)
                self.struck.append(pid)
            time.sleep(0.001)


@pytest.mark.slow
def test_kill_9_in_the_middle(long_song: Path, tmp_path: Path) -> None:
    with Decoder(DecodeConfig(), tmp_path) as decoder:
        killer = Meanwhile(decoder, signal.SIGKILL, times=1)
        killer.start()
        bad = refusal(decoder, long_song)  # a new child: the file is blamed
        killer.join()
        assert bad.reason is Reason.CRASHED
        assert "SIGKILL" in bad.detail
        assert decoder.probe(long_song).duration_s == 3 * 3600
        killer = Meanwhile(decoder, signal.SIGKILL, times=1)
        killer.start()
        with decoder.decode(long_song, 8000, NATIVE) as result:  # a used one: tried again
            assert len(result.wav) == 3 * 3600 * 8000
        killer.join()


def test_a_child_that_stops_in_the_middle(tmp_path: Path) -> None:
    # Short blocks, so that what it decodes before it is stopped buys it little time.
    fine = silence(tmp_path / "fine.wav", hours=0.2, rate=384_000)
    with Decoder(DecodeConfig(timeout_s=1.0), tmp_path) as decoder:
        stopper = Meanwhile(decoder, signal.SIGSTOP, times=1)
        stopper.start()
        assert refusal(decoder, fine).reason is Reason.TIMED_OUT
        stopper.join()
        assert gone(stopper.struck[0])
        assert decoder.probe(fine).duration_s == 720


def test_out_of_memory_is_the_files_fault_and_the_next_one_is_fine(
    tmp_path: Path, long_song: Path
) -> None:
    with Decoder(DecodeConfig(memory_mb=128), tmp_path) as decoder:
        bad = refusal(decoder, glutton(tmp_path))
        assert bad.reason is Reason.OUT_OF_MEMORY
        assert "decode.memory_mb=128" in bad.detail
        fine = put(tmp_path, SHAPES["plain"], "fine.wav")
        assert len(decoded(decoder, fine)) == len(PCM)
    with Decoder(DecodeConfig(memory_mb=1), tmp_path) as decoder:
        wide = put(tmp_path, encoded(song(2 * BLOCK), 48000), "wide.wav")
        assert refusal(decoder, wide).reason is Reason.OUT_OF_MEMORY


def test_memory_is_flat_in_length(long_song: Path, tmp_path: Path) -> None:
    peaks = []
    for path in (silence(tmp_path / "short.wav", hours=0.01), long_song):
        with Decoder(DecodeConfig(), tmp_path) as decoder:
            with decoder.decode(path, 4000, NATIVE) as result:
                assert result.source_samples == decoder.probe(path).num_samples
                assert len(result.wav) == -(-result.source_samples // 2)
            status = Path(f"/proc/{decoder.child_pid}/status").read_text()
            peaks.append(int(status.split("VmHWM:")[1].split()[0]) / 1024)
    assert peaks[1] < 500
    assert peaks[1] - peaks[0] < 16


def test_an_interrupt_leaves_nothing_behind(long_song: Path, tmp_path: Path) -> None:
    class Interrupt(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    fine = put(tmp_path, SHAPES["plain"], "fine.wav")
    with Decoder(DecodeConfig(), tmp_path) as decoder:
        decoder.probe(fine)
        child = decoder.child_pid
        assert child is not None
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            with pytest.raises(Interrupt):
                decoder.decode(long_song, 44100, NATIVE)
        finally:
            signal.signal(signal.SIGALRM, before)
        assert gone(child)
        assert not list(tmp_path.glob("song-*"))
        assert len(decoded(decoder, fine)) == len(PCM)


# ---- the child as a process ---------------------------------------------------------------------


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    script = """
        import os, signal, sys
        from pathlib import Path
        from stages.decode import DecodeConfig, Decoder
        decoder = Decoder(DecodeConfig(), Path(sys.argv[1]))
        decoder.probe(sys.argv[2])
        print(decoder.child_pid, flush=True)
        if sys.argv[3] == "stopped":
            os.kill(decoder.child_pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    path = put(tmp_path, SHAPES["plain"])
    for state in ("idle", "stopped"):
        result = run_python(script, tmp_path, path, state)
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert gone(int(result.stdout))


def test_the_child_has_its_own_session_and_one_thread(decoder: Decoder, tmp_path: Path) -> None:
    decoder.probe(put(tmp_path, SHAPES["plain"]))
    child = child_of(decoder)
    assert os.getsid(child.pid) == child.pid
    assert child.environ()["OMP_NUM_THREADS"] == "1"


def test_this_process_loads_no_audio_library_and_the_folder_does_not_matter(tmp_path: Path) -> None:
    """The package is found from any folder, and a `numpy.py` that lies there is not imported."""
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
    root = Path(__file__).resolve().parents[3]
    script = f"import sys; sys.path[0] = {str(root)!r}\n" + textwrap.dedent(DECODE_ONE)
    path = put(tmp_path, encoded(song(44100)), "song.wav")
    result = run_python(script, path.name, tmp_path / "scratch", cwd=tmp_path)
    assert result.stdout.split() == ["48000", "False", "False"], result.stderr


def test_the_child_imports_no_torch() -> None:
    script = (
        "import stages.decode.child, sys; print(sorted({'torch', 'librosa'} & set(sys.modules)))"
    )
    result = run_python(script)
    assert result.stdout.strip() == "[]", result.stderr


def test_a_child_that_cannot_start_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "modules"
    broken.mkdir()
    (broken / "av.py").write_text("raise ImportError('no FFmpeg here')")
    monkeypatch.syspath_prepend(broken)
    with (
        Decoder(DecodeConfig(), tmp_path) as decoder,
        pytest.raises(RuntimeError, match="no FFmpeg here"),
    ):
        decoder.probe(put(tmp_path, SHAPES["plain"]))


@pytest.mark.slow
def test_a_defect_of_ours_in_the_child_is_not_the_files_fault(
    decoder: Decoder, tmp_path: Path
) -> None:
    path = put(tmp_path, SHAPES["plain"])
    with pytest.raises(RuntimeError, match="sample rates must be positive"):
        decoder.decode(path, 0, NATIVE)
    assert not list(decoder.scratch.glob("song-*"))
    assert len(decoded(decoder, path)) == len(PCM)


# ---- faults of the storage ----------------------------------------------------------------------


def unreadable_device_file() -> str:
    """A regular file of 4096 bytes whose reading fails with EIO."""
    for path in glob.iglob("/sys/devices/system/**/power/autosuspend_delay_ms", recursive=True):
        try:
            Path(path).read_bytes()
        except OSError as error:
            if error.errno == errno.EIO:
                return path
    pytest.skip("no file here that fails with EIO")


def test_an_io_error_is_not_the_files_fault(decoder: Decoder, tmp_path: Path) -> None:
    path = unreadable_device_file()
    for ask in (decoder.probe, lambda path: decoder.decode(path, RATE, NATIVE)):
        with pytest.raises(OSError) as caught:
            ask(path)
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, path)
    assert len(decoded(decoder, put(tmp_path, SHAPES["plain"]))) == len(PCM)


def test_an_io_error_while_decoding_is_not_the_files_fault(tmp_path: Path) -> None:
    source = SourceFile(os.fsencode(put(tmp_path, encoded(song(4 * BLOCK)))))
    with open_stream(source) as stream:
        blocks = stream.blocks(fill_gaps=False)
        assert len(next(blocks)) > 0
        with open(unreadable_device_file(), "rb") as failing:
            os.dup2(failing.fileno(), source._fd)
        with pytest.raises(OSError) as caught:
            list(blocks)
        assert caught.value.errno == errno.EIO
        assert caught.value.filename == str(tmp_path / "song.bin")
    source.close()


def test_scratch_that_takes_no_more(tmp_path: Path) -> None:
    path = put(tmp_path, encoded(song(4 * BLOCK)), "song.wav")
    with Decoder(DecodeConfig(), tmp_path) as decoder:
        decoder.probe(path)
        child_of(decoder).rlimit(psutil.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(OSError) as caught:
            decoder.decode(path, RATE, NATIVE)
        assert caught.value.errno == errno.EFBIG
        assert str(tmp_path / "song-") in caught.value.filename
        assert not list(tmp_path.glob("song-*"))


def test_a_full_scratch_disk(tmp_path: Path) -> None:
    prefix = ["unshare", "-rm"]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], check=False).returncode:
        pytest.skip("no user namespaces to mount a small disk in")
    path = put(tmp_path, encoded(song(4 * BLOCK)), "song.wav")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=256k small {disk} || exit 5; exec "$@"'
    result = run_python(DECODE_ONE, path, disk, prefix=[*prefix, "sh", "-c", mount, "sh"])
    if result.returncode == 5:
        pytest.skip("may not mount here")
    assert result.stdout.split() == [Reason.NO_ROOM], result.stderr  # it is too big for this disk
    fill = f"head -c 63M /dev/zero > {disk}/other"
    mount = f'mount -t tmpfs -o size=64M small {disk} || exit 5; {fill}; exec "$@"'
    result = run_python(DECODE_ONE, path, disk, prefix=[*prefix, "sh", "-c", mount, "sh"])
    number, name, left = result.stdout.split()
    assert int(number) == errno.ENOSPC, result.stderr  # others have filled the disk
    assert name.startswith(str(disk))
    assert left == "[]"


# ---- other formats ------------------------------------------------------------------------------


def test_no_file_makes_the_decoder_open_another(tmp_path: Path, decoder: Decoder) -> None:
    """A playlist or a script named .m4a is no audio, whatever it points at."""
    wav = put(tmp_path, SHAPES["plain"], "other.wav")
    texts = (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{wav}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{wav}'\n",
        f"v=0\nc=IN IP4 127.0.0.1\nm=audio 9 RTP/AVP 0\na={wav}\n",
        "x" * 999,
    )
    for text in texts:
        bad = refusal(decoder, put(tmp_path, text.encode(), "song.m4a"))
        assert bad.reason is Reason.UNREADABLE


@pytest.mark.parametrize(
    ("suffix", "codec", "tolerance"),
    [
        *(("m4a", "alac", 0), ("wv", "wavpack", 0), ("mka", "flac", 0), ("oga", "flac", 0)),
        *(("tta", "tta", 0), ("caf", "alac", 0)),
        *(("m4a", "aac", 2048), ("aac", "aac", 4096), ("wma", "wmav2", 8192)),
        *(("webm", "libopus", 2048), ("mov", "aac", 2048), ("mkv", "ac3", 4096)),
        *(("3gp", "aac", 2048), ("flv", "aac", 4096), ("ts", "aac", 4096), ("avi", "mp2", 4096)),
        *(("wav", "libmp3lame", 4096), ("wav", "adpcm_yamaha", 4096), ("mpg", "mp2", 4096)),
        *(("ac3", "ac3", 4096), ("eac3", "eac3", 4096)),
    ],
)
def test_formats_of_ffmpeg(
    suffix: str, codec: str, tolerance: int, tmp_path: Path, decoder: Decoder
) -> None:
    rate = 48000 if codec == "libopus" else RATE
    wav = np.stack([sung(2, rate, seed) for seed in (1, 2)], axis=1)
    path = write_coded(tmp_path / f"song.{suffix}", wav, rate, codec)
    header = decoder.probe(path)
    assert header.channels == 2
    with decoder.decode(path, rate, NATIVE) as result:
        got = result.wav[0 : len(result.wav)]
        assert not result.notes or suffix in ("ts", "mpg")  # which state no length
    assert abs(len(got) - 2 * rate) <= tolerance
    if tolerance == 0:
        expected = ((32767 * wav).astype(np.int16) / 32768).mean(axis=1)
        np.testing.assert_allclose(got, expected, atol=1e-6)
    os.truncate(path, path.stat().st_size * 6 // 10)
    try:
        with decoder.decode(path, rate, NATIVE) as result:
            assert result.notes
    except BadInput as bad:
        assert bad.reason in (Reason.TRUNCATED, Reason.DAMAGED, Reason.UNREADABLE)


def test_a_cut_m4a_is_truncated(tmp_path: Path, decoder: Decoder) -> None:
    wav = sung(10, RATE)
    path = write_coded(tmp_path / "song.m4a", wav, RATE, "aac", movflags="+faststart")
    os.truncate(path, path.stat().st_size * 6 // 10)
    assert refusal(decoder, path).reason is Reason.TRUNCATED
    path = write_coded(tmp_path / "song.m4a", wav, RATE, "aac")  # its index is at the end
    os.truncate(path, path.stat().st_size * 6 // 10)
    assert refusal(decoder, path).reason is Reason.UNREADABLE


def test_a_video_gives_its_sound(tmp_path: Path, decoder: Decoder) -> None:
    path = tmp_path / "video.mp4"
    with av.open(path, "w") as out:
        video, audio = out.add_stream("mpeg4", rate=10), out.add_stream("aac", rate=RATE)
        video.width = video.height = 64
        audio.layout = "mono"
        for number in range(40):
            picture = np.full((64, 64, 3), number, np.uint8)
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture)))
        resampler = av.AudioResampler(audio.format, "mono", RATE, audio.frame_size)
        frame = av.AudioFrame.from_ndarray(sung(2, RATE)[None].astype(np.float32), "fltp", "mono")
        frame.sample_rate = RATE
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(audio.encode(part))
        for stream in (video, audio):
            out.mux(stream.encode(None))
    assert abs(len(decoded(decoder, path)) / RATE - 2) < 0.1  # shorter than its picture, and fine


def with_serial(data: bytes, serial: int) -> bytes:
    """An Ogg file under another stream number, its checksums made good."""
    pages = []
    for page in ogg_pages(data):
        blank = page[:14] + struct.pack("<I", serial) + page[18:22] + bytes(4) + page[26:]
        crc = 0
        for byte in blank:
            crc ^= byte << 24
            for _ in range(8):
                crc = (crc << 1 ^ 0x04C11DB7 if crc & 1 << 31 else crc << 1) & 0xFFFFFFFF
        pages.append(blank[:22] + struct.pack("<I", crc) + blank[26:])
    return b"".join(pages)


def test_a_chain_of_ogg_streams_is_read_whole(tmp_path: Path, decoder: Decoder) -> None:
    links = [encoded(song(8000, seed=n), 8000, "VORBIS", "OGG") for n in (1, 2)]
    path = put(tmp_path, with_serial(links[0], 1) + with_serial(links[1], 2))
    with decoder.decode(path, 8000, NATIVE) as result:
        assert 0 <= result.source_samples - 2 * 8000 <= 1024  # a block of Vorbis
        assert result.notes == ("it is 2 files joined, all of them read",)
