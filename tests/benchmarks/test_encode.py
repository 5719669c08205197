"""The encoders' benchmark: all candidates compute the same. What it measures is never asserted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from benchmarks import encode as bench


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter, about itself
def test_all_candidates_give_the_same_units(tmp_path: Path) -> None:
    name = "contentvec768l12"
    weights = str(bench.write_network(name, tmp_path / "hf", tiny=True))
    graph = tmp_path / "graph.onnx"
    assert bench.export_onnx(name, Path(weights), graph) == ""
    wavs = [0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    ours = bench.Candidate("", name, "ours", weights)
    expected = ours.load(1)(wavs)
    assert [units.shape for units in expected] == [(24, 64)] * 3
    for other in (
        bench.Candidate("", name, "transformers", weights),
        bench.Candidate("", name, "transformers", weights, batch=2),
        bench.Candidate("", name, "onnxruntime", str(graph), batch=2),
    ):
        with torch.inference_mode():
            off = bench.Difference.of(other.load(1)(wavs), expected)
        assert off.largest < 2e-5
        assert off.cosine > 0.99999


@pytest.mark.slow
def test_processes_share_the_clips(tmp_path: Path) -> None:
    name = "contentvec768l12"
    weights = str(bench.write_network(name, tmp_path / "hf", tiny=True))
    candidate = bench.Candidate("", name, "ours", weights)
    clips = [0.1 * np.random.default_rng(i).standard_normal(8000).astype("f4") for i in range(2)]
    figure, units = bench.measure(candidate, clips, processes=2, threads=1, repeats=1)
    assert [row.shape for row in units] == [(24, 64)]
    assert figure.wall_s > 0
    assert figure.cpu_s > 0
    assert 50 < figure.peak_mb < 2000


def test_differences() -> None:
    exact = [torch.tensor([[3.0, 0.0], [3.0, 4.0]])]
    off = bench.Difference.of([exact[0] + torch.tensor([0.5, 0.0])], exact)
    assert off.largest == 0.5
    assert off.relative == pytest.approx((0.5 / 34) ** 0.5)
    assert off.varying == 0


def test_clips_are_taken_from_all_files_in_turn(tmp_path: Path) -> None:
    rate, rng = 16000, np.random.default_rng(0)
    sf.write(tmp_path / "a.wav", 0.1 * rng.standard_normal(3 * rate), rate)
    sf.write(tmp_path / "b.flac", 0.5 * rng.standard_normal((rate, 2)), rate)
    sf.write(tmp_path / "silent.wav", np.zeros(rate), rate)
    (tmp_path / "notes.txt").write_text("no audio")
    clips = bench.read_clips(tmp_path, seconds=5.0, clip_s=1.0)
    assert [len(clip) for clip in clips] == [rate] * 5
    assert [clip.std() > 0.2 for clip in clips] == [False, True, False, False, False]
    with pytest.raises(SystemExit, match=r"no audio of 9 s"):
        bench.read_clips(tmp_path, seconds=9.0, clip_s=9.0)
