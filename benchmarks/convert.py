#!/usr/bin/env python3
"""Cost of conversion: infer() against so-vits-svc's arrangement of it, and a whole conversion.

    python benchmarks/convert.py [--frames 200 790] [--batch 1 2] [--repeats 5] [--quick]

so-vits-svc's template for 768-dimensional units, float32, without the f0 predictor. Both sides have
the same weights, the same units and the same random numbers, and run in their own processes of one
thread. They take turns, and the best of the repeats counts: other work on the machine can only add
CPU seconds. Then the memory of `convert` for songs of several lengths with a small voice. With a
GPU, infer() on it follows. docs/convert-speed.md explains the tables.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script

from benchmarks.environment import environment
from benchmarks.plain_training import Coupling, PlainSynthesizer
from benchmarks.train import TEMPLATE, clips, networks, peak_rss_mb
from models.synthesizer.batch import Batch
from models.synthesizer.blocks.decoder import prepare_for_inference
from models.synthesizer.blocks.noise import KeyedNoise, Noise
from models.synthesizer.blocks.pitch import f0_to_coarse
from models.synthesizer.config import SynthesizerConfig

_SCALE = 0.35  # of the noise
_SOVITS = {(200, 2): 3.7, (790, 2): 24.1}  # seconds on another machine, (frames, batch)

Sing = Callable[[Batch, Noise], Tensor]
"""wav (B, T)."""


# ---- what is compared --------------------------------------------------------------------------


def our_voice(config: SynthesizerConfig) -> Sing:
    network = prepare_for_inference(networks(config)[0])

    def sing(clip: Batch, noise: Noise) -> Tensor:
        return network.infer(
            clip.units, clip.f0, clip.voiced, clip.speaker, noise=noise, noise_scale=_SCALE
        )[0]

    return sing


def plain_voice(config: SynthesizerConfig) -> Sing:
    network = PlainSynthesizer(config)
    network.load_state_dict(networks(config)[0].state_dict())
    network.eval()

    @torch.no_grad()
    def sing(clip: Batch, noise: Noise) -> Tensor:
        g = network.emb_g(clip.speaker).unsqueeze(-1)
        mask = torch.ones_like(clip.f0).unsqueeze(1)
        x = network.pre(clip.units) * mask + network.emb_uv(clip.voiced.long()).transpose(1, 2)
        _, mean, log_deviation = network.enc_p(x, mask, f0_to_coarse(clip.f0, sovits=True))
        z = (mean + noise.normal(mean) * torch.exp(log_deviation) * _SCALE) * mask
        for flow in reversed(network.flow.flows):
            z = _undone(flow, z, mask, g) if isinstance(flow, Coupling) else flow(z, mask, g)
        return network.dec(z * mask, clip.f0, g, noise)[:, 0]

    return sing


def _undone(flow: Coupling, x: Tensor, mask: Tensor, g: Tensor) -> Tensor:
    """Invert `flow` on x."""
    kept, moved = torch.chunk(x, 2, dim=1)
    shift = flow.post(flow.enc(flow.pre(kept) * mask, mask, g)) * mask
    return torch.cat([kept, (moved - shift) * mask], dim=1)


SIDES = {"ours": our_voice, "plain": plain_voice}


# ---- measuring ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """CPU seconds of an infer(), and the peak RSS of its process during it."""

    seconds: float
    peak_mb: float


class Bench:
    """One side, built and warm, in its own process."""

    def __init__(self, side: str, config: SynthesizerConfig, frames: int, batch: int) -> None:
        torch.set_num_threads(1)
        self.sing = SIDES[side](config)
        self.clip = clips(config, frames, batch)
        self.measure()  # kernels are chosen

    def measure(self) -> Cost:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        begun = time.process_time()
        self.sing(self.clip, KeyedNoise(self.clip.noise_keys))
        return Cost(time.process_time() - begun, peak_rss_mb())


def compare(
    config: SynthesizerConfig, frames: int, batch: int, repeats: int, allocator: dict[str, str]
) -> dict[str, Cost]:
    """Measure both sides in turn; return the best of each."""
    from benchmarks.extract import THREADS  # not at the top: every process would import Ray

    costs: dict[str, list[Cost]] = {side: [] for side in SIDES}
    with ExitStack() as held:
        held.enter_context(environment(dict.fromkeys(THREADS, "1") | allocator))
        context = multiprocessing.get_context("spawn")
        pools = {}
        for side in SIDES:
            pools[side] = held.enter_context(ProcessPoolExecutor(1, mp_context=context))
            pools[side].submit(_begin, side, config, frames, batch).result()
        for _ in range(repeats):
            for side, pool in pools.items():
                costs[side].append(pool.submit(_measure).result())
    return {
        side: Cost(min(cost.seconds for cost in found), max(cost.peak_mb for cost in found))
        for side, found in costs.items()
    }


_bench: Bench


def _begin(side: str, config: SynthesizerConfig, frames: int, batch: int) -> None:
    global _bench
    _bench = Bench(side, config, frames, batch)


def _measure() -> Cost:
    return _bench.measure()


def on_gpu(frames: int, batch: int, repeats: int = 10) -> dict[str, float]:
    """Measure seconds of both sides, the best of `repeats`, and the peak memory of each in GB."""
    found = {}
    clip = clips(TEMPLATE, frames, batch).to("cuda")
    for side, build in SIDES.items():
        with torch.device("cuda"):
            sing = build(TEMPLATE)
        times = []
        for _ in range(repeats + 1):  # the first chooses kernels
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            begun = time.perf_counter()
            sing(clip, KeyedNoise(clip.noise_keys, "cuda"))
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        found[f"{side} s"] = min(times[1:])
        found[f"{side} GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found


# ---- a whole conversion ------------------------------------------------------------------------


def conversion(minutes: float) -> Cost:
    """Measure CPU seconds and peak memory of converting a song with a small voice of 16 kHz."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_convert, Path(folder), minutes).result()


def _convert(folder: Path, minutes: float) -> Cost:
    import soundfile as sf
    from rich.console import Console

    from pipeline.convert.command import convert_file, read_request
    from tests.helpers.songs import tune
    from tests.helpers.voices import write_small_voice

    rate, song = 16000, folder / "song.wav"
    piece = tune(min(60.0, 60 * minutes), rate)
    with sf.SoundFile(song, "w", rate, 1) as file:
        for _ in range(max(1, round(minutes))):
            file.write(piece)
    del piece
    voice = write_small_voice(folder / "voice")
    Path("/proc/self/clear_refs").write_text("5")
    begun = time.process_time()
    request = read_request(voice, ["voice.speaker=ann"])
    convert_file(request, song, folder / "out.wav", Console(file=io.StringIO()))
    return Cost(time.process_time() - begun, peak_rss_mb())


# ---- all of it ---------------------------------------------------------------------------------


def table(costs: dict[tuple[int, int], dict[str, Cost]], config: SynthesizerConfig) -> str:
    """Return rows by (frames, batch). RTF: CPU seconds of Cantor per second of audio."""
    lines = [
        "| frames x batch | ours | plain | ratio | RTF | peak MB, ours | plain | so-vits-svc |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (frames, batch), sides in costs.items():
        ours, plain = sides["ours"], sides["plain"]
        sound = frames * batch * config.hop_length / config.sample_rate
        lines.append(
            f"| {frames} x {batch} | {ours.seconds:.2f} | {plain.seconds:.2f} | "
            f"**{ours.seconds / plain.seconds:.2f}** | {ours.seconds / sound:.3f} | "
            f"{ours.peak_mb:.0f} | {plain.peak_mb:.0f} | {_SOVITS.get((frames, batch), '-')} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--frames", type=int, nargs="*", default=[200, 790], help="of a clip")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 2], help="clips at once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, nargs="*", default=[1, 10, 60], help="of a song")
    parser.add_argument(
        "--default-allocator", action="store_true", help="not set as in our workers"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--quick", action="store_true", help="200 frames, two repeats, one minute")
    options = parser.parse_args(arguments)
    if options.quick:
        options.frames, options.batch, options.repeats, options.minutes = [200], [1], 2, [1]
    from benchmarks.extract import cpu_model
    from pipeline.cluster.ray_connection import KEEP_FREED_MEMORY

    loads = [os.getloadavg()[0]]
    print(f"{cpu_model()}, {os.cpu_count()} CPUs, torch {torch.__version__}\n", flush=True)
    allocator = {} if options.default_allocator else KEEP_FREED_MEMORY
    costs = {
        (frames, batch): compare(TEMPLATE, frames, batch, options.repeats, allocator)
        for frames in options.frames
        for batch in options.batch
    }
    if costs:
        print(table(costs, TEMPLATE), flush=True)
    figures: dict[str, object] = {
        f"{frames} x {batch}": {side: asdict(cost) for side, cost in sides.items()}
        for (frames, batch), sides in costs.items()
    }
    for frames, batch in costs if torch.cuda.is_available() else ():
        figures[f"gpu {frames} x {batch}"] = found = on_gpu(frames, batch)
        print(f"GPU, {frames} x {batch}: {found}", flush=True)
    for minutes in options.minutes:
        cost = conversion(minutes)
        figures[f"{minutes} minutes"] = asdict(cost)
        print(
            f"A song of {minutes:g} minutes: {cost.seconds:.1f} CPU s, {cost.peak_mb:.0f} MB",
            flush=True,
        )
    loads.append(os.getloadavg()[0])
    print("\nLoad average before and after: " + ", ".join(f"{load:.1f}" for load in loads))
    if options.json:
        options.json.write_text(json.dumps(figures | {"load": loads}, indent=1) + "\n")


if __name__ == "__main__":
    main()
