"""Files in so-vits-svc's format, with the weights of the small synthesizers."""

from __future__ import annotations

import functools
import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.synthesizer.blocks.snake import Snake
from tests.golden.synthesizers.fill import fill_state

GOLDEN = Path(__file__).parents[2] / "golden" / "synthesizers"


@functools.cache
def manifest(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))


def state_dict(keys: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a manifest's `keys`, in order, tensors of several names being one.

    The filters of anti-aliasing, which are not filled, are as they are built, but in the last bits.
    """
    taps = torch.nextafter(Snake(1).upsample.filter, torch.tensor(1.0))
    shapes = {name: np.empty(what["shape"], np.float32) for name, what in keys.items()}
    filled = fill_state(shapes)
    tensors: dict[str, Tensor] = {}
    for name, what in keys.items():
        if "alias_of" in what:
            tensors[name] = tensors[what["alias_of"]]
        elif name in filled:
            tensors[name] = torch.from_numpy(filled[name])
        else:
            tensors[name] = taps.clone()
    return tensors


def checksums() -> dict[str, Any]:
    """Return the checksums of the references' weights, by model."""
    return json.loads((GOLDEN / "fill_checksums.json").read_text())


def checksum(state: Mapping[str, Tensor]) -> int:
    """Compute the references' checksum of the filled tensors."""
    total = 0
    for name in sorted(name for name in state if not name.endswith("filter")):
        numbers = np.ascontiguousarray(state[name].numpy(), "<f4")
        total = zlib.crc32(numbers.tobytes(), zlib.crc32(name.encode(), total))
    return total


def tiny_config(peer: Mapping[str, Any], **model: Any) -> dict[str, Any]:
    """config.json of a tiny synthesizer; `peer` is its `config` in the manifest."""
    stated = {k: v for k, v in peer.items() if k not in ("spec_channels", "segment_size")}
    hop_length = int(np.prod(peer["upsample_rates"]))
    n_fft = 2 * (peer["spec_channels"] - 1)
    return {
        "train": {"segment_size": peer["segment_size"] * hop_length, "learning_rate": 1e-4},
        "data": {
            "sampling_rate": 44100,
            "filter_length": n_fft,
            "hop_length": hop_length,
            "win_length": n_fft,
            "n_mel_channels": 20,
            "mel_fmin": 0.0,
            "mel_fmax": 22050,
        },
        "model": stated | {"n_layers_q": 3, "use_spectral_norm": False} | model,
        "spk": {"mezzo": 0, "tenor": 2},
    }


def write_voice(
    folder: Path, variant: str, content: Mapping[str, Any] | None = None, **model: Any
) -> tuple[Path, Path]:
    """G_800.pth and config.json of a tiny variant, as so-vits-svc's trainer leaves them.

    content: what is in G_800.pth otherwise.
    """
    tiny = manifest("svc_tiny_manifest")[variant]
    g_path, config_path = folder / "G_800.pth", folder / "config.json"
    training = {"iteration": 3, "optimizer": None, "learning_rate": 1e-4}
    torch.save(content or {"model": state_dict(tiny["keys"]), **training}, g_path)
    config_path.write_text(json.dumps(tiny_config(tiny["config"], **model)))
    return g_path, config_path
