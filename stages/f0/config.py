"""Settings of f0 estimation."""

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
_ENSEMBLE = ("crepe-tiny", "dio", "fcpe")  # docs/f0.md says why
_PEERS = ("praat", "dio", "harvest", "crepe", "fcpe", "rmvpe")  # what so-vits-svc has too


@dataclass(frozen=True, kw_only=True)
class F0Config(PostConfig):
    """How the pitch of a clip is estimated, and what is done to it afterwards.

    f0_min, f0_max: searched range in Hz; what an estimator finds outside it counts as unvoiced.

    voicing_threshold: 0 to 1, higher means fewer voiced frames; None is the method's own default.
      praat, praat-cc: strength (correlation) that a voiced candidate must reach in Praat's path;
        0.6.
      dio, harvest: correlation of two periods around the frame with themselves one period later;
        WORLD has no such measure, and None keeps every frame that WORLD calls voiced.
      pyin: probability that the frame is voiced; None leaves the decision to the hidden Markov
        model, whose path does not follow that probability (0.1 is already strict).
      crepe, crepe-tiny: the network's activation on the path that it takes; 0.5.
      fcpe, rmvpe: the network's largest activation of the frame; 0.3 and 0.03. torchfcpe's own
        0.006 voices a quarter of what is unvoiced in real singing.
      crepe, fcpe, rmvpe with align=peer: so-vits-svc's 0.05.
      ensemble: every method of `ensemble` keeps its own default; None is the only choice.

    device: of the networks; "auto" is CUDA where there is any.

    checkpoint: file of weights of rmvpe, alone or in an ensemble; the other networks' weights come
      with their packages.

    ensemble: the methods whose contours the method "ensemble" combines; None is crepe-tiny, dio and
      fcpe with that method, and the only choice with others.

    crepe_hop_ms: crepe and crepe-tiny look at the clip this often; None: at every frame.

    align: "sample" puts frame i at sample i * hop_length for every method. "peer" gives the numbers
      of so-vits-svc before it fills unvoiced frames (`stages.f0.sovits_compat`): its Praat contour
      is about 0.8 hop late, its WORLD contours drift by one hop over a clip.
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
            raise ValueError(f"f0.checkpoint must be empty: {self.method} reads no file of weights")
        if self.checkpoint is None and "rmvpe" in self.members:
            raise ValueError(
                "f0.checkpoint must name a file of RMVPE's weights (rmvpe.pt or rmvpe.onnx); none "
                "comes with this program"
            )
        if self.crepe_hop_ms is not None:
            if not 1 <= self.crepe_hop_ms <= 1000:
                raise ValueError(
                    f"f0.crepe_hop_ms must lie between 1 and 1000 ms, not {self.crepe_hop_ms}"
                )
            if not {"crepe", "crepe-tiny"} & set(self.members):
                raise ValueError(f"f0.crepe_hop_ms must be empty: {self.method} is not crepe")
        if self.align == "peer" and self.crepe_hop_ms is not None:
            raise ValueError("f0.crepe_hop_ms must be empty with f0.align=peer, which has its own")
        if self.align == "peer" and self.method not in _PEERS:
            names = ", ".join(_PEERS)
            raise ValueError(f"f0.align=peer exists for {names}; so-vits has no {self.method}")

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
                raise ValueError(f"f0.ensemble names '{name}'; it may name {', '.join(METHODS)}")
        if len(members) < 2 or len(set(members)) < len(members):
            raise ValueError(
                f"f0.ensemble must name two methods or more, each once, not {list(members)}"
            )
        if self.voicing_threshold is not None:
            raise ValueError("f0.voicing_threshold must be empty: an ensemble has a vote in place")

    @property
    def members(self) -> tuple[str, ...]:
        """The methods that run."""
        return (self.method,) if self.ensemble is None else self.ensemble

    @property
    def networks(self) -> tuple[str, ...]:
        """Those of them that are networks, which a GPU makes quicker."""
        return tuple(name for name in self.members if name in NETWORKS)
