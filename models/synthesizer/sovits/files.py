"""Reading and writing of so-vits-svc voices: `G_*.pth`, `D_*.pth` and config.json.

The networks and the names of their tensors are the same; only the settings have other names.
Readable are training checkpoints, files of compress_model.py (half precision, without the posterior
encoder), bare state dicts, and safetensors with the same names.

Source: so-vits-svc (commit 730930d), utils.py, models.py, compress_model.py, configs_template/.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoint import OWN_HEADER, CheckpointError, load_foreign
from models.synthesizer.blocks.discriminators import MultiPeriodDiscriminator
from models.synthesizer.blocks.snake import Snake
from models.synthesizer.config import SynthesizerConfig
from models.synthesizer.sovits.config import (
    ENCODERS,
    LEARNING_RATE,
    SovitsConfig,
    bare_config,
    config_json,
    names_by_row,
    read_config,
)
from models.synthesizer.sovits.networks import Synthesizer
from models.synthesizer.tensor_layout import TensorLayout, layout_of, matching_tensors
from models.synthesizer.voice import (
    POSTERIOR,
    Voice,
    VoiceEncoder,
    atomic_file,
    layout_for,
    load_network,
    network_of,
    synthesizer_layout,
)

_FILTER_ERROR = 1e-3  # more than the rounding error of half precision

# Prefixes of keys that identify other files, and the kind of those files.
OTHER_KINDS = (
    ("enc_p.emb_phone.", "a voice of RVC, another network"),
    ("enc_p.emb_pitch.", "a voice of RVC, another network"),
    ("enc_p.tone_emb.", "a Bert-VITS2 model, which speaks text"),
    ("enc_p.emb.", "a VITS model, which speaks text"),
    ("enc_p.pit.", "a voice of so-vits-svc 5, another network"),
    ("unit2ctrl.", "a DDSP-SVC model, another network"),
    ("denoise_fn.", "a diffusion model"),
    ("decoder.denoise_fn.", "a diffusion model"),
    ("unet.encoder.", "a network that estimates f0 (RMVPE)"),
    ("cent_table", "a network that estimates f0 (FCPE)"),
    ("conv1_BN.", "a network that estimates f0 (CREPE)"),
    ("conv_pre.", "a vocoder"),
    ("ups.0.", "a vocoder"),
    ("lstm.weight_ih_l0", "a speaker encoder"),
    ("feature_extractor.", "an encoder of units, which `encoder.checkpoint` names"),
    ("encoder.layers.", "an encoder of units, which `encoder.checkpoint` names"),
    ("encoder.blocks.", "an encoder of units, which `encoder.checkpoint` names"),
    ("encoder.embed_positions.", "an encoder of units, which `encoder.checkpoint` names"),
)
_SYNTHESIZER = ("a synthesizer (G_*.pth)", ("enc_p.", "enc_q.", "dec.", "emb_g."))
_DISCRIMINATOR = ("a discriminator (D_*.pth)", ("discriminators.",))


@dataclass(frozen=True, kw_only=True)
class Training:
    """State of a training in a G_*.pth or D_*.pth.

    optimizer: state of an AdamW over all parameters in order, for `load_state_dict`; None where the
    file has none.
    """

    epoch: int
    learning_rate: float
    optimizer: dict[str, Any] | None


def from_sovits(g_path: str | os.PathLike[str], config_path: str | os.PathLike[str]) -> Synthesizer:
    """Load the voice's network, in eval mode, on the CPU in float32.

    Raises: CheckpointError: when settings or tensors are missing, unknown or do not match, or the
    file has another network.
    """
    config = read_config(config_path).network
    return network_of(config, _synthesizer_tensors(Path(g_path), config))


def read_voice(
    g_path: str | os.PathLike[str],
    config_path: str | os.PathLike[str],
    *,
    any_speakers: bool = False,
) -> Voice:
    """Read a so-vits-svc voice as a Cantor voice; its step is the number in the file name.

    any_speakers: take the number of speakers from the file, not the configuration. For base models,
    which come without one: a configuration of the same networks will do.

    Raises: CheckpointError: when the files do not match or the encoder is not known.
    """
    path, config = Path(g_path), read_config(config_path)
    if config.encoder is None:
        raise CheckpointError(
            f"{config_path} lacks model.speech_encoder, and no encoder is known for units of width "
            f"{config.network.units_dim}; choose from {', '.join(ENCODERS)}"
        )
    network, speakers = config.network, config.speakers
    if any_speakers:
        network = dataclasses.replace(network, n_speakers=_rows(path, network.n_speakers))
        speakers = {}
    number = re.search(r"(\d+)(?=[^\d]*$)", path.stem)
    return Voice(
        tensors=_synthesizer_tensors(path, network),
        config=network,
        mel=config.mel,
        speakers=names_by_row(speakers),
        encoder=VoiceEncoder(name=config.encoder, dim=network.units_dim),
        expand=config.expand,
        step=int(number[1]) if number else 0,
    )


def read_discriminator(
    d_path: str | os.PathLike[str], spectral_norm: bool = False
) -> MultiPeriodDiscriminator:
    """Load the discriminators of D_*.pth.

    Raises: CheckpointError: when tensors are missing, unknown or do not match.
    """
    path = Path(d_path)
    layout = _discriminator_layout(spectral_norm)
    content = _tensors(path, _DISCRIMINATOR, _SYNTHESIZER)
    tensors = matching_tensors(path, "so-vits-svc's discriminators", content, layout)
    with torch.device("meta"):
        network = MultiPeriodDiscriminator(spectral_norm)
    network.load_state_dict(tensors, assign=True)
    return network


def read_training(path: str | os.PathLike[str], network: nn.Module) -> Training:
    """Read the training state of a G_*.pth or D_*.pth, which contains `network`.

    Raises: CheckpointError: when the optimizer's state does not match the network's parameters.
    """
    path = Path(path)
    content = load_foreign(path)
    content = content if isinstance(content, dict) else {}
    epoch, rate = content.get("iteration", 0), content.get("learning_rate", 1e-4)
    if type(epoch) is not int or not isinstance(rate, float | int):
        raise CheckpointError(f"{path} has an iteration or a learning_rate that is not a number")
    state = content.get("optimizer")
    if not isinstance(state, dict) or not state.get("state"):
        return Training(epoch=epoch, learning_rate=float(rate), optimizer=None)
    try:
        _require_optimizer(state, network)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Training(epoch=epoch, learning_rate=float(rate), optimizer=state)


def to_sovits(
    network: Synthesizer,
    path: str | os.PathLike[str],
    *,
    config: SovitsConfig | None = None,
    discriminator: nn.Module | None = None,
    training: Training | None = None,
    discriminator_training: Training | None = None,
) -> None:
    """Write `path`, named like G_1000.pth, and config.json in the same folder, for so-vits-svc.

    so-vits-svc loads exactly these weights; its training settings come from its own template.

    config: None: that of the bare network, with numbered speakers and no encoder.
    discriminator: written too, as D_1000.pth. training: with an optimizer, so-vits-svc resumes from
    it; without one, it starts at epoch 1 with a new one.

    Raises: ValueError: when so-vits-svc does not have the network or a state, or discriminators are
    to be written and the file name does not start with G_.
    """
    path = Path(path)
    config = config or bare_config(network.config)
    if config.network != network.config:
        raise ValueError("config does not match the network: their settings differ")
    if discriminator is not None and not path.name.startswith("G_"):
        raise ValueError(f"{path} must be named like G_1000.pth, so that D_1000.pth matches it")
    described = config_json(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, network, synthesizer_layout(network.config, _has_posterior(network)), training)
    if discriminator is not None:
        beside = path.with_name("D_" + path.name.removeprefix("G_"))
        layout = _discriminator_layout(network.config.spectral_norm)
        _write(beside, discriminator, layout, discriminator_training)
    with atomic_file(path.parent / "config.json") as temporary:
        text = json.dumps(described, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def write_voice(voice: Voice, path: str | os.PathLike[str]) -> None:
    """Write a Cantor voice in so-vits-svc's format (`to_sovits`).

    Raises: ValueError: when so-vits-svc does not have its encoder, or it uses a codebook.
    """
    if voice.encoder.codebook_sha256 is not None:
        raise ValueError("so-vits-svc has no unit codebooks, but this voice uses one")
    config = SovitsConfig(
        network=voice.config,
        mel=voice.mel,
        speakers={name: row for row, name in enumerate(voice.speakers)},
        encoder=voice.encoder.name,
        expand=voice.expand,
    )
    to_sovits(load_network(voice), path, config=config)


def _tensors(
    path: Path, wanted: tuple[str, tuple[str, ...]], other: tuple[str, tuple[str, ...]]
) -> dict[str, Tensor]:
    """Return the tensors in a file, unless it is of another known kind than `wanted`."""
    metadata: dict[str, str] = {}
    content = load_foreign(path, metadata)
    what, starts = wanted
    if OWN_HEADER in metadata:
        raise CheckpointError(f"{path} has Cantor's own format; it is not {what} of so-vits-svc")
    content = state_dict_in(path, content)
    names = [str(name) for name in content]
    if all(name.startswith("module.") for name in names):  # of DistributedDataParallel
        content = {str(name).removeprefix("module."): value for name, value in content.items()}
        names = list(content)
    seems_right = any(name.startswith(starts) for name in names)
    for start, kind in (*((start, other[0]) for start in other[1]), *OTHER_KINDS):
        if seems_right and not start.startswith(starts):
            continue
        if any(name.startswith(start) for name in names):
            raise CheckpointError(f"{path} is {kind}, not {what} of so-vits-svc")
    return content


def state_dict_in(path: Path, content: Any) -> dict[str, Any]:
    """Return the state dict in a file: under "model" or another program's key, or bare.

    Raises: CheckpointError: when the content is not a network's weights.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} has a {type(content).__name__}, not a network's weights")
    if any(isinstance(v, dict) and "cluster_centers_" in v for v in content.values()):
        raise CheckpointError(f"{path} has cluster centres (k-means), not a network")
    for name in ("model", "weight", "generator", "model_g", "state_dict"):
        if isinstance(content.get(name), dict):
            return content[name]
    return content


def _synthesizer_tensors(path: Path, config: SynthesizerConfig) -> dict[str, Tensor]:
    content = _tensors(path, _SYNTHESIZER, _DISCRIMINATOR)
    described = "the network that config.json describes"
    layout = layout_for(path, config, content, described)
    tensors = matching_tensors(path, described, content, layout)
    return tensors | _filters(path, content, layout)


def _filters(path: Path, content: Mapping[str, Any], layout: TensorLayout) -> dict[str, Tensor]:
    """Return exact anti-aliasing filters that replace the file's rounded ones.

    They are not weights: so-vits-svc computes them and ignores its files. So filters that were
    rounded to half precision are computed again.
    """
    names = [name for name in layout.buffers if name.endswith(".filter")]
    if not names:
        return {}
    own = Snake(1).upsample.filter
    other = [name for name in names if (content[name] - own).abs().max() > _FILTER_ERROR]
    if other:
        raise CheckpointError(f"{path} has another filter than so-vits-svc in {other[0]}")
    return {name: own.clone() for name in names if content[name].dtype != torch.float32}


def _rows(path: Path, otherwise: int) -> int:
    table = _tensors(path, _SYNTHESIZER, _DISCRIMINATOR).get("emb_g.weight")
    return len(table) if isinstance(table, Tensor) and table.ndim == 2 else otherwise


def _discriminator_layout(spectral_norm: bool) -> TensorLayout:
    return layout_of(lambda: MultiPeriodDiscriminator(spectral_norm))


def _has_posterior(network: nn.Module) -> bool:
    return any(name.startswith(POSTERIOR) for name in network.state_dict())


def _write(path: Path, network: nn.Module, layout: TensorLayout, training: Training | None) -> None:
    tensors = matching_tensors(path, "so-vits-svc", network.state_dict(), layout)
    training = training or Training(epoch=0, learning_rate=LEARNING_RATE, optimizer=None)
    optimizer = training.optimizer
    if optimizer is not None:
        _require_optimizer(optimizer, network)
        # so-vits-svc's schedule needs this to resume after the first epoch.
        (group,) = optimizer["param_groups"]
        group = {"initial_lr": training.learning_rate, **group}
        optimizer = {**optimizer, "param_groups": [group]}
    content = {
        "model": tensors,
        "iteration": training.epoch if optimizer else 0,
        "optimizer": optimizer,
        "learning_rate": training.learning_rate,
    }
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def _require_optimizer(state: Mapping[str, Any], network: nn.Module) -> None:
    """Check that `state` is that of one AdamW over all parameters, in order.

    Raises: ValueError: when it is not (the message names the difference).
    """
    parameters = list(network.parameters())
    groups = state.get("param_groups")
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(groups[0], dict):
        raise ValueError("the optimizer's state does not have exactly one parameter group")
    if groups[0].get("params") != list(range(len(parameters))):
        count = len(parameters)
        raise ValueError(f"the optimizer's state does not have {count} parameters in order")
    for index, moments in state.get("state", {}).items():
        for name in ("exp_avg", "exp_avg_sq"):
            moment = moments.get(name) if isinstance(moments, dict) else None
            if index not in range(len(parameters)) or not isinstance(moment, Tensor):
                raise ValueError(f"the optimizer's state lacks {name} of parameter {index}")
            if moment.shape != parameters[index].shape:
                raise ValueError(
                    f"{name} of parameter {index} in the optimizer's state is "
                    f"{tuple(moment.shape)}, not {tuple(parameters[index].shape)}"
                )
