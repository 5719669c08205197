"""`purity` on a dataset whose embeddings are known."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from models.torchaudio_compat import import_torchaudio
from pipeline.dataset.shards import iter_shards, read_footer, write_shard
from pipeline.errors import UserError
from pipeline.tools.speaker_purity import PuritySettings, SpeakerPurity, measure_purity
from stages.resample import ResampleConfig
from stages.xvector import XvectorConfig
from tests.helpers.command import cantor
from tests.helpers.xvectors import direction, near_the_speaker, put_xvectors


def measure(dataset: Path, **options: object) -> dict[str, SpeakerPurity]:
    settings = PuritySettings(xvector=XvectorConfig(**options))
    speakers = measure_purity(dataset, settings, Console(file=io.StringIO()))
    return {purity.speaker: purity for purity in speakers}


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def clips_of(dataset: Path, *columns: str) -> pd.DataFrame:
    return pq.read_table(dataset / "data", columns=["clip_id", "speaker", *columns]).to_pandas()


def by_hand(clips: pd.DataFrame) -> pd.DataFrame:
    """The definition, written out: a clip against the others of its speaker."""
    vectors = np.stack(clips["xvector"].to_list()).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = clips["speaker"].to_numpy()
    rows = []
    for i, name in enumerate(names):
        near = {}
        for other in np.unique(names):
            members = vectors[(names == other) & (np.arange(len(names)) != i)]
            if len(members):
                mean = members.mean(0)
                near[other] = float(vectors[i] @ mean / np.linalg.norm(mean))
        nearest = max(near, key=near.__getitem__) if name in near else name
        rows.append((near.get(name, np.nan), nearest == name, nearest))
    return pd.DataFrame(rows, columns=["cosine", "own", "nearest_speaker"])


def test_the_sidecar_is_what_the_definition_says(copy: Path) -> None:
    clips = clips_of(copy)
    stray, of = clips["clip_id"][0], clips["speaker"].iloc[-1]
    assert clips["speaker"][0] != of
    put_xvectors(copy, lambda clip, name: near_the_speaker(clip, of if clip == stray else name))
    found = measure(copy)
    table = pd.read_parquet(copy / "purity.parquet")
    assert table["clip_id"].tolist() == clips["clip_id"].tolist()
    assert table["speaker"].tolist() == clips["speaker"].tolist()
    expected = by_hand(clips_of(copy, "xvector"))
    assert np.abs(table["cosine"] - expected["cosine"]).max() < 1e-6
    assert table["own"].tolist() == expected["own"].tolist()
    assert table["nearest_speaker"].tolist() == expected["nearest_speaker"].tolist()
    (row,) = table[~table["own"]].itertuples()
    assert (row.clip_id, row.nearest_speaker) == (stray, of)

    assert sum(p.clips for p in found.values()) == len(clips)
    assert {name: p.strays for name, p in found.items() if p.strays} == {clips["speaker"][0]: 1}
    for name, rows in table.groupby("speaker"):
        assert found[name].mean == pytest.approx(rows["cosine"].mean(), abs=1e-6)
        assert found[name].low == pytest.approx(np.percentile(rows["cosine"], 5), abs=1e-6)


def test_its_types_and_what_it_is_about(copy: Path) -> None:
    put_xvectors(copy)
    measure(copy)
    schema = pq.read_schema(copy / "purity.parquet")
    assert [str(field.type) for field in schema] == ["string", "string", "float", "bool", "string"]
    notes = json.loads(schema.metadata[b"cantor"])
    assert notes == {
        "fingerprint": json.loads((copy / "dataset.json").read_text())["fingerprint"],
        "checkpoint_sha256": "ab" * 32,
        "clips": len(clips_of(copy)),
    }
    assert list((copy / ".tmp").iterdir()) == []


def test_the_only_clip_of_a_speaker_has_nothing_to_be_near_to(copy: Path) -> None:
    put_xvectors(copy)
    shard = [p for p in iter_shards(copy) if pq.read_metadata(p).num_rows][-1]
    table = pq.read_table(shard)
    names = table["speaker"].to_pylist()
    place = table.schema.get_field_index("speaker")
    renamed = table.set_column(place, "speaker", pa.array([*names[:-1], "solo"]))
    write_shard(copy, shard.name, renamed, read_footer(shard))
    found = measure(copy)
    assert (found["solo"].clips, found["solo"].mean, found["solo"].strays) == (1, None, 0)
    (row,) = pd.read_parquet(copy / "purity.parquet").query("speaker == 'solo'").itertuples()
    assert (np.isnan(row.cosine), row.own, row.nearest_speaker) == (True, True, "solo")


def test_opposite_clips_have_a_cosine_all_the_same(copy: Path) -> None:
    """Two clips whose others cancel out, and two that point away from each other."""
    put_xvectors(copy, lambda clip, _: direction("x") * (-1) ** (clip[-1] in "02468"))
    measure(copy)
    table = pd.read_parquet(copy / "purity.parquet")
    assert table["cosine"].dropna().between(-1.000001, 1.000001).all()
    assert table["cosine"].notna().all()


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_vector_without_direction_is_damage(copy: Path, value: float) -> None:
    clip = clips_of(copy)["clip_id"].iloc[-1]
    put_xvectors(copy, lambda c, s: np.full(24, value) if c == clip else near_the_speaker(c, s))
    with pytest.raises(UserError, match=f"x-vector of {clip} has no direction"):
        measure(copy)
    assert not (copy / "purity.parquet").exists()


def test_without_vectors_both_ways_to_them_are_offered(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"has no x-vectors; give xvector\.checkpoint=FOLDER to this"
    ):
        measure(dataset)
    with pytest.raises(UserError, match="is not a dataset"):
        measure(tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        measure(dataset, checkpoint=str(tmp_path / "nowhere"))


@pytest.mark.slow
def test_vectors_of_a_checkpoint(copy: Path, tmp_path: Path) -> None:
    """A small network without training: the plumbing is what counts."""
    import_torchaudio()  # before transformers does
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.WavLMConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        tdnn_dim=(16,) * 5,
        xvector_output_dim=12,
    )
    folder = tmp_path / "xvector"
    transformers.WavLMForXVector(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    found = measure(copy, checkpoint=str(folder), device="cpu")
    table = pd.read_parquet(copy / "purity.parquet")
    assert table["clip_id"].tolist() == clips_of(copy)["clip_id"].tolist()
    assert sum(p.clips for p in found.values()) == len(table)

    from models.encoders.xvector import load_xvector
    from stages.flac import decode_flac
    from stages.pcm import dequantise
    from stages.xvector import embed_clips

    clips = clips_of(copy, "audio")
    wavs = [dequantise(decode_flac(a["bytes"], "PCM_16"), "PCM_16") for a in clips["audio"]]
    vectors = embed_clips(wavs, 44100, load_xvector(folder), ResampleConfig())
    expected = by_hand(clips.assign(xvector=vectors))
    assert np.abs(table["cosine"] - expected["cosine"]).max() < 1e-5


def test_the_command(copy: Path) -> None:
    assert "has no x-vectors" in cantor("purity", copy, status=2)
    put_xvectors(copy)
    output = cantor("purity", copy)
    assert "nearer to another" in output and "purity.parquet" in output
