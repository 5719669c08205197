"""Search in an index of a speaker's frames, and the blend of its results."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest

from stages.retrieval import (
    IndexFault,
    IndexNote,
    SpeakerIndex,
    index_files,
    load_index,
    note_to_json,
)

faiss = pytest.importorskip("faiss")

NOTE = IndexNote(
    encoder="mfcc",
    checkpoint_sha256=None,
    dim=6,
    speaker="ann",
    vectors=400,
    frames=400,
    kind="Flat",
    nprobe=None,
    seed=0,
    faiss_version=faiss.__version__,
    dataset_fingerprint="f",
    sha256="",
)


def made(frames: np.ndarray, kind: str = "Flat") -> SpeakerIndex:
    index = faiss.index_factory(frames.shape[1], kind)
    index.train(frames)
    index.add(frames)
    return SpeakerIndex(dataclasses.replace(NOTE, dim=frames.shape[1]), index)


def frames_and_queries() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((400, 6)).astype("f4"), rng.standard_normal((30, 6)).astype("f4")


def test_search_finds_the_nearest_frames_themselves() -> None:
    frames, queries = frames_and_queries()
    squares, found = made(frames).search(queries, k=5)
    every = ((queries[:, None].astype("f8") - frames[None]) ** 2).sum(-1)
    order = np.argsort(every, axis=1)[:, :5]
    assert np.array_equal(found, frames[order])
    assert np.allclose(squares, np.take_along_axis(every, order, 1), atol=1e-5)


def test_blend_is_that_of_rvc() -> None:
    frames, queries = frames_and_queries()
    index = made(frames)
    score, ix = index.index.search(queries, k=8)
    weight = np.square(1 / score)
    weight /= weight.sum(axis=1, keepdims=True)
    expected = np.sum(frames[ix] * weight[:, :, None], axis=1)
    assert np.abs(index.blend(queries) - expected).max() < 1e-6


def test_a_frame_of_the_speaker_stays_as_it_is() -> None:
    frames, _ = frames_and_queries()
    index = made(frames)
    assert np.array_equal(index.blend(frames[:20]), frames[:20])


def test_few_frames_and_empty_lists_give_what_there_is() -> None:
    frames, queries = frames_and_queries()
    squares, found = made(frames[:3]).search(queries, k=8)
    assert np.isinf(squares[:, 3:]).all() and not found[:, 3:].any()
    assert np.isfinite(made(frames[:3]).blend(queries)).all()
    lists = made(frames, "IVF64,Flat")
    lists.index.nprobe = 1  # 6 frames a list: not all of 8 are found
    assert np.isinf(lists.search(queries)[0]).any()
    assert np.isfinite(lists.blend(queries)).all()
    nothing = made(frames, "IVF4,Flat")
    nothing.index.reset()
    assert np.array_equal(nothing.blend(queries), queries)


def test_very_near_and_very_far_frames_give_finite_weights() -> None:
    frames, queries = frames_and_queries()
    near = np.concatenate([queries + 1e-12, frames]).astype("f4")
    assert np.isfinite(made(near).blend(queries)).all()
    assert np.isfinite(made(frames * 1e15).blend(queries)).all()


def test_units_of_another_width_are_refused() -> None:
    frames, _ = frames_and_queries()
    with pytest.raises(ValueError, match=r"needs \(F, 6\)"):
        made(frames).search(np.zeros((3, 7), np.float32))
    with pytest.raises(ValueError, match="contain NaN or infinity"):
        made(frames).blend(np.full((1, 6), np.nan, np.float32))


def write(folder: Path, speaker: str) -> None:
    frames, _ = frames_and_queries()
    index_path, note_path = index_files(folder, speaker)
    faiss.write_index(made(frames).index, str(index_path))
    sha256 = hashlib.sha256(index_path.read_bytes()).hexdigest()
    note = dataclasses.replace(NOTE, speaker=speaker, sha256=sha256)
    note_path.write_text(note_to_json(note), "utf-8")


def test_names_of_speakers_are_names_of_files(tmp_path: Path) -> None:
    names = ["ann", ".ann", "%2Eann", ".", "..", "a/b", "a%2Fb", "音" * 100, "音" * 101, "-x", " y"]
    for name in names:
        write(tmp_path, name)
    assert len(list(tmp_path.iterdir())) == 2 * len(names)
    for name in names:
        assert load_index(tmp_path, name).note.speaker == name


def test_what_is_no_index_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(IndexFault, match=r"no index of speaker 'ann' \(.*ann\.json does not exist"):
        load_index(tmp_path, "ann")
    write(tmp_path, "ann")
    index_path, note_path = index_files(tmp_path, "ann")
    data = bytearray(index_path.read_bytes())
    data[40] ^= 1
    index_path.write_bytes(data)
    with pytest.raises(IndexFault, match=r"ann\.index is not the file that ann\.json describes"):
        load_index(tmp_path, "ann")
    note_path.write_text('{"encoder": "mfcc"}')
    with pytest.raises(IndexFault, match=r"ann\.json does not describe an index"):
        load_index(tmp_path, "ann")


def test_without_faiss_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(IndexFault, match=r"pip install 'cantor\[retrieval\]'"):
        load_index(tmp_path, "ann")
