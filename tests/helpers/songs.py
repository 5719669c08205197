"""Small synthetic songs for tests that need files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile as sf


def tune(
    seconds: float, sample_rate: int = 44100, pitch_hz: float = 220.0, seed: int = 0
) -> np.ndarray:
    """(T,) float32: a harmonic tone with vibrato, and half a second of near-silence every 2.5 s."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * sample_rate)) / sample_rate
    phase = 2 * np.pi * pitch_hz * (t + 0.002 * np.sin(2 * np.pi * 5 * t))
    wav = sum(np.sin(k * phase) / k for k in range(1, 9)) * 0.1
    wav[(t % 2.5) > 2.0] = 0.0
    return (wav + 1e-4 * rng.standard_normal(len(t))).astype(np.float32)


def make_songs(
    folder: Path, speakers: int = 3, songs: int = 2, seconds: float = 6.0, longer_s: float = 1.0
) -> list[Path]:
    """`folder/spkN/songM.(wav|flac)`, each of another pitch and rate, and `longer_s` longer."""
    paths = []
    for speaker in range(speakers):
        for song in range(songs):
            number = speaker * songs + song
            rate = (44100, 48000, 22050)[number % 3]
            wav = tune(seconds + number * longer_s, rate, 110.0 * 2 ** (number / 7), seed=number)
            path = folder / f"spk{speaker}" / f"song{song}.{('wav', 'flac')[number % 2]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            sf.write(path, wav if number % 3 else np.stack([wav, wav], 1), rate)
            paths.append(path)
    return paths
