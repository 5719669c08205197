#!/usr/bin/env python3
"""Cost of a training step against so-vits-svc's arrangement of it, phase by phase.

    python benchmarks/train.py [--frames 200 790] [--repeats 5] [--dataset DATASET] [--quick]

so-vits-svc's template for 768-dimensional units (52 million parameters, discriminators 47 million),
batches of 2 clips, segments of 20 frames, float32, dropout as in training. Both sides have the same
weights, the same clips and the same random numbers, and run in their own processes of one thread
with the allocator settings of Cantor's workers. They take turns, one step at a time. Figures are
CPU seconds, the best of the repeats: other work on the machine can only add to them.

Then the cost of reading the clips of a dataset. With a GPU, steps per second at batch 16 in bf16
follow. docs/training-speed.md explains the tables.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script

from benchmarks.environment import environment
from benchmarks.plain_training import PlainDiscriminator, PlainStep, PlainSynthesizer
from models.synthesizer.batch import Batch
from models.synthesizer.blocks.discriminators import MultiPeriodDiscriminator
from models.synthesizer.blocks.noise import KeyedNoise
from models.synthesizer.blocks.segments import sequence_mask
from models.synthesizer.config import MelConfig, SynthesizerConfig
from models.synthesizer.sovits.networks import Synthesizer
from models.synthesizer.step import GanStep, LossWeights, Totals

TEMPLATE = SynthesizerConfig(units_dim=768, n_speakers=200)
MEL = MelConfig(f_max=22050.0)
SEGMENT = 20  # frames
BATCH = 2

NETWORKS = ("enc_p", "enc_q", "flow", "f0_decoder", "dec")
PHASES = (
    "spectrograms",
    "G forward",
    "D forward",
    "D backward",
    "D optimizer",
    "D forward, second",
    "G backward",
    "G optimizer",
)
_SOVITS = {  # seconds on another machine, frames: phases
    200: (None, 0.87, 0.72, 1.74, 0.28, 0.72, 2.48, 0.35, 0.11, 0.10, 0.11, 0.09, 0.37, 7.15),
    790: (None, 2.80, 0.79, 1.77, 0.30, 0.76, 5.30, 0.36, 0.79, 0.31, 0.30, 0.40, 0.38, 12.1),
}
WHOLE = "step"
ROWS = (*PHASES, *NETWORKS, WHOLE)

Step = Callable[[Batch], dict[str, float]]


# ---- what is compared --------------------------------------------------------------------------


class Clock:
    """CPU seconds of the phases of a step; each phase is marked at its end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = 0.0

    def begin(self) -> None:
        self.seconds.clear()
        self._last = time.process_time()

    def mark(self, phase: str) -> None:
        now = time.process_time()
        self.seconds[phase] += now - self._last
        self._last = now

    def watch(self, generator: nn.Module) -> None:
        """Mark the calls of a synthesizer's networks."""
        begun: dict[str, float] = {}
        for name in NETWORKS:

            def begin(*_: object, name: str = name) -> None:
                begun[name] = time.process_time()

            def end(*_: object, name: str = name) -> None:
                self.seconds[name] += time.process_time() - begun[name]

            network = generator.get_submodule(name)
            network.register_forward_pre_hook(begin)
            network.register_forward_hook(end)


def networks(config: SynthesizerConfig) -> tuple[Synthesizer, MultiPeriodDiscriminator]:
    """Build the networks, always with the same weights."""
    torch.manual_seed(0)
    return Synthesizer(config), MultiPeriodDiscriminator(channels=config.discriminator_channels)


def our_step(config: SynthesizerConfig, mel: MelConfig, clock: Clock, segment: int) -> Step:
    generator, discriminator = networks(config)
    optim_g, optim_d = (
        torch.optim.AdamW(each.parameters(), 1e-4, betas=(0.8, 0.99), eps=1e-9, fused=True)
        for each in (generator, discriminator)
    )
    turns: Iterator[str] = iter(())
    step = GanStep(
        generator,
        discriminator,
        optim_g,
        optim_d,
        mel,
        LossWeights(segment_frames=segment),
        reduce=lambda tensors: clock.mark(next(turns, "spectrograms")),
    )
    heard: Iterator[str] = iter(())
    generator.register_forward_pre_hook(lambda *_: clock.mark("spectrograms"))
    generator.register_forward_hook(lambda *_: clock.mark("G forward"))
    discriminator.register_forward_pre_hook(lambda *_: clock.mark("spectrograms"))
    discriminator.register_forward_hook(lambda *_: clock.mark(next(heard)))
    optim_d.register_step_post_hook(lambda *_: clock.mark("D optimizer"))
    optim_g.register_step_post_hook(lambda *_: clock.mark("G optimizer"))
    clock.watch(generator)

    def run(batch: Batch) -> dict[str, float]:
        nonlocal turns, heard
        turns = iter(("D backward", "G backward"))
        heard = iter(("D forward", "D forward, second", "D forward, second"))
        return step([batch], totals_of(batch), lambda part: KeyedNoise(part.noise_keys))

    return run


def plain_step(config: SynthesizerConfig, mel: MelConfig, clock: Clock, segment: int) -> Step:
    generator = PlainSynthesizer(config)
    discriminator = PlainDiscriminator(config.discriminator_channels)
    for plain, ours in zip((generator, discriminator), networks(config), strict=True):
        plain.load_state_dict(ours.state_dict())
    clock.watch(generator)
    step = PlainStep(generator, discriminator, mel, segment, clock.mark)
    return lambda batch: step(batch, KeyedNoise(batch.noise_keys))


SIDES = {"ours": our_step, "plain": plain_step}


def totals_of(batch: Batch) -> Totals:
    return Totals(len(batch), int(batch.lengths.sum()))


def clips(config: SynthesizerConfig, frames: int, count: int = BATCH) -> Batch:
    """Make a batch of tones in noise, each slightly shorter than the previous, and random units."""
    torch.manual_seed(1)
    lengths = torch.tensor([frames - i * frames // 20 for i in range(count)])
    inside = sequence_mask(lengths, frames).float()
    samples = frames * config.hop_length
    f0 = 220 + 60 * torch.rand(count, frames)
    cycles = (f0.repeat_interleave(config.hop_length, 1) / config.sample_rate).cumsum(1)
    wav = 0.3 * torch.sin(2 * torch.pi * cycles) + 0.03 * torch.randn(count, samples)
    return Batch(
        clip_ids=tuple(f"clip{i}" for i in range(count)),
        units=torch.randn(count, config.units_dim, frames) * inside.unsqueeze(1),
        f0=f0 * inside,
        voiced=inside,
        volume=0.2 * inside,
        wav=wav * inside.repeat_interleave(config.hop_length, 1),
        speaker=torch.arange(count),
        lengths=lengths,
        noise_keys=tuple(range(count)),
    )


# ---- measuring ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """CPU seconds of the phases (`ROWS`), each at its best, and the peak RSS of a step."""

    seconds: dict[str, float]
    peak_mb: float


class Bench:
    """One side, built and warm, in its own process."""

    def __init__(self, side: str, config: SynthesizerConfig, frames: int) -> None:
        torch.set_num_threads(1)
        self.clock = Clock()
        self.step = SIDES[side](config, MEL, self.clock, SEGMENT)
        self.batch = clips(config, frames)
        self.step(self.batch)  # optimizers make their states, kernels are chosen

    def measure(self) -> Cost:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.clock.begin()
        begun = time.process_time()
        self.step(self.batch)
        whole = time.process_time() - begun
        return Cost({**self.clock.seconds, WHOLE: whole}, peak_rss_mb())


def compare(config: SynthesizerConfig, frames: int, repeats: int) -> dict[str, Cost]:
    """Measure both sides in turn, step by step; return the best of each."""
    from benchmarks.extract import THREADS  # not at the top: every process would import Ray
    from pipeline.cluster.ray_connection import KEEP_FREED_MEMORY

    costs: dict[str, list[Cost]] = {side: [] for side in SIDES}
    with ExitStack() as held:
        held.enter_context(environment(dict.fromkeys(THREADS, "1") | KEEP_FREED_MEMORY))
        context = multiprocessing.get_context("spawn")
        pools = {}
        for side in SIDES:
            pools[side] = held.enter_context(ProcessPoolExecutor(1, mp_context=context))
            pools[side].submit(_begin, side, config, frames).result()
        for _ in range(repeats):
            for side, pool in pools.items():
                costs[side].append(pool.submit(_measure).result())
    return {side: _best(found) for side, found in costs.items()}


_bench: Bench


def _begin(side: str, config: SynthesizerConfig, frames: int) -> None:
    global _bench
    _bench = Bench(side, config, frames)


def _measure() -> Cost:
    return _bench.measure()


def _best(costs: Sequence[Cost]) -> Cost:
    seconds = {row: min(cost.seconds[row] for cost in costs) for row in ROWS}
    return Cost(seconds, max(cost.peak_mb for cost in costs))


def peak_rss_mb() -> float:
    """Return the peak RSS of this process; ru_maxrss would include its parent's at the start."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM: peaks are measured on Linux alone")


# ---- reading clips -----------------------------------------------------------------------------


def loading(dataset: Path, frames: int, batches: int) -> float:
    """Measure CPU seconds per batch of `BATCH` clips, threads included, in the steady state."""
    from pipeline.dataset.data_config import DataConfig
    from pipeline.dataset.shard_dataset import ShardDataset

    data = DataConfig(batch_size=BATCH, max_frames=frames, validation=0.0)
    with closing(ShardDataset(dataset, data=data).batches()) as stream:
        next(stream)
        begun = time.process_time()
        for _ in range(batches):
            next(stream)
        return (time.process_time() - begun) / batches


@contextmanager
def own_dataset(frames: int) -> Iterator[Path]:
    """Make a dataset of 64 clips of `frames` frames as extraction writes it: FLAC, units of 768."""
    from tests.helpers.training_data import write_dataset

    seconds = (frames + 1) * TEMPLATE.hop_length / TEMPLATE.sample_rate
    with tempfile.TemporaryDirectory() as folder:
        yield write_dataset(
            Path(folder),
            clips=16,
            seconds=(seconds, seconds),
            sample_rate=TEMPLATE.sample_rate,
            hop_length=TEMPLATE.hop_length,
            dim=TEMPLATE.units_dim,
            shards=2,
        )


# ---- the machine -------------------------------------------------------------------------------


def rates() -> dict[str, float]:
    """Measure GFLOPS per CPU second of one thread, best of ten."""
    torch.set_num_threads(1)
    square = torch.randn(2048, 2048)
    conv, wav = nn.Conv1d(512, 512, 3, 2), torch.randn(1, 512, 8001)
    works = {
        "sgemm 2048": (2 * 2048**3, lambda: square @ square),
        "conv1d 512 x 512, kernel 3, stride 2": (2 * 4000 * 512 * 512 * 3, lambda: conv(wav)),
    }
    found = {}
    with torch.inference_mode():
        for name, (operations, work) in works.items():
            times = []
            for _ in range(10):
                begun = time.process_time()
                work()
                times.append(time.process_time() - begun)
            found[name] = operations / min(times) / 1e9
    return found


def on_gpu(frames: int, steps: int = 30, batch_size: int = 16) -> dict[str, float]:
    """Measure steps per second in bf16, the GPU's utilisation in percent, and peak memory in GB."""
    device = torch.device("cuda")
    generator, discriminator = (network.to(device) for network in networks(TEMPLATE))
    optimizers = [
        torch.optim.AdamW(each.parameters(), 1e-4, betas=(0.8, 0.99), eps=1e-9, fused=True)
        for each in (generator, discriminator)
    ]
    weights = LossWeights(segment_frames=SEGMENT)
    step = GanStep(generator, discriminator, *optimizers, MEL, weights, precision="bf16")
    batch = clips(TEMPLATE, frames, batch_size).to(device)

    def run() -> None:  # it waits for the device at its end
        step([batch], totals_of(batch), lambda part: KeyedNoise(part.noise_keys, device))

    for _ in range(5):
        run()
    torch.cuda.reset_peak_memory_stats()
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms"]
    with subprocess.Popen([*command, "100"], stdout=subprocess.PIPE, text=True) as watch:
        begun = time.perf_counter()
        for _ in range(steps):
            run()
        seconds = time.perf_counter() - begun
        watch.terminate()
        used = [int(line.split()[0]) for line in watch.stdout or () if line.strip()]
    return {
        "steps/s": steps / seconds,
        "utilisation %": sum(used) / max(1, len(used)),
        "GB": torch.cuda.max_memory_allocated() / 1e9,
    }


# ---- all of it ---------------------------------------------------------------------------------


def table(frames: int, costs: dict[str, Cost]) -> str:
    """Return rows of Cantor, so-vits-svc's arrangement, and so-vits-svc on another machine."""
    elsewhere = dict(zip(ROWS, _SOVITS.get(frames, ()), strict=False))
    lines = [
        f"| {frames} frames | ours | plain | ratio | so-vits-svc, elsewhere |",
        "|---|---|---|---|---|",
    ]
    ours, plain = costs["ours"], costs["plain"]
    for row in ROWS:
        name = f"of it {row}" if row in NETWORKS else f"**{row}**" if row == WHOLE else row
        a, b = ours.seconds[row], plain.seconds[row]
        there = elsewhere.get(row) or "-"
        lines.append(f"| {name} | {a:.3f} | {b:.3f} | {a / b:.2f} | {there} |")
    ratio = ours.peak_mb / plain.peak_mb
    lines.append(f"| peak MB | {ours.peak_mb:.0f} | {plain.peak_mb:.0f} | {ratio:.2f} | - |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--frames", type=int, nargs="*", default=[200, 790], help="of a clip")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dataset", type=Path, help="whose clips to read; one is made without it")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--quick", action="store_true", help="200 frames, two repeats")
    options = parser.parse_args(arguments)
    if options.quick:
        options.frames, options.repeats = [200], 2
    from benchmarks.extract import cpu_model

    loads = [os.getloadavg()[0]]
    print(f"{cpu_model()}, {os.cpu_count()} CPUs, torch {torch.__version__}", flush=True)
    figures: dict[str, object] = {"cpu": cpu_model(), "rates": rates()}
    for name, rate in rates().items():
        print(f"{name}: {rate:.0f} GFLOPS a thread", flush=True)
    for frames in options.frames:
        costs = compare(TEMPLATE, frames, options.repeats)
        print(f"\n{table(frames, costs)}", flush=True)
        with ExitStack() as held:
            dataset = options.dataset or held.enter_context(own_dataset(frames))
            seconds = loading(dataset, frames, 8 if options.quick else 40)
        share = seconds / costs["ours"].seconds[WHOLE]
        print(f"\nReading a batch: {seconds:.4f} CPU s, {share:.1%} of a step", flush=True)
        figures[str(frames)] = {
            "loading": seconds,
            **{side: asdict(cost) for side, cost in costs.items()},
        }
        if torch.cuda.is_available():
            figures[f"gpu {frames}"] = found = on_gpu(frames)
            print(f"GPU, batch 16, bf16: {found}", flush=True)
    loads.append(os.getloadavg()[0])
    print("\nLoad average before and after: " + ", ".join(f"{load:.1f}" for load in loads))
    if options.json:
        options.json.write_text(json.dumps(figures | {"load": loads}, indent=1) + "\n")


if __name__ == "__main__":
    main()
