#!/usr/bin/env python3
"""Counts of what becomes of odd, damaged and hostile files.

    python benchmarks/robust.py [--mutations 100] [--seeds 1] [--audio FOLDER]

Every class prints how many files were tried, how many of them were read whole, read with a note,
and left out with a reason, and the failures: audio that is lost or wrong without a word, a hang, a
crash, foreign code that ran, or memory out of proportion. The exit status is 1 if there are any.

--mutations: damaged audio files per format and seed. --audio: also judge the files under a folder
(FORMAT/NUMBER-KIND.suffix, with the originals in ../seeds), which another program has made.
`make soak` runs this, and then kills extractions and trainings.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script

from models.checkpoint import CheckpointError, load_foreign
from stages.chain import ChainConfig, StageClock, prepare_song
from stages.decode import DecodeConfig, Decoder
from stages.errors import BadInput, Reason
from stages.resample import ResampleConfig
from stages.retrieval import IndexFault, load_index
from tests.helpers.coded_audio import write_coded
from tests.helpers.mutations import mutated_bytes, mutated_json
from tests.helpers.zoo import write_audio

Wav = NDArray[np.float32]
ROOT = Path(__file__).resolve().parents[1]
RATE = 44100
CASES = ROOT / "tests" / "data" / "decode"
RECORDINGS = ROOT / "tests" / "data" / "audio"
SILENT_MISTAKE_S = 0.12  # longer changes than two codec frames have to be explained
TOLERANCE = 0.02  # of AAC's noise, too, which depends on what was decoded before
MAX_SHIFT = 2000  # samples
LARGEST_DAMAGE = 3000  # bytes that one mutation changes
CRASHES = (Reason.CRASHED, Reason.TIMED_OUT, Reason.OUT_OF_MEMORY)


@dataclass
class Tally:
    """Counts of the files of one class, by what became of them."""

    name: str
    whole: int = 0
    noted: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        left_out = self.left_out.total()
        tried = self.whole + self.noted + left_out + len(self.failures)
        return f"{self.name:24} {tried:6} {self.whole:6} {self.noted:6} {left_out:8} " + (
            f"{len(self.failures):8}"
        )


# ---- audio --------------------------------------------------------------------------------------


def decode(decoder: Decoder, path: Path) -> tuple[Wav, tuple[str, ...]]:
    """Return the samples of a file at its own rate, and the notes on it."""
    rate = decoder.probe(path).sample_rate
    with decoder.decode(path, rate, ResampleConfig()) as decoded:
        return np.array(decoded.wav[0 : len(decoded.wav)]), decoded.notes


def odd_files(decoder: Decoder) -> Tally:
    """Judge the odd files of the tests by what they must come out as."""
    tally = Tally("odd audio files")
    for name, case in json.loads((CASES / "expected.json").read_text()).items():
        if not (CASES / name).is_file():
            continue
        try:
            song = prepare_song(bytes(CASES / name), decoder, ChainConfig(), StageClock())
            reason, _ = (None, "") if song.clips else song.why_empty()
            got = {"status": "filtered" if reason else "kept", "reason": reason}
            seconds = song.duration_s
        except BadInput as bad:
            got, seconds = {"status": "quarantined", "reason": bad.reason}, 0.0
        right = any(
            must.get("status") == got["status"]
            and must.get("reason") == got["reason"]
            and abs(must.get("seconds", seconds) - seconds) <= 0.1
            for must in case["must"]
        )
        if not right:
            tally.failures.append(f"{name}: {got}, {seconds:.2f} s")
        elif got["status"] == "kept":
            tally.whole += 1
        else:
            tally.left_out[str(got["reason"])] += 1
    return tally


# Suffix and the subtype of libsndfile or the codec of FFmpeg, by name
SNDFILE = {
    "wav": ("wav", "WAV", "PCM_16"), "wav24": ("wav", "WAV", "PCM_24"),
    "wavf": ("wav", "WAV", "FLOAT"), "mulaw": ("wav", "WAV", "ULAW"),
    "flac": ("flac", "FLAC", "PCM_16"), "aiff": ("aiff", "AIFF", "PCM_16"),
    "caf": ("caf", "CAF", "PCM_16"), "w64": ("w64", "W64", "PCM_16"), "au": ("au", "AU", "PCM_16"),
    "vorbis": ("ogg", "OGG", "VORBIS"), "mp3": ("mp3", "MP3", "MPEG_LAYER_III"),
}  # fmt: skip
FFMPEG = {
    "opus": ("opus", "libopus"), "m4a": ("m4a", "aac"), "mka": ("mka", "libopus"),
    "wv": ("wv", "wavpack"), "adts": ("aac", "aac"), "alac": ("m4a", "alac"),
    "adpcm": ("wav", "adpcm_ms"), "mp3v": ("mp3", "libmp3lame"),
}  # fmt: skip


def originals(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """Write three recordings of 1.3 s in every format; yield name and files of each."""
    import librosa

    folder.mkdir()
    wavs = []
    for path in sorted(RECORDINGS.glob("*.*")):
        if path.suffix in (".wav", ".flac", ".ogg") and len(wavs) < 3:
            wavs.append(librosa.load(path, sr=RATE, offset=0.5, duration=1.3)[0])
    for name, (suffix, kind, subtype) in SNDFILE.items():
        paths = [folder / f"{name}-{number}.{suffix}" for number in range(len(wavs))]
        for path, wav in zip(paths, wavs, strict=True):
            write_audio(path, wav, RATE, subtype, kind)
        yield name, paths
    for name, (suffix, codec) in FFMPEG.items():
        paths = [folder / f"{name}-{number}.{suffix}" for number in range(len(wavs))]
        for path, wav in zip(paths, wavs, strict=True):
            rate = 48000 if codec == "libopus" else RATE
            options = {"write_xing": "0", "id3v2_version": "0"} if name == "mp3v" else {}
            write_coded(path, 0.9 * wav, rate, codec, **options)
        yield name, paths


KINDS = (
    "head1 head4 headbyte body1 body8 trunc trunc0 lie splice insert delete zero dup swapend "
    "append headff".split()
)


def mutated(bodies: Sequence[bytes], rng: random.Random) -> tuple[str, bytes]:
    """Return one damaged version of one of `bodies`, and the kind of damage."""
    data = bytearray(rng.choice(bodies))
    size, kind = len(data), rng.choice(KINDS)
    at = rng.randrange(size)
    length = rng.randrange(1, 300)
    match kind:
        case "head1" | "head4" | "body1" | "body8":
            first, last = (0, min(size, 200)) if kind.startswith("head") else (size // 9, size)
            for _ in range(int(kind[4:])):
                data[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
        case "headbyte":
            data[rng.randrange(min(size, 100))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
        case "headff":
            at = rng.randrange(min(size, 200))
            data[at : at + 8] = b"\xff" * 8
        case "trunc":
            data = data[: max(1, at)]
        case "trunc0":
            data = data[: size - rng.randrange(1, min(size, 64))]
        case "lie":
            at = rng.randrange(min(size - 8, 400))
            values = [0, 1, 2**32 - 1, 2**31 - 1, 2**31, size, 2 * size, size // 2]
            value = rng.choice([*values, rng.getrandbits(32)])
            data[at : at + 4] = struct.pack(rng.choice("<>") + "I", value & 0xFFFFFFFF)
        case "splice":
            other = rng.choice(bodies)
            data = data[:at] + other[rng.randrange(len(other)) :]
        case "insert":
            data[at:at] = rng.randbytes(length)
        case "delete":
            del data[at : at + length]
        case "zero":
            length = min(10 * length, size - at)
            data[at : at + length] = bytes(length)
        case "dup":
            data[at:at] = data[at : at + 10 * length]
        case "swapend":
            data += rng.choice(bodies)
        case "append":
            data += rng.randbytes(10 * length)
    return kind, bytes(data)


def changed_s(wav: Wav, wholes: Sequence[Wav], rate: int) -> float:
    """Return the seconds of `wav` that are neither the beginning nor the end of any original.

    Of a waveform as long as an original, the stretches of 10 ms that differ. Up to 2000 samples may
    be added or missing at either end: a tag that states the encoder's delay may be lost.
    """
    best = float("inf")
    for first in wholes:
        for lag in _lags(wav, first):
            shifted = wav[lag:] if lag >= 0 else np.concatenate([first[:-lag], wav])
            if abs(len(shifted) - len(first)) < MAX_SHIFT:
                best = min(best, _different(shifted, first, rate) * rate)
            head = _equal(shifted, first)
            for last in wholes:
                for shift in _lags(shifted[::-1], last[::-1]):
                    end = shifted[::-1][max(0, shift) :][: len(shifted) - head]
                    best = min(best, len(end) - _equal(end, last[::-1][max(0, -shift) :]))
    return best / rate


def _equal(wav: Wav, other: Wav) -> int:
    """Return the number of samples for which two waveforms agree from the start."""
    length = min(len(wav), len(other))
    wrong = np.flatnonzero(np.abs(wav[:length] - other[:length]) > TOLERANCE)
    return int(wrong[0]) if len(wrong) else length


def _different(wav: Wav, other: Wav, rate: int) -> float:
    """Return the seconds in which two waveforms differ, by stretches of 10 ms."""
    length = min(len(wav), len(other))
    wrong = np.abs(wav[:length] - other[:length]) > TOLERANCE
    stretches = np.unique(np.flatnonzero(wrong) // (rate // 100))
    return len(stretches) / 100 + abs(len(wav) - len(other)) / rate


def _lags(wav: Wav, whole: Wav) -> list[int]:
    """Return 0 and the delay against `whole` at which `wav` begins most like it."""
    size = 1 << 15
    spectra = [np.fft.rfft(part, 2 * size) for part in (wav[:size], whole[:size])]
    likeness = np.fft.irfft(spectra[0] * np.conj(spectra[1]))
    likeness[MAX_SHIFT:-MAX_SHIFT] = -np.inf
    lag = int(np.argmax(likeness))
    return [0, lag if lag < size else lag - 2 * size]


def explained_s(kind: str, size: int, seconds: float) -> float:
    """Return how many seconds a mutation may change in an honest decoding."""
    if kind in ("body8", "head4"):
        return 8 * SILENT_MISTAKE_S
    if kind in ("insert", "zero", "dup", "append", "splice", "delete"):
        return 2 * SILENT_MISTAKE_S + LARGEST_DAMAGE / size * seconds
    return SILENT_MISTAKE_S


def judge(
    decoder: Decoder, path: Path, kind: str, wholes: Sequence[Wav], size: int, tally: Tally
) -> None:
    """Decode one damaged file and count it."""
    try:
        wav, notes = decode(decoder, path)
    except BadInput as bad:
        if bad.reason in CRASHES:
            tally.failures.append(f"{path.name} ({kind}): {bad}")
        tally.left_out[bad.reason] += bad.reason not in CRASHES
        return
    except (OSError, RuntimeError, ValueError) as error:
        tally.failures.append(f"{path.name} ({kind}): {type(error).__name__}: {error}")
        return
    if notes:
        tally.noted += 1
        return
    rate = 48000 if path.suffix in (".opus", ".mka") else RATE
    changed = changed_s(wav, wholes, rate)
    lengths = [len(first) + len(last) for first in wholes for last in wholes]
    if kind == "swapend" and any(abs(len(wav) - length) < MAX_SHIFT for length in lengths):
        changed = 0.0  # both are read; the noise in AAC depends on what was decoded before
    if changed > explained_s(kind, size, len(wholes[0]) / rate):
        tally.failures.append(f"{path.name} ({kind}): {changed:.2f} s changed without a word")
    else:
        tally.whole += 1


def mutations(decoder: Decoder, folder: Path, count: int, seeds: int) -> Tally:
    """Judge `count` damaged files of each format and seed."""
    tally = Tally("mutated audio files")
    for name, paths in originals(folder / "seeds"):
        bodies = [path.read_bytes() for path in paths]
        wholes = [decode(decoder, path)[0] for path in paths]
        for seed in range(seeds):
            rng = random.Random(f"{name} {seed}")
            for number in range(count):
                kind, data = mutated(bodies, rng)
                path = folder / f"{name}-{seed}-{number}{paths[0].suffix}"
                path.write_bytes(data)
                judge(decoder, path, kind, wholes, len(bodies[0]), tally)
                path.unlink()
    return tally


def made_elsewhere(decoder: Decoder, folder: Path) -> Tally:
    """Judge damaged files that lie in a folder."""
    tally = Tally("audio files of --audio")
    for group in sorted(folder.iterdir()):
        paths = sorted((folder.parent / "seeds").glob(f"{group.name}-*"))
        wholes = [decode(decoder, path)[0] for path in paths]
        for path in sorted(group.iterdir()):
            judge(
                decoder, path, path.stem.partition("-")[2], wholes, paths[0].stat().st_size, tally
            )
    return tally


# ---- checkpoints and indexes --------------------------------------------------------------------

LIMIT_MB = 300  # memory that a hostile file may cost
LIMIT_S = 10.0


def in_child(work: Callable[[], None]) -> tuple[str, float, float]:
    """Run `work` in a forked child; return its outcome, its seconds and the megabytes it added.

    The outcome is "read", "refused", or what went wrong.
    """
    reader, writer = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        limit = (4 << 30) + 1024 * before
        resource.setrlimit(resource.RLIMIT_AS, (8 * limit, 8 * limit))
        outcome = "read"
        try:
            work()
        except (CheckpointError, IndexFault) as error:
            outcome = "refused" if str(error).isprintable() else f"message: {error!r}"
        except BaseException as error:  # noqa: BLE001 anything else is a failure
            outcome = f"{type(error).__name__}: {error}"
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(writer, f"{after - before}\n{outcome}".encode()[:4000])
        os._exit(0)
    os.close(writer)
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() - began > 2 * LIMIT_S:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.001)
    seconds = time.monotonic() - began
    with os.fdopen(reader, "rb") as pipe:
        memory, _, outcome = pipe.read().decode().partition("\n")
    return outcome or "it hung or crashed", seconds, int(memory or 0) / 1024


def checkpoints(folder: Path) -> Tally:
    """Load the hostile checkpoints of the tests, and damaged ones."""
    from tests.models import test_checkpoint as hostile

    tally = Tally("hostile checkpoints")
    mark = folder / "foreign-code-ran"
    files: dict[str, Path] = {}
    storage = struct.pack("<4f", 1, 2, 3, 4)
    for name, (data, _) in hostile.LIES.items():
        files[name] = hostile.zip_with(folder / f"lie-{len(files)}.pt", data, s0=storage)
    for name, (opcodes, _) in hostile.BOMBS.items():
        data = b"\x80\x04" + opcodes + b"."
        files[name] = hostile.zip_with(folder / f"bomb-{len(files)}.pt", data, s0=storage)
        files[f"{name}, bare"] = folder / f"bomb-{len(files)}.pt"
        files[f"{name}, bare"].write_bytes(data)
    for name, (make, _) in hostile.ATTACKS.items():
        for zipped in (True, False):
            path = folder / f"attack-{len(files)}.pt"
            content = {"model": make(str(mark))}
            hostile.save(path, content, _use_new_zipfile_serialization=zipped)
            files[f"{name}, {'zip' if zipped else 'legacy'}"] = path
    whole = hostile.save(folder / "whole.pt", hostile.every_kind_of_content())
    for number, data in enumerate(mutated_bytes(whole.read_bytes(), 100)):
        files[f"damaged {number}"] = folder / f"damaged-{number}.pt"
        files[f"damaged {number}"].write_bytes(data)
    most_s = most_mb = 0.0
    for name, path in files.items():
        outcome, seconds, megabytes = in_child(lambda path=path: load_foreign(path) and None)
        most_s, most_mb = max(most_s, seconds), max(most_mb, megabytes)
        if mark.exists():
            outcome = "foreign code ran"
            mark.unlink()
        if seconds > LIMIT_S or megabytes > LIMIT_MB:
            outcome = f"{outcome}, after {seconds:.1f} s and {megabytes:.0f} MB"
        tally.whole += outcome == "read"
        tally.left_out["refused"] += outcome == "refused"
        if outcome not in ("read", "refused"):
            tally.failures.append(f"{name}: {outcome}")
    print(f"hostile checkpoints cost at most {most_s:.2f} s and {most_mb:.0f} MB each", flush=True)
    return tally


def indexes(folder: Path) -> Tally:
    """Load damaged unit indexes."""
    import faiss

    from stages.retrieval import IndexNote, index_files, note_to_json

    tally = Tally("damaged indexes")
    index_path, note_path = index_files(folder, "singer")
    vectors = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
    index = faiss.index_factory(8, "IVF4,Flat")
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(index_path))
    note = IndexNote(
        encoder="mfcc",
        checkpoint_sha256=None,
        dim=8,
        speaker="singer",
        vectors=len(vectors),
        frames=len(vectors),
        kind="IVF4,Flat",
        nprobe=1,
        seed=0,
        faiss_version=faiss.__version__,
        dataset_fingerprint="0" * 64,
        sha256=hashlib.sha256(index_path.read_bytes()).hexdigest(),
    )
    note_path.write_text(note_to_json(note))
    load_index(folder, "singer")
    for path, versions in (
        (index_path, mutated_bytes(index_path.read_bytes(), 60)),
        (note_path, mutated_json(note_path.read_text(), 21)),
    ):
        original = path.read_bytes()
        for number, data in enumerate(versions):
            path.write_bytes(data)
            outcome, seconds, megabytes = in_child(lambda: load_index(folder, "singer") and None)
            tally.whole += outcome == "read"
            tally.left_out["refused"] += outcome == "refused"
            if outcome not in ("read", "refused") or seconds > LIMIT_S or megabytes > LIMIT_MB:
                tally.failures.append(
                    f"{path.name} {number}: {outcome}, {seconds:.1f} s, {megabytes:.0f} MB"
                )
        path.write_bytes(original)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mutations", type=int, default=100, metavar="N")
    parser.add_argument("--seeds", type=int, default=1, metavar="N")
    parser.add_argument("--audio", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("audio", "checkpoints", "indexes"):
            (folder / part).mkdir()
        with Decoder(DecodeConfig(), folder / "scratch") as decoder:
            tallies = [
                odd_files(decoder),
                mutations(decoder, folder / "audio", options.mutations, options.seeds),
            ]
            if options.audio:
                tallies.append(made_elsewhere(decoder, options.audio))
        tallies += [checkpoints(folder / "checkpoints"), indexes(folder / "indexes")]
    print(f"{'':24} {'tried':>6} {'whole':>6} {'noted':>6} {'left out':>8} {'failures':>8}")
    for tally in tallies:
        print(tally)
    for tally in tallies:
        for failure in tally.failures:
            print(f"{tally.name}: {failure}")
    return 1 if any(tally.failures for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
