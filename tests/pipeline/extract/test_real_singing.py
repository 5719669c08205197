"""Real recordings from end to end; skipped where they are absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.dataset.verify import verify
from pipeline.extract.config import load_config
from tests.pipeline.conftest import Extract


@pytest.mark.parametrize("method", ["praat", "dio"])
def test_f0_in_the_shards_follows_the_hand_annotation(
    real_audio: Path, tmp_path: Path, run_extract: Extract, method: str
) -> None:
    """Within 50 cents on 95 % of the frames voiced in both, at the clips' places in the song."""
    run_extract(real_audio, tmp_path / "d", [f"f0.method={method}"], speaker="real")
    result = verify(tmp_path / "d", real_audio)
    assert result.problems == []
    assert result.account.count("kept") == 9

    time_s, reference = np.loadtxt(real_audio / "vocadito_1_f0.csv", delimiter=",").T
    hop_length = load_config().f0.hop_length
    cents = []
    for row in pq.read_table(tmp_path / "d" / "data").to_pylist():
        if row["song_id"] == "vocadito_1.flac":
            f0 = np.array(row["f0"])
            at_s = (row["start"] + np.arange(len(f0)) * hop_length) / row["sample_rate"]
            truth = reference[np.abs(time_s[None, :] - at_s[:, None]).argmin(axis=1)]
            both = (f0 > 0) & (truth > 0)
            cents.append(1200 * np.log2(f0[both] / truth[both]))
    errors = np.abs(np.concatenate(cents))
    assert len(errors) > 1500
    assert (errors <= 50).mean() >= 0.95
