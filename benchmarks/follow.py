"""Accuracy of conversion: melody and timbre of songs with known f0 (`cantor demo-corpus`).

Each song is converted to the voices of the other singers.

    python benchmarks/follow.py RUN CORPUS
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile as sf
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.convert.command import convert_file, read_request
from pipeline.convert.metrics import (
    compare_f0,
    envelope_distance,
    long_term_envelope,
    measure_f0,
)
from pipeline.train.find_voice import read_any_voice
from pipeline.train.validation import compare_pitch
from stages.resample import ResampleConfig, resample
from stages.types import Array

_HEADER = "| song | in the voice of | moved | right | near | median cents | to target | to source |"


def sound(path: Path, sample_rate: int) -> Array:
    """Read a song (T,), mixed down, at `sample_rate`."""
    wav, rate = sf.read(path, dtype="float32", always_2d=True)
    return resample(wav.mean(axis=1), rate, sample_rate, ResampleConfig())


def songs_of(corpus: Path, speaker: str) -> list[Path]:
    truth = corpus / ".truth" / speaker
    return sorted(
        path for path in (corpus / speaker).iterdir() if (truth / f"{path.stem}.csv").exists()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("voice", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--songs", type=int, default=1, help="of each speaker")
    parser.add_argument("settings", nargs="*", help="section.key=value, for convert")
    options = parser.parse_args()
    voice = read_any_voice(options.voice)
    rate = voice.sample_rate
    envelopes = {
        speaker: long_term_envelope(
            np.concatenate([sound(path, rate) for path in songs_of(options.corpus, speaker)]), rate
        )
        for speaker in voice.speakers
    }
    print(_HEADER)
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "sung.wav"
        for source, target in itertools.permutations(voice.speakers, 2):
            for song in songs_of(options.corpus, source)[: options.songs]:
                settings = [f"voice.speaker={target}", "pitch.transpose=auto", *options.settings]
                request = read_request(options.voice, settings)
                done = convert_file(request, song, output, Console(file=io.StringIO()))
                wav = sound(output, rate)
                found = measure_f0(wav, rate, done.hop_length, len(done.target_f0))
                agreement = compare_f0(done.target_f0, found)
                right = compare_pitch(done.target_f0, found)["pitch_accuracy"]
                envelope = long_term_envelope(wav, rate)
                voiced = (done.f0 > 0) & (done.target_f0 > 0)
                moved = 12 * np.log2(np.median(done.target_f0[voiced] / done.f0[voiced]))
                print(
                    f"| {source}/{song.name} | {target} | {moved:+.0f} "
                    f"| {100 * right:.1f} % | {100 * agreement.near:.1f} % "
                    f"| {agreement.median_cents:.1f} "
                    f"| {envelope_distance(envelope, envelopes[target]):.1f} dB "
                    f"| {envelope_distance(envelope, envelopes[source]):.1f} dB |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
