"""k-means of more frames than fit in memory, in batches and any number of passes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.encoders.codebook import nearest


class KMeans:
    """k-means by minibatches or by whole passes (Lloyd).

    Batches are float32 CPU (N, D). Distances are computed on `device`, sums on the CPU in float64.
    `nearest` is exact, so the centres are the same on every device.

    centroids: float32 CPU (K, D).
    """

    def __init__(self, centroids: Tensor, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self._centres = centroids.double().cpu().clone()
        self._seen = torch.zeros(len(centroids), dtype=torch.int64)  # frames used by each centre
        self._refresh()
        self.start_pass()

    def _refresh(self) -> None:
        self.centroids = self._centres.float()
        self._on_device = self.centroids.to(self.device)

    def start_pass(self) -> None:
        """Reset the counts of `minibatch` and `collect`."""
        self.counts = torch.zeros(len(self.centroids), dtype=torch.int64)  # frames of each centre
        self.inertia = 0.0  # sum of the squared distances to the nearest centres
        self._sums = torch.zeros_like(self._centres)

    def minibatch(self, frames: Tensor) -> None:
        """Move the centres towards the means of their frames in a batch.

        A centre moves more slowly the more frames it has seen (Sculley 2010, algorithm 1, with one
        step per batch).
        """
        sums, counts = self._sums_of(frames)
        self.counts += counts
        self._seen += counts
        rate = counts / self._seen.clamp(min=1)  # (K,)
        mean = sums / counts.clamp(min=1)[:, None]
        self._centres += rate[:, None] * (mean - self._centres)
        self._refresh()

    def collect(self, frames: Tensor) -> None:
        """Collect a batch for `finish_lloyd` without moving the centres."""
        sums, counts = self._sums_of(frames)
        self.counts += counts
        self._sums += sums

    def finish_lloyd(self) -> None:
        """Move each centre to the mean of its frames collected since `start_pass`.

        One step of Lloyd's algorithm. A centre without frames stays.
        """
        used = self.counts > 0
        self._centres[used] = self._sums[used] / self.counts[used, None]
        self._refresh()

    def reseed(self, dead: Tensor, sample: Tensor, generator: torch.Generator) -> None:
        """Move the centres `dead` (indices) to random frames of `sample` (N, D).

        The probability of a frame is proportional to its squared distance to the nearest centre.
        """
        if len(dead) == 0:
            return
        ids = nearest(sample.to(self.device), self._on_device).cpu()
        weight = (sample.double() - self._centres[ids]).square().sum(1)
        drawn = min(len(dead), int((weight > 0).sum()))
        if drawn == 0:
            return  # every frame lies on a centre
        chosen = torch.multinomial(weight, drawn, generator=generator)
        self._centres[dead[:drawn]] = sample[chosen].double()
        self._seen[dead[:drawn]] = 0
        self._refresh()

    def _sums_of(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return sum (K, D) and number (K,) of the frames of each centre; add to the inertia."""
        ids = nearest(frames.to(self.device), self._on_device).cpu()
        wide = frames.double()
        self.inertia += float((wide - self._centres[ids]).square().sum())
        sums = torch.zeros_like(self._centres).index_add_(0, ids, wide)
        return sums, torch.bincount(ids, minlength=len(self._centres))


def kmeans_plus_plus(
    sample: Tensor, clusters: int, generator: torch.Generator, device: str | torch.device = "cpu"
) -> Tensor:
    """Choose initial centres (K, D) from `sample` by greedy k-means++.

    Each centre is the best of a few frames drawn with a probability proportional to the squared
    distance to the centres so far. sample: float32 (N, D), N >= clusters.
    Source: Arthur and Vassilvitskii (2007).

    Raises: ValueError: when there are fewer frames than clusters.
    """
    if len(sample) < clusters:
        raise ValueError(f"{len(sample)} frames are too few for {clusters} centres")
    trials = 2 + int(math.log(clusters))
    frames = sample.to(device)
    frames = frames - frames.mean(0)
    squares = frames.square().sum(1)

    def squared_distances(to: Tensor) -> Tensor:  # (T,) indices -> (N, T)
        cross = frames @ frames[to].T
        return (squares[:, None] - 2 * cross + squares[to][None, :]).clamp_(min=0)

    first = torch.randint(len(sample), (1,), generator=generator)
    chosen = [int(first)]
    closest = squared_distances(first.to(frames.device)).squeeze(1)  # (N,)
    closest[chosen[0]] = 0
    for _ in range(clusters - 1):
        reach = closest.double().cpu().cumsum(0)
        draws = torch.rand(trials, generator=generator, dtype=torch.float64) * reach[-1]
        tried = torch.searchsorted(reach, draws, right=True).clamp_(max=len(sample) - 1)
        after = torch.minimum(squared_distances(tried.to(frames.device)), closest[:, None])
        best = int(after.double().sum(0).argmin())
        chosen.append(int(tried[best]))
        closest = after[:, best].contiguous()
        closest[chosen[-1]] = 0
    return sample[torch.tensor(chosen)].clone()
