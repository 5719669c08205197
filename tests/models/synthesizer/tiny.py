"""The small synthesizers of the reference vectors."""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import Tensor

from models.synthesizer.batch import Batch
from models.synthesizer.config import MelConfig, SynthesizerConfig

MEL = MelConfig(n_fft=256, win_length=256, n_mels=20, f_min=0.0, f_max=22050.0)
VARIANTS = (
    "base",
    "transflow",
    "share",
    "transflow_share",
    "depthwise",
    "snake",
    "vol",
    "noautof0",
    "resblock2",
    "oddrates",
)


def config_of(reference: dict[str, np.ndarray]) -> SynthesizerConfig:
    """The configuration that the arrays of svc_tiny_* and svc_train3_* were made with."""
    peer = json.loads(str(reference["config_json"]))
    transformer = peer["use_transformer_flow"]
    return SynthesizerConfig(
        units_dim=peer["ssl_dim"],
        n_speakers=peer["n_speakers"],
        source_rate=peer["sampling_rate"],
        n_fft=2 * (peer["spec_channels"] - 1),
        inter_channels=peer["inter_channels"],
        hidden_channels=peer["hidden_channels"],
        filter_channels=peer["filter_channels"],
        n_heads=peer["n_heads"],
        n_layers=peer["n_layers"],
        kernel_size=peer["kernel_size"],
        dropout=peer["p_dropout"],
        decoder=peer["vocoder_name"],
        resblock=peer["resblock"],
        resblock_kernel_sizes=tuple(peer["resblock_kernel_sizes"]),
        resblock_dilation_sizes=tuple(map(tuple, peer["resblock_dilation_sizes"])),
        upsample_rates=tuple(peer["upsample_rates"]),
        upsample_initial_channel=peer["upsample_initial_channel"],
        upsample_kernel_sizes=tuple(peer["upsample_kernel_sizes"]),
        gin_channels=peer["gin_channels"],
        flow="transformer" if transformer else "residual",
        n_flows=peer["n_flow_layer"] if transformer else 4,
        n_flow_layers=peer["n_layers_trans_flow" if transformer else "n_flow_layer"],
        share_flow=peer["flow_share_parameter"],
        depthwise_conv=peer["use_depthwise_conv"],
        predict_f0=peer["use_automatic_f0_prediction"],
        volume_embedding=peer["vol_embedding"],
    )


def batch_of(reference: dict[str, np.ndarray]) -> Batch:
    """The inputs `in/*`."""

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(reference[f"in/{name}"])

    count = len(reference["in/c"])
    return Batch(
        clip_ids=tuple(f"song#{i:06d}" for i in range(count)),
        units=tensor("c"),
        f0=tensor("f0"),
        voiced=tensor("uv"),
        volume=tensor("vol"),
        wav=tensor("y").squeeze(1),
        speaker=tensor("spk").squeeze(1),
        lengths=tensor("lengths"),
        noise_keys=tuple(range(count)),
    )
