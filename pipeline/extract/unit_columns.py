"""The columns that encoders fill: units, or their ids in a codebook, and x-vectors."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from models.encoders import load_encoder
from pipeline.cluster.device import choose_device
from pipeline.dataset.decoded_clips import DecodedClips
from pipeline.dataset.schema import XVECTOR_COLUMN, EncoderIdentity, XvectorIdentity
from pipeline.errors import SongBug
from pipeline.extract.config import ExtractConfig
from pipeline.extract.model_checks import load_codebook_of, name_setting_while_loading
from pipeline.storage.weight_files import WeightFile, require_unchanged
from stages.chain import StageClock
from stages.types import Array
from stages.units import EncoderConfig, encode_units, pack_ids, pack_units
from stages.xvector import XvectorConfig, embed_clips


class UnitColumns:
    """An encoder, loaded, and the two columns that it fills."""

    def __init__(self, section: str, cfg: EncoderConfig, weights: Mapping[str, WeightFile]) -> None:
        """Load the encoder of a section of the settings.

        Raises: UserError: when its weights changed since the run began, or do not load.
        """
        self.cfg = cfg
        sha256 = _sha256_unchanged(f"{section}.checkpoint", weights)
        codebook_sha256 = _sha256_unchanged(f"{section}.codebook", weights)
        self.codebook = load_codebook_of(section, cfg, sha256)
        device = choose_device(cfg.device, f"{section}.device")
        with name_setting_while_loading(section):
            self.encoder = load_encoder(cfg.name, cfg.checkpoint, device, **cfg.options())
        rate = self.encoder.sample_rate / self.encoder.hop_length
        if self.codebook is None:
            dim = self.encoder.dim
            self.identity = EncoderIdentity(cfg.name, dim, "float16", rate, sha256)
        else:
            size = len(self.codebook.centroids)
            self.identity = EncoderIdentity(
                cfg.name, 1, "int16", rate, sha256, codebook_sha256, size
            )

    def add(self, clips: pa.Table, config: ExtractConfig, clock: StageClock) -> pa.Table:
        """Return `clips` with the units of each and their number of frames."""
        wavs = DecodedClips(clips["audio"], config.audio.subtype)
        songs = clips["song_id"].to_pylist()
        rate = config.audio.sample_rate
        with clock.stage("units"):
            units = encode_units(wavs, songs, rate, self.encoder, self.cfg, config.resample)
            packed = []
            for clip_id, frames in zip(clips["clip_id"].to_pylist(), units, strict=True):
                try:
                    packed.append(self._pack(frames))
                except OverflowError as error:
                    raise SongBug(f"{clip_id}: {error}") from error
        counts = pa.array([len(frames) for frames in units], pa.int32())
        clips = clips.append_column(self.identity.column, pa.array(packed, pa.binary()))
        return clips.append_column(self.identity.frames_column, counts)

    def _pack(self, units: Array) -> bytes:
        if self.codebook is None:
            return pack_units(units)
        import torch

        return pack_ids(self.codebook.assign(torch.from_numpy(units)).numpy())


class XvectorColumn:
    """The network of x-vectors, loaded, and the column that it fills."""

    def __init__(self, cfg: XvectorConfig, weights: Mapping[str, WeightFile]) -> None:
        """Load the network.

        Raises: UserError: when its weights changed since the run began, or do not load.
        """
        from models.encoders.xvector import load_xvector

        sha256 = _sha256_unchanged("xvector.checkpoint", weights)
        assert cfg.checkpoint is not None and sha256 is not None
        device = choose_device(cfg.device, "xvector.device")
        with name_setting_while_loading("xvector"):
            self.model = load_xvector(cfg.checkpoint, device)
        self.identity = XvectorIdentity(self.model.dim, sha256)

    def add(self, clips: pa.Table, config: ExtractConfig, clock: StageClock) -> pa.Table:
        """Return `clips` with the x-vector of each."""
        wavs = DecodedClips(clips["audio"], config.audio.subtype)
        rate = config.audio.sample_rate
        with clock.stage("xvector"):
            vectors = embed_clips(wavs, rate, self.model, config.resample)
        return clips.append_column(XVECTOR_COLUMN, pa.array(vectors, pa.list_(pa.float32())))


def _sha256_unchanged(key: str, weights: Mapping[str, WeightFile]) -> str | None:
    if key not in weights:
        return None
    require_unchanged(key, weights[key])
    return weights[key].sha256
