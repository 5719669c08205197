"""k-means by batches against scikit-learn's, and on data with known clusters."""

from __future__ import annotations

import pytest
import torch
from sklearn.cluster import KMeans as WholeKMeans
from torch import Tensor

from models.encoders.kmeans import KMeans, kmeans_plus_plus


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fit(frames: Tensor, clusters: int, epochs: int = 3, batch: int = 1024) -> KMeans:
    generator = seeded()
    kmeans = KMeans(kmeans_plus_plus(frames[::4], clusters, generator))
    for _ in range(epochs):
        kmeans.start_pass()
        for rows in torch.split(torch.randperm(len(frames), generator=generator), batch):
            kmeans.minibatch(frames[rows])
    kmeans.start_pass()
    kmeans.collect(frames)
    kmeans.finish_lloyd()
    kmeans.start_pass()
    kmeans.collect(frames)
    return kmeans


def test_inertia_is_near_that_of_the_whole_algorithm() -> None:
    """On frames without clear clusters, where the two may well end in different places."""
    mixing = torch.randn(20, 20, generator=seeded(1))
    frames = torch.randn(20000, 20, generator=seeded(2)) @ mixing
    whole = WholeKMeans(64, n_init=1, random_state=0).fit(frames.numpy())
    assert fit(frames, 64).inertia < 1.02 * whole.inertia_


def test_well_separated_clusters_are_found() -> None:
    centres = 20 * torch.randn(40, 16, generator=seeded(3))
    truth = torch.randint(40, (12000,), generator=seeded(4))
    frames = centres[truth] + torch.randn(12000, 16, generator=seeded(5))
    kmeans = fit(frames, 40)
    distance = torch.cdist(centres, kmeans.centroids)
    assert sorted(distance.argmin(1).tolist()) == list(range(40))  # each centre once
    assert distance.min(1).values.max() < 0.5
    assert kmeans.inertia / len(frames) == pytest.approx(16, rel=0.02)  # the noise alone


def test_kmeans_plus_plus_starts_in_every_cluster() -> None:
    centres = 100 * torch.randn(30, 8, generator=seeded(6))
    frames = centres.repeat_interleave(50, 0) + torch.randn(1500, 8, generator=seeded(7))
    first = kmeans_plus_plus(frames, 30, seeded(8))
    assert torch.cdist(first, centres).argmin(1).unique().numel() == 30
    assert torch.equal(first, kmeans_plus_plus(frames, 30, seeded(8)))


def test_a_pass_of_lloyd_is_that_of_scikit_learn() -> None:
    frames = torch.randn(3000, 12, generator=seeded(9))
    first = frames[:20].clone()
    kmeans = KMeans(first)
    for block in frames.split(700):  # in batches of any size
        kmeans.collect(block)
    kmeans.finish_lloyd()
    whole = WholeKMeans(20, init=first.numpy(), n_init=1, max_iter=1, algorithm="lloyd")
    whole.fit(frames.numpy())
    assert torch.allclose(kmeans.centroids, torch.from_numpy(whole.cluster_centers_), atol=1e-5)


def test_a_minibatch_moves_a_centre_by_what_it_has_seen() -> None:
    kmeans = KMeans(torch.tensor([[0.0], [100.0]]))
    kmeans.minibatch(torch.tensor([[1.0], [3.0]]))
    assert kmeans.centroids.tolist() == [[2.0], [100.0]]  # first: all the way to the mean
    kmeans.minibatch(torch.tensor([[5.0], [6.0]]))
    assert kmeans.centroids.tolist() == [[3.75], [100.0]]  # then by 2 of 4
    assert kmeans.counts.tolist() == [4, 0]


def test_dead_centres_are_put_where_frames_are_far_from_any() -> None:
    frames = torch.cat([torch.zeros(50, 2), torch.full((50, 2), 9.0)])
    kmeans = KMeans(torch.tensor([[0.0, 0.0], [-50.0, 0.0]]))
    kmeans.minibatch(frames[:50])
    kmeans.reseed(torch.tensor([1]), frames, seeded())
    assert kmeans.centroids[1].tolist() == [9.0, 9.0]
    kmeans.reseed(torch.tensor([0]), frames, seeded())  # nothing is far: it stays
    assert kmeans.centroids[0].tolist() == [0.0, 0.0]


def test_frames_that_are_all_alike_are_no_trouble() -> None:
    frames = torch.ones(100, 3)
    kmeans = KMeans(kmeans_plus_plus(frames, 4, seeded()))
    kmeans.minibatch(frames)
    assert kmeans.inertia == 0.0
    with pytest.raises(ValueError, match="too few for 101"):
        kmeans_plus_plus(frames, 101, seeded())
