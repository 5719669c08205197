"""`index` on a dataset of shards."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipeline.dataset.shards import read_dataset_info
from pipeline.dataset.unit_frames import UnitDataConfig, find_units
from pipeline.errors import UserError
from pipeline.settings import load_settings
from pipeline.tools.unit_index import IndexConfig, IndexSettings, index_kind, make_indexes
from stages.retrieval import IndexNote, load_index
from tests.helpers.command import cantor
from tests.helpers.yaml_keys import assert_names_every_key

pytest.importorskip("faiss")


def make(
    dataset: Path, out: Path, speaker: str | None = None, **options: object
) -> list[IndexNote]:
    settings = IndexSettings(data=UnitDataConfig(speaker=speaker), index=IndexConfig(**options))
    return make_indexes(dataset, out, settings, Console(file=io.StringIO()))


def test_each_speaker_gets_their_frames(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "indexes"
    notes = make(dataset, out)
    units = find_units(dataset)
    assert [note.speaker for note in notes] == units.speakers
    assert len(list(out.iterdir())) == 2 * len(notes)
    for note in notes:
        frames = np.concatenate(list(units.of(note.speaker).blocks()))
        found = load_index(out, note.speaker)
        assert found.note == note and note.vectors == note.frames == len(frames)
        assert (note.encoder, note.dim, note.kind) == ("mfcc", 39, "Flat")
        assert note.dataset_fingerprint == read_dataset_info(dataset)["fingerprint"]
        assert np.array_equal(found.index.reconstruct_n(0, len(frames)), frames)
        assert np.array_equal(found.search(frames[:50], k=1)[1][:, 0], frames[:50])


def test_many_frames_are_searched_by_lists(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tools.unit_index._FEW", 300)
    speaker = find_units(dataset).speakers[0]
    (note,) = make(dataset, tmp_path, speaker=speaker, nprobe=4)
    assert note.kind.startswith("IVF") and note.nprobe == 4
    frames = np.concatenate(list(find_units(dataset).of(speaker).blocks()))
    found = load_index(tmp_path, speaker)
    assert found.index.nprobe == 4 and found.index.ntotal == len(frames)
    assert np.array_equal(found.search(frames[:50], k=1)[1][:, 0], frames[:50])


def test_a_limit_draws_frames_at_random(dataset: Path, tmp_path: Path) -> None:
    speaker = find_units(dataset).speakers[0]
    (note,) = make(dataset, tmp_path, speaker=speaker, max_vectors=100)
    assert (note.vectors, note.frames > 100) == (100, True)
    frames = np.concatenate(list(find_units(dataset).of(speaker).blocks()))
    kept = load_index(tmp_path, speaker).index.reconstruct_n(0, 100)
    known = {frame.tobytes() for frame in frames}
    assert len({frame.tobytes() for frame in kept} & known) == 100


def test_lists_are_those_of_rvc_as_far_as_they_can_be_learnt() -> None:
    assert index_kind(9_999) == "Flat"
    assert index_kind(50_000) == f"IVF{50_000 // 39},Flat"
    assert index_kind(100_000) == f"IVF{100_000 // 39},Flat"
    assert index_kind(10_000_000) == f"IVF{262_144 // 39},Flat"


def test_a_full_disk_leaves_no_half_index(dataset: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(4_000_000))
    out = small_disk / "out"
    with pytest.raises(OSError, match="No space"):
        make(dataset, out)
    left = sorted(p for p in out.rglob("*") if p.is_file())
    assert len(left) < 2 * len(find_units(dataset).speakers)
    for note in (p for p in left if p.suffix == ".json"):  # what was done before is whole
        left.remove(note)
        left.remove(out / f"{load_index(out, note.stem).note.speaker}.index")
    assert left == []


def test_what_cannot_be_indexed_is_said(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no clips of speaker 'nobody'"):
        make(dataset, tmp_path / "out", speaker="nobody")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; name the folder"):
        make(dataset, tmp_path / "file")
    with pytest.raises(UserError, match=r"index\.max_vectors is 0; it must be 1 or more"):
        load_settings(IndexSettings, None, ["index.max_vectors=0"])
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install 'cantor\[retrieval\]'"):
        make(dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_yaml_file_names_exactly_the_keys_and_defaults() -> None:
    assert_names_every_key("index", IndexSettings)


def test_the_command(dataset: Path, tmp_path: Path) -> None:
    speaker = find_units(dataset).speakers[0]
    output = cantor("index", dataset, tmp_path, f"data.speaker={speaker}", "index.max_vectors=50")
    assert f"{speaker}: 50 frames of mfcc (sampled from " in output
    (note,) = tmp_path.glob("*.json")
    assert json.loads(note.read_text())["vectors"] == 50
