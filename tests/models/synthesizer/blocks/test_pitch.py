"""Mel bins and normalised log f0: so-vits-svc's results, and Cantor's where they differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.synthesizer.blocks.pitch import f0_to_coarse, normalize_f0


@pytest.fixture(scope="module")
def reference(golden: Path) -> dict[str, NDArray[np.generic]]:
    merged: dict[str, NDArray[np.generic]] = {}
    for name in ("synthesizers/svc_functions", "preprocessing/volume_expand_coarse_spec"):
        with np.load(golden / f"{name}.npz", allow_pickle=False) as arrays:
            merged |= dict(arrays)
    return merged


@pytest.fixture(scope="module")
def contours(golden: Path) -> dict[str, NDArray[np.generic]]:
    with np.load(golden / "preprocessing" / "f0.npz", allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files if name.startswith("seed003/")}


# f0_to_coarse


@pytest.mark.parametrize(
    "given, expected, dtype",
    [
        ("f0_to_coarse/in", "f0_to_coarse/out", torch.float32),
        ("coarse/in_f32", "coarse/out_f32", torch.float32),
        ("coarse/in_f32", "coarse/out_f64", torch.float64),
    ],
)
def test_the_references_bins(
    given: str, expected: str, dtype: torch.dtype, reference: dict[str, NDArray[np.generic]]
) -> None:
    f0 = torch.from_numpy(reference[given]).to(dtype)
    bins = f0_to_coarse(f0, sovits=True)
    assert bins.dtype == torch.int64
    np.testing.assert_array_equal(bins.numpy(), reference[expected])


@pytest.mark.parametrize("key", [0, 12, -5])
@pytest.mark.parametrize("recording", ["vocadito_3to8s/plen500", "vocadito_full/plen3320"])
def test_the_articles_bins(
    recording: str, key: int, contours: dict[str, NDArray[np.generic]]
) -> None:
    case = f"seed003/{recording}_key{key}"
    bins = f0_to_coarse(torch.from_numpy(contours[f"{case}/f0"]))
    np.testing.assert_array_equal(bins.numpy(), contours[f"{case}/coarse"])


def test_what_lies_outside_the_range() -> None:
    f0 = torch.tensor([[0.0, 20.0, 50.0], [1100.0, 1104.0, 20000.0]])
    assert f0_to_coarse(f0).tolist() == [[1, 1, 1], [255, 255, 255]]
    assert f0_to_coarse(f0, sovits=True).tolist() == [[1, 1, 1], [255, 0, 0]]


def test_every_bin_is_met_in_order() -> None:
    bins = f0_to_coarse(torch.linspace(40, 1200, 20000))
    assert (bins.diff() >= 0).all()
    assert bins.unique().tolist() == list(range(1, 256))


def test_other_bins_and_range() -> None:
    f0 = torch.tensor([0.0, 80.0, 2000.0, 3000.0])
    assert f0_to_coarse(f0, bins=64, f0_min=80, f0_max=2000).tolist() == [1, 1, 63, 63]


@pytest.mark.parametrize(
    "wrong", [{"bins": 2}, {"f0_min": 0.0}, {"f0_min": 1100.0}, {"f0_max": float("nan")}]
)
def test_a_range_without_bins_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="mel bins need"):
        f0_to_coarse(torch.ones(1), **wrong)  # type: ignore[arg-type]


# normalize_f0


def test_the_references_normalisation(reference: dict[str, NDArray[np.generic]]) -> None:
    log_f0, mask, voiced, out = (
        torch.from_numpy(reference[f"normalize_f0/{name}"]) for name in ("lf0", "mask", "uv", "out")
    )
    torch.testing.assert_close(normalize_f0(log_f0, mask, voiced), out, rtol=0, atol=3e-7)
    torch.testing.assert_close(normalize_f0(log_f0, mask, voiced > 0), out, rtol=0, atol=3e-7)


def test_the_factor_stretches_each_contour() -> None:
    log_f0 = torch.tensor([[[1.0, 3.0, 9.0]], [[1.0, 3.0, 9.0]]])
    mask = torch.tensor([[[1.0, 1, 1]], [[1, 1, 0]]])
    voiced = torch.tensor([[1.0, 1, 0], [0, 1, 0]])
    out = normalize_f0(log_f0, mask, voiced, factor=torch.tensor([0.5, 2.0]))
    assert out.tolist() == [[[-0.5, 0.5, 3.5]], [[-4.0, 0.0, 0.0]]]


def test_nothing_voiced_is_left_at_its_height() -> None:
    log_f0 = torch.tensor([[[0.4, 0.5, 0.6]]])
    out = normalize_f0(log_f0, torch.tensor([[[1.0, 1, 0]]]), torch.zeros(1, 3))
    torch.testing.assert_close(out, torch.tensor([[[0.4, 0.5, 0.0]]]))
