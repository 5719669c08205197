"""The benchmark's own arithmetic, on seconds of audio. What it measures is never asserted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import extract as bench
from pipeline.dataset.shards import iter_shards
from pipeline.extract.config import load_config
from tests.helpers.songs import make_songs

OVERRIDES = ["f0.method=dio", "encoder.name=mfcc", "slice.min_length_ms=1000"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four songs of 4 to 7 s, 22 s in all."""
    folder = tmp_path_factory.mktemp("corpus")
    make_songs(folder, speakers=2, songs=2, seconds=4.0)
    return folder


@pytest.mark.slow
def test_bare_calls_and_stages_do_the_same_work(corpus: Path, tmp_path: Path) -> None:
    config = load_config(None, OVERRIDES)
    bare = bench.measure_bare(corpus, config, tmp_path / "bare")
    stages = bench.measure_stages(corpus, config, tmp_path / "stages")
    assert bare.clips == stages.clips > 4
    assert bare.audio_s == pytest.approx(22.0, abs=0.01)
    assert stages.audio_s == pytest.approx(bare.audio_s, abs=0.01)
    assert set(bench.CANTOR_ONLY) < set(bare.costs)
    assert bare.costs["f0 dio"].calls == bare.clips
    assert bare.costs["soundfile.read"].calls == 4
    assert stages.costs["f0"].calls == 4  # songs
    assert list(iter_shards(tmp_path / "stages"))
    for measured in (bare, stages):
        assert all(cost.cpu_s > 0 for cost in measured.costs.values())
        assert measured.cpu_s() <= measured.total.cpu_s * 1.001


@pytest.mark.slow
def test_the_account_of_a_process_tree_holds_its_orphans(tmp_path: Path) -> None:
    """A child that leaves its parent, as Ray's daemons do, and outlives it."""
    burn = "import time\nwhile time.process_time() < {}: pass"
    child = f"import time; time.sleep(0.3)\n{burn.format(1.0)}"
    parent = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {child!r}], start_new_session=True)
{burn.format(0.5)}
"""
    tree = bench.measure_tree([sys.executable, "-c", parent], tmp_path / "log")
    assert tree.processes == 2
    # The last reading of each is at most POLL_S (0.2 s) and some load old.
    assert 0.9 < tree.total_cpu_s < 1.7
    assert tree.total_cpu_s <= tree.reaped_cpu_s + 0.02
    assert tree.peak_pss_mb <= tree.peak_rss_mb


def test_a_failing_command_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        bench.measure_tree([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log")


@pytest.mark.slow
def test_a_run_is_set_against_the_bare_calls(corpus: Path, tmp_path: Path) -> None:
    """In one process, without Ray: the account is the same, the processes are fewer."""
    config = load_config(None, OVERRIDES)
    bare = bench.measure_bare(corpus, config, tmp_path / "bare")
    run, summary = bench.measure_run(corpus, tmp_path / "run", [*OVERRIDES, "--local"])
    tiny = bench.make_tiny_corpus(tmp_path / "tiny", 1)
    start_up, _ = bench.measure_run(tiny, tmp_path / "first", [*OVERRIDES, "--local"])
    assert summary["clips"] == bare.clips
    assert "driver" in run.cpu_s and set(run.cpu_s) <= {"driver", "decode child"}
    figures = bench.Figures(22 / 60, bare, bare, bare, run, start_up, summary, [0.0])
    figures.summary["f0_method"] = "dio"
    net = run.total_cpu_s - start_up.total_cpu_s
    overhead = figures.overhead(bare)["counted on both sides"]
    assert overhead == pytest.approx(net / bare.cpu_s() - 1)
    assert f"{100 * overhead:+.1f} %" in bench.describe(figures)
    assert f"{run.peak_rss_mb:.0f}" in bench.describe_memory([figures])
