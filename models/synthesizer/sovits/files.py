"""Voices of so-vits-svc, both ways: `G_*.pth`, `D_*.pth` and the config.json beside them.

The networks are the same and so are the names of their tensors; only the settings are called
otherwise. Read are the files of a training, those that compress_model.py made of them (half
precision, without the posterior encoder), bare state dicts, and safetensors of the same names.

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
from models.synthesizer.tensor_layout import TensorLayout, fitted, layout_of
from models.synthesizer.voice import (
    POSTERIOR,
    Voice,
    VoiceEncoder,
    load_network,
    network_of,
    replacing,
    synthesizer_layout,
)

_FILTER_ERROR = 1e-3  # more than half precision makes

# A key that only such files have (at its start), and what they are.
STRANGERS = (
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
    """Where a G_*.pth or D_*.pth left off.

    optimizer: the state of an AdamW over all parameters in their order, for `load_state_dict`;
    None where the file has none.
    """

    epoch: int
    learning_rate: float
    optimizer: dict[str, Any] | None


def from_sovits(g_path: str | os.PathLike[str], config_path: str | os.PathLike[str]) -> Synthesizer:
    """The voice's network, in eval mode, on the CPU in float32.

    Raises CheckpointError for settings and tensors that are missing, unknown, or not made for each
    other, and for files of other networks.
    """
    config = read_config(config_path).network
    return network_of(config, _synthesizer_tensors(Path(g_path), config))


def read_voice(
    g_path: str | os.PathLike[str],
    config_path: str | os.PathLike[str],
    *,
    any_speakers: bool = False,
) -> Voice:
    """The voice, as ours are; its step is the number in the name of the file.

    any_speakers: the number of speakers is the file's, whatever the configuration says. So read
    are base models, which come with none: a configuration of the same networks serves.

    Raises CheckpointError as `from_sovits`, and where the encoder is not known.
    """
    path, config = Path(g_path), read_config(config_path)
    if config.encoder is None:
        raise CheckpointError(
            f"{config_path} lacks model.speech_encoder, and none is known to give units of "
            f"{config.network.units_dim} numbers; there are {', '.join(ENCODERS)}"
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
    """The discriminators of D_*.pth. Raises CheckpointError as `from_sovits`."""
    path = Path(d_path)
    layout = _discriminator_layout(spectral_norm)
    content = _tensors(path, _DISCRIMINATOR, _SYNTHESIZER)
    tensors = fitted(path, "so-vits-svc's discriminators", content, layout)
    with torch.device("meta"):
        network = MultiPeriodDiscriminator(spectral_norm)
    network.load_state_dict(tensors, assign=True)
    return network


def read_training(path: str | os.PathLike[str], network: nn.Module) -> Training:
    """What a G_*.pth or D_*.pth says of its training, `network` being the one in it.

    Raises CheckpointError for an optimizer's state that is not of the network's parameters.
    """
    path = Path(path)
    content = load_foreign(path)
    content = content if isinstance(content, dict) else {}
    epoch, rate = content.get("iteration", 0), content.get("learning_rate", 1e-4)
    if type(epoch) is not int or not isinstance(rate, float | int):
        raise CheckpointError(f"{path} has an iteration or a learning_rate that is no number")
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
    """Write `path`, so named as G_1000.pth, and a config.json beside it: so-vits-svc loads them
    to the same bits, and keeps its settings of training from its own template.

    config: None: one of the network alone, with speakers by number and no encoder.
    discriminator: is written too, as D_1000.pth. training: with the optimizer, which so-vits-svc
    goes on from; without, it begins at epoch 1 with a new one.

    Raises ValueError where the network or a state is not what so-vits-svc has, and for a name
    without a number in it where discriminators are written.
    """
    path = Path(path)
    config = config or bare_config(network.config)
    if config.network != network.config:
        raise ValueError("config is not of this network: their settings differ")
    if discriminator is not None and not path.name.startswith("G_"):
        raise ValueError(f"{path} must be named like G_1000.pth: D_1000.pth lies beside it")
    described = config_json(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, network, synthesizer_layout(network.config, _has_posterior(network)), training)
    if discriminator is not None:
        beside = path.with_name("D_" + path.name.removeprefix("G_"))
        layout = _discriminator_layout(network.config.spectral_norm)
        _write(beside, discriminator, layout, discriminator_training)
    with replacing(path.parent / "config.json") as temporary:
        text = json.dumps(described, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def write_voice(voice: Voice, path: str | os.PathLike[str]) -> None:
    """Write a voice of ours as `to_sovits` does.

    Raises ValueError where so-vits-svc does not have its encoder.
    """
    if voice.encoder.codebook_sha256 is not None:
        raise ValueError("so-vits-svc has no codebooks of units, and this voice sings from one")
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
    """Names and tensors in a file that is of the `wanted` kind, or at least of no known other."""
    metadata: dict[str, str] = {}
    content = load_foreign(path, metadata)
    what, starts = wanted
    if OWN_HEADER in metadata:
        raise CheckpointError(f"{path} is of our own format, not {what} of so-vits-svc")
    content = unwrapped(path, content)
    names = [str(name) for name in content]
    if all(name.startswith("module.") for name in names):  # of DistributedDataParallel
        content = {str(name).removeprefix("module."): value for name, value in content.items()}
        names = list(content)
    seems_right = any(name.startswith(starts) for name in names)
    for start, stranger in (*((start, other[0]) for start in other[1]), *STRANGERS):
        if seems_right and not start.startswith(starts):
            continue
        if any(name.startswith(start) for name in names):
            raise CheckpointError(f"{path} is {stranger}, not {what} of so-vits-svc")
    return content


def unwrapped(path: Path, content: Any) -> dict[str, Any]:
    """The state dict in a file: under "model", or what other programs call it, or bare."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a network's weights")
    if any(isinstance(v, dict) and "cluster_centers_" in v for v in content.values()):
        raise CheckpointError(f"{path} holds centres of clusters (k-means), not a network")
    for name in ("model", "weight", "generator", "model_g", "state_dict"):
        if isinstance(content.get(name), dict):
            return content[name]
    return content


def _synthesizer_tensors(path: Path, config: SynthesizerConfig) -> dict[str, Tensor]:
    content = _tensors(path, _SYNTHESIZER, _DISCRIMINATOR)
    posterior = any(str(name).startswith(POSTERIOR) for name in content)
    layout = synthesizer_layout(config, posterior)
    tensors = fitted(path, "the network that config.json describes", content, layout)
    return tensors | _filters(path, content, layout)


def _filters(path: Path, content: Mapping[str, Any], layout: TensorLayout) -> dict[str, Tensor]:
    """The filters of anti-aliasing that are to be put in place of the file's.

    They are no weights: so-vits-svc computes them whatever its files say. So those that were
    rounded to half precision are made anew.
    """
    names = [name for name in layout.buffers if name.endswith(".filter")]
    if not names:
        return {}
    own = Snake(1).upsample.filter
    strange = [name for name in names if (content[name] - own).abs().max() > _FILTER_ERROR]
    if strange:
        raise CheckpointError(f"{path} has another filter than so-vits-svc in {strange[0]}")
    return {name: own.clone() for name in names if content[name].dtype != torch.float32}


def _rows(path: Path, otherwise: int) -> int:
    table = _tensors(path, _SYNTHESIZER, _DISCRIMINATOR).get("emb_g.weight")
    return len(table) if isinstance(table, Tensor) and table.ndim == 2 else otherwise


def _discriminator_layout(spectral_norm: bool) -> TensorLayout:
    return layout_of(lambda: MultiPeriodDiscriminator(spectral_norm))


def _has_posterior(network: nn.Module) -> bool:
    return any(name.startswith(POSTERIOR) for name in network.state_dict())


def _write(path: Path, network: nn.Module, layout: TensorLayout, training: Training | None) -> None:
    tensors = fitted(path, "so-vits-svc", network.state_dict(), layout)
    training = training or Training(epoch=0, learning_rate=LEARNING_RATE, optimizer=None)
    optimizer = training.optimizer
    if optimizer is not None:
        _require_optimizer(optimizer, network)
        # Its schedule goes on from an epoch after the first only with this.
        (group,) = optimizer["param_groups"]
        group = {"initial_lr": training.learning_rate, **group}
        optimizer = {**optimizer, "param_groups": [group]}
    content = {
        "model": tensors,
        "iteration": training.epoch if optimizer else 0,
        "optimizer": optimizer,
        "learning_rate": training.learning_rate,
    }
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def _require_optimizer(state: Mapping[str, Any], network: nn.Module) -> None:
    """Raises ValueError where `state` is not that of one AdamW over all parameters, in order."""
    parameters = list(network.parameters())
    groups = state.get("param_groups")
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(groups[0], dict):
        raise ValueError("the optimizer's state has not one group of parameters")
    if groups[0].get("params") != list(range(len(parameters))):
        raise ValueError(f"the optimizer's state is not of {len(parameters)} parameters in order")
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
