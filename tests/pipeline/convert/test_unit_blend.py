"""Units drawn towards a speaker's by an index and a codebook, and files of other voices refused."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.encoders.codebook import Codebook, save_codebooks
from models.synthesizer.voice import Voice, VoiceEncoder
from pipeline.convert.unit_blend import UnitControls, UnitsConfig
from pipeline.errors import UserError
from stages.retrieval import IndexNote, index_files, note_to_json
from stages.types import Array
from tests.models.synthesizer.test_voice import CONFIG, MEL

WIDTH = CONFIG.units_dim
SHA256 = "ab" * 32
VOICE = Voice(
    tensors={},
    config=CONFIG,
    mel=MEL,
    speakers=("ann", "ben"),
    encoder=VoiceEncoder(name="hubertsoft", dim=WIDTH, checkpoint_sha256=SHA256),
)


def frames(count: int, width: int = WIDTH, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, width)).astype("f4")


def write_index(folder: Path, speaker: str, of: Array, **changes: Any) -> Path:
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatL2(of.shape[1])
    index.add(of)
    index_path, note_path = index_files(folder, speaker)
    folder.mkdir(exist_ok=True)
    faiss.write_index(index, str(index_path))
    note = IndexNote(
        encoder="hubertsoft",
        checkpoint_sha256=SHA256,
        dim=of.shape[1],
        speaker=speaker,
        vectors=len(of),
        frames=len(of),
        kind="Flat",
        nprobe=None,
        seed=0,
        faiss_version=faiss.__version__,
        dataset_fingerprint="f",
        sha256=hashlib.sha256(index_path.read_bytes()).hexdigest(),
    )
    note_path.write_text(note_to_json(dataclasses.replace(note, **changes)), "utf-8")
    return folder


def write_codebook(path: Path, of: Array, speaker: str | None = None, **changes: Any) -> Path:
    codebook = Codebook("hubertsoft", SHA256, torch.from_numpy(of), speaker)
    save_codebooks(path, [dataclasses.replace(codebook, **changes)])
    return path


def write_kmeans(path: Path, **of: Any) -> Path:
    """Write k-means centres in the format of so-vits-svc's cluster/train_cluster.py."""
    content = {
        speaker: {"n_features_in_": WIDTH, "_n_threads": 4, "cluster_centers_": centres}
        for speaker, centres in of.items()
    }
    torch.save(content, path)
    return path


def controls(voice: Voice = VOICE, speaker: str | None = "ann", **settings: Any) -> UnitControls:
    settings = {key: str(v) if isinstance(v, Path) else v for key, v in settings.items()}
    return UnitControls(UnitsConfig(**settings), voice, speaker)


def nearest(units: Array, centres: Array) -> Array:
    return centres[np.square(units[:, None] - centres).sum(-1).argmin(1)]


def refused(**asked: Any) -> str:
    with pytest.raises(UserError) as error:
        controls(**asked)
    return str(error.value)


@pytest.mark.parametrize("key", ["index_ratio", "codebook_ratio", "protect"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_ratios_lie_in_0_to_1(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"units\.{key} is .*; it must lie in 0 to 1"):
        UnitsConfig(**{key: value})


def test_where_nothing_is_set_it_is_the_same_array() -> None:
    units = frames(5)
    assert controls().blend(units) is units


def test_the_index_draws_by_its_ratio_to_what_retrieval_finds(tmp_path: Path) -> None:
    folder = write_index(tmp_path / "indexes", "ann", frames(50))
    units = frames(7, seed=1)
    found = controls(index=folder, index_ratio=1.0).blend(units)
    assert np.abs(found - units).max() > 0.1
    quarter = controls(index=folder, index_ratio=0.25).blend(units)
    assert np.allclose(quarter, 0.75 * units + 0.25 * found, atol=1e-6)
    assert np.array_equal(controls(index=folder, index_ratio=0.0).blend(units), units)
    assert controls(index=folder).blend(units[:0]).shape == (0, WIDTH)


def test_the_codebook_draws_by_its_ratio_to_the_nearest_centre(tmp_path: Path) -> None:
    centres, units = frames(20), frames(7, seed=1)
    path = write_codebook(tmp_path / "c.safetensors", centres)
    full = controls(codebook=path, codebook_ratio=1.0).blend(units)
    assert np.array_equal(full, nearest(units, centres))
    part = controls(codebook=path, codebook_ratio=0.3).blend(units)
    assert np.allclose(part, 0.7 * units + 0.3 * full, atol=1e-6) and part.dtype == np.float32
    assert controls(codebook=path).blend(units[:0]).shape == (0, WIDTH)


def test_the_codebook_comes_after_the_index(tmp_path: Path) -> None:
    folder = write_index(tmp_path / "indexes", "ann", frames(50))
    centres, units = frames(20, seed=2), frames(7, seed=1)
    path = write_codebook(tmp_path / "c.safetensors", centres)
    first = controls(index=folder, index_ratio=0.5).blend(units)
    both = controls(index=folder, codebook=path, codebook_ratio=0.4).blend(units)
    assert np.allclose(both, 0.6 * first + 0.4 * nearest(first, centres), atol=1e-6)


def test_each_speaker_has_their_own_centres(tmp_path: Path) -> None:
    path, units = tmp_path / "c.safetensors", frames(7, seed=1)
    made = [
        Codebook("hubertsoft", SHA256, torch.from_numpy(frames(9, seed=seed)), speaker)
        for seed, speaker in ((3, "ann"), (4, "ben"))
    ]
    save_codebooks(path, made)
    for seed, speaker in ((3, "ann"), (4, "ben")):
        found = controls(speaker=speaker, codebook=path, codebook_ratio=1.0).blend(units)
        assert np.array_equal(found, nearest(units, frames(9, seed=seed)))
    assert "has no centres of speaker 'eve'; it has those of ann, ben" in refused(
        speaker="eve", codebook=path
    )
    assert "no centres of a mix of speakers" in refused(speaker=None, codebook=path)


@pytest.mark.parametrize("kind", ["float32", "float64", "tensor"])
def test_centres_of_so_vits_svc_are_read(tmp_path: Path, kind: str) -> None:
    centres, units = frames(30), frames(7, seed=1)
    stored = torch.from_numpy(centres) if kind == "tensor" else centres.astype(kind)
    path = write_kmeans(tmp_path / "kmeans_30.pt", ann=stored, ben=frames(30, seed=2))
    full = controls(codebook=path, codebook_ratio=1.0).blend(units)
    assert np.array_equal(full, nearest(units, centres))
    assert "has no centres of speaker 'eve'; it has those of ann, ben" in refused(
        speaker="eve", codebook=path
    )


def test_centres_of_so_vits_svc_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    wide = write_kmeans(tmp_path / "wide.pt", ann=frames(5, 256))
    assert "width 256, but this voice's have 6" in refused(codebook=wide)
    flat = write_kmeans(tmp_path / "flat.pt", ann=np.ones(3, "f4"))
    assert "flat.pt, speaker 'ann': centres are (3,)" in refused(codebook=flat)
    spoilt = write_kmeans(tmp_path / "spoilt.pt", ann=np.full((3, WIDTH), np.nan, "f4"))
    assert "spoilt.pt, speaker 'ann': a centre has NaN" in refused(codebook=spoilt)
    words = write_kmeans(tmp_path / "words.pt", ann="centres")
    assert "words.pt has no centres of speaker 'ann'" in refused(codebook=words)
    torch.save({"model": {"emb_g.weight": torch.zeros(2, 3)}}, tmp_path / "G_0.pth")
    assert "neither a codebook of `cantor codebook`" in refused(codebook=tmp_path / "G_0.pth")


def test_codebooks_of_other_voices_are_refused(tmp_path: Path) -> None:
    def of(width: int = WIDTH, **changes: Any) -> str:
        path = tmp_path / "c.safetensors"
        return refused(codebook=write_codebook(path, frames(5, width), **changes))

    assert "width 9, but this voice's have 6" in of(width=9)
    message = of(encoder="mfcc")
    assert (
        "for units of mfcc, but this voice takes hubertsoft; make one with `cantor cod" in message
    )
    message = of(checkpoint_sha256="cd" * 32)
    assert (
        "another checkpoint of hubertsoft (SHA-256 cdcdcdcdcdcd) than this voice's (abab" in message
    )
    assert "(SHA-256 none)" in of(checkpoint_sha256=None)
    assert "made with normalize=song, but these are made with the defaults" in of(
        settings={"normalize": "song"}
    )
    assert "does not exist" in refused(codebook=tmp_path / "none.safetensors")
    assert "does not exist" in refused(codebook=tmp_path / "none.pt")


def test_settings_of_the_voices_units_are_those_of_the_codebook(tmp_path: Path) -> None:
    voice = dataclasses.replace(
        VOICE, extraction={"encoder": {"name": "hubertsoft", "normalize": "song"}}
    )
    path = write_codebook(tmp_path / "c.safetensors", frames(5), settings={"normalize": "song"})
    controls(voice, codebook=path)
    path = write_codebook(path, frames(5))
    assert "made with the defaults, but these are made with normalize=song" in refused(
        voice=voice, codebook=path
    )


def test_a_voice_that_states_no_checkpoint_takes_any_of_its_encoder(tmp_path: Path) -> None:
    encoder = VoiceEncoder(name="hubertsoft", dim=WIDTH)
    voice = dataclasses.replace(VOICE, encoder=encoder)
    controls(voice, codebook=write_codebook(tmp_path / "c.safetensors", frames(5)))


def test_indexes_of_other_voices_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "indexes"
    write_index(folder, "ben", frames(5))
    (folder / "notes.json").write_text("[]")
    message = refused(index=folder)
    assert "indexes has no index of speaker 'ann'; it has those of ben" in message
    assert "units.index" in message
    assert "no index of a mix of speakers; it has those of ben" in refused(
        speaker=None, index=folder
    )
    for changes, words in (
        (
            {"encoder": "mfcc"},
            "is for units of mfcc, but this voice takes hubertsoft; make one with `cantor index`",
        ),
        ({"checkpoint_sha256": "cd" * 32}, "(SHA-256 cdcdcdcdcdcd) than this voice's (abab"),
        ({"sha256": "0" * 64}, "is not the file that ann.json describes"),
    ):
        assert words in refused(index=write_index(folder, "ann", frames(5), **changes))
    write_index(folder, "ann", frames(5, 9))
    assert "width 9, but this voice's have 6" in refused(index=folder)


def test_what_is_no_folder_of_indexes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ann.index").touch()
    for path in (tmp_path / "ann.index", tmp_path / "none"):
        assert "is not a folder; name one that `cantor index` wrote" in refused(index=path)
    assert "has no index of speaker 'ann'; it has none" in refused(index=tmp_path)
