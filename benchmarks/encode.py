#!/usr/bin/env python3
"""Cost of units: encoders against transformers and onnxruntime, same weights, same clips.

    python benchmarks/encode.py [--encoders contentvec768l12 ...] [--audio FOLDER] [--quick]

Every candidate runs in its own processes, in both arrangements of two cores: one process with two
threads, two processes with one thread each (and half of the clips). A process loads, warms up and
waits; only the clips are timed. Real-time factors are wall seconds per second of audio, CPU is user
+ system time of all processes, memory the peak RSS of the largest process while it encodes, and
before. All run with the allocator settings of Cantor's workers. Each figure is the best of the
repeats: other work on the machine can only add to it.

Weights are random (tests/golden/encoders/fill.py), which does not affect cost. With a GPU, a table
of hours of audio per hour follows. docs/benchmarks.md explains the tables.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import soundfile as sf
import soxr
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script

from benchmarks.environment import environment
from models.encoders import load_encoder
from models.torchaudio_compat import import_torchaudio
from tests.helpers.checkpoints import fill

SAMPLE_RATE = 16000
HOP_LENGTH = 320
ARRANGEMENTS = {"1 process x 2 threads": (1, 2), "2 processes x 1 thread": (2, 1)}

Run = Callable[[list[Tensor]], list[Tensor]]
"""Clips (T,) -> units (F, D)."""


# ---- weights -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A Cantor encoder and the transformers class of the same network."""

    model: str
    config: str
    shapes: dict[str, Any]


_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}
_MEDIUM = {
    "d_model": 1024,
    "encoder_layers": 24,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "decoder_layers": 1,  # not used; 24 in the published file
    "decoder_attention_heads": 16,
}
NETWORKS = {
    "contentvec768l12": Network("HubertModel", "HubertConfig", _BASE),
    "cnhubertlarge": Network("HubertModel", "HubertConfig", _LARGE),
    "wavlm-base-plus": Network("WavLMModel", "WavLMConfig", _BASE),
    "whisper-ppg": Network("WhisperModel", "WhisperConfig", _MEDIUM),
}


def _transformers() -> ModuleType:
    import_torchaudio()
    import transformers

    transformers.logging.disable_progress_bar()
    return transformers


def write_network(name: str, folder: Path, drawn: str = "fill", tiny: bool = False) -> Path:
    """Write a Hugging Face folder that both sides load.

    drawn: "fill" (by the goldens' rule) or "usual" (as transformers initialises them).
    tiny: two narrow layers, to try the program.
    """
    transformers = _transformers()
    network = NETWORKS[name]
    shapes = dict(network.shapes)
    if tiny:
        small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        shapes |= small | {"intermediate_size": 128, "conv_dim": [32] * 7}
    torch.manual_seed(0)
    model = getattr(transformers, network.model)(getattr(transformers, network.config)(**shapes))
    if drawn == "fill":
        skip = ("encoder.embed_positions.weight",)  # sinusoids
        fill().fill_state_dict(model.state_dict(), skip)
    model.save_pretrained(folder)
    return folder


def export_onnx(name: str, folder: Path, graph: Path) -> str:
    """Export the transformers network as a graph for onnxruntime; return the error if it fails."""
    model = _transformers_model(name, folder)
    example, axes = torch.zeros(1, SAMPLE_RATE), {0: "batch", 1: "time"}
    if name.startswith("whisper"):
        example, axes = torch.zeros(1, 80, 3000), {0: "batch"}
    try:
        torch.onnx.export(
            model,
            (example,),
            str(graph),
            input_names=["input"],
            output_names=["units"],
            dynamic_axes={"input": axes, "units": {0: "batch", 1: "frames"}},
            opset_version=17,
            dynamo=False,  # the newer exporter needs onnxscript
        )
    except (RuntimeError, ValueError, TypeError) as error:  # whatever the exporter cannot express
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return ""


def quantize_onnx(graph: Path, out: Path) -> None:
    """Quantise with onnxruntime's dynamic int8: per channel, all products with constant weights."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # it recommends a step that changes nothing here
    quantize_dynamic(
        graph, out, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8
    )


def _transformers_model(name: str, folder: Path) -> nn.Module:
    transformers = _transformers()
    network = NETWORKS[name]
    model = getattr(transformers, network.model).from_pretrained(folder)  # sdpa where it has it
    model = model.eval().requires_grad_(False)
    return _LastState(model.encoder if name.startswith("whisper") else model)


class _LastState(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).last_hidden_state


# ---- candidates --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """One way to encode. batch: clips per call of the network (Cantor's encoders decide)."""

    title: str
    encoder: str
    kind: str  # ours, transformers, onnxruntime
    path: str
    batch: int = 1
    int8: bool = False

    def load(self, threads: int, device: str = "cpu", dtype: str = "float32") -> Run:
        if self.kind == "ours":
            options = {"int8": True} if self.int8 else {}
            encoder = load_encoder(self.encoder, self.path, device, dtype=dtype, **options)
            return lambda wavs: encoder.encode(wavs)
        features = _features(self.encoder)
        if self.kind == "transformers":
            network: Callable[[Tensor], Tensor] = _transformers_model(self.encoder, Path(self.path))
        else:
            network = _onnx_session(self.path, threads)

        def run(wavs: list[Tensor]) -> list[Tensor]:
            units: list[Tensor] = []
            for start in range(0, len(wavs), self.batch):
                part = wavs[start : start + self.batch]
                rows = network(features(torch.stack(part)))
                units += rows[:, : len(part[0]) // HOP_LENGTH]
            return units

        return run


def _features(name: str) -> Callable[[Tensor], Tensor]:
    """Convert (B, T) to the network's input."""
    if not name.startswith("whisper"):
        return lambda wavs: wavs
    extractor = _transformers().WhisperFeatureExtractor()

    def mel(wavs: Tensor) -> Tensor:
        rows = list(wavs.numpy())
        found = extractor(rows, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        return found.input_features

    return mel


def _onnx_session(path: str, threads: int) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda wavs: torch.from_numpy(session.run(None, {"input": wavs.numpy()})[0])


# ---- measuring ---------------------------------------------------------------------------------


@dataclass
class Figure:
    """Figures of one candidate in one arrangement, per second of audio."""

    wall_s: float
    cpu_s: float
    load_mb: float  # peak RSS of the largest process, from its start to its first units
    peak_mb: float  # the same while it encodes


@torch.inference_mode()
def _work(pipe: Connection, candidate: Candidate, threads: int, clips: list[np.ndarray]) -> None:
    torch.set_num_threads(threads)
    wavs = [torch.from_numpy(clip) for clip in clips]
    run = candidate.load(threads)
    units = run(wavs[: max(1, candidate.batch)])
    pipe.send(([row.numpy() for row in units], _peak_rss_mb()))
    while pipe.recv():
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        cpu_s = time.process_time()
        run(wavs)
        pipe.send((time.process_time() - cpu_s, _peak_rss_mb()))


def _peak_rss_mb() -> float:
    """Return the peak RSS of this process; ru_maxrss would include its parent's at the start."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM: peaks are measured on Linux alone")


def measure(
    candidate: Candidate, clips: Sequence[np.ndarray], processes: int, threads: int, repeats: int
) -> tuple[Figure, list[np.ndarray]]:
    """Return the best of the repeats over all clips, and the units of the first clip or batch."""
    from benchmarks.extract import THREADS  # not at the top: every worker would import Ray
    from pipeline.cluster.ray_connection import KEEP_FREED_MEMORY

    context = multiprocessing.get_context("spawn")
    seconds = sum(len(clip) for clip in clips) / SAMPLE_RATE
    workers = []
    with environment(dict.fromkeys(THREADS, str(threads)) | KEEP_FREED_MEMORY):
        for i in range(processes):
            pipe, theirs = context.Pipe()
            arguments = (theirs, candidate, threads, list(clips[i::processes]))
            process = context.Process(target=_work, args=arguments)
            process.start()
            theirs.close()
            workers.append((process, pipe))
    ready = [pipe.recv() for _, pipe in workers]
    load_mb = max(mb for _, mb in ready)
    figures = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _, pipe in workers:
            pipe.send(True)
        cpu_s, peaks_mb = zip(*(pipe.recv() for _, pipe in workers), strict=True)
        wall_s = time.perf_counter() - started
        figures.append(Figure(wall_s / seconds, sum(cpu_s) / seconds, load_mb, max(peaks_mb)))
    for process, pipe in workers:
        pipe.send(False)
        process.join()
    best = Figure(
        min(f.wall_s for f in figures),
        min(f.cpu_s for f in figures),
        load_mb,
        max(f.peak_mb for f in figures),
    )
    return best, ready[0][0]


@dataclass(frozen=True)
class Difference:
    """Differences of units from the exact ones. varying: after subtracting a clip's mean."""

    largest: float
    relative: float
    varying: float
    cosine: float

    @staticmethod
    def of(found: Sequence[Tensor], exact: Sequence[Tensor]) -> Difference:
        pairs = list(zip(found, exact, strict=True))
        off = torch.cat([a - b for a, b in pairs])
        off_centred = torch.cat([(a - b) - (a - b).mean(0) for a, b in pairs])
        centred = torch.cat([b - b.mean(0) for _, b in pairs])
        cosines = [F.cosine_similarity(a, b).min() for a, b in pairs]
        return Difference(
            float(off.abs().max()),
            float(off.norm() / torch.cat(list(exact)).norm()),
            float(off_centred.norm() / centred.norm()),
            float(min(cosines)),
        )


# ---- clips -------------------------------------------------------------------------------------


def read_clips(folder: Path, seconds: float, clip_s: float) -> list[np.ndarray]:
    """Read clips of `clip_s` at 16 kHz, `seconds` in total, from all files in turn.

    Files are repeated from their start if there is not enough audio; files that cannot be read or
    are shorter than a clip are skipped.
    """
    length = round(clip_s * SAMPLE_RATE)
    songs = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            wav, rate = sf.read(path, dtype="float32", always_2d=True)
        except sf.LibsndfileError:
            continue
        wav = soxr.resample(wav.mean(axis=1), rate, SAMPLE_RATE, quality="VHQ")
        pieces = [wav[i : i + length] for i in range(0, len(wav) - length + 1, length)]
        pieces = [piece for piece in pieces if np.abs(piece).max() > 0.01]
        if pieces:
            songs.append(pieces)
    if not songs:
        raise SystemExit(f"{folder} has no audio of {clip_s:g} s")
    in_turn = [p[i] for i in range(max(map(len, songs))) for p in songs if i < len(p)]
    count = max(1, round(seconds / clip_s))
    return [in_turn[i % len(in_turn)] for i in range(count)]


# ---- on a CPU ----------------------------------------------------------------------------------


def compare(
    name: str, clips: Sequence[np.ndarray], folder: Path, repeats: int, tiny: bool = False
) -> tuple[list[list[str]], list[str]]:
    """Measure one encoder; return the rows of its table, and notes."""
    weights = write_network(name, folder / name, tiny=tiny)
    graph, graph8 = folder / f"{name}.onnx", folder / f"{name}-int8.onnx"
    notes = []
    ours = str(weights)
    candidates = [
        Candidate("ours", name, "ours", ours),
        Candidate("transformers", name, "transformers", ours),
        Candidate("transformers, batch of 4", name, "transformers", ours, batch=4),
    ]
    if why := export_onnx(name, weights, graph):
        notes.append(f"{name} could not be exported for onnxruntime ({why}).")
    else:
        candidates += [
            Candidate("onnxruntime", name, "onnxruntime", str(graph)),
            Candidate("onnxruntime, batch of 4", name, "onnxruntime", str(graph), batch=4),
        ]
    if not name.startswith("whisper"):
        candidates.append(Candidate("**ours, int8**", name, "ours", ours, int8=True))
    if not why:
        quantize_onnx(graph, graph8)
        candidates.append(Candidate("onnxruntime, int8", name, "onnxruntime", str(graph8)))
    best: dict[str, list[Figure]] = {}
    units: dict[str, Tensor] = {}
    for candidate in candidates:
        best[candidate.title] = []
        for processes, threads in ARRANGEMENTS.values():
            figure, found = measure(candidate, clips, processes, threads, repeats)
            best[candidate.title].append(figure)
            units[candidate.title] = torch.from_numpy(found[0])
    reference = min(f.wall_s for f in best["transformers"])
    rows = []
    for title, figures in best.items():
        least = min(figures, key=lambda f: f.wall_s)
        off = Difference.of([units[title]], [units["transformers"]])
        rows.append(
            [
                title,
                *(f"{f.wall_s:.4f}" for f in figures),
                f"{least.wall_s / reference:.2f}",
                *(f"{f.cpu_s:.4f}" for f in figures),
                f"{max(f.peak_mb for f in figures):.0f}",
                f"{max(f.load_mb for f in figures):.0f}",
                f"{off.largest:.1e}",
                f"{off.relative:.1e}",
            ]
        )
    return rows, notes


HEAD = ["", "wall 1x2", "wall 2x1", "ratio", "CPU 1x2", "CPU 2x1", "MB"]
HEAD += ["MB to load", "largest off", "relative"]


def int8_errors(clips: Sequence[np.ndarray], folder: Path, tiny: bool = False) -> list[list[str]]:
    """Return rows of int8 units against exact ones, for both ways to draw weights."""
    name, rows = "contentvec768l12", []
    wavs = [torch.from_numpy(clip) for clip in clips]
    for drawn, words in (("fill", "by the goldens' rule"), ("usual", "as before training")):
        path = str(write_network(name, folder / f"{name}-{drawn}", drawn, tiny))
        exact = load_encoder(name, path).encode(wavs)
        off = Difference.of(load_encoder(name, path, int8=True).encode(wavs), exact)
        constant = sum((u.mean(0).square().sum() * len(u)).item() for u in exact)
        share = constant / sum(u.square().sum().item() for u in exact)
        figures = [f"{share:.4f}", f"{off.relative:.4f}", f"{off.varying:.4f}", f"{off.cosine:.5f}"]
        rows.append([words, *figures])
    return rows


# ---- on a GPU ----------------------------------------------------------------------------------


@torch.inference_mode()
def on_gpu(name: str, clips: Sequence[np.ndarray], path: str, hours: float) -> list[list[str]]:
    """Return rows of hours of audio per hour, in batches and clip by clip, for every dtype.

    Lengths are mixed, 2 to 15 s, as after slicing.
    """
    whole = torch.from_numpy(np.concatenate(list(clips)))
    rng = np.random.default_rng(0)
    wavs: list[Tensor] = []
    while sum(map(len, wavs)) < hours * 3600 * SAMPLE_RATE:
        length = int(rng.uniform(2, 15) * SAMPLE_RATE)
        start = int(rng.integers(max(1, len(whole) - length)))
        wavs.append(whole[start : start + length].clone())
    some = wavs[: max(1, len(wavs) // 8)]
    rows, exact = [], None
    for dtype in ("float32", "bfloat16", "float16"):
        run = Candidate("ours", name, "ours", path).load(1, "cuda", dtype)
        run(some)
        torch.cuda.reset_peak_memory_stats()
        with _gpu_load() as busy:
            batched_s = _timed(lambda run=run: run(wavs)) / sum(map(len, wavs)) * SAMPLE_RATE
        memory_mb = torch.cuda.max_memory_allocated() / 2**20
        alone_s = _timed(lambda run=run: [run([wav]) for wav in some])
        alone_s *= SAMPLE_RATE / sum(map(len, some))
        units = run(some)
        exact = units if exact is None else exact
        rows.append(
            [
                f"{name}, {dtype}",
                f"{1 / batched_s:.0f}",
                f"{1 / alone_s:.0f}",
                f"{alone_s / batched_s:.1f}",
                f"{np.mean(busy):.0f} %" if busy else "unknown",
                f"{memory_mb:.0f}",
                f"{Difference.of(units, exact).relative:.1e}",
            ]
        )
    return rows


GPU_HEAD = ["", "h/h batched", "h/h one by one", "ratio", "utilisation", "MB on GPU", "relative"]


def _timed(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


@contextmanager
def _gpu_load() -> Iterator[list[float]]:
    """Measure the percentage of time that a kernel ran (nvidia-smi), filled in at the end."""
    busy: list[float] = []
    query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
    try:
        smi = subprocess.Popen(["nvidia-smi", *query], stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        yield busy
        return
    try:
        yield busy
    finally:
        smi.terminate()
        out, _ = smi.communicate()
        busy += [float(line) for line in out.split("\n")[:-1] if line.strip().isdigit()]


# ---- all of it ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--encoders", nargs="+", choices=NETWORKS, default=["contentvec768l12"])
    parser.add_argument("--audio", type=Path, help="folder of songs; default: the demo's singer")
    parser.add_argument("--seconds", type=float, default=40.0, help="of audio in all")
    parser.add_argument("--clip-s", type=float, default=5.0, help="length of every clip")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gpu-hours", type=float, default=1.0, help="of audio on a GPU")
    parser.add_argument("--quick", action="store_true", help="narrow networks, to try it out")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args(arguments)
    if options.quick:
        options.encoders, options.seconds, options.repeats = ["contentvec768l12"], 10.0, 1
    from pipeline.tools.demo_corpus import make_demo_corpus

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        audio = options.audio or make_demo_corpus(folder / "demo", minutes=1.0)
        clips = read_clips(audio, options.seconds, options.clip_s)
        report = run_all(clips, folder, options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def run_all(
    clips: Sequence[np.ndarray], folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Print every table when it is done, and return them all."""
    from benchmarks.extract import cpu_model, table

    loads = [os.getloadavg()[0]]
    seconds = len(clips) * options.clip_s
    print(f"{cpu_model()}, {os.cpu_count()} CPUs; {len(clips)} clips, {seconds:g} s\n", flush=True)
    report: dict[str, Any] = {"cpu": cpu_model(), "seconds": seconds, "head": HEAD}
    for name in options.encoders:
        rows, notes = compare(name, clips, folder, options.repeats, options.quick)
        loads.append(os.getloadavg()[0])
        print(f"### {name}\n")
        print("\n".join([*table(HEAD, rows), *notes]), flush=True)
        report[name] = rows
    head = ["weights drawn", "constant share", "relative", "of what varies", "least cosine"]
    report["int8"] = int8_errors(clips[:4], folder, options.quick)
    print("### int8, contentvec768l12\n")
    print("\n".join(table(head, report["int8"])), flush=True)
    if torch.cuda.is_available():
        print(f"### {torch.cuda.get_device_name()}\n")
        hours = 0.02 if options.quick else options.gpu_hours
        rows = []
        for name in options.encoders:
            rows += on_gpu(name, clips, str(folder / name), hours)
        print("\n".join(table(GPU_HEAD, rows)), flush=True)
        report["gpu"] = rows
    report["loadavg"] = loads
    print("Load average before and after each: " + ", ".join(f"{load:.1f}" for load in loads))
    return report


if __name__ == "__main__":
    main()
