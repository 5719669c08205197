"""Quality of a clip: clipping, silence, noise, bandwidth, pitch, and limits on all of them.

A measure is declared once, in `stages.quality.audio` or `stages.quality.pitch`. The columns of
shards, the settings of the section `quality`, the reasons in ledgers, and the report follow.
"""

from stages.quality.audio import AUDIO_MEASURES, measure_quality
from stages.quality.config import MEASURES, QualityConfig, unwanted, unwanted_pitch
from stages.quality.measure import Limit, Measure
from stages.quality.pitch import PITCH_MEASURES, measure_pitch

__all__ = [
    "AUDIO_MEASURES",
    "MEASURES",
    "PITCH_MEASURES",
    "Limit",
    "Measure",
    "QualityConfig",
    "measure_pitch",
    "measure_quality",
    "unwanted",
    "unwanted_pitch",
]
