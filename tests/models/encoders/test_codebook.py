"""Codebooks: the nearest centre exactly, and the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoint import CheckpointError
from models.encoders.codebook import Codebook, load_codebook, load_codebooks, save_codebooks


def random_codebook(clusters: int = 300, dim: int = 64, speaker: str | None = None) -> Codebook:
    generator = torch.Generator().manual_seed(clusters)
    return Codebook("mfcc", None, torch.randn(clusters, dim, generator=generator), speaker)


def brute_force(units: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    distance = (units.double()[:, None] - centroids.double()[None]).square().sum(-1)
    return distance.argmin(1).to(torch.int16)


def test_ids_are_those_of_the_nearest_centres() -> None:
    codebook = random_codebook()
    units = torch.randn(2000, 64)
    ids = codebook.assign(units)
    assert ids.dtype == torch.int16
    assert torch.equal(ids, brute_force(units, codebook.centroids))


def test_ids_are_exact_where_float32_products_cannot_tell() -> None:
    """Centres far from the origin, closer together than the products round."""
    torch.manual_seed(0)
    centroids = 1000 + 1e-3 * torch.randn(50, 32)
    units = 1000 + 1e-3 * torch.randn(500, 32)
    expected = brute_force(units, centroids)
    product = units @ centroids.T - centroids.square().sum(1) / 2
    assert (product.argmax(1) != expected).any()  # what one would compute without care
    assert torch.equal(Codebook("mfcc", None, centroids).assign(units), expected)


def test_of_equal_centres_the_lowest_counts() -> None:
    centroids = torch.randn(7, 16).repeat(5, 1)
    units = torch.randn(400, 16)
    assert Codebook("mfcc", None, centroids).assign(units).max() < 7
    midway = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    assert Codebook("mfcc", None, midway).assign(torch.zeros(3, 2)).tolist() == [0, 0, 0]


def test_a_frame_has_the_same_id_whatever_it_comes_with() -> None:
    codebook = random_codebook(64, 768)
    units = torch.randn(257, 768)
    alone = torch.cat([codebook.assign(frame[None]) for frame in units])
    assert torch.equal(alone, codebook.assign(units))
    assert len(codebook.assign(units[:0])) == 0
    assert torch.equal(codebook.assign(units.half()), codebook.assign(units.half().float()))


def test_units_that_do_not_fit_are_refused() -> None:
    codebook = random_codebook()
    with pytest.raises(ValueError, match=r"\(F, 64\)"):
        codebook.assign(torch.zeros(3, 65))
    with pytest.raises(ValueError, match="NaN or infinity"):
        codebook.assign(torch.full((1, 64), float("nan")))


@pytest.mark.parametrize(
    ("centroids", "said"),
    [
        (torch.zeros(0, 4), "1 to 32767"),
        (torch.zeros(32768, 1), "1 to 32767"),
        (torch.zeros(4), r"not \(K, D\)"),
        (torch.zeros(4, 4, dtype=torch.float64), r"not \(K, D\)"),
        (torch.full((2, 2), float("inf")), "NaN or infinity"),
    ],
)
def test_what_is_no_codebook_is_not_made(centroids: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Codebook("mfcc", None, centroids)


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    whole = Codebook("contentvec768l12", "ab" * 32, torch.randn(5, 8))
    save_codebooks(tmp_path / "one.safetensors", [whole], {"seed": "3"})
    back = load_codebook(tmp_path / "one.safetensors")
    assert (back.encoder, back.checkpoint_sha256, back.speaker) == (
        "contentvec768l12",
        "ab" * 32,
        None,
    )
    assert torch.equal(back.centroids, whole.centroids)

    voices = [random_codebook(4, speaker="ann"), random_codebook(6, speaker="Bø/b")]
    save_codebooks(tmp_path / "two.safetensors", voices)
    assert [c.speaker for c in load_codebooks(tmp_path / "two.safetensors")] == ["ann", "Bø/b"]
    assert len(load_codebook(tmp_path / "two.safetensors", "Bø/b").centroids) == 6
    with pytest.raises(CheckpointError, match="codebooks of 2 speakers; name one"):
        load_codebook(tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match="no codebook of 'eve'; it has that of ann"):
        load_codebook(tmp_path / "two.safetensors", "eve")


def test_a_file_is_of_one_encoder_and_names_a_speaker_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one encoder"):
        save_codebooks(tmp_path / "x", [random_codebook(3, 4), random_codebook(3, 5)])
    with pytest.raises(ValueError, match="same speaker"):
        save_codebooks(tmp_path / "x", [random_codebook(3), random_codebook(4)])
    assert not (tmp_path / "x").exists()


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is not a codebook"):
        load_codebook(tmp_path / "weights.safetensors")
    save_file(
        {"a": torch.zeros(2)},
        tmp_path / "torn.safetensors",
        {"cantor-codebook": '{"encoder": "mfcc", "speakers": [null]}'},
    )
    with pytest.raises(CheckpointError, match=r"torn\.safetensors is a damaged codebook"):
        load_codebook(tmp_path / "torn.safetensors")
