"""Error rates of the measure `second_voice`: solo clips called mixed, and mixed clips missed.

The constants of the measure were chosen on the singers and recordings of `tuned`; those of
`held out` had no part in it. Further solo recordings can be named; they count as held out.

    python benchmarks/second_voice.py [--f0 praat] [FOLDER/SINGER/*.flac ...]
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile as sf
from scipy import signal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.f0_corpus import HIGH_SOPRANO, LOW_BASS, TENOR
from pipeline.tools.formant_singer import VOICES, FormantVoice, sing
from stages.f0 import estimate_f0
from stages.f0.config import F0Config
from stages.quality.second_voice import second_voice
from stages.resample import ResampleConfig, resample
from stages.types import Array

RATE = 44100
HOP_LENGTH = 512
CLIP_S = 6
LEVELS_DB = (0, -6, -12, -18)  # of the second voice or the instrument, below the first voice
LIMIT = 0.5
_AUDIO = Path(__file__).resolve().parent.parent / "tests" / "data" / "audio"
_MOST_CLIPS = 6  # of one singer

TUNED_RECORDINGS = ("singing-female", "vignesh", "speech-female", "198-209-0000")
HELD_OUT_RECORDINGS = ("vocadito_1", "speech-male")
MIXED_RECORDINGS = ("carnatic", "karissa_hobbs")

Singers = Mapping[str, Sequence[Array]]  # clips (T,) by singer


@dataclass(frozen=True)
class Group:
    """Solo clips by singer, and an accompaniment of so many samples from a seed."""

    name: str
    singers: Singers
    accompany: Callable[[int, int], Array]


def groups(folders: Sequence[Path]) -> list[Group]:
    tuned = {
        **_sung((*VOICES, *_drawn(range(4)))),
        **{name: _clips(_AUDIO / name) for name in TUNED_RECORDINGS},
    }
    held_out = {
        **_sung((TENOR, LOW_BASS, HIGH_SOPRANO, *_drawn(range(100, 105)))),
        **{name: _clips(_AUDIO / name) for name in HELD_OUT_RECORDINGS},
    }
    further = defaultdict(list)
    for path in folders:
        if len(further[path.parent.name]) < _MOST_CLIPS:
            further[path.parent.name] += _clips(path.with_suffix(""))
    found = [Group("tuned", tuned, _guitar), Group("held out", held_out, _keys)]
    return found + ([Group("further recordings", further, _keys)] if further else [])


def conditions(group: Group) -> Iterator[tuple[str, bool, list[Array]]]:
    """Yield name, whether it is mixed, and clips."""
    solo = [clip for clips in group.singers.values() for clip in clips]
    rng = np.random.default_rng(0)
    yield "solo", False, solo
    yield "solo, noise at 20 dB", False, [_level(clip) + _noise(clip, rng, 0.1) for clip in solo]
    yield "solo in a room", False, [_in_a_room(_level(clip), rng) for clip in solo]
    names = list(group.singers)
    for db in LEVELS_DB:
        duets = []
        for i, name in enumerate(names):
            for j, first in enumerate(group.singers[name]):
                others = group.singers[names[(i + 1 + j % (len(names) - 1)) % len(names)]]
                duets.append(_mixed(first, others[j % len(others)], db))
        yield f"two voices, {db} dB", True, duets
    for db in LEVELS_DB:
        accompanied = [
            _mixed(clip, group.accompany(len(clip), seed), db) for seed, clip in enumerate(solo)
        ]
        yield f"voice and instruments, {db} dB", True, accompanied


def suspicion(wav: Array, method: str) -> float:
    wav = (0.5 * wav / np.abs(wav).max()).astype(np.float32)
    f0 = estimate_f0(wav, RATE, F0Config(method=method, hop_length=HOP_LENGTH))
    return second_voice(wav, RATE, f0, HOP_LENGTH)


def _drawn(seeds: range) -> list[FormantVoice]:
    """Return voices of random range, vocal tract and source."""
    voices = []
    for seed in seeds:
        rng = np.random.default_rng([7, seed])
        lowest = float(np.exp(rng.uniform(np.log(75), np.log(330))))
        voices.append(
            replace(
                VOICES[0],
                name=f"drawn {seed}",
                f0_min=lowest,
                f0_max=lowest * float(rng.uniform(2, 3.5)),
                formant_scale=float(np.interp(lowest, (75, 330), (0.95, 1.2))),
                ring=float(rng.uniform(0, 0.6)),
                breathiness=float(rng.uniform(0.1, 0.5)),
                vibrato_cents=float(rng.uniform(10, 70)),
                open_quotient=float(rng.uniform(0.45, 0.8)),
                tilt_hz=float(rng.uniform(1500, 4000)),
            )
        )
    return voices


def _sung(voices: Sequence[FormantVoice]) -> Singers:
    return {
        voice.name: _cut(sing(voice, 4 * CLIP_S, RATE, seed=i, hop_length=HOP_LENGTH).wav)
        for i, voice in enumerate(voices)
    }


def _clips(stem: Path) -> list[Array]:
    (path,) = stem.parent.glob(f"{stem.name}.*[!v]")  # not the .csv of its pitch
    wav, rate = sf.read(path, dtype="float32", always_2d=True)
    return _cut(resample(wav.mean(axis=1), rate, RATE, ResampleConfig()))


def _cut(wav: Array) -> list[Array]:
    clips = [wav[i : i + CLIP_S * RATE] for i in range(0, len(wav), CLIP_S * RATE)]
    long_enough = [clip for clip in clips if len(clip) > 3 * RATE and np.std(clip) > 1e-3]
    return (long_enough or clips[:1])[:_MOST_CLIPS]


def _level(wav: Array) -> Array:
    return wav / np.std(wav)


def _mixed(first: Array, second: Array, db: float) -> Array:
    count = min(len(first), len(second))
    return _level(first[:count]) + _level(second[:count]) * np.float32(10 ** (db / 20))


def _noise(wav: Array, rng: np.random.Generator, gain: float) -> Array:
    return (gain * rng.standard_normal(len(wav))).astype(np.float32)


def _in_a_room(wav: Array, rng: np.random.Generator) -> Array:
    """Ring for half a second with a quarter of the energy."""
    time = np.arange(int(0.6 * RATE)) / RATE
    tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / 0.5)
    room = 0.5 * tail / np.linalg.norm(tail)
    room[0] = 1
    return signal.fftconvolve(wav, room)[: len(wav)].astype(np.float32)


def _guitar(count: int, seed: int) -> Array:
    """Strummed chords of plucked strings (Karplus and Strong 1983)."""
    rng = np.random.default_rng([1, seed])
    wav = np.zeros(count)
    for start in range(0, count, RATE // 2):
        root = 40 + int(rng.integers(0, 12))
        for string, interval in enumerate((0, 7, 12, 16, 19)):
            period = round(RATE / (440 * 2 ** ((root + interval - 69) / 12)))
            at = start + string * RATE // 60
            burst = np.zeros(max(0, min(count, at + RATE) - at))
            burst[:period] = rng.uniform(-1, 1, period)[: len(burst)]
            loop = np.zeros(period + 2)
            loop[0], loop[period], loop[period + 1] = 1, -0.498, -0.498
            wav[at : at + len(burst)] += signal.lfilter([1.0], loop, burst)
    return wav.astype(np.float32)


def _keys(count: int, seed: int) -> Array:
    """Chords of decaying or held stiff strings, a bass line, and drums of noise."""
    rng = np.random.default_rng([2, seed])
    wav = np.zeros(count)
    decay = 1.5 if seed % 2 else 0.2
    for beat, start in enumerate(range(0, count, int(0.6 * RATE))):
        left = np.arange(min(count - start, RATE)) / RATE
        root = 45 + int(rng.choice([0, 2, 5, 7, 9]))
        for note, gain in ((root - 12, 1.5), (root, 1), (root + 4, 0.8), (root + 7, 0.8)):
            hz = 440 * 2 ** ((note - 69) / 12)
            for k in range(1, 9):
                partial = k * hz * np.sqrt(1 + 4e-4 * k * k)
                wav[start : start + len(left)] += (
                    gain / k * np.sin(2 * np.pi * partial * left + k) * np.exp(-decay * k * left)
                )
        strike = np.exp(-left * (60 if beat % 2 else 25)) * rng.standard_normal(len(left))
        wav[start : start + len(left)] += 1.5 * strike
    return wav.astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("further", nargs="*", type=Path, help="solo recordings, SINGER/FILE")
    parser.add_argument("--f0", nargs="*", default=["praat", "dio"], help="methods")
    parser.add_argument("--only", choices=("tuned", "held out", "further recordings"))
    options = parser.parse_args()
    found = [each for each in groups(options.further) if options.only in (None, each.name)]
    print(f"| clips of {CLIP_S} s | f0 | clips | above {LIMIT:g} | wrong |\n|---|---|---|---|---|")
    for group in found:
        for name, mixed, clips in conditions(group):
            for method in options.f0:
                above = sum(suspicion(clip, method) > LIMIT for clip in clips)
                wrong = len(clips) - above if mixed else above
                print(
                    f"| {group.name}: {name} | {method} | {len(clips)} | {above} "
                    f"| {wrong / len(clips):.0%} |"
                )
    for name in MIXED_RECORDINGS:
        clips = _clips(_AUDIO / name)
        for method in options.f0:
            above = sum(suspicion(clip, method) > LIMIT for clip in clips)
            print(
                f"| recording {name} | {method} | {len(clips)} | {above} "
                f"| {1 - above / len(clips):.0%} |"
            )


if __name__ == "__main__":
    main()
