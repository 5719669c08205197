#!/usr/bin/env python3
"""Accuracy and cost of every f0 method on singing of known pitch.

    python benchmarks/f0.py [--methods praat dio ...] [--audio FOLDER] [--rmvpe FILE] [--resume]

Accuracy is measured on a recording annotated by hand (vocadito_1 in FOLDER) and on songs of the
demo's singer, clean and degraded in several ways; cost is compared with the call that users make
today, in the same run. docs/f0.md has the tables, between markers, and explains them; the plots are
in the same folder. Results are kept under bench-out/f0: --resume continues from them, and --pages
only writes page and plots again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script

from benchmarks.f0_corpus import HOP_LENGTH, SAMPLE_RATE, Condition, generated, vocadito
from benchmarks.f0_speed import PAIRS, Cost, compare

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "bench-out" / "f0"
REAL = "vocadito"  # the condition that is no generated one
CLIP_S = 5.0

METHODS: dict[str, dict[str, Any]] = {
    "praat": {"method": "praat"},
    "praat-cc": {"method": "praat-cc"},
    "dio": {"method": "dio"},
    "harvest": {"method": "harvest"},
    "pyin": {"method": "pyin"},
    "crepe": {"method": "crepe"},
    "crepe-tiny": {"method": "crepe-tiny"},
    "fcpe": {"method": "fcpe"},
    "rmvpe": {"method": "rmvpe"},
}
"""Settings of each measured method, by its name in the tables."""

ENSEMBLES = (("dio", "fcpe"), ("crepe-tiny", "dio", "fcpe"), ("crepe-tiny", "fcpe", "praat"))
"""Ensembles of these methods: they combine contours that are computed already."""

THRESHOLDS = {
    "praat": (0.3, 0.45, 0.55, 0.7),
    "dio": (0.3, 0.5, 0.7),
    "harvest": (0.5, 0.7, 0.8),
    "pyin": (0.05,),
    "crepe-tiny": (0.2, 0.3, 0.4, 0.6),
    "fcpe": (0.05, 0.1, 0.2, 0.4, 0.5),
}
"""Values of voicing_threshold to try in addition to the default."""

Contours = dict[str, list[np.ndarray]]
"""Contours of a method: (F,) for each clip, by condition."""


# ---- accuracy ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Scores in 0 to 1 as mir_eval.melody defines them at 50 cents, except the last two.

    pitch, chroma: share of voiced frames with the right pitch (or its octaves); a frame estimated
    as unvoiced is wrong. recall, false_alarm: share of voiced (unvoiced) frames estimated as
    voiced. overall: share of frames with the right pitch or rightly unvoiced. octaves: share of
    frames voiced in both that are off by one octave or more, within 50 cents. cents: median
    absolute error of the frames with the right pitch.
    """

    pitch: float
    chroma: float
    octaves: float
    recall: float
    false_alarm: float
    overall: float
    cents: float


_FIELDS = [field.name for field in fields(Scores)]


def score(truth: np.ndarray, found: np.ndarray) -> Scores:
    """Score a contour against the truth, both (F,) in Hz at the same times, 0 = unvoiced."""
    from mir_eval import melody

    series = []
    for f0 in (truth, found):
        hz, voiced = melody.freq_to_voicing(f0.astype(np.float64))
        series += [voiced, melody.hz2cents(hz)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a contour may be voiced nowhere
        recall, false_alarm = melody.voicing_measures(series[0], series[2])
        pitch = melody.raw_pitch_accuracy(*series)
        chroma = melody.raw_chroma_accuracy(*series)
        overall = melody.overall_accuracy(*series)
    both = (truth > 0) & (found > 0)
    off = series[3][both] - series[1][both]
    octaves = np.round(off / 1200)
    astray = (octaves != 0) & (np.abs(off - 1200 * octaves) < 50)
    right = np.abs(off[np.abs(off) < 50])
    return Scores(
        float(pitch),
        float(chroma),
        float(astray.mean()) if both.any() else 0.0,
        float(recall),
        float(false_alarm),
        float(overall),
        float(np.median(right)) if len(right) else float("nan"),
    )


def find_contours(settings: Mapping[str, Any], conditions: Iterable[Condition]) -> Contours:
    """Estimate f0 of every clip with one method."""
    from stages.f0 import F0Config, estimate_clips

    found = {}
    for condition in conditions:
        cfg = F0Config(**settings, f0_max=condition.f0_max, hop_length=HOP_LENGTH, device="cpu")
        wavs = [clip.wav for clip in condition.clips]
        counts = [len(clip.f0) for clip in condition.clips]
        found[condition.name] = list(estimate_clips(wavs, SAMPLE_RATE, cfg, counts))
    return found


def score_all(conditions: Iterable[Condition], contours: Contours) -> dict[str, Scores]:
    """Score every condition, over the frames of all its clips."""
    return {
        condition.name: score(
            np.concatenate([clip.f0 for clip in condition.clips]),
            np.concatenate(contours[condition.name]),
        )
        for condition in conditions
    }


def vote(members: Sequence[Contours]) -> Contours:
    """Combine the contours of the members as the ensemble does."""
    from stages.f0.ensemble import combine

    return {
        name: [
            combine(np.stack(tracks)) for tracks in zip(*(m[name] for m in members), strict=True)
        ]
        for name in members[0]
    }


def mean(scores: Iterable[Scores]) -> Scores:
    """Average conditions with equal weights; NaN where there is none."""
    columns = np.array([list(asdict(one).values()) for one in scores]).reshape(-1, len(_FIELDS)).T
    known = [column[~np.isnan(column)] for column in columns]
    return Scores(*(float(column.mean()) if len(column) else float("nan") for column in known))


def save_contours(path: Path, contours: Contours) -> None:
    flat = {f"{name}.{i}": f0 for name, rows in contours.items() for i, f0 in enumerate(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".tmp").open("wb") as file:
        np.savez(file, **flat)
    path.with_suffix(".tmp").replace(path)


def load_contours(path: Path, conditions: Iterable[Condition]) -> Contours:
    with np.load(path, allow_pickle=False) as found:
        return {
            condition.name: [found[f"{condition.name}.{i}"] for i in range(len(condition.clips))]
            for condition in conditions
        }


# ---- measuring ---------------------------------------------------------------------------------


def measure_accuracy(
    methods: Mapping[str, dict[str, Any]],
    conditions: Sequence[Condition],
    folder: Path,
    resume: bool,
) -> None:
    """Write contours of every method to `folder`, two methods at a time, slowest first."""
    missing = [m for m in methods if not (resume and _contours_file(folder, m).exists())]
    if not missing:
        return
    dearest = ("crepe", "harvest", "pyin", "praat-cc")
    missing.sort(key=lambda m: [*dearest, methods[m]["method"]].index(methods[m]["method"]))
    context = multiprocessing.get_context("spawn")
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        running = {m: pool.submit(find_contours, methods[m], conditions) for m in missing}
        for method, future in running.items():
            save_contours(_contours_file(folder, method), future.result())
            print(f"contours of {method}: done", flush=True)


def _contours_file(folder: Path, method: str) -> Path:
    return folder / "contours" / f"{method}.npz"


def measure_speed(
    methods: Iterable[str], wav: np.ndarray, folder: Path, resume: bool, quick: bool
) -> dict[str, dict[str, Cost]]:
    """Measure Cantor's and the usual call by method; results are kept in `folder`."""
    file = folder / "speed.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    length = min(round(CLIP_S * SAMPLE_RATE), len(wav))
    clips = [wav[i : i + length] for i in range(0, len(wav) - length + 1, length)]
    with tempfile.TemporaryDirectory() as scratch:
        for method in methods:
            if method not in PAIRS or (resume and method in known):
                continue
            weights = _made_up_rmvpe(Path(scratch)) if method == "rmvpe" else None
            print(f"cost of {method} ...", flush=True)
            ours, theirs = compare(method, clips, weights, quick)
            known[method] = {"ours": asdict(ours), "theirs": asdict(theirs)}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(known, indent=1) + "\n")
    return {
        method: {side: Cost(**cost) for side, cost in sides.items()}
        for method, sides in known.items()
    }


def _made_up_rmvpe(folder: Path) -> str:
    """Make an RMVPE file of full size with arbitrary weights, which do not affect cost."""
    import torch

    from models.f0.rmvpe_checkpoint import RmvpeConfig
    from tests.helpers.checkpoints import tiny_rmvpe_weights

    torch.save({"model": tiny_rmvpe_weights(RmvpeConfig())}, folder / "rmvpe.pt")
    return str(folder / "rmvpe.pt")


# ---- words -------------------------------------------------------------------------------------

TARGETS = {
    **dict.fromkeys(("praat", "harvest"), 1.10),
    **dict.fromkeys(("dio", "crepe", "crepe-tiny", "fcpe", "rmvpe"), 0.50),
}
"""Highest permitted cost of Cantor's implementation, relative to the other one."""


@dataclass(frozen=True)
class Figures:
    """All figures of the page.

    accuracy: by method and condition. thresholds: the same, by method and voicing_threshold first.
    speed: by method and side.
    """

    accuracy: dict[str, dict[str, Scores]]
    thresholds: dict[str, dict[float, dict[str, Scores]]]
    speed: dict[str, dict[str, Cost]]

    def cost(self, method: str) -> float | None:
        """Return CPU seconds per further minute; for an ensemble the sum of its members."""
        members = method.split(" + ")
        if not set(members) <= set(self.speed):
            return None
        return sum(self.speed[member]["ours"].steady for member in members)

    def conditions(self) -> list[str]:
        return list(next(iter(self.accuracy.values()), {}))


def tables(figures: Figures) -> dict[str, str]:
    """Return Markdown tables by the name of the marker in the page."""
    from benchmarks.extract import table  # not at the top: every process would import Ray

    head = ["", "pitch", "chroma", "octaves", "recall", "false alarm", "overall", "cents"]
    found: dict[str, list[str]] = {}
    real, made = [], []
    for method, by_condition in figures.accuracy.items():
        real.append([method, *_cells(mean(_real(by_condition)))])
        made.append([method, *_cells(mean(_made(by_condition)))])
    if "rmvpe" not in figures.accuracy:
        for rows in (real, made):
            rows.append(["rmvpe", *["no weights"] * (len(head) - 1)])
    found["vocadito"] = table(head, real)
    found["generated"] = table(head, made)
    for name, key in (("overall", "overall"), ("pitch", "pitch")):
        found[name] = table(
            ["", *figures.conditions()],
            [
                [method, *(f"{getattr(s, key):.3f}" for s in by_condition.values())]
                for method, by_condition in figures.accuracy.items()
            ],
        )
    three = ("recall", "false_alarm", "overall")
    found["thresholds"] = table(
        ["", "threshold", *("recall", "false alarm", "overall") * 2],
        [
            [method, value, *(_number(getattr(one, key), 3) for one in both for key in three)]
            for method, values in figures.thresholds.items()
            for value, by_condition in (
                ("default", figures.accuracy[method]),
                *((f"{value:g}", by) for value, by in values.items()),
            )
            for both in [(mean(_real(by_condition)), mean(_made(by_condition)))]
        ],
    )
    found["speed"] = table(
        [
            *("", "first min", "theirs", "ratio", "further min", "theirs", "ratio", "at most"),
            *("RTF", "MB", "theirs", "imports", "theirs", "they"),
        ],
        [_speed_row(method, sides) for method, sides in figures.speed.items()],
    )
    return {name: "\n".join(lines).strip() for name, lines in found.items()}


def _real(by_condition: Mapping[str, Scores]) -> list[Scores]:
    return [scores for name, scores in by_condition.items() if name == REAL]


def _made(by_condition: Mapping[str, Scores]) -> list[Scores]:
    return [scores for name, scores in by_condition.items() if name != REAL]


def _cells(scores: Scores) -> list[str]:
    parts = list(asdict(scores).values())
    return [*(_number(part, 4) for part in parts[:-1]), _number(parts[-1], 1)]


def _number(value: float, digits: int) -> str:
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def _speed_row(method: str, sides: Mapping[str, Cost]) -> list[str]:
    ours, theirs = sides["ours"], sides["theirs"]
    target = TARGETS.get(method)
    return [
        method,
        *(f"{x:.3g}" for x in (ours.first, theirs.first)),
        f"**{ours.first / theirs.first:.2f}**",
        *(f"{x:.3g}" for x in (ours.steady, theirs.steady)),
        f"**{ours.steady / theirs.steady:.2f}**",
        "" if target is None else f"{target:.2f}",
        f"{ours.steady / 60:.2g}",
        *(f"{x:.0f}" for x in (ours.peak_mb, theirs.peak_mb)),
        *(f"{x:.1f}" for x in (ours.imports, theirs.imports)),
        PAIRS[method].title,
    ]


def write_page(page: Path, found: Mapping[str, str]) -> None:
    """Write each table between its markers in the page."""
    text = page.read_text(encoding="utf-8")
    for name, lines in found.items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        if not re.search(pattern, text, re.DOTALL):
            raise SystemExit(f"{page} has no place for the table {name}")
        text = re.sub(
            pattern, lambda m, lines=lines: f"{m[1]}\n{lines}\n\n{m[2]}", text, flags=re.DOTALL
        )
    page.write_text(text, encoding="utf-8")


# ---- plots -------------------------------------------------------------------------------------


def plot_cost(figures: Figures, path: Path) -> None:
    """Plot overall accuracy over CPU seconds, on the recording and on generated songs."""
    from matplotlib import pyplot

    panels = {"generated songs, mean of conditions": _made}
    if REAL in figures.conditions():
        panels = {"vocadito_1, annotated by hand": _real} | panels
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
    all_points = []
    for axis, (title, chosen) in zip(axes[0], panels.items(), strict=True):
        points: list[tuple[float, float, str]] = []
        all_points.append(points)
        for method, by_condition in figures.accuracy.items():
            cost = figures.cost(method)
            if cost is not None:
                points.append((cost, mean(chosen(by_condition)).overall, method))
        for cost, right, method in points:
            axis.plot(cost, right, "s" if " + " in method else "o", color=_colour(method))
        axis.set_xscale("log")
        axis.margins(x=0.3, y=0.15)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("CPU seconds for each minute of audio, one thread")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("overall accuracy")
    figure.tight_layout()
    for axis, points in zip(axes[0], all_points, strict=True):
        _label(axis, points)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _colour(method: str) -> str:
    networks = ("crepe", "fcpe", "rmvpe")
    if " + " in method:
        return "tab:green"
    return "tab:orange" if method.startswith(networks) else "tab:blue"


def _label(axis: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Place names next to their points without overlap; lengths in points of 1 / 72 inch."""
    scale = 72 / axis.figure.dpi
    places = [axis.transData.transform((cost, right)) * scale for cost, right, _ in points]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    for (x, y), (cost, right, method) in zip(places, points, strict=True):
        width = 4.6 * len(method)
        for up, left in itertools.product((0, 11, -11, 22, -22, 33, -33, 44), (False, True)):
            begin = x - 8 - width if left else x + 8
            box = (begin, y + up - 5, begin + width, y + up + 5)
            if not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        axis.annotate(
            method,
            (cost, right),
            (begin - x, up),
            textcoords="offset points",
            fontsize=8,
            va="center",
            color=_colour(method),
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "grey"} if up else None,
        )


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return the overlap of two boxes (left, bottom, right, top)."""
    return all(one[i] < other[i + 2] and other[i] < one[i + 2] for i in (0, 1))


def plot_conditions(figures: Figures, path: Path) -> None:
    """Plot overall accuracy by method and condition."""
    from matplotlib import pyplot

    methods, names = list(figures.accuracy), figures.conditions()
    grid = np.array([[figures.accuracy[m][c].overall for c in names] for m in methods])
    figure, axis = pyplot.subplots(figsize=(1.0 * len(names) + 2.5, 0.4 * len(methods) + 1.6))
    axis.imshow(grid, cmap="RdYlGn", vmin=0.0, vmax=1.0, aspect="auto", alpha=0.8)
    for i, j in itertools.product(range(len(methods)), range(len(names))):
        axis.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center", fontsize=8)
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=9)
    axis.set_yticks(range(len(methods)), methods, fontsize=9)
    axis.set_title("overall accuracy", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ---- all of it ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    recordings = ROOT / "tests" / "data" / "audio"
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--audio", type=Path, default=recordings, help="folder with vocadito_1")
    parser.add_argument("--rmvpe", type=Path, help="trained weights of RMVPE, for its accuracy")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each generated condition")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run found")
    parser.add_argument("--quick", action="store_true", help="little audio, to try it out")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for what is found")
    parser.add_argument("--page", type=Path, help="page to put the tables into; plots go beside it")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seconds = 4.0
    from benchmarks.extract import cpu_model

    print(f"{cpu_model()}, {os.cpu_count()} CPUs", flush=True)
    loads = [os.getloadavg()[0]]
    real = vocadito(options.audio)
    if real is None:
        print(f"{options.audio} has no vocadito_1: generated songs alone", flush=True)
    made = generated(options.seconds)
    conditions = made if real is None else [real, *made]
    clip = conditions[0].clips[0]
    speed = measure_speed(options.methods, clip.wav, options.out, options.resume, options.quick)
    loads.append(os.getloadavg()[0])

    methods = {name: METHODS[name] for name in options.methods if name != "rmvpe"}
    if options.rmvpe and "rmvpe" in options.methods:
        methods["rmvpe"] = METHODS["rmvpe"] | {"checkpoint": str(options.rmvpe)}
    tried = {
        f"{m} at {value:g}": METHODS[m] | {"voicing_threshold": value}
        for m, values in THRESHOLDS.items()
        for value in (values[:1] if options.quick else values)
        if m in methods
    }
    measure_accuracy(methods | tried, conditions, options.out, options.resume)
    loads.append(os.getloadavg()[0])

    contours = {
        name: load_contours(_contours_file(options.out, name), conditions)
        for name in (*methods, *tried)
    }
    thresholds: dict[str, dict[float, dict[str, Scores]]] = {}
    for name in tried:
        method, value = name.split(" at ")
        scores = score_all(conditions, contours.pop(name))
        thresholds.setdefault(method, {})[float(value)] = scores
    for members in ENSEMBLES:
        if set(members) <= set(contours):
            contours[" + ".join(members)] = vote([contours[m] for m in members])
    accuracy = {method: score_all(conditions, found) for method, found in contours.items()}
    speed = {m: speed[m] for m in METHODS if m in speed}
    report(Figures(accuracy, thresholds, speed), options.out, options.page, loads)


def report(figures: Figures, out: Path, page: Path | None, loads: Sequence[float]) -> None:
    """Print the tables, write the figures as JSON, and fill in the page."""
    from benchmarks.extract import cpu_model

    found = tables(figures)
    for name, lines in found.items():
        print(f"\n### {name}\n\n{lines}", flush=True)
    data = {"cpu": cpu_model(), "load": loads, **asdict(figures)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "figures.json").write_text(json.dumps(data, indent=1) + "\n")
    print("\nLoad average before, between, after: " + ", ".join(f"{load:.1f}" for load in loads))
    if page is not None:
        write_page(page, found)
        plot_cost(figures, page.with_suffix(".png"))
        plot_conditions(figures, page.with_name(f"{page.stem}-conditions.png"))


if __name__ == "__main__":
    main()
