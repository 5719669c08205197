"""FCPE: torchfcpe's results for any clip, batch and length."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.checkpoint import CheckpointError, load_foreign
from models.f0 import fcpe
from models.f0.fcpe import Fcpe, bundled_fcpe, decode_fcpe, load_fcpe, read_fcpe
from models.torchaudio_compat import import_torchaudio

TOLERANCE = 1e-5  # of activations, 0 to 1; measured 4e-6
RATE = 16000


@pytest.fixture(scope="module")
def network() -> Fcpe:
    return load_fcpe(bundled_fcpe())


@pytest.fixture(scope="module")
def torchfcpe() -> Any:
    import_torchaudio()
    import torchfcpe

    with contextlib.redirect_stdout(io.StringIO()):
        return torchfcpe.spawn_bundled_infer_model("cpu")


@pytest.fixture(scope="module")
def singing(golden: Path) -> Tensor:
    """Five seconds of vocadito at 16 kHz."""
    with np.load(golden / "preprocessing" / "f0.npz") as arrays:
        return torch.from_numpy(arrays["seed003/vocadito_3to8s/wav16k_soxrhq"]).float()


def theirs(torchfcpe: Any, wav: Tensor) -> Tensor:
    with torch.inference_mode():
        return torchfcpe.model(torchfcpe.wav2mel(wav[None, :, None], RATE))[0]


@pytest.mark.parametrize(
    "num_samples", [1, 2, 159, 160, 161, 319, 320, 431, 432, 433, 591, 592, 593, 1600, 16123, 80000]
)
def test_activations_are_torchfcpes(
    network: Fcpe, torchfcpe: Any, singing: Tensor, num_samples: int
) -> None:
    wav = singing[25000:][:num_samples] if num_samples < 50000 else singing
    expected = theirs(torchfcpe, wav)
    (found,) = network.activations([wav])
    assert found.shape == expected.shape == (num_samples // 160 + 1, 360)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    if num_samples > 16000:
        assert expected.max() > 0.8


def test_activations_of_noise_and_silence(network: Fcpe, torchfcpe: Any) -> None:
    noise = torch.randn(9000, generator=torch.Generator().manual_seed(0))
    for wav in (noise, noise * 1e-6, torch.zeros(9000)):
        (found,) = network.activations([wav])
        torch.testing.assert_close(found, theirs(torchfcpe, wav), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("threshold", [0.006, 0.05, 0.5])
def test_pitch_is_torchfcpes(
    network: Fcpe, torchfcpe: Any, singing: Tensor, threshold: float
) -> None:
    expected = torchfcpe.infer(singing[None, :, None], RATE, threshold=threshold)[0, :, 0]
    ((f0, strength),) = network.pitch([singing])
    f0 = torch.where(strength > threshold, f0, 0)
    assert 100 < (f0 > 0).sum() < len(f0)
    torch.testing.assert_close(f0, expected, rtol=1e-5, atol=0)


def test_decoding_at_the_ends_of_the_range(network: Fcpe, torchfcpe: Any) -> None:
    salience = torch.rand(720, 360, generator=torch.Generator().manual_seed(0)) * 0.5
    salience[torch.arange(720), torch.arange(360).repeat(2)] = 1.0
    salience[5] = 0.25  # all alike: the first one counts
    cents = torchfcpe.model.latent2cents_local_decoder(salience[None], mask=False)
    expected = torchfcpe.model.cent_to_f0(cents)[0, :, 0]
    f0, strength = decode_fcpe(salience, network.network.cents).unbind(1)
    torch.testing.assert_close(f0, expected, rtol=1e-6, atol=0)
    assert f0.min() < 33 and f0.max() > 1950
    torch.testing.assert_close(strength, salience.max(1).values)


@pytest.mark.slow
def test_a_clip_does_not_depend_on_its_batch(network: Fcpe, singing: Tensor) -> None:
    """From one sample to 40 s, in batches as a GPU gets them and in those of a CPU."""
    long = torch.cat([singing] * 8)
    lengths = [1, 80000, 100, 159, 160, 433, 640000, 5000, 16000, 48123]
    clips = [long[start : start + n] for start, n in enumerate(lengths)]
    clips.append(torch.zeros(3000))
    alone = [network.activations([clip])[0] for clip in clips]
    budget = network.batcher.budget
    batches: list[int] = []
    forward = network.network.register_forward_pre_hook(
        lambda module, args: batches.append(len(args[0]))
    )
    for frames in (10**6, budget):
        network.batcher.budget = frames
        together = network.activations(clips)
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=TOLERANCE)
    forward.remove()
    assert max(batches) == len(clips) - 1  # 40 s runs alone, in windows


@pytest.mark.slow
@pytest.mark.parametrize("window", [250, 347])
def test_windows_change_nothing(
    network: Fcpe, singing: Tensor, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows also keep quiet ends, which depend on the mean over the whole clip."""
    wav = torch.cat([singing[:30000] * 0.01, singing[30000:]])
    whole, (f0, _) = network.activations([wav])[0], network.pitch([wav])[0]
    monkeypatch.setattr(fcpe, "WINDOW_FRAMES", window)
    torch.testing.assert_close(network.activations([wav])[0], whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(network.pitch([wav])[0][0], f0, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_windows_bound_the_memory(network: Fcpe, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass of the network has more frames than a window."""
    seen: list[int] = []
    entered = network.network.enter.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[1])
    )
    monkeypatch.setattr(fcpe, "WINDOW_FRAMES", 300)
    network.pitch([torch.zeros(160 * 301), torch.zeros(160 * 900)])
    entered.remove()
    assert max(seen) <= 300
    assert len(seen) > 8


def test_unpacked_products_give_the_same(
    network: Fcpe, singing: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code path of a GPU and of a CPU without oneDNN."""
    monkeypatch.setattr(fcpe, "can_pack", lambda weight: False)
    plain = load_fcpe(bundled_fcpe())
    assert isinstance(plain.network.output, torch.nn.Linear)
    clips = [singing[:20000], singing[20000:30000]]
    for found, expected in zip(plain.activations(clips), network.activations(clips), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


# The file of weights


@pytest.mark.slow
def test_torchfcpe_is_not_imported() -> None:
    program = (
        "import sys\n"
        "from models.f0.fcpe import bundled_fcpe, load_fcpe\n"
        "load_fcpe(bundled_fcpe())\n"
        "strangers = {'torchfcpe', 'torchaudio', 'librosa', 'einops'} & set(sys.modules)\n"
        "sys.exit(f'imported {strangers}' if strangers else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install torchfcpe"):
        bundled_fcpe()


def test_an_absent_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = ModuleSpec("torchfcpe", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=r"fcpe_c_v001.pt.*pip install torchfcpe==0\.0\.4"):
        bundled_fcpe()


def without(key: str) -> Any:
    return lambda content: content["model"].pop(key)


def changed(part: str, key: str, value: object) -> Any:
    return lambda content: content[part].__setitem__(key, value)


@pytest.mark.parametrize(
    "change, says",
    [
        (without("net.encoder_layers.3.conformer.net.6.bias"), "lacks net.encoder_layers.3"),
        (without("output_proj.weight_g"), "lacks output_proj.weight_g"),
        (without("net.encoder_layers.0.norm.weight"), "lacks net.encoder_layers.0.norm.weight"),
        (changed("model", "harmonic_emb.weight", torch.zeros(9, 4)), "unknown key harmonic_emb"),
        (changed("model", "norm.bias", torch.zeros(4)), r"norm.bias is \(4,\), not \(512,\)"),
        (changed("model", "cent_table", 7), "cent_table is int"),
        (changed("config_dict", "model", {"type": "CFNaiveMelPE"}), "conv_only is None, not True"),
        (changed("config_dict", "mel", None), "mel.sr is None, not 16000"),
        (lambda content: content.pop("model"), "lacks 'model'"),
    ],
)
def test_another_network_is_refused(change: Any, says: str, tmp_path: Path) -> None:
    content = load_foreign(bundled_fcpe())
    for key, value in content["model"].items():  # small on disk: only shapes are looked at
        content["model"][key] = torch.zeros(value.shape, dtype=torch.bool)
    change(content)
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=says) as error:
        read_fcpe(tmp_path / "other.pt")
    assert str(tmp_path / "other.pt") in str(error.value)
