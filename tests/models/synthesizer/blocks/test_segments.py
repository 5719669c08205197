"""Masks, segments, units on the frame clock and volume: so-vits-svc's results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from models.synthesizer.blocks.noise import KeyedNoise, NoNoise
from models.synthesizer.blocks.segments import (
    expand_units,
    random_starts,
    sequence_mask,
    slice_segments,
    volume_of,
)
from tests.models.synthesizer.conftest import Reference


@pytest.fixture
def functions(reference: Reference) -> dict[str, np.ndarray]:
    return reference("svc_functions")


@pytest.fixture(scope="module")
def preprocessing(golden: Path) -> dict[str, np.ndarray]:
    with np.load(golden / "preprocessing" / "volume_expand_coarse_spec.npz") as arrays:
        return dict(arrays)


# masks and segments


def test_masks(functions: dict[str, np.ndarray]) -> None:
    lengths = torch.from_numpy(functions["sequence_mask/lengths"])
    for mask, name in ((sequence_mask(lengths, 8), "max8"), (sequence_mask(lengths), "none")):
        assert mask.dtype == torch.bool
        np.testing.assert_array_equal(mask.numpy(), functions[f"sequence_mask/{name}"])
    fractions = sequence_mask(torch.tensor([2.5, 4.0]), 5)
    np.testing.assert_array_equal(fractions.numpy(), functions["sequence_mask/float_lengths"])


def test_segments_from_given_starts(functions: dict[str, np.ndarray]) -> None:
    x, pitch = (torch.from_numpy(functions[f"slice/{name}"]) for name in ("x", "pitch"))
    starts = torch.from_numpy(functions["slice/ids"])
    expected, expected_pitch = functions["slice/segments"], functions["slice/pitch_segments"]
    np.testing.assert_array_equal(slice_segments(x, starts, 6).numpy(), expected)
    found = slice_segments(pitch.unsqueeze(1), starts, 6).squeeze(1)
    np.testing.assert_array_equal(found.numpy(), expected_pitch)


@pytest.mark.parametrize("chance", [0.0, 0.37, 0.999])
def test_random_segments(chance: float, functions: dict[str, np.ndarray]) -> None:
    x, pitch = (torch.from_numpy(functions[f"slice/{name}"]) for name in ("x", "pitch"))
    lengths = torch.from_numpy(functions["slice/lengths"])
    name, noise = f"slice/rand_{chance}", NoNoise(chance)
    starts = random_starts(lengths, 6, noise)
    assert starts.dtype == torch.int64
    np.testing.assert_array_equal(starts.numpy(), functions[f"{name}/ids"])
    np.testing.assert_array_equal(slice_segments(x, starts, 6).numpy(), functions[f"{name}/seg"])
    of_pitch = slice_segments(pitch.unsqueeze(1), starts, 6).squeeze(1)
    np.testing.assert_array_equal(of_pitch.numpy(), functions[f"{name}/pitch"])
    whole = random_starts(torch.full_like(lengths, 20), 6, noise)
    np.testing.assert_array_equal(whole.numpy(), functions[f"{name}/nolen_ids"])
    one_less = random_starts(lengths - 1, 6, noise)
    np.testing.assert_array_equal(one_less.numpy(), functions[f"{name}/spec_ids"])


def test_every_start_is_drawn_and_none_beyond() -> None:
    starts = random_starts(torch.full((400,), 24), 20, KeyedNoise(range(400)))
    counts = np.bincount(starts.numpy(), minlength=5)
    assert len(counts) == 5
    assert counts.min() > 50  # of 80 each

    lengths = torch.arange(1, 5001)
    last = random_starts(lengths, 1, NoNoise(1 - 2**-24))  # the largest number below 1
    assert torch.equal(last, lengths - 1)
    assert random_starts(torch.tensor([3]), 20, NoNoise(0.9)).tolist() == [0]  # shorter than it


def test_gradient_of_a_segment_is_where_it_was_taken() -> None:
    x = torch.zeros(2, 3, 9, requires_grad=True)
    slice_segments(x, torch.tensor([0, 4]), 5).sum().backward()
    expected = torch.zeros(2, 3, 9)
    expected[0, :, :5] = expected[1, :, 4:] = 1
    assert x.grad is not None and torch.equal(x.grad, expected)


def test_a_segment_does_not_fit() -> None:
    with pytest.raises(ValueError, match="segment of 20 frames does not fit into 19"):
        slice_segments(torch.zeros(1, 2, 19), torch.zeros(1, dtype=torch.int64), 20)


# units on the frame clock


@pytest.mark.parametrize("mode", ["nearest", "left"])
@pytest.mark.parametrize("case", ["13_29", "50_86", "43_43", "40_33", "1_7", "173_298"])
def test_expands_as_the_reference(mode: str, case: str, functions: dict[str, np.ndarray]) -> None:
    units = functions[f"repeat_expand/{case}/in"].T
    expected = functions[f"repeat_expand/{case}/{mode}"].T
    found = expand_units(units, len(expected), mode)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, expected)


EXPANDED = "h2_s1_t5 h2_s249_t430 h2_s1659_t2860 h3_s100_t172 h4_s10_t10 h4_s10_t7 h4_s50_t86"


@pytest.mark.parametrize("mode", ["nearest", "left"])
@pytest.mark.parametrize("case", [*EXPANDED.split(), "h4_s7_t12", "h8_s49_t86"])
def test_expands_as_in_preprocessing(
    mode: str, case: str, preprocessing: dict[str, np.ndarray]
) -> None:
    expected = preprocessing[f"expand/{case}/{mode}"].T
    found = expand_units(preprocessing[f"expand/{case}/in"].T, len(expected), mode)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("source, target", [(461, 793), (5000, 5001), (4999, 8600), (700, 33)])
def test_left_is_the_rule_frame_by_frame(source: int, target: int) -> None:
    ends = (np.arange(source + 1) * target).astype(np.float32) / np.float32(source)
    at, expected = 0, []
    for frame in range(target):
        at += bool(frame >= ends[at + 1])
        expected.append(at)
    units = np.arange(source, dtype=np.float32)[:, None]
    assert expand_units(units, target, "left")[:, 0].tolist() == expected


@pytest.mark.parametrize("source, target", [(461, 793), (5000, 5001), (4999, 8600), (700, 33)])
def test_nearest_is_torchs(source: int, target: int) -> None:
    units = np.arange(source, dtype=np.float32)[:, None]
    expected = torch.nn.functional.interpolate(torch.from_numpy(units.T)[None], size=target)
    np.testing.assert_array_equal(expand_units(units, target, "nearest").T, expected[0].numpy())


def test_no_units_to_expand() -> None:
    with pytest.raises(ValueError, match="no units"):
        expand_units(np.zeros((0, 4), np.float32), 5, "nearest")


# volume

VOLUME = 9e-8  # ten times what the peer is from float64


@pytest.mark.parametrize("samples", [5120, 5130, 5600])
def test_volume(samples: int, functions: dict[str, np.ndarray]) -> None:
    found = volume_of(functions[f"volume/{samples}/in"], 512)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, functions[f"volume/{samples}/out"], rtol=0, atol=VOLUME)


@pytest.mark.parametrize("hop", [320, 441, 511, 512])
def test_volume_of_a_recording(
    hop: int, preprocessing: dict[str, np.ndarray], real_audio: Path
) -> None:
    wav, _ = soundfile.read(real_audio / "vocadito_1.flac", dtype="float32")
    found = volume_of(wav, hop)
    expected = preprocessing[f"volume/vocadito_full/hop{hop}"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=VOLUME)


@pytest.mark.parametrize("case", ["vocadito_3to8s", "len600"])
def test_volume_of_parts_of_it(
    case: str, preprocessing: dict[str, np.ndarray], golden: Path
) -> None:
    with np.load(golden / "preprocessing" / "inputs.npz") as arrays:
        wav = (arrays["vocadito_3to8s"] / 32768).astype(np.float32)
    if case == "len600":
        wav = wav[220500 - 132300 :][:600]
    expected = preprocessing[f"volume/{case}/hop512"]
    np.testing.assert_allclose(volume_of(wav, 512), expected, rtol=0, atol=VOLUME)


def test_volume_of_an_odd_hop() -> None:
    wav = np.repeat(np.float32([0, 2, 4]), 5)
    np.testing.assert_allclose(volume_of(wav, 5), np.sqrt([0, 2.4, 11.2]), rtol=1e-6)
    with pytest.raises(ValueError, match="clip of 4 samples"):
        volume_of(wav[:4], 5)
