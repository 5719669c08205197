"""Cost of f0 estimation: each method against the call that users make today, on the same clips.

Both sides run in fresh processes of one thread, with the allocator settings of Cantor's workers.
Only numpy is imported at the top, so each process has only what its method needs.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import environment

SAMPLE_RATE = 44100
HOP_LENGTH = 512
F0_MIN, F0_MAX = 50.0, 1100.0

_PASSES_S = 4.0  # of CPU in passes over the clips, two passes at least

Clips = Sequence[np.ndarray]
Work = Callable[[Clips], object]


# ---- what users call today ---------------------------------------------------------------------


def _praat(call: str) -> Callable[[str | None], Work]:
    def build(weights: str | None) -> Work:
        import parselmouth

        def work(clips: Clips) -> list[np.ndarray]:
            found = []
            for wav in clips:
                pitch = getattr(parselmouth.Sound(wav, SAMPLE_RATE), call)(
                    time_step=HOP_LENGTH / SAMPLE_RATE,
                    pitch_floor=F0_MIN,
                    pitch_ceiling=F0_MAX,
                    voicing_threshold=0.6,
                )
                found.append(pitch.selected_array["frequency"])
            return found

        return work

    return build


def _world(estimator: str) -> Callable[[str | None], Work]:
    def build(weights: str | None) -> Work:
        import pyworld

        def work(clips: Clips) -> list[np.ndarray]:
            found = []
            for wav in clips:
                samples = wav.astype(np.float64)
                f0, times = getattr(pyworld, estimator)(
                    samples,
                    SAMPLE_RATE,
                    f0_floor=F0_MIN,
                    f0_ceil=F0_MAX,
                    frame_period=1000 * HOP_LENGTH / SAMPLE_RATE,
                )
                found.append(pyworld.stonemask(samples, f0, times, SAMPLE_RATE))
            return found

        return work

    return build


def _pyin(weights: str | None) -> Work:
    import librosa
    import librosa.core.pitch  # or it is imported when it is first called

    def work(clips: Clips) -> list[np.ndarray]:
        settings: dict[str, Any] = {"fmin": F0_MIN, "fmax": F0_MAX, "sr": SAMPLE_RATE}
        return [librosa.pyin(wav, hop_length=HOP_LENGTH, **settings)[0] for wav in clips]

    return work


def _crepe(size: str) -> Callable[[str | None], Work]:
    def build(weights: str | None) -> Work:
        _import_torchaudio()  # torchcrepe imports it
        import torch
        import torchcrepe

        def work(clips: Clips) -> list[Any]:
            return [
                torchcrepe.predict(
                    torch.from_numpy(wav)[None],
                    SAMPLE_RATE,
                    HOP_LENGTH,
                    F0_MIN,
                    F0_MAX,
                    size,
                    batch_size=512,
                    return_periodicity=True,
                )
                for wav in clips
            ]

        return work

    return build


def _fcpe(weights: str | None) -> Work:
    """Build the network for every file, as so-vits-svc does with all its predictors."""
    _import_torchaudio()
    import torch
    import torchfcpe

    def work(clips: Clips) -> list[Any]:
        found = []
        for wav in clips:
            with redirect_stdout(None):  # it says what it assumes, every time
                model = torchfcpe.spawn_bundled_infer_model("cpu")
            f0 = model.infer(
                torch.from_numpy(wav)[None, :, None],
                sr=SAMPLE_RATE,
                decoder_mode="local_argmax",
                threshold=0.006,
                f0_min=F0_MIN,
                f0_max=F0_MAX,
                output_interp_target_length=len(wav) // HOP_LENGTH,
            )
            found.append(f0)
        return found

    return work


def _rmvpe(weights: str | None) -> Work:
    """Run the network layer by layer, reading its file for every clip, as so-vits-svc does."""
    torchaudio = _import_torchaudio()
    import torch

    from models.f0.mel import f0_log_mel, f0_mel_filters
    from models.f0.rmvpe_checkpoint import RmvpeConfig
    from tests.helpers.plain_rmvpe import PlainRmvpe

    assert weights is not None
    cents = 20 * np.arange(360) + 1997.3794084376191

    @torch.inference_mode()
    def f0(wav: np.ndarray) -> np.ndarray:
        model = PlainRmvpe(RmvpeConfig()).eval()
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["model"])
        resample = torchaudio.transforms.Resample(SAMPLE_RATE, 16000, lowpass_filter_width=128)
        wav16 = resample(torch.from_numpy(wav))[None, None]
        padded = torch.nn.functional.pad(wav16, (512, 512), mode="reflect")[0]
        mel = f0_log_mel(padded, f0_mel_filters("htk", 30.0, 8000.0)).transpose(1, 2)  # (1, M, F)
        frames = mel.shape[-1]
        salience = model(torch.nn.functional.pad(mel, (0, -frames % 32)))[0, :frames].numpy()
        nine = np.clip(salience.argmax(axis=1)[:, None] + np.arange(-4, 5), 0, 359)
        weight = np.take_along_axis(salience, nine, axis=1)
        mean = (weight * cents[nine]).sum(axis=1) / np.maximum(weight.sum(axis=1), 1e-9)
        return np.where(salience.max(axis=1) > 0.03, 10 * 2 ** (mean / 1200), 0.0)

    return lambda clips: [f0(wav) for wav in clips]


def _import_torchaudio() -> Any:
    from models.torchaudio_compat import import_torchaudio

    return import_torchaudio()


@dataclass(frozen=True)
class Pair:
    """One method and the call to compare it with.

    title: name of that call. build: makes it, after its imports. ours_imports: imports of Cantor's
    process. clips: clips of 5 s per pass, fewer where a pass would take minutes.
    """

    title: str
    build: Callable[[str | None], Work]
    our_imports: tuple[str, ...]
    clips: int = 12


PAIRS = {
    "praat": Pair("parselmouth, `to_pitch_ac`", _praat("to_pitch_ac"), ("parselmouth",)),
    "praat-cc": Pair("parselmouth, `to_pitch_cc`", _praat("to_pitch_cc"), ("parselmouth",), 6),
    "dio": Pair("pyworld, `dio` and `stonemask`", _world("dio"), ("pyworld",)),
    "harvest": Pair("pyworld, `harvest` and `stonemask`", _world("harvest"), ("pyworld",), 6),
    "pyin": Pair("`librosa.pyin`", _pyin, ("librosa", "librosa.core.pitch"), 6),
    "crepe": Pair("`torchcrepe.predict`, full", _crepe("full"), ("torch",), 3),
    "crepe-tiny": Pair("`torchcrepe.predict`, tiny", _crepe("tiny"), ("torch",), 6),
    "fcpe": Pair("torchfcpe, a model for each clip", _fcpe, ("torch",)),
    "rmvpe": Pair("plain PyTorch, a model for each clip", _rmvpe, ("torch",), 6),
}


def _ours(method: str) -> Callable[[str | None], Work]:
    def build(weights: str | None) -> Work:
        for name in PAIRS[method].our_imports:
            importlib.import_module(name)
        if "torch" in PAIRS[method].our_imports:
            _import_torchaudio()
        from stages.f0 import F0Config, estimate_clips

        cfg = F0Config(method=method, device="cpu", checkpoint=weights)  # type: ignore[arg-type]
        return lambda clips: list(estimate_clips(clips, SAMPLE_RATE, cfg))

    return build


# ---- measuring ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """CPU seconds of one side of a pair.

    imports: all imports. first: the first minute of audio, including everything that is built or
    read for it. steady: every further minute. peak_mb: RSS after a pass.
    """

    imports: float
    first: float
    steady: float
    peak_mb: float


def compare(
    method: str, clips: Clips, weights: str | None, quick: bool = False
) -> tuple[Cost, Cost]:
    """Measure both sides in turn, each the best of two processes, or one if a pass takes long."""
    pair = PAIRS[method]
    clips = [clips[i % len(clips)] for i in range(1 if quick else pair.clips)]
    ours, theirs = [], []
    for _ in range(1 if quick or pair.clips < 12 else 2):
        ours.append(_in_fresh_process(method, True, clips, weights, quick))
        theirs.append(_in_fresh_process(method, False, clips, weights, quick))
    return _best(ours), _best(theirs)


def _best(costs: Sequence[Cost]) -> Cost:
    return Cost(
        min(cost.imports for cost in costs),
        min(cost.first for cost in costs),
        min(cost.steady for cost in costs),
        max(cost.peak_mb for cost in costs),
    )


def _measure(method: str, ours: bool, clips: Clips, weights: str | None, quick: bool) -> Cost:
    start = time.process_time()
    work = (_ours(method) if ours else PAIRS[method].build)(weights)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    imports = time.process_time() - start
    minutes = sum(map(len, clips)) / SAMPLE_RATE / 60
    passes: list[float] = []
    while len(passes) < 2 or (not quick and sum(passes) < _PASSES_S):
        start = time.process_time()
        work(clips)
        passes.append(time.process_time() - start)
        if len(passes) == 1:
            peak_mb = _peak_rss_mb()
    steady = min(passes[1:]) / minutes
    # A pass may be less than a minute: the rest of the first minute costs as much as others.
    return Cost(imports, passes[0] + (1 - minutes) * steady, steady, peak_mb)


def _peak_rss_mb() -> float:
    """Return the peak RSS of this process; ru_maxrss would include its parent's at the start."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM: peaks are measured on Linux alone")


def _in_fresh_process(*arguments: Any) -> Cost:
    from benchmarks.extract import THREADS  # not at the top: every process would import Ray
    from pipeline.cluster.ray_connection import KEEP_FREED_MEMORY

    with environment(dict.fromkeys(THREADS, "1") | KEEP_FREED_MEMORY):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_measure, *arguments).result()
