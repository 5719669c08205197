"""The likeliest path through bins of pitch, frame by frame.

The model is torchcrepe's (`torchcrepe.decode.viterbi`): the chance to move by d bins falls in
proportion to 12 - |d|, and what a frame says of its bins is the softmax of their salience. Near the
ends of the scale torchcrepe makes the moves that are left likelier, so that a weak pitch is taken
for one there; here they stay as they are. From 36 to 1766 Hz the two agree.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_REACH = 11  # bins that the pitch moves at most from one frame to the next


def likeliest_path(salience: NDArray[np.floating], first: int, last: int) -> NDArray[np.int64]:
    """The bin of each frame: (F,) within [first, last).

    salience: (F, K); only the bins in [first, last), of which there must be one, are looked at. Of
    equally likely bins the lowest one counts.
    """
    scores = _log_softmax(salience[:, first:last])
    frames, bins = scores.shape
    path = np.empty(frames, dtype=np.int64)
    if frames == 0:
        return path
    weight = _REACH + 1.0 - np.abs(np.arange(-_REACH, _REACH + 1))
    moves = np.log(weight / weight.sum())[:, None]
    # Around the scores of a frame lie bins that no path reaches, so that row m of `reached` is, for
    # each bin, the score of the one m - reach away from it.
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
