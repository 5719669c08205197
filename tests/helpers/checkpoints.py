"""Checkpoint files of full size, made from the rule that also made the reference vectors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from models.f0.rmvpe_checkpoint import RmvpeConfig, key_shapes

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "encoders"


def fill() -> ModuleType:
    """tests/golden/encoders/fill.py: weights from their names."""
    spec = importlib.util.spec_from_file_location("fill", GOLDEN / "fill.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights(manifest: str) -> dict[str, Tensor]:
    """State dict of a manifest in tests/golden/encoders."""
    arrays = fill().from_manifest(GOLDEN / manifest)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def write_hubert_base(path: Path) -> Path:
    """A file as fairseq's trainer writes it: 12 layers of 768, 95 M parameters, in float16."""
    stem = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
    model = {
        "encoder_layers": 12,
        "encoder_embed_dim": 768,
        "encoder_ffn_embed_dim": 3072,
        "encoder_attention_heads": 12,
        "extractor_mode": "default",
        "layer_norm_first": False,
        "conv_feature_layers": stem,
        "conv_bias": False,
        "conv_pos": 128,
        "conv_pos_groups": 16,
        "final_dim": 256,
        "activation_fn": "gelu",
    }
    half = {name: tensor.half() for name, tensor in weights("manifest_hubert_base.json").items()}
    cfg = {"model": model | {"_name": "hubert"}, "task": {"normalize": False}}
    torch.save({"args": None, "cfg": cfg, "model": half}, path)
    return path


TINY_RMVPE = RmvpeConfig(channels=2, blocks=2, inter_layers=2, hidden=6)


def rmvpe_weights(config: RmvpeConfig) -> dict[str, Tensor]:
    """State dict of an RMVPE by the rule of its reference vectors (tests/golden/rmvpe)."""
    rule = fill().fill
    state: dict[str, Tensor] = {}
    for name, shape in key_shapes(config).items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif name.endswith("running_var"):  # the same draw around 1: a variance is not negative
            state[name] = torch.from_numpy(np.abs(np.float32(1) + rule(name, shape)))
        else:
            state[name] = torch.from_numpy(rule(name, shape))
    return state


def tiny_rmvpe_weights(config: RmvpeConfig = TINY_RMVPE) -> dict[str, Tensor]:
    """The same with quieter residual blocks: by the rule alone they saturate the GRU."""
    quiet = (".conv.4.weight", ".conv.4.bias", "cnn.weight", "cnn.bias")
    state = rmvpe_weights(config)
    return {name: 0.2 * value if name.endswith(quiet) else value for name, value in state.items()}


def write_rmvpe(path: Path, config: RmvpeConfig = TINY_RMVPE) -> Path:
    """A file as the community passes rmvpe.pt around; of few channels unless `config` says more."""
    torch.save({"model": tiny_rmvpe_weights(config)}, path)
    return path
