"""Settings of f0 estimation.

Tested by tests/stages/f0/test_estimate.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stages.f0.post import PostConfig

# Method name -> "module:function". A module is imported when its method first runs, so that DSP
# methods never wait for torch. To add a method, write its module and add its line here.
METHODS: dict[str, str] = {
    "praat": "stages.f0.praat:praat",
    "praat-cc": "stages.f0.praat:praat_cc",
    "dio": "stages.f0.world:dio",
    "harvest": "stages.f0.world:harvest",
    "pyin": "stages.f0.pyin:pyin",
    "crepe": "stages.f0.crepe:crepe",
    "crepe-tiny": "stages.f0.crepe:crepe_tiny",
    "fcpe": "stages.f0.fcpe:fcpe",
    "rmvpe": "stages.f0.rmvpe:rmvpe",
}
NETWORKS = ("crepe", "crepe-tiny", "fcpe", "rmvpe")  # they take all clips at once, in batches
_ENSEMBLE = ("crepe-tiny", "dio", "fcpe")  # reasons in docs/f0.md
_SOVITS_METHODS = ("praat", "dio", "harvest", "crepe", "fcpe", "rmvpe")  # also in so-vits-svc


@dataclass(frozen=True, kw_only=True)
class F0Config(PostConfig):
    """Settings of f0 estimation and of the post-processing of a contour.

    f0_min, f0_max: search range in Hz; values outside it count as unvoiced.

    voicing_threshold: 0 to 1, higher means fewer voiced frames; None is the method's own default.
      praat, praat-cc: strength (correlation) that a voiced candidate must reach in Praat's path;
        0.6.
      dio, harvest: correlation of two periods around the frame with the signal one period later;
        WORLD has no such measure, and None keeps every frame that WORLD calls voiced.
      pyin: probability that the frame is voiced; None leaves the decision to the hidden Markov
        model, whose path does not follow that probability (0.1 is already strict).
      crepe, crepe-tiny: the network's activation along the decoded path; 0.5.
      fcpe, rmvpe: the network's largest activation in the frame; 0.3 and 0.03. torchfcpe's own
        0.006 marks a quarter of the unvoiced frames of real singing as voiced.
      crepe, fcpe, rmvpe with align=peer: so-vits-svc's 0.05.
      ensemble: every method of `ensemble` keeps its own default; only None is allowed.

    device: device of the networks; "auto" is CUDA where available.

    checkpoint: weights file of rmvpe, alone or in an ensemble; the other networks' weights come
      with their packages.

    ensemble: the methods that the method "ensemble" combines; None means crepe-tiny, dio and fcpe.
      Must be None with any other method.

    crepe_hop_ms: hop of crepe and crepe-tiny; None: the frame clock.

    align: "sample" puts frame i at sample i * hop_length for every method. "peer" reproduces
      so-vits-svc's values before it fills unvoiced frames (`stages.f0.sovits_compat`): its Praat
      contour is about 0.8 hop late, its WORLD contours drift by one hop over a clip.
    """

    method: str = "fcpe"  # a name of METHODS, or "ensemble"
    hop_length: int = 512
    f0_min: float = 50.0
    f0_max: float = 1100.0
    voicing_threshold: float | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint: str | None = None
    ensemble: tuple[str, ...] | None = None
    crepe_hop_ms: float | None = None
    align: Literal["sample", "peer"] = "sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in (*METHODS, "ensemble"):
            raise ValueError(
                f"f0.method is '{self.method}'; choose one of {', '.join((*METHODS, 'ensemble'))}"
            )
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
        self._settle_ensemble()
        if self.checkpoint is not None and "rmvpe" not in self.members:
            raise ValueError(f"f0.checkpoint must be empty: {self.method} has no weights file")
        if self.checkpoint is None and "rmvpe" in self.members:
            raise ValueError(
                "f0.checkpoint must name RMVPE's weights (rmvpe.pt or rmvpe.onnx); they do not "
                "come with Cantor. See docs/f0.md"
            )
        if self.crepe_hop_ms is not None:
            if not 1 <= self.crepe_hop_ms <= 1000:
                raise ValueError(
                    f"f0.crepe_hop_ms must lie between 1 and 1000 ms, not {self.crepe_hop_ms}"
                )
            if not {"crepe", "crepe-tiny"} & set(self.members):
                raise ValueError(f"f0.crepe_hop_ms must be empty: {self.method} is not crepe")
        if self.align == "peer" and self.crepe_hop_ms is not None:
            raise ValueError("f0.crepe_hop_ms must be empty with f0.align=peer")
        if self.align == "peer" and self.method not in _SOVITS_METHODS:
            names = ", ".join(_SOVITS_METHODS)
            raise ValueError(
                f"f0.align=peer supports {names}; so-vits-svc does not have {self.method}"
            )

    def _settle_ensemble(self) -> None:
        if self.method != "ensemble":
            if self.ensemble is not None:
                raise ValueError(
                    f"f0.ensemble must be empty with f0.method={self.method}; "
                    "set f0.method=ensemble"
                )
            return
        members = _ENSEMBLE if self.ensemble is None else tuple(self.ensemble)
        object.__setattr__(self, "ensemble", members)
        for name in members:
            if name not in METHODS:
                raise ValueError(f"f0.ensemble has '{name}'; choose from {', '.join(METHODS)}")
        if len(members) < 2 or len(set(members)) < len(members):
            raise ValueError(
                f"f0.ensemble must list two or more different methods, not {list(members)}"
            )
        if self.voicing_threshold is not None:
            raise ValueError(
                "f0.voicing_threshold must be empty with f0.method=ensemble, which votes instead"
            )

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the methods that run."""
        return (self.method,) if self.ensemble is None else self.ensemble

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the methods that are networks, which a GPU speeds up."""
        return tuple(name for name in self.members if name in NETWORKS)
