"""Voices as ONNX graphs: `voice.onnx`, `voice.json`, and `melody.onnx` with a pitch predictor.

The graphs are `Synthesizer.infer` and `Synthesizer.predict_f0` for any number of frames, without
training-only parts and with weight norms folded. They draw no random numbers: noise and phases are
inputs. The sine source is part of the graph, with phases in float64 as in torch. The JSON is that
of `voice.py`; the graphs' metadata contain its hash. docs/export.md lists the inputs.

B batch, S speakers, F frames, T samples; M is 1 for a constant mix of speakers, F for a mix over
time.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.onnx_session import FirstRun, open_session
from models.synthesizer.blocks.noise import Noise
from models.synthesizer.blocks.source import HARMONICS, first_phase
from models.synthesizer.blocks.weight_norm import fold_weight_norm
from models.synthesizer.config import SynthesizerConfig
from models.synthesizer.sovits.networks import Synthesizer
from models.synthesizer.voice import (
    DESCRIPTION,
    Voice,
    atomic_file,
    described_network,
    load_network,
    read_description,
    voice_folder,
    write_description,
)

GRAPH = "voice.onnx"
MELODY = "melody.onnx"
_OPSET = 18
_CONTENT = ("units", "f0", "voiced", "speaker", "volume")  # inputs of both graphs
_VARYING = {  # dimensions that a graph leaves open
    "units": {0: "batch", 2: "frames"},
    "f0": {0: "batch", 1: "frames"},
    "voiced": {0: "batch", 1: "frames"},
    "speaker": {0: "batch", 1: "mix_frames"},
    "volume": {0: "batch", 1: "frames"},
    "noise": {0: "batch", 2: "frames"},
    "source_noise": {0: "batch", 2: "samples"},
    "phase": {0: "batch"},
    "wav": {0: "batch", 1: "samples"},
    "melody": {0: "batch", 1: "frames"},
}


def export_voice(folder: str | os.PathLike[str], voice: Voice) -> None:
    """Write the voice's graphs and description into `folder`, which is created.

    Each file is written atomically. If the process is killed between them, `OnnxSynthesizer`
    refuses the result.

    Raises: ValueError: when onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise ValueError("writing ONNX graphs needs onnx: pip install 'cantor[onnx]'") from error
    folder = Path(folder)
    graphs = {name: onnx.load_model_from_string(graph) for name, graph in _graphs(voice).items()}
    with write_description(folder, voice) as metadata:
        for name, graph in graphs.items():
            onnx.helper.set_model_props(graph, metadata)
            with atomic_file(folder / name) as temporary:
                onnx.save_model(graph, str(temporary))
        if MELODY not in graphs:
            (folder / MELODY).unlink(missing_ok=True)  # of a voice that was here before


class OnnxSynthesizer:
    """The inference interface of `Synthesizer`, run by onnxruntime.

    voice: the description; it has no tensors.
    """

    def __init__(self, path: str | os.PathLike[str], device: str = "cpu") -> None:
        """Open a voice; path: the folder, or its `voice.onnx` or `voice.json`.

        onnxruntime gets as many threads as torch has in this process now.

        Raises: CheckpointError: when a file is missing, is not such a graph or belongs to another
        voice; ValueError: when onnxruntime or the device is missing.
        """
        folder = voice_folder(Path(path), GRAPH)
        self._graph, self.voice = _open(folder / GRAPH, device)
        self.config = self.voice.config
        if self.config.predict_f0:
            self._melody, _ = _open(folder / MELODY, device)

    def infer(
        self,
        units: Tensor,
        f0: Tensor,
        voiced: Tensor,
        speaker: Tensor,
        *,
        noise: Noise,
        noise_scale: float = 0.35,
        predict_f0: bool = False,
        volume: Tensor | None = None,
        phase: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run `Synthesizer.infer`; the same noise gives the same audio."""
        if predict_f0:
            f0 = self.predict_f0(units, f0, voiced, speaker, volume)
        batch, frames = f0.shape
        latents = noise.normal(f0.new_empty(batch, self.config.inter_channels, frames))
        if phase is None:
            phase = first_phase(f0, noise)
        samples = frames * self.config.hop_length
        feed = self._content(units, f0, voiced, speaker, volume) | {
            "noise_scale": torch.tensor(noise_scale),
            "noise": latents,
            "source_noise": noise.normal(f0.new_empty(batch, HARMONICS, samples)),
            "phase": phase.double(),
        }
        return _run(self._graph, feed).to(f0.device), f0

    def predict_f0(
        self,
        units: Tensor,
        f0: Tensor,
        voiced: Tensor,
        speaker: Tensor,
        volume: Tensor | None = None,
    ) -> Tensor:
        """Run `Synthesizer.predict_f0`."""
        if not self.config.predict_f0:
            raise ValueError("this voice has no pitch predictor (model.predict_f0 was false)")
        feed = self._content(units, f0, voiced, speaker, volume)
        return _run(self._melody, feed).to(f0.device)

    def _content(
        self, units: Tensor, f0: Tensor, voiced: Tensor, speaker: Tensor, volume: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the inputs that both graphs share."""
        inputs = {"units": units, "f0": f0, "voiced": voiced.bool(), "speaker": self._mix(speaker)}
        if not self.config.volume_embedding:
            return inputs
        if volume is None:
            raise ValueError("this voice needs the volume of each frame")
        return inputs | {"volume": volume}

    def _mix(self, speaker: Tensor) -> Tensor:
        """Convert the speaker argument of `infer` to mix weights (B, M, S)."""
        count = self.config.n_speakers
        if not speaker.is_floating_point():
            return torch.eye(count, device=speaker.device)[speaker].unsqueeze(1)
        if speaker.shape[-1] != count:
            raise ValueError(
                f"the mix has weights for {speaker.shape[-1]} speakers, but this voice has {count}"
            )
        return speaker if speaker.dim() == 3 else speaker.unsqueeze(1)


def _open(path: Path, device: str) -> tuple[Any, Voice]:
    """Open a session and read its voice."""
    example = _example(described_network(path))
    names = _CONTENT if path.name == MELODY else tuple(example)
    feed = {name: example[name].numpy() for name in names if name in example}
    first_run = FirstRun(f"the inputs that {DESCRIPTION} describes", feed, _description)
    session = open_session(
        path, torch.device(device), "a voice as ONNX needs", "compute.device", first_run
    )
    return session, _description(path, session)


def _description(path: Path, session: Any) -> Voice:
    return read_description(path, session.get_modelmeta().custom_metadata_map)


def _run(session: Any, feed: Mapping[str, Tensor]) -> Tensor:
    """Run a session and return its output on the CPU."""
    arrays = {name: tensor.contiguous().cpu().numpy() for name, tensor in feed.items()}
    return torch.from_numpy(session.run(None, arrays)[0])


class _Infer(nn.Module):
    """`Synthesizer.infer` with its noise as an input."""

    def __init__(self, network: Synthesizer) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        units: Tensor,
        f0: Tensor,
        voiced: Tensor,
        speaker: Tensor,
        noise_scale: Tensor,
        noise: Tensor,
        source_noise: Tensor,
        phase: Tensor,
        volume: Tensor | None = None,
    ) -> Tensor:
        wav, _ = self.network.infer(
            units,
            f0,
            voiced,
            speaker,
            noise=_GivenNoise(noise, source_noise),
            noise_scale=noise_scale,
            volume=volume,
            phase=phase,
        )
        return wav


class _GivenNoise:
    """Given random numbers, in the order in which `Synthesizer.infer` draws them."""

    def __init__(self, *drawn: Tensor) -> None:
        self._drawn = iter(drawn)

    def normal(self, like: Tensor) -> Tensor:
        return next(self._drawn)


class _PredictF0(nn.Module):
    """`Synthesizer.predict_f0` as a module."""

    def __init__(self, network: Synthesizer) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        units: Tensor,
        f0: Tensor,
        voiced: Tensor,
        speaker: Tensor,
        volume: Tensor | None = None,
    ) -> Tensor:
        return self.network.predict_f0(units, f0, voiced, speaker, volume)


def _graphs(voice: Voice) -> dict[str, bytes]:
    """Build the graphs, by file name."""
    network = fold_weight_norm(load_network(voice))
    network.dec.infer = network.dec.forward  # a trace would fix the number of tiles
    example = _example(voice.config)
    graphs = {GRAPH: _trace(_Infer(network), example, "wav")}
    if voice.config.predict_f0:
        content = {name: example[name] for name in _CONTENT if name in example}
        graphs[MELODY] = _trace(_PredictF0(network), content, "melody")
    return graphs


def _trace(network: nn.Module, example: dict[str, Tensor], output: str) -> bytes:
    """Export with torch's older exporter.

    The newer one gives the same values, but takes fifty times as long and needs onnxscript.
    """
    names = [*example, output]
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its deprecation and the shape checks it skips
        torch.onnx.export(
            network,
            f=file,
            kwargs=example,
            input_names=names[:-1],
            output_names=[output],
            dynamic_axes={name: _VARYING[name] for name in names if name in _VARYING},
            opset_version=_OPSET,
            dynamo=False,
        )
    return file.getvalue()


def _example(config: SynthesizerConfig) -> dict[str, Tensor]:
    """Return inputs to trace with, in the order of `_Infer.forward`; the values do not matter."""
    frames = 24
    example = {
        "units": torch.zeros(1, config.units_dim, frames),
        "f0": torch.full((1, frames), 220.0),
        "voiced": torch.ones(1, frames, dtype=torch.bool),
        "speaker": torch.ones(1, 1, config.n_speakers),
        "noise_scale": torch.tensor(0.0),
        "noise": torch.zeros(1, config.inter_channels, frames),
        "source_noise": torch.zeros(1, HARMONICS, frames * config.hop_length),
        "phase": torch.zeros(1, HARMONICS, dtype=torch.float64),
    }
    if config.volume_embedding:
        example["volume"] = torch.ones(1, frames)
    return example
