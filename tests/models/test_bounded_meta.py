"""Descriptions of networks far larger than their file are refused before they are built."""

from __future__ import annotations

import copy
import dataclasses
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.bounded_meta import bounded_meta, most_parameters
from models.checkpoint import (
    OWN_HEADER,
    CheckpointError,
    load_foreign,
    read_safetensors,
    save_safetensors,
)
from models.encoders.layouts import read_encoder_file
from models.encoders.whisper import read_whisper
from models.synthesizer import voice
from models.synthesizer.sovits.files import read_voice, write_voice
from models.synthesizer.vocoder import load_vocoder
from models.synthesizer.voice import DESCRIPTION, WEIGHTS, load_voice
from tests.helpers.voices import small_voice, write_small_voice
from tests.models.synthesizer.test_vocoder import write_vocoder


def test_a_network_is_built_up_to_a_number_of_parameters() -> None:
    with bounded_meta(most_parameters(1)):
        network = nn.Sequential(*(nn.Linear(3, 10**9) for _ in range(20)))
    assert network[0].weight.is_meta
    nn.Linear(3, 3)  # the limit is that of the block
    with (
        pytest.raises(ValueError, match="more than 1500 tensors"),
        bounded_meta(most_parameters(1)),
    ):
        nn.Sequential(*(nn.Linear(3, 3) for _ in range(10**6)))
    with pytest.raises(ValueError, match="cannot be built"), bounded_meta(None):
        nn.Linear(2**40, 2**40)
    nn.Sequential(*(nn.ReLU() for _ in range(2000)))


HUGE = (10**6, 10**9, 2**61, 10**400, -1, 0, float("nan"), 1e308, "x", None, [10**9] * 5, [[1]])
NUMBERS = [
    field.name for field in dataclasses.fields(small_voice().config) if field.name != "dropout"
]


def refuses(read: Callable[[], Any], what: str) -> None:
    """`read` raises a CheckpointError of one line, in seconds and without much memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(CheckpointError) as caught:
        read()
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value), what
    assert time.process_time() - start < 5, what
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10, what  # KiB


def test_a_voice_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    folder = write_small_voice(tmp_path)
    original = json.loads((folder / DESCRIPTION).read_text())
    tensors, _ = read_safetensors(folder / WEIGHTS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for number, key in enumerate(NUMBERS):
        huge = HUGE if key == "upsample_rates" else HUGE[number % len(HUGE) :: 9]
        for value in [10**6] if key in ("n_layers", "n_flow_layers") else huge:
            changed = copy.deepcopy(original)
            changed["network"][key] = value
            (folder / DESCRIPTION).write_text(json.dumps(changed))
            header = {"kind": "voice", "version": 2, "description_sha256": voice._sha256(changed)}
            save_safetensors(folder / WEIGHTS, tensors, {OWN_HEADER: json.dumps(header)})
            refuses(lambda: load_voice(folder), f"{key}={value}")


def test_a_so_vits_svc_voice_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    small = dataclasses.replace(
        small_voice(), encoder=voice.VoiceEncoder(name="contentvec256l9", dim=39)
    )
    write_voice(small, tmp_path / "G_1.pth")
    config = tmp_path / "config.json"
    original = json.loads(config.read_text())
    original["model"] |= {"speech_encoder": "vec256l9"}
    for key in original["model"]:
        for value in (10**6, 10**9, -1, [10**9] * 3):
            changed = copy.deepcopy(original)
            changed["model"][key] = value
            config.write_text(json.dumps(changed))
            refuses(lambda: read_voice(tmp_path / "G_1.pth", config), f"{key}={value}")


def test_a_vocoder_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    path = write_vocoder(tmp_path, "tiny")
    config = tmp_path / "config.json"
    original = json.loads(config.read_text())
    for key in (
        "upsample_rates", "upsample_kernel_sizes", "resblock_kernel_sizes", "num_mels", "n_fft",
        "resblock_dilation_sizes", "upsample_initial_channel", "sampling_rate", "hop_size",
    ):  # fmt: skip
        for value in (10**30, [10**9] * 5, [[1, 3, 5]] * 10**4, [2] * 10**4, float("nan")):
            config.write_text(json.dumps(original | {key: value}))
            refuses(lambda: load_vocoder(path), f"{key}={value}"[:60])


def test_encoders_larger_than_their_files_are_refused(golden: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    whisper = torch.load(golden / "encoders" / "tiny_whisper.pt", weights_only=True)
    for key in ("n_audio_layer", "n_audio_state", "n_audio_head", "n_mels"):
        for value in (10**6, 10**9, -1, 0.5, float("inf"), [3]):
            torch.save({**whisper, "dims": whisper["dims"] | {key: value}}, path)
            refuses(lambda: read_whisper(path), f"{key}={value}")
    content = torch.load(golden / "encoders" / "tiny_dphubert.pth", weights_only=True)
    absent = {"encoder_use_attention": [False] * 10**5, "encoder_use_feed_forward": [False] * 10**5}
    for changes in (
        {"encoder_num_layers": 10**6},
        {"encoder_num_layers": 10**5, **absent},
        {"encoder_num_layers": float("inf")},
        {"encoder_head_dim": -64},
        {"encoder_head_dim": [1]},
        {"extractor_conv_layer_config": [[1, 2, 10**30]] * 7},
    ):
        torch.save({**content, "config": content["config"] | changes}, path)
        refuses(lambda: read_encoder_file(path), str(changes)[:60])
    content = load_foreign(golden / "encoders" / "tiny_hubert_base.pt")
    for stem in ("[(512,10,5)] * 1000000000", "[" + "(1,2,3)   " * 90, "[(1,2,3)]" * 10**5):
        args = {"conv_feature_layers": stem, "encoder_layers": 2}
        torch.save({"model": content["model"], "args": None, "cfg": {"model": args}}, path)
        refuses(lambda: read_encoder_file(path), stem[:60])
