"""`codebook` on a dataset of shards."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from sklearn.cluster import KMeans

from models.encoders.codebook import load_codebook, load_codebooks
from pipeline.dataset.unit_frames import UnitDataConfig, find_units
from pipeline.dataset.verify import verify
from pipeline.errors import UserError
from pipeline.settings import load_settings
from pipeline.tools.codebook import CodebookConfig, CodebookSettings, Fit, make_codebook
from tests.helpers.command import cantor
from tests.helpers.yaml_keys import assert_names_every_key


def make(dataset: Path, out: Path, speaker: str | None = None, **options: object) -> list[Fit]:
    settings = CodebookSettings(
        data=UnitDataConfig(speaker=speaker), codebook=CodebookConfig(**options)
    )
    return make_codebook(dataset, out, settings, Console(file=io.StringIO()))


@pytest.mark.slow
def test_it_fits_about_as_well_as_scikit_learn_on_all_frames(dataset: Path, tmp_path: Path) -> None:
    (fit,) = make(dataset, tmp_path / "c.safetensors", clusters=50)
    frames = torch.cat([torch.from_numpy(b) for b in find_units(dataset).blocks()])
    whole = KMeans(50, n_init=1, random_state=0).fit(frames.numpy())
    assert fit.frames == len(frames)
    assert fit.inertia * fit.frames < 1.03 * whole.inertia_
    codebook = load_codebook(tmp_path / "c.safetensors")
    assert (codebook.encoder, codebook.speaker) == ("mfcc", None)
    ids = codebook.assign(frames)
    error = (frames - codebook.centroids[ids.long()]).double().square().sum(1).mean()
    assert error.item() == pytest.approx(fit.inertia, rel=1e-5)
    assert ids.unique().numel() == fit.used == 50


def test_the_seed_makes_the_file(dataset: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(dataset, tmp_path / f"{name}.safetensors", clusters=20, seed=seed, epochs=1)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "a.safetensors").read_bytes() != (tmp_path / "c.safetensors").read_bytes()


def test_one_for_each_speaker(dataset: Path, tmp_path: Path) -> None:
    fits = make(
        dataset, tmp_path / "new" / "all.safetensors", clusters=15, per_speaker=True, epochs=1
    )
    codebooks = load_codebooks(tmp_path / "new" / "all.safetensors")
    assert [c.speaker for c in codebooks] == find_units(dataset).speakers
    assert sum(fit.frames for fit in fits) == find_units(dataset).total
    speaker = codebooks[1].speaker
    make(dataset, tmp_path / "one.safetensors", clusters=15, speaker=speaker, epochs=1)
    one = load_codebook(tmp_path / "one.safetensors")
    assert one.speaker == speaker and torch.equal(one.centroids, codebooks[1].centroids)


def test_more_clusters_than_the_careful_start_takes(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tools.codebook._MOST_SPREAD", 10)
    (fit,) = make(dataset, tmp_path / "c.safetensors", clusters=40)
    (careful,) = make(dataset, tmp_path / "d.safetensors", clusters=10, epochs=0)
    assert fit.used > 35 and fit.inertia < careful.inertia


def test_what_cannot_be_clustered_is_said(dataset: Path, tmp_path: Path) -> None:
    total = find_units(dataset).total
    with pytest.raises(
        UserError, match=f"{total} frames, too few for 32000 .* codebook.clusters={total}"
    ):
        make(dataset, tmp_path / "c.safetensors", clusters=32000)
    with pytest.raises(UserError, match=r"frames of speaker '.*', too few"):
        make(dataset, tmp_path / "c.safetensors", clusters=total // 2, per_speaker=True)
    with pytest.raises(UserError, match="name the file to write"):
        make(dataset, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["codebook.clusters=40000"], r"codebook\.clusters is 40000; .* ids have 16 bits"),
        (["codebook.epochs=-1"], r"codebook\.epochs is -1; it must be 0 or more"),
        (["codebook.seed=-1"], r"codebook\.seed is -1"),
        (["codebook.clustres=9"], r"did you mean 'codebook\.clusters'"),
        (["data.speaker=ann", "codebook.per_speaker=true"], "are both set; give one of them"),
    ],
)
def test_wrong_settings_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_settings(CodebookSettings, None, words)


def test_the_yaml_file_names_exactly_the_keys_and_defaults() -> None:
    assert_names_every_key("codebook", CodebookSettings)


def test_the_command(dataset: Path, tmp_path: Path) -> None:
    output = cantor("codebook", dataset, tmp_path / "c.safetensors", "codebook.clusters=12")
    assert "12 of 12 ids used" in output and "variance explained" in output
    assert len(load_codebook(tmp_path / "c.safetensors").centroids) == 12
    words = ("codebook", dataset, tmp_path / "d.safetensors", "data.encoder=x")
    assert "no units of 'x'" in cantor(*words, status=2)


def test_units_made_otherwise_do_not_share_centres(dataset: Path, tmp_path: Path) -> None:
    song, codes = tmp_path / "song", tmp_path / "codes.safetensors"
    cantor("extract", "--from", dataset, song, "encoder.normalize=song", "--local")
    make(song, codes, clusters=12, epochs=1)
    assert load_codebook(codes).settings == {"normalize": "song"}
    ids = (tmp_path / "ids", f"encoder.codebook={codes}", "--local")
    said = cantor("extract", "--from", dataset, *ids, status=2)
    assert "made with normalize=song, but these are made with the defaults" in said
    cantor("extract", "--from", song, *ids)
    assert verify(tmp_path / "ids").problems == []
