"""The benchmark's own arithmetic, on seconds of audio. What it measures is never asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import extract as bench
from pipeline.config import load_config
from pipeline.shards import iter_shards
from tests.songs import make_songs

OVERRIDES = ["f0.method=dio", "encoder.name=mfcc", "slice.min_length_ms=1000"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four songs of 4 to 7 s, 22 s in all."""
    folder = tmp_path_factory.mktemp("corpus")
    make_songs(folder, speakers=2, songs=2, seconds=4.0)
    return folder


def test_bare_calls_and_stages_do_the_same_work(corpus: Path, tmp_path: Path) -> None:
    config = load_config(None, OVERRIDES)
    bare = bench.measure_bare(corpus, config, tmp_path / "bare")
    stages = bench.measure_stages(corpus, config, tmp_path / "stages")
    assert bare.clips == stages.clips > 4
    assert bare.audio_s == pytest.approx(22.0, abs=0.01)
    assert stages.audio_s == pytest.approx(bare.audio_s, abs=0.01)
    assert set(bench.OURS_ALONE) < set(bare.costs)
    assert bare.costs["f0 dio"].calls == bare.clips
    assert bare.costs["soundfile.read"].calls == 4
    assert stages.costs["f0"].calls == stages.clips
    assert list(iter_shards(tmp_path / "stages"))
    for measured in (bare, stages):
        assert all(cost.cpu_s > 0 for cost in measured.costs.values())
        assert measured.cpu_s() <= measured.total.cpu_s * 1.001


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


@pytest.mark.ray
def test_the_whole_benchmark(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    environment = dict(os.environ)
    bench.main(["--source", str(corpus), "--out", str(out), "--json", str(tmp_path / "f.json")])
    assert dict(os.environ) == environment
    (figures,) = json.loads((tmp_path / "f.json").read_text())["corpora"]
    assert figures["run"]["cpu_s"]["worker"] > 0
    assert figures["run"]["cpu_s"]["driver"] > 0
    assert figures["summary"]["songs"] == 4
    assert set(figures["overhead"]) == {
        "counted on both sides",
        "on neither side",
        "in the run alone",
    }
    printed = capsys.readouterr().out
    assert "Overhead" in printed and "Peak memory" in printed
