"""A fast voice: a small synthesizer with random weights on the units of mfcc."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from models.synthesizer.config import MelConfig, SynthesizerConfig
from models.synthesizer.sovits.networks import Synthesizer
from models.synthesizer.voice import Voice, VoiceEncoder, save_voice
from pipeline.extract.config import load_config

_CONFIG = SynthesizerConfig(
    units_dim=39,
    n_speakers=2,
    sample_rate=16000,
    source_rate=16000,
    n_fft=512,
    inter_channels=8,
    hidden_channels=16,
    filter_channels=32,
    n_layers=1,
    resblock="2",
    resblock_kernel_sizes=(3,),
    resblock_dilation_sizes=((1, 3),),
    upsample_rates=(8, 5, 4),
    upsample_kernel_sizes=(16, 7, 8),
    upsample_initial_channel=32,
    gin_channels=8,
)
_MEL = MelConfig(n_fft=512, win_length=512, n_mels=40)
SETTINGS = ("audio.sample_rate=16000", "f0.hop_length=160", "f0.method=dio")
"""Of `extract`, for clips that such a voice could have been trained on."""


def small_voice(seed: int = 0, **changes: Any) -> Voice:
    """16 kHz, a frame every 160 samples, speakers ann and ben. changes: of its configuration."""
    config = dataclasses.replace(_CONFIG, **changes)
    extract = dataclasses.asdict(load_config(None, SETTINGS))
    sections = ("audio", "decode", "resample", "slice", "loudness", "f0", "encoder")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Synthesizer(config)
    return Voice(
        tensors=network.state_dict(),
        config=config,
        mel=_MEL,
        speakers=("ann", "ben"),
        encoder=VoiceEncoder(name="mfcc", dim=39),
        f0_method="dio",
        extraction={section: extract[section] for section in sections},
        pitch_hz={"ann": 440.0, "ben": 110.0},
    )


def write_overflowing_voice(folder: Path) -> Path:
    """Write a voice with finite weights and an output of NaN, as a training that diverged does."""
    voice = small_voice()
    tensors = {name: tensor * 1e30 for name, tensor in voice.tensors.items()}
    save_voice(folder, dataclasses.replace(voice, tensors=tensors))
    return folder


def write_small_voice(folder: Path, seed: int = 0, **changes: Any) -> Path:
    save_voice(folder, small_voice(seed, **changes))
    return folder
