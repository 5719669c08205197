"""Viterbi decoding of the most likely path through pitch bins.

The model is torchcrepe's (`torchcrepe.decode.viterbi`): the probability of a move by d bins is
proportional to 12 - |d|, and the probability of a bin is the softmax of salience. Near the ends of
the scale torchcrepe renormalises the remaining moves, which attracts weak pitches; here they are
not renormalised. From 36 to 1766 Hz the two agree.

Tested by tests/models/f0/test_crepe.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_REACH = 11  # largest move in bins from one frame to the next


def likeliest_path(salience: NDArray[np.floating], first: int, last: int) -> NDArray[np.int64]:
    """Return the bin of each frame, (F,) within [first, last).

    salience: (F, K); only the bins in [first, last) are used, at least one. On a tie the lowest bin
    wins.
    """
    scores = _log_softmax(salience[:, first:last])
    frames, bins = scores.shape
    path = np.empty(frames, dtype=np.int64)
    if frames == 0:
        return path
    weight = _REACH + 1.0 - np.abs(np.arange(-_REACH, _REACH + 1))
    moves = np.log(weight / weight.sum())[:, None]
    # The scores of a frame are padded with unreachable bins, so that row m of `reached` has, for
    # each bin, the score of the bin m - reach away.
    padded = np.full(bins + 2 * _REACH, -np.inf)
    best = padded[_REACH : _REACH + bins]
    reached = np.lib.stride_tricks.sliding_window_view(padded, bins)  # (2 * reach + 1, bins)
    so_far = np.empty_like(scores)
    paths = np.empty(reached.shape)
    best[:] = scores[0]
    for i in range(1, frames):
        so_far[i - 1] = best
        np.add(reached, moves, out=paths)
        np.maximum.reduce(paths, axis=0, out=best)
        best += scores[i]
    path[-1] = best.argmax()
    for i in range(frames - 1, 0, -1):
        best[:] = so_far[i - 1]
        path[i - 1] = path[i] - _REACH + (reached[:, path[i]] + moves[:, 0]).argmax()
    return path + first


def _log_softmax(salience: NDArray[np.floating]) -> NDArray[np.float64]:
    shifted = salience.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
