"""Settings of f0 estimation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class F0Config:
    """How the pitch of a clip is estimated.

    f0_min, f0_max: searched range in Hz; what an estimator finds outside it counts as unvoiced.

    voicing_threshold: 0 to 1, higher means fewer voiced frames; None is the method's own default.
      praat: strength (autocorrelation) that a voiced candidate must reach in Praat's path; 0.6.
      dio, harvest: correlation of two periods around the frame with themselves one period later;
        WORLD has no such measure, and None keeps every frame that WORLD calls voiced.
      pyin: probability that the frame is voiced; None leaves the decision to the hidden Markov
        model, whose path does not follow that probability (0.1 is already strict).

    align: "sample" puts frame i at sample i * hop_length for every method. "peer" gives the numbers
      of so-vits-svc before it fills unvoiced frames (`stages.f0.peer`): its Praat contour is about
      0.8 hop late, its WORLD contours drift by one hop over a clip.

    device, checkpoint: for estimators with weights; the methods here have none.
    """

    method: Literal["praat", "dio", "harvest", "pyin"] = "praat"
    hop_length: int = 512
    f0_min: float = 50.0
    f0_max: float = 1100.0
    voicing_threshold: float | None = None
    device: str = "cpu"
    checkpoint: str | None = None
    align: Literal["sample", "peer"] = "sample"

    def __post_init__(self) -> None:
        if self.hop_length < 1:
            raise ValueError(f"f0.hop_length must be at least 1 sample, not {self.hop_length}")
        if not 0 < self.f0_min < self.f0_max:
            raise ValueError(
                f"f0.f0_min and f0.f0_max must be a rising range above 0 Hz, "
                f"not {self.f0_min} to {self.f0_max}"
            )
        if self.voicing_threshold is not None and not 0 <= self.voicing_threshold <= 1:
            raise ValueError(
                f"f0.voicing_threshold must lie between 0 and 1, not {self.voicing_threshold}"
            )
        if self.checkpoint is not None:
            raise ValueError(f"f0.checkpoint must be empty: {self.method} has no weights")
        if self.align == "peer" and self.method == "pyin":
            raise ValueError("f0.align=peer exists for praat, dio and harvest; so-vits has no pyin")
