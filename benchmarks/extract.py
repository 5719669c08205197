#!/usr/bin/env python3
"""Cost of extraction: bare library calls, the stages, and the whole run on Ray.

    python benchmarks/extract.py --minutes 10 30 60 [--source make_corpus|demo|FOLDER] [--out DIR]

On one input, in one run, each in its own processes:
(a) bare: the library calls that a user would write by hand, one process, one thread; once with
    the user's allocator settings, once with those of Cantor's workers;
(b) stages: Cantor's code as a worker runs it, one process and its decode child, without Ray;
(c) the whole run: `run_pipeline.py extract` on Ray, all processes of its tree, less a run on a
    few seconds of audio (start-up).
The ratio of (c) to (a) is the cost of running on Ray, exactly once. Compare CPU seconds (user +
system time); wall seconds mean little on a machine that does other work too.
docs/benchmarks.md explains the tables.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import psutil
import soundfile as sf

from pipeline.cluster.ray_connection import KEEP_FREED_MEMORY
from pipeline.extract.config import ExtractConfig, load_config
from pipeline.songs.balance import QUARANTINED
from pipeline.songs.corpus import Corpus, list_corpus
from pipeline.songs.plan import append_plan, default_task_minutes, load_plan, make_tasks, plan_songs
from pipeline.tools.demo_corpus import make_demo_corpus
from stages.chain import StageClock

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

# Bare calls that extraction makes too, although no common library has them.
CANTOR_ONLY = ("true peak (ours)", "quality columns (ours)")

# so-vits-svc 730930d and its libraries, CPU s per minute of audio, one thread, measured on another
# day: Intel Xeon (Cascade Lake) at 2.5 GHz, 2 vCPU. Keys are the stages that do the same work; its
# encoder and spectrogram have no counterpart in a run with mfcc.
SOVITS_CPU = "Intel Xeon (Cascade Lake, model 85 stepping 7) at 2.5 GHz, 2 vCPU"
SOVITS = {
    "decode": (0.10, "resample.py, with trimming and writing"),
    "slice": (0.020, "slicer2.py"),
    "f0 dio": (2.4, "f0_predictor dio"),
    "f0 praat": (0.56, "f0_predictor pm"),
    "f0 harvest": (24.3, "f0_predictor harvest"),
}
SOVITS_TREE_MB = 2839.0  # its feature step, one process and its parent; the encoder is most of it

# Every measured process has one thread.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")

POLL_S = 0.2
FULL_POLL_S = 2.0  # PSS makes the kernel walk every page


@dataclass
class Cost:
    """CPU and wall seconds of `calls` calls."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    calls: int = 0


@dataclass
class Measured:
    """Costs of the parts of one process by name, in the order of their first call."""

    audio_s: float  # of the songs that could be read
    costs: dict[str, Cost]
    total: Cost
    peak_rss_mb: float
    clips: int = 0

    def cpu_s(self, without: Sequence[str] = ()) -> float:
        return sum(cost.cpu_s for name, cost in self.costs.items() if name not in without)


@dataclass
class Tree:
    """Resources used by a process and all its descendants."""

    wall_s: float = 0.0
    cpu_s: dict[str, float] = field(default_factory=dict)  # by role
    reaped_cpu_s: float = 0.0  # what the kernel accounts to us of processes that were waited for
    peak_rss_mb: float = 0.0  # sum of all; pages that processes share count once for each
    peak_pss_mb: float = 0.0  # sum of all; shared pages count once
    peak_by_role_mb: dict[str, float] = field(default_factory=dict)  # RSS of the largest process
    peak_uss_by_role_mb: dict[str, float] = field(default_factory=dict)
    processes: int = 0

    @property
    def total_cpu_s(self) -> float:
        return sum(self.cpu_s.values())


@dataclass
class Figures:
    """All measurements on one corpus."""

    minutes: float
    bare: Measured  # with the allocator settings of workers, as all else here
    bare_untuned: Measured
    stages: Measured
    run: Tree
    start_up: Tree
    summary: dict[str, Any]  # the run's own --json
    loadavg: list[float]  # before, between and after every measurement

    @property
    def net_cpu_s(self) -> float:
        return self.run.total_cpu_s - self.start_up.total_cpu_s

    def overhead(self, bare: Measured) -> dict[str, float]:
        """Return the CPU of the whole run less start-up, over that of bare calls, less one."""
        alone = sum(bare.costs[name].cpu_s for name in CANTOR_ONLY)
        return {
            "counted on both sides": self.net_cpu_s / bare.cpu_s() - 1,
            "on neither side": (self.net_cpu_s - alone) / (bare.cpu_s() - alone) - 1,
            "in the run alone": self.net_cpu_s / (bare.cpu_s() - alone) - 1,
        }


# ---- corpus ------------------------------------------------------------------------------------


def make_corpus(source: str, minutes: float, out: Path) -> Path:
    """Make a corpus of that many minutes under `out`, once; a FOLDER is used as it is."""
    if source not in ("make_corpus", "demo"):
        return Path(source)
    folder = out / f"corpus-{source}-{minutes:g}"
    if source == "demo":
        return make_demo_corpus(folder, minutes=minutes)
    if not (folder / "manifest.json").exists():
        script = [sys.executable, str(SHARED / "bench" / "make_corpus.py"), str(folder)]
        options = ["--minutes", f"{minutes:g}", "--seed", "0", "--sources", str(SHARED / "audio")]
        subprocess.run([*script, *options], check=True, stdout=subprocess.DEVNULL)
    return folder


def make_tiny_corpus(folder: Path, songs: int) -> Path:
    """Make songs of 1.5 s, to measure start-up."""
    rng = np.random.default_rng(0)
    time_s = np.arange(66150) / 44100
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(songs):
        wav = 0.2 * np.sin(2 * np.pi * 220 * time_s) + 1e-3 * rng.standard_normal(len(time_s))
        (folder / "spk").mkdir(exist_ok=True)
        sf.write(folder / "spk" / f"{number}.wav", wav, 44100)
    return folder


# ---- (a) bare library calls --------------------------------------------------------------------


class Costs:
    """Sum of the costs of code blocks in this process, and in `other` where a block uses it."""

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = defaultdict(Cost)

    @contextmanager
    def of(self, name: str, other: Callable[[], float] = lambda: 0.0) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time() + other()
        try:
            yield
        finally:
            cost = self.costs[name]
            cost.cpu_s += time.process_time() + other() - cpu
            cost.wall_s += time.perf_counter() - wall
            cost.calls += 1


def measure_bare(corpus: Path, config: ExtractConfig, out: Path) -> Measured:
    """Run the library calls for every song of `corpus`, with files written to `out`.

    The output differs from extraction: the decoder trusts the file, f0 stays on the estimator's
    clock, and there is one table per song.
    """
    import torch

    torch.set_num_threads(1)
    listed = list_corpus(corpus)
    out.mkdir(parents=True, exist_ok=True)
    warm = make_tiny_corpus(out / "warm-up", 1) / "spk" / "0.wav"
    measure = _bare_song(config, out)
    measure(warm, Costs())
    costs, clips, seconds = Costs(), 0, 0.0
    started = time.process_time(), time.perf_counter()
    for source in listed.songs:
        try:
            song_s, song_clips = measure(listed.root / os.fsdecode(source.path), costs)
        except sf.LibsndfileError:
            continue  # the corrupt song of the demo corpus
        seconds, clips = seconds + song_s, clips + song_clips
    total = Cost(time.process_time() - started[0], time.perf_counter() - started[1], 1)
    return Measured(seconds, dict(costs.costs), total, _peak_rss_mb(), clips)


def _bare_song(config: ExtractConfig, out: Path) -> Callable[[Path, Costs], tuple[float, int]]:
    import librosa
    import pyarrow as pa
    import pyarrow.parquet as pq
    import pyloudnorm
    import soxr
    import torch

    from models.encoders import load_encoder
    from stages.loudness import peaks
    from stages.quality import measure_pitch, measure_quality
    from stages.slice import kept_spans, slice_silence

    rate = config.audio.sample_rate
    hop = round(rate * config.slice.hop_ms / 1000)
    estimate = _bare_f0(config)
    encoder = load_encoder(config.encoder.name, config.encoder.checkpoint, "cpu")
    meter = pyloudnorm.Meter(rate)

    def song(path: Path, costs: Costs) -> tuple[float, int]:
        with costs.of("soundfile.read"):
            wav, source_rate = sf.read(path, dtype="float32", always_2d=True)
        seconds = len(wav) / source_rate
        with costs.of("numpy mean of channels"):
            wav = wav.mean(axis=1)
        with costs.of("soxr.resample VHQ"):
            wav = soxr.resample(wav, source_rate, rate, quality="VHQ")
        with costs.of("librosa.feature.rms"):
            librosa.feature.rms(y=wav, frame_length=4 * hop, hop_length=hop, pad_mode="constant")
        # The cuts take microseconds; not timed, because slice_silence computes its own RMS.
        spans, _ = kept_spans(slice_silence(wav, rate, config.slice), rate, config.slice)
        if not spans:
            return seconds, 0
        with costs.of("pyloudnorm integrated_loudness"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loudness = meter.integrated_loudness(wav)
        with costs.of("true peak (ours)"):
            _, true_peak = peaks(wav)
        gain = 10 ** (min(config.loudness.target_lufs - loudness, 40.0) / 20)
        gain = min(gain, 10 ** (config.loudness.true_peak_db / 20) / max(true_peak, 1e-9))
        rows: dict[str, list[Any]] = {"audio": [], "f0": [], "units": []}
        for span in spans:
            with costs.of("numpy gain and int16"):
                clip = wav[span.start : span.stop] * np.float32(gain)
                samples = np.clip(np.rint(clip * 32768), -32768, 32767).astype(np.int16)
                clip = samples.astype(np.float32) / 32768
            with costs.of(f"f0 {config.f0.method}"):
                f0 = estimate(clip)
            with costs.of("quality columns (ours)"):
                measure_quality(clip, rate)
                measure_pitch(clip, rate, np.asarray(f0, np.float32), config.f0.hop_length)
            with costs.of("soxr.resample VHQ to the encoder"):
                low = soxr.resample(clip, rate, encoder.sample_rate, quality="VHQ")
            with costs.of(f"encoder {config.encoder.name}"):
                (units,) = encoder.encode([torch.from_numpy(low)])
            with costs.of("soundfile.write FLAC"):
                flac = io.BytesIO()
                sf.write(flac, samples, rate, "PCM_16", format="FLAC", compression_level=0.5)
            rows["audio"].append(flac.getvalue())
            rows["f0"].append(np.asarray(f0, np.float32))
            rows["units"].append(units.numpy().astype(np.float16).tobytes())
        with costs.of("pyarrow.parquet.write_table"):
            pq.write_table(pa.table(rows), out / f"{len(list(out.iterdir()))}.parquet")
        return seconds, len(spans)

    return song


def _bare_f0(config: ExtractConfig) -> Callable[[np.ndarray], np.ndarray]:
    rate, cfg = config.audio.sample_rate, config.f0
    if cfg.method == "praat":
        import parselmouth

        def praat(clip: np.ndarray) -> np.ndarray:
            sound = parselmouth.Sound(clip.astype(np.float64), rate)
            pitch = sound.to_pitch_ac(
                time_step=cfg.hop_length / rate,
                voicing_threshold=0.6,
                pitch_floor=cfg.f0_min,
                pitch_ceiling=cfg.f0_max,
            )
            return pitch.selected_array["frequency"]

        return praat
    if cfg.method not in ("dio", "harvest"):
        raise SystemExit(f"no bare calls are written here for f0.method={cfg.method}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pyworld

    def world(clip: np.ndarray) -> np.ndarray:
        samples = clip.astype(np.float64)
        f0, times = getattr(pyworld, cfg.method)(
            samples,
            rate,
            f0_floor=cfg.f0_min,
            f0_ceil=cfg.f0_max,
            frame_period=1000 * cfg.hop_length / rate,
        )
        return pyworld.stonemask(samples, f0, times, rate)

    return world


# ---- (b) our stages, in one process ------------------------------------------------------------


class CpuClock(StageClock):
    """The chain's clock, extended by CPU seconds of this process and the decode child."""

    def __init__(self, costs: Costs, child_cpu_s: Callable[[], float], rename: dict[str, str]):
        super().__init__()
        self.costs, self.child_cpu_s, self.rename = costs, child_cpu_s, rename

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        child = self.child_cpu_s if name == "decode" else lambda: 0.0
        with self.costs.of(self.rename.get(name, name), child):
            yield


def measure_stages(corpus: Path, config: ExtractConfig, dataset: Path) -> Measured:
    """Run the workers' code task by task in this process; the same shards, in `dataset`."""
    from pipeline.extract.clip_sources import ClipsOfSongs
    from pipeline.extract.job import ExtractJob
    from pipeline.extract.task import ClipMaker, ShardMaker

    tiny = make_tiny_corpus(dataset / "warm-up" / "corpus", 1)
    for root, folder in ((tiny, dataset / "warm-up"), (corpus, dataset)):
        _write_plan(list_corpus(root), folder, config)
    read_s: list[float] = []

    def heartbeat(song_id: str, seconds: float, status: str) -> None:
        if status != QUARANTINED:
            read_s.append(seconds)

    job = ExtractJob(dataset / "warm-up", tiny, config, "benchmark", {})
    clip_maker, shard_maker = ClipMaker(job, heartbeat), ShardMaker(job)
    source = clip_maker.source
    assert isinstance(source, ClipsOfSongs)

    def child_cpu_s() -> float:
        pid = source.decoder.child_pid
        return 0.0 if pid is None else sum(psutil.Process(pid).cpu_times()[:2])

    def run(costs: Costs) -> int:
        prepare = CpuClock(costs, child_cpu_s, {"write": "clip table"})
        finish = CpuClock(costs, child_cpu_s, {"write": "shard"})
        clips = 0
        for index in shard_maker.tasks:
            made = clip_maker.make(index, (), prepare)
            shard_maker.make(index, made, finish)
            clips += made.table.num_rows
        return clips

    run(Costs())
    read_s.clear()
    # Keep the warm libraries and decode child, but not the plan.
    source.job = shard_maker.job = ExtractJob(dataset, corpus, config, "benchmark", {})
    clip_maker.tasks = shard_maker.tasks = load_plan(dataset)
    costs = Costs()
    before = time.process_time() + child_cpu_s(), time.perf_counter()
    clips = run(costs)
    spent = time.process_time() + child_cpu_s() - before[0]
    total = Cost(spent, time.perf_counter() - before[1], 1)
    clip_maker.close()
    rest = total.cpu_s - sum(cost.cpu_s for cost in costs.costs.values())
    others = total.wall_s - sum(cost.wall_s for cost in costs.costs.values())
    costs.costs["hash, ledger, plan"] = Cost(rest, others, 1)
    return Measured(sum(read_s), dict(costs.costs), total, _peak_rss_mb(), clips)


def _write_plan(corpus: Corpus, dataset: Path, config: ExtractConfig) -> None:
    songs = plan_songs(corpus, corpus.songs, config.decode, config.workers.scratch)
    minutes = sum(song.duration_s for _, song in songs.values()) / 60
    size = config.plan.task_minutes or default_task_minutes(minutes)
    append_plan(dataset, make_tasks(list(songs.values()), size))


# ---- (c) the whole run -------------------------------------------------------------------------


def measure_tree(command: Sequence[str], log: Path) -> Tree:
    """Run `command` and account for every process that it starts, daemons included.

    Children of ended processes are reparented here (a "subreaper"), so none leaves the tree. CPU
    times are read every POLL_S and the last reading of each process is kept, so at most that much
    of each process is missed.

    Raises: CalledProcessError: when the command fails (subprocess' exception).
    """
    me, tree, seen = psutil.Process(), Tree(), {}
    before = {child.pid for child in me.children(recursive=True)}
    reaped = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = Event()
    started = time.perf_counter()
    with log.open("w") as file, _adopting_orphans():
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )

        def poll() -> None:
            full_at = 0.0
            while not done.wait(POLL_S):
                full = time.perf_counter() - full_at >= FULL_POLL_S
                full_at = time.perf_counter() if full else full_at
                _look(_new_children(me, before), seen, tree, full)

        watcher = Thread(target=poll, daemon=True)
        watcher.start()
        status = process.wait()
        tree.wall_s = time.perf_counter() - started
        done.set()
        watcher.join()
        # Daemons outlive the driver by a moment.
        while rest := _new_children(me, before):
            _look(rest, seen, tree, full=False)
            for child in rest:
                with suppress(ChildProcessError):
                    os.waitpid(child.pid, os.WNOHANG)
            time.sleep(0.02)
            if time.perf_counter() - started - tree.wall_s > 30:
                raise TimeoutError(f"{rest} live on 30 s after {command}")
    if status:
        tail = log.read_text(errors="replace")[-2000:]
        raise subprocess.CalledProcessError(status, list(command), tail)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    tree.reaped_cpu_s = now.ru_utime + now.ru_stime - reaped.ru_utime - reaped.ru_stime
    by_role: dict[str, float] = defaultdict(float)
    for role, cpu_s in seen.values():
        by_role[role] += cpu_s
    tree.cpu_s = dict(sorted(by_role.items(), key=lambda item: -item[1]))
    tree.processes = len(seen)
    return tree


def _new_children(me: psutil.Process, before: set[int]) -> list[psutil.Process]:
    return [child for child in me.children(recursive=True) if child.pid not in before]


@contextmanager
def _adopting_orphans() -> Iterator[None]:
    pr_set_child_subreaper = 36
    prctl = ctypes.CDLL(None).prctl
    prctl(pr_set_child_subreaper, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(pr_set_child_subreaper, 0, 0, 0, 0)


def _look(
    processes: Sequence[psutil.Process],
    seen: dict[tuple[int, float], tuple[str, float]],
    tree: Tree,
    full: bool,
) -> None:
    """Read every process once into `seen` (by process: role, CPU seconds) and `tree`."""
    rss_mb, pss_mb = 0.0, 0.0
    for process in processes:
        try:
            with process.oneshot():
                key = (process.pid, process.create_time())
                times = process.cpu_times()
                mb = process.memory_info().rss / 2**20
                role = _role(process.cmdline(), seen.get(key, ("", 0.0))[0])
            memory = process.memory_full_info() if full else None
        except psutil.Error:
            continue
        seen[key] = (role, times.user + times.system)
        rss_mb += mb
        tree.peak_by_role_mb[role] = max(mb, tree.peak_by_role_mb.get(role, 0.0))
        if memory is not None:
            pss_mb += memory.pss / 2**20
            uss = memory.uss / 2**20
            tree.peak_uss_by_role_mb[role] = max(uss, tree.peak_uss_by_role_mb.get(role, 0.0))
    tree.peak_rss_mb = max(rss_mb, tree.peak_rss_mb)
    tree.peak_pss_mb = max(pss_mb, tree.peak_pss_mb)


_ROLES = (
    ("ExtractTask", "worker"),
    ("PrepareTask", "worker"),
    ("FinishTask", "worker"),
    ("stages.decode.child", "decode child"),
    ("ray::Board", "board"),
    ("ray::", "other Ray worker"),
    ("default_worker.py", "other Ray worker"),
    ("setup_worker.py", "other Ray worker"),
    ("gcs_server", "gcs_server"),
    ("log_monitor", "Ray agents"),
    ("agent", "Ray agents"),
    ("dashboard", "Ray agents"),
    ("monitor.py", "Ray agents"),
    ("raylet", "raylet"),
    ("run_pipeline.py", "driver"),
)
_LASTING = ("worker", "board")  # such a process was that from its start, whatever its title says


def _role(command: list[str], before: str) -> str:
    if before in _LASTING or not command:
        return before or "unknown"
    program = Path(command[0]).name  # the raylet's arguments hold the names of all others
    words = program if program in ("raylet", "gcs_server") else " ".join(command)
    return next((role for mark, role in _ROLES if mark in words), "unknown")


def measure_run(corpus: Path, dataset: Path, overrides: Sequence[str]) -> tuple[Tree, dict]:
    """Run the user's command and return its resources and the summary that it writes."""
    shutil.rmtree(dataset, ignore_errors=True)
    summary, log = dataset.with_suffix(".json"), dataset.with_suffix(".log")
    command = [sys.executable, "run_pipeline.py", "extract", str(corpus.absolute())]
    command += [str(dataset.absolute()), *overrides, "--json", str(summary.absolute())]
    tree = measure_tree(command, log)
    return tree, json.loads(summary.read_text())


def measure_start_up(out: Path, overrides: Sequence[str]) -> Tree:
    """Run on two songs of 1.5 s per CPU, one task each, so that every worker warms up."""
    songs = 2 * len(os.sched_getaffinity(0))
    corpus = make_tiny_corpus(out / "tiny", songs)
    tree, summary = measure_run(
        corpus, out / "tiny-dataset", [*overrides, "plan.task_minutes=0.05"]
    )
    if summary["tasks_run"] < songs / 2:
        raise RuntimeError(f"{summary['tasks_run']} tasks for {songs} songs: not every worker ran")
    return tree


# ---- all of it ---------------------------------------------------------------------------------


def measure(
    corpus: Path, out: Path, overrides: Sequence[str], start_up: Tree, repeats: int = 1
) -> Figures:
    """Measure (a), (b) and (c) on one corpus in turn, `repeats` times; keep the cheapest of each.

    Other work on the machine can only add CPU seconds (caches, clock, hypervisor).
    """
    config = load_config(None, list(overrides))
    scratch = out / "work"
    loads = [os.getloadavg()[0]]
    bares, untuned, stages, runs = [], [], [], []
    for _ in range(repeats):
        shutil.rmtree(scratch, ignore_errors=True)
        untuned.append(_in_fresh_process({}, measure_bare, corpus, config, scratch / "untuned"))
        tuned = KEEP_FREED_MEMORY
        bares.append(_in_fresh_process(tuned, measure_bare, corpus, config, scratch / "bare"))
        stages.append(_in_fresh_process(tuned, measure_stages, corpus, config, scratch / "stages"))
        loads.append(os.getloadavg()[0])
        runs.append(measure_run(corpus, scratch / "run", overrides))
        loads.append(os.getloadavg()[0])
        clips = {bares[-1].clips, stages[-1].clips, runs[-1][1]["clips"]}
        if len(clips) != 1:
            raise RuntimeError(f"the three ways gave different numbers of clips: {clips}")
    bare, stage = min(bares, key=Measured.cpu_s), min(stages, key=Measured.cpu_s)
    run, summary = min(runs, key=lambda run: run[0].total_cpu_s)
    least_untuned = min(untuned, key=Measured.cpu_s)
    minutes = bare.audio_s / 60
    return Figures(minutes, bare, least_untuned, stage, run, start_up, summary, loads)


def _in_fresh_process(
    environment: dict[str, str], function: Callable[..., Measured], *args: Any
) -> Measured:
    """Call a function in a new interpreter, whose C library reads `environment` at start."""
    before = dict(os.environ)
    os.environ |= dict.fromkeys(THREADS, "1") | environment
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ |= before


def _peak_rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---- words -------------------------------------------------------------------------------------


def describe(figures: Figures) -> str:
    """Markdown tables of one corpus."""
    minutes = figures.minutes
    lines = [f"### {minutes:.1f} minutes, {figures.bare.clips} clips", ""]
    loads = ", ".join(f"{load:.1f}" for load in figures.loadavg)
    lines += [f"Load average before, between and after: {loads}.", ""]
    bare, untuned = figures.bare, figures.bare_untuned

    words = "(a) Bare library calls, one process, one thread, seconds per minute of audio,"
    lines += [f"{words} with our workers' allocator settings and with glibc's own:", ""]
    rows = []
    for name, cost in bare.costs.items():
        theirs = untuned.costs[name].cpu_s / minutes
        rows.append([*_cost_row(name, cost, minutes), f"{theirs:.3f}"])
    sums = [measured.cpu_s() / minutes for measured in (bare, untuned)]
    rows.append(["**sum**", f"**{sums[0]:.3f}**", "", f"**{sums[1]:.3f}**"])
    sums = [measured.cpu_s(CANTOR_ONLY) / minutes for measured in (bare, untuned)]
    rows.append(["sum of what libraries have", f"{sums[0]:.3f}", "", f"{sums[1]:.3f}"])
    lines += table(["call", "CPU", "wall", "CPU, glibc's own"], rows)

    lines += ["(b) Stages, one process and its decode child, without Ray, and so-vits-svc:", ""]
    rows = []
    for name, cost in figures.stages.costs.items():
        method = figures.summary["f0_method"]
        sovits = SOVITS.get(f"f0 {method}" if name == "f0" else name)
        cells = [f"{sovits[0]:g}", sovits[1]] if sovits else ["", ""]
        rows.append([*_cost_row(name, cost, minutes), *cells])
    rows.append(["**sum**", f"**{figures.stages.cpu_s() / minutes:.3f}**", "", "", ""])
    lines += table(["stage", "CPU", "wall", "so-vits-svc CPU", "its part"], rows)

    lines += ["(c) The whole run, CPU seconds by process:", ""]
    run, tiny = figures.run, figures.start_up
    rows = []
    for role in sorted(run.cpu_s | tiny.cpu_s, key=lambda role: -run.cpu_s.get(role, 0.0)):
        all_s, first_s = run.cpu_s.get(role, 0.0), tiny.cpu_s.get(role, 0.0)
        net = (all_s - first_s) / minutes
        rows.append([role, f"{all_s:.1f}", f"{first_s:.1f}", f"{net:.3f}"])
    total = [f"**{run.total_cpu_s:.1f}**", f"**{tiny.total_cpu_s:.1f}**"]
    rows.append(["**sum**", *total, f"**{figures.net_cpu_s / minutes:.3f}**"])
    rows.append(["wall", f"{run.wall_s:.1f}", f"{tiny.wall_s:.1f}", ""])
    lines += table(["process", "run", "of it start-up", "net, per minute of audio"], rows)
    checks = f"{run.reaped_cpu_s:.1f} and {tiny.reaped_cpu_s:.1f}"
    lines += [f"(The kernel's own account of processes waited for: {checks} s.)", ""]

    lines += ["Overhead: CPU of (c) net of start-up over (a), less one:", ""]
    ours, theirs = figures.overhead(bare), figures.overhead(untuned)
    rows = [[name, _percent(ours[name]), _percent(theirs[name])] for name in ours]
    cpu_s = figures.stages.cpu_s()
    parts = [_percent(cpu_s / measured.cpu_s() - 1) for measured in (bare, untuned)]
    rows.append(["of the first, (b) over (a)", *parts])
    lines += table(["true peak and quality", "same allocator", "glibc's own"], rows)
    return "\n".join(lines)


def describe_memory(all_figures: Sequence[Figures]) -> str:
    """Markdown table of peak memory against length."""
    head = ["minutes", "tree PSS", "tree RSS", "largest worker RSS", "its USS", "driver RSS"]
    head += ["(b) process RSS", "so-vits-svc tree RSS"]
    rows = []
    for figures in all_figures:
        run = figures.run
        values = [run.peak_pss_mb, run.peak_rss_mb, run.peak_by_role_mb.get("worker", 0.0)]
        values += [run.peak_uss_by_role_mb.get("worker", 0.0)]
        values += [run.peak_by_role_mb.get("driver", 0.0), figures.stages.peak_rss_mb]
        rows.append([f"{figures.minutes:.1f}", *(f"{mb:.0f}" for mb in values), ""])
    rows[0][-1] = f"{SOVITS_TREE_MB:.0f}"
    return "\n".join(["Peak memory in MB:", "", *table(head, rows)])


def describe_slope(first: Figures, last: Figures) -> str:
    """Describe the cost of one more minute of audio, from two lengths, without start-up."""
    minutes = last.minutes - first.minutes
    run = (last.run.total_cpu_s - first.run.total_cpu_s) / minutes
    bare = (last.bare.cpu_s() - first.bare.cpu_s()) / minutes
    fixed = first.run.total_cpu_s - run * first.minutes
    return (
        f"From {first.minutes:.0f} to {last.minutes:.0f} minutes each more minute of audio cost "
        f"{run:.3f} CPU s in the run and {bare:.3f} in bare calls ({_percent(run / bare - 1)}); "
        f"what is left for start-up is {fixed:.1f} CPU s.\n"
    )


def _percent(ratio: float) -> str:
    return f"{100 * ratio:+.1f} %"


def _cost_row(name: str, cost: Cost, minutes: float) -> list[str]:
    return [name, f"{cost.cpu_s / minutes:.3f}", f"{cost.wall_s / minutes:.3f}"]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: list[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return [line(head), rule, *(line(row) for row in rows), ""]


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, nargs="+", default=[10.0], help="corpus lengths")
    default = "make_corpus" if (SHARED / "bench" / "make_corpus.py").exists() else "demo"
    parser.add_argument("--source", default=default, help="make_corpus, demo, or a FOLDER")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="folder for all files")
    parser.add_argument("--repeats", type=int, default=1, help="times; the cheapest of each counts")
    parser.add_argument("--f0-method", default="dio", help="praat, dio or harvest")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    overrides = [f"f0.method={options.f0_method}", "encoder.name=mfcc"]
    lengths = options.minutes if options.source in ("make_corpus", "demo") else [0.0]
    print(
        f"{cpu_model()}, {os.cpu_count()} CPUs; so-vits-svc's figures: {SOVITS_CPU}\n", flush=True
    )
    start_ups = [measure_start_up(out, overrides) for _ in range(options.repeats)]
    start_up = min(start_ups, key=lambda tree: tree.total_cpu_s)
    all_figures = []
    for minutes in lengths:
        corpus = make_corpus(options.source, minutes, out)
        figures = measure(corpus, out, overrides, start_up, options.repeats)
        figures.summary["f0_method"] = options.f0_method
        all_figures.append(figures)
        print(describe(figures), flush=True)
    if len(all_figures) > 1:
        print(describe_slope(all_figures[0], all_figures[-1]))
    print(describe_memory(all_figures))
    if options.json:
        data = [
            asdict(figures) | {"overhead": figures.overhead(figures.bare)}
            for figures in all_figures
        ]
        options.json.write_text(json.dumps({"cpu": cpu_model(), "corpora": data}, indent=2) + "\n")


if __name__ == "__main__":
    main()
