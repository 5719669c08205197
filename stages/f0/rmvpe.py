"""RMVPE (`models.f0.rmvpe`) with the weights of `F0Config.checkpoint`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stages.f0.config import F0Config
from stages.f0.networks import at_16k, every_10_ms, network
from stages.frames import Track
from stages.types import Array

if TYPE_CHECKING:
    from models.f0.rmvpe import Rmvpe

_DEFAULT_VOICING = 0.03  # from the paper's code


def rmvpe(wavs: Sequence[Array], sample_rate: int, cfg: F0Config) -> Iterable[Track]:
    """Estimate f0 of each clip: Hz and sample positions.

    Raises: ValueError: when the file does not have RMVPE's weights or cannot run on `cfg.device`.
    """
    return every_10_ms(rmvpe_frames(wavs, sample_rate, cfg, _DEFAULT_VOICING), sample_rate)


def rmvpe_frames(
    wavs: Sequence[Array], sample_rate: int, cfg: F0Config, default_voicing: float
) -> list[NDArray[np.float64]]:
    """Estimate f0 in Hz every 10 ms, 0 = unvoiced, of each clip."""
    import torch

    from models.f0.rmvpe import decode_rmvpe

    rmvpe: Rmvpe = network("rmvpe", cfg)
    threshold = default_voicing if cfg.voicing_threshold is None else cfg.voicing_threshold
    wavs_16k = at_16k(wavs, sample_rate)
    saliences = rmvpe.salience(
        [torch.from_numpy(np.require(wav, np.float32, "W")) for wav in wavs_16k]
    )
    return [decode_rmvpe(salience, threshold).numpy() for salience in saliences]
