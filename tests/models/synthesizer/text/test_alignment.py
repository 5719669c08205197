"""Alignment of symbols and frames: Bert-VITS2's paths, exactly, and the best of all paths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from models.synthesizer.text.alignment import log_likelihood, monotonic_path, path_of_durations
from tests.models.synthesizer.conftest import Reference


@pytest.fixture
def pieces(reference: Reference) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in reference("bv2_pieces").items()}


@pytest.mark.parametrize("case", ["mas0", "mas1", "mas2"])
def test_the_references_paths(case: str, pieces: dict[str, Tensor]) -> None:
    mask = pieces[f"{case}/mask"]
    symbols, frames = mask[:, 0].sum(1).long(), mask[:, :, 0].sum(1).long()
    path = monotonic_path(pieces[f"{case}/neg_cent"], symbols, frames)
    assert torch.equal(path, pieces[f"{case}/path"])


def test_of_equal_ways_the_one_that_stays(pieces: dict[str, Tensor]) -> None:
    path = monotonic_path(torch.zeros(1, 10, 4), torch.tensor([4]), torch.tensor([10]))
    assert torch.equal(path, pieces["mas_tie/path"])


def best_path(score: np.ndarray) -> np.ndarray:
    """The best of all paths, by trying every one of them."""
    frames, symbols = score.shape
    best, found = -np.inf, np.zeros_like(score)
    for inner in itertools.combinations(range(1, frames), symbols - 1):
        ends = np.array([0, *inner, frames])
        path = np.repeat(np.eye(symbols), np.diff(ends), axis=0)
        if (score * path).sum() > best:
            best, found = (score * path).sum(), path
    return found


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_the_best_of_all_paths(scale: float) -> None:
    generator = torch.Generator().manual_seed(4)
    symbols, frames = torch.tensor([1, 2, 3, 5, 5]), torch.tensor([1, 6, 8, 5, 8])
    score = scale * torch.randn(5, 8, 5, generator=generator, dtype=torch.float64).float()
    path = monotonic_path(score, symbols, frames)
    for i, (n, f) in enumerate(zip(symbols.tolist(), frames.tolist(), strict=True)):
        np.testing.assert_array_equal(path[i, :f, :n].numpy(), best_path(score[i, :f, :n].numpy()))
        assert path[i].sum() == f, "padding is on no path"


def test_a_hopeless_score_gives_a_path_all_the_same() -> None:
    path = monotonic_path(torch.full((1, 6, 6), -1e12), torch.tensor([6]), torch.tensor([6]))
    assert torch.equal(path[0], torch.eye(6))


def test_the_scores_are_not_written_to() -> None:
    score = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(5))
    before = score.clone()
    monotonic_path(score, torch.tensor([4, 2]), torch.tensor([9, 3]))
    assert torch.equal(score, before)


@pytest.mark.parametrize(
    "symbols, frames, says",
    [
        (4, 3, "4 symbols do not fit into 3 frames"),
        (0, 3, "0 symbols and 3 frames, but scores for 1 to 4"),
        (4, 10, "4 symbols and 10 frames, but scores for 1 to 4 symbols and 9 frames"),
        (5, 9, "5 symbols and 9 frames, but scores for 1 to 4"),
    ],
)
def test_refuses_what_has_no_path(symbols: int, frames: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        monotonic_path(torch.zeros(2, 9, 4), torch.tensor([2, symbols]), torch.tensor([9, frames]))


def test_the_likelihood_is_that_of_the_normal_distribution() -> None:
    generator = torch.Generator().manual_seed(6)

    def draw(last: int) -> Tensor:
        return torch.randn(2, 5, last, generator=generator, dtype=torch.float64)

    z, mean, log_std = draw(7), draw(3), draw(3)
    found = log_likelihood(z, mean, log_std)
    each = torch.distributions.Normal(mean.unsqueeze(2), log_std.exp().unsqueeze(2))
    expected = each.log_prob(z.unsqueeze(3)).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)


def test_the_likelihood_of_half_precision_is_found_in_float32() -> None:
    generator = torch.Generator().manual_seed(6)
    halved = [torch.randn(2, 5, n, generator=generator).bfloat16() for n in (7, 3, 3)]
    with torch.autocast("cpu", torch.bfloat16):
        found = log_likelihood(*halved)
    assert torch.equal(found, log_likelihood(*(part.float() for part in halved)))


def test_the_references_path_of_durations(reference: Reference) -> None:
    arrays = reference("svc_functions")
    durations = torch.from_numpy(arrays["generate_path/dur"]).squeeze(1)
    mask = torch.from_numpy(arrays["generate_path/mask"]).squeeze(1)
    path = path_of_durations(durations, mask.shape[1]) * mask
    np.testing.assert_array_equal(path.numpy(), arrays["generate_path/out"][:, 0])


def test_durations_of_a_path_give_the_path() -> None:
    score = torch.randn(1, 20, 6, generator=torch.Generator().manual_seed(7))
    path = monotonic_path(score, torch.tensor([6]), torch.tensor([20]))
    assert torch.equal(path_of_durations(path.sum(1), 20), path)


def test_durations_add_up_exactly_in_half_precision() -> None:
    durations = torch.tensor([[255.0, 4.0, 300.0]], dtype=torch.bfloat16)
    path = path_of_durations(durations, 559)
    assert path.long().sum(1).tolist() == [[255, 4, 300]]
