"""NSF-HiFiGAN vocoders: so-vits-svc's state dicts and audio, and files of other kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.checkpoint import CheckpointError
from models.synthesizer.blocks.noise import KeyedNoise, NoNoise
from models.synthesizer.blocks.source import HARMONICS
from models.synthesizer.blocks.weight_norm import fold_weight_norm
from models.synthesizer.config import MelConfig
from models.synthesizer.tensor_layout import layout_of
from models.synthesizer.vocoder import Vocoder, load_vocoder
from tests.models.synthesizer.conftest import Reference
from tests.models.synthesizer.sovits_files import checksum, checksums, manifest, state_dict

# Ten times what the peer's float32 is from float64.
SOUND = 8e-6
SOURCE = 1.1e-5

TINY = ("tiny", "tiny2")


def write_vocoder(folder: Path, variant: str, content: Any = None, **config: Any) -> Path:
    """`model` and config.json of a variant with made-up weights, as OpenVPI publishes vocoders."""
    about = manifest("nsf_hifigan_manifest")[variant]
    path = folder / "model"
    torch.save(content or {"generator": state_dict(about["keys"])}, path)
    (folder / "config.json").write_text(json.dumps(about["config"] | config))
    return path


def filled_vocoder(folder: Path, variant: str) -> Vocoder:
    """Return the vocoder with its weight norm, as in training."""
    network = Vocoder(load_vocoder(write_vocoder(folder, variant)).config).eval()
    network.load_state_dict(state_dict(manifest("nsf_hifigan_manifest")[variant]["keys"]))
    return network


def close(found: Tensor, expected: np.ndarray, tolerance: float = SOUND) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=tolerance)


# files


@pytest.mark.parametrize("variant", [*TINY, "community"])
def test_names_shapes_and_order_are_theirs(tmp_path: Path, variant: str) -> None:
    keys = manifest("nsf_hifigan_manifest")[variant]["keys"]
    state = state_dict(keys)
    assert checksum(state) == checksums()[f"nsf/{variant}"]["all"]
    config = load_vocoder(write_vocoder(tmp_path, variant, {"generator": state})).config
    layout = layout_of(lambda: Vocoder(config))
    assert list(layout.shapes.items()) == [(n, tuple(what["shape"])) for n, what in keys.items()]
    assert layout.parameters == list(keys)


def test_names_shapes_and_order_without_weight_norm(tmp_path: Path) -> None:
    about = manifest("nsf_hifigan_manifest")
    config = load_vocoder(write_vocoder(tmp_path, "community")).config
    found = layout_of(lambda: fold_weight_norm(Vocoder(config))).shapes
    expected = about["community_no_weight_norm"]["keys"]
    assert found == {name: tuple(what["shape"]) for name, what in expected.items()}


@pytest.mark.parametrize("variant", TINY)
@pytest.mark.parametrize("bare", [False, True])
def test_a_file_is_loaded_and_run(
    tmp_path: Path, variant: str, bare: bool, reference: Reference
) -> None:
    """As published, or with removed weight norm and a bare state dict."""
    path = write_vocoder(tmp_path, variant)
    if bare:
        torch.save(load_vocoder(path).state_dict(), path)
    arrays = reference(f"nsf_hifigan_{variant}")
    vocoder = load_vocoder(path)
    assert not vocoder.training
    assert not any(name.endswith("weight_g") for name in vocoder.state_dict())
    with torch.no_grad():
        close(vocoder(*inputs(arrays), NoNoise()), arrays["no_weight_norm/out"])


def test_the_settings_are_those_of_the_file(tmp_path: Path) -> None:
    config = load_vocoder(write_vocoder(tmp_path, "community")).config
    assert (config.sample_rate, config.hop_length) == (44100, 512)
    assert config.mel == MelConfig(n_fft=2048, win_length=2048, n_mels=128, f_min=40, f_max=16000)


def tiny_state(**changed: Any) -> dict[str, Any]:
    """Return the state dict of the tiny vocoder; None removes a tensor."""
    state = state_dict(manifest("nsf_hifigan_manifest")["tiny"]["keys"]) | changed
    return {name: tensor for name, tensor in state.items() if tensor is not None}


REFUSED_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"generator": tiny_state(**{"ups.1.bias": None})}, r"lacks 1 of 90 .* ups.1.bias$"),
    "misshapen": (
        {"generator": tiny_state(**{"ups.1.bias": torch.zeros(3)})},
        r"other shapes: ups.1.bias \(is \(3,\), must be \(8,\)\)",
    ),
    "surplus": ({"generator": tiny_state(extra=torch.zeros(1))}, "1 unknown tensors: extra$"),
    "not finite": (
        {"generator": tiny_state(**{"ups.1.bias": torch.full((8,), torch.nan)})},
        r"has values that are not finite \(NaN or infinity\) in ups\.1\.bias",
    ),
    "voice": ({"model": {"enc_p.proj.weight": torch.zeros(1)}}, "is a voice, which takes"),
    "rvc": ({"weight": {"enc_p.emb_phone.weight": torch.zeros(1)}}, "is a voice of RVC"),
    "discriminator": ({"model": {"discriminators.0.x": torch.zeros(1)}}, "is a discriminator"),
    "vocoder's discriminators": ({"mpd": {}, "msd": {}}, "is a vocoder's discriminators"),
    "in training": (
        {"state_dict": {"generator.conv_pre.bias": torch.zeros(1)}},
        "is a vocoder's training checkpoint; only its generator is needed",
    ),
    "hifigan": (
        {"generator": tiny_state(**{"m_source.l_linear.weight": None})},
        "is a vocoder without a sine source",
    ),
    "encoder": ({"model": {"encoder.layers.0.x": torch.zeros(1)}}, "is an encoder of units"),
    "k-means": ({"ann": {"cluster_centers_": torch.zeros(2, 2)}}, "cluster centres"),
}


@pytest.mark.parametrize("kind", REFUSED_FILES)
def test_refused_files(tmp_path: Path, kind: str) -> None:
    content, message = REFUSED_FILES[kind]
    path = write_vocoder(tmp_path, "tiny", content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_vocoder(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"hop_size": 128}, "hop_size is 128, but the product of upsample_rates is 64"),
        ({"hop_size": "64"}, "hop_size is '64'; it must be a whole number"),
        ({"upsample_rates": [8, 9]}, "upsample_kernel_sizes has 16 for the rate 9"),
        ({"resblock_dilation_sizes": [[1, 3, 0], [1, 3, 5]]}, "resblock_dilation_sizes is 0"),
        ({"resblock": "3"}, "resblock is '3'; choose from 1, 2"),
        ({"win_size": 512}, "win_length is 512"),
        ({"sampling_rate": 0}, "sampling_rate is 0"),
        ({"mini_nsf": True}, "mini_nsf is true, which is not supported"),
        ({"upsample_initial_channel": 64}, "does not match the vocoder that config.json describes"),
    ],
)
def test_refused_settings(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = write_vocoder(tmp_path, "tiny", **changed)
    with pytest.raises(CheckpointError, match=message):
        load_vocoder(path)


def test_refused_without_its_settings(tmp_path: Path) -> None:
    path = write_vocoder(tmp_path, "tiny")
    (tmp_path / "config.json").write_text('{"train": {}, "data": {}}')
    with pytest.raises(CheckpointError, match=r"config.json: resblock, .*hop_size are missing"):
        load_vocoder(path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"needs its config\.json in the same folder"):
        load_vocoder(path)
    with pytest.raises(CheckpointError, match="is a folder"):
        load_vocoder(tmp_path)


# sound


def inputs(arrays: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(arrays["in/mel"]), torch.from_numpy(arrays["in/f0"])


@pytest.mark.parametrize("chance", [0.0, 0.3])
@pytest.mark.parametrize("variant", TINY)
def test_sounds_as_the_reference(
    tmp_path: Path, variant: str, chance: float, reference: Reference
) -> None:
    arrays = reference(f"nsf_hifigan_{variant}")
    network = filled_vocoder(tmp_path, variant)
    kept: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        module.register_forward_hook(
            lambda module, given, returned, name=name: kept.update({name: returned.clone()})
        )
    mel, f0 = inputs(arrays)
    with torch.no_grad():
        network(mel, f0, NoNoise(chance))
    start = f"rand{chance}"
    close(kept[""], arrays[f"{start}/out"])
    close(kept["conv_post"], arrays[f"{start}/conv_post"])
    close(kept["m_source"].transpose(1, 2), arrays[f"{start}/har_source"], SOURCE)
    for name in ("noise_convs.0", "ups.0"):
        assert list(kept[name].shape) == arrays[f"{start}/{name}/shape"].tolist()
        wide = kept[name].double()
        stat = torch.stack([wide.mean(), wide.std(correction=0), wide.abs().max()])
        close(stat, arrays[f"{start}/{name}/stat"])
        close(kept[name].flatten()[:16], arrays[f"{start}/{name}/first"])
    waves = network.m_source.waves(f0, NoNoise(chance)).transpose(1, 2)
    close(waves, arrays[f"{start}/sine"], SOURCE)
    voiced = arrays[f"{start}/uv"][..., 0] > 0
    assert voiced.any() and not voiced.all()
    assert not waves[torch.from_numpy(~voiced)].any()


@pytest.mark.parametrize("variant", TINY)
@pytest.mark.parametrize("frames", [1, 7, 700])
def test_singing_is_what_the_whole_gives(tmp_path: Path, variant: str, frames: int) -> None:
    vocoder = load_vocoder(write_vocoder(tmp_path, variant))
    generator = torch.Generator().manual_seed(0)
    mel = torch.randn(2, 16, frames, generator=generator)
    f0 = 100 + 300 * torch.rand(2, frames, generator=generator)
    phase = torch.rand(2, HARMONICS, generator=generator)
    with torch.no_grad():
        whole = vocoder(mel, f0, KeyedNoise([1, 2]), phase)
    sung = vocoder.infer(mel, f0, KeyedNoise([1, 2]), phase)
    torch.testing.assert_close(sung, whole, rtol=0, atol=SOUND)
