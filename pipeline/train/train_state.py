"""The state of a run: networks, their optimizers and average, and the number of steps done.

Tested by tests/pipeline/train/test_trainer.py.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from models.checkpoint import CheckpointError
from models.input_file import parse_json
from models.synthesizer.blocks.discriminators import MultiPeriodDiscriminator
from models.synthesizer.config import SynthesizerConfig
from models.synthesizer.sovits.networks import Synthesizer
from models.synthesizer.step import GanStep, LossWeights
from pipeline.dataset.clip_index import Identity
from pipeline.train.config import TrainConfig
from pipeline.train.init_weights import NewRun, read_initial_weights
from pipeline.train.optimizer import freeze, make_optimizer, trainable_names
from pipeline.train.process_group import ProcessGroup
from pipeline.train.random_keys import seed_networks
from pipeline.train.run_folder import (
    Checkpoint,
    join,
    load_network_state,
    load_optimizer,
    network_tensors,
    optimizer_tensors,
    part_of,
)

REMEDY = (
    "start a new run with a lower optimizer.learning_rate, with optimizer.clip_norm, or with "
    "run.precision=bf16 or fp32"
)
Networks = tuple[Synthesizer, MultiPeriodDiscriminator]


class TrainState:
    """Everything that a step changes. A checkpoint holds all of it."""

    def __init__(
        self, networks: Networks, config: TrainConfig, group: ProcessGroup, steps_done: int = 0
    ) -> None:
        """Freeze parameters and make the average and the optimizers.

        networks: with their initial weights, on the device of `group`.
        """
        self.generator, self.discriminator = networks
        self.steps_done = steps_done
        optimizer = config.optimizer
        freeze(networks, optimizer.freeze)
        self.averaged = None
        if optimizer.ema is not None:
            self.averaged = copy.deepcopy(self.generator).requires_grad_(False)
        self.names_g, self.names_d = map(trainable_names, networks)
        self.step = GanStep(
            self.generator,
            self.discriminator,
            make_optimizer(self.generator, optimizer),
            make_optimizer(self.discriminator, optimizer),
            config.mel,
            LossWeights(**dataclasses.asdict(config.loss)),
            precision=config.run.precision,
            clip_norm=optimizer.clip_norm,
            reduce=group.all_reduce,
        )
        if config.run.compile:  # what works on segments, which all have the same length
            self.generator.dec.compile()
            self.discriminator.compile()

    @property
    def voice(self) -> Synthesizer:
        """The network to sing with: the average, where there is one."""
        return self.generator if self.averaged is None else self.averaged

    def tensors(self) -> dict[str, Tensor]:
        """Return copies on the CPU, by part and name."""
        parts = {
            "generator": network_tensors(self.generator),
            "discriminator": network_tensors(self.discriminator),
            "optim_g": optimizer_tensors(self.step.optim_g, self.names_g),
            "optim_d": optimizer_tensors(self.step.optim_d, self.names_d),
        }
        if self.averaged is not None:
            parts["averaged"] = network_tensors(self.averaged)
        return join(parts)

    def notes(self) -> dict[str, str]:
        """Return what a checkpoint notes beside the tensors."""
        return {
            "step": str(self.steps_done),
            "source_rate": str(self.generator.config.source_rate),
            "scaler": json.dumps(self.step.scaler.state_dict()),
        }


def resume_state(
    checkpoint: Checkpoint, config: TrainConfig, identity: Identity, group: ProcessGroup
) -> TrainState:
    """Return the state that a checkpoint holds.

    Raises: CheckpointError: when it does not fit the networks.
    """
    tensors, notes = checkpoint.read()
    try:
        source_rate, scaler = int(notes["source_rate"]), parse_json(notes["scaler"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.folder} lacks the notes of a run ({error})") from error
    networks = _build_networks(config, identity, source_rate, group)
    for network, part in zip(networks, ("generator", "discriminator"), strict=True):
        load_network_state(network, part_of(tensors, part), checkpoint.folder)
    state = TrainState(networks, config, group, checkpoint.step)
    if state.averaged is not None:
        load_network_state(state.averaged, part_of(tensors, "averaged"), checkpoint.folder)
    load_optimizer(state.step.optim_g, state.names_g, part_of(tensors, "optim_g"))
    load_optimizer(state.step.optim_d, state.names_d, part_of(tensors, "optim_d"))
    state.step.scaler.load_state_dict(scaler)
    return state


def new_state(
    init_from: Path | None,
    config: TrainConfig,
    identity: Identity,
    group: ProcessGroup,
    say: Callable[[str], None],
) -> TrainState:
    """Return the state of a new run: random weights, or those of the voice `init_from`.

    say: gets lines about the weights that are taken over.

    Raises: UserError: when the weights do not fit the run.
    """
    if init_from is None:
        networks = _build_networks(config, identity, identity.sample_rate, group)
        return TrainState(networks, config, group)
    shape = synthesizer_config(config, identity, identity.sample_rate)
    run = NewRun(shape, config.mel, identity.encoder, identity.speakers)
    initial = read_initial_weights(init_from, run)
    networks = _build_networks(config, identity, initial.source_rate, group)
    load_network_state(networks[0], initial.generator, init_from)
    if initial.discriminator is not None:
        load_network_state(networks[1], initial.discriminator, init_from)
    for line in initial.lines:
        say(f"from {init_from}: {line}")
    return TrainState(networks, config, group)


def synthesizer_config(
    config: TrainConfig, identity: Identity, source_rate: int
) -> SynthesizerConfig:
    """Return the settings of the networks for a dataset. source_rate: of their sine source."""
    return SynthesizerConfig(
        **dataclasses.asdict(config.model),
        units_dim=identity.encoder.dim,
        n_speakers=len(identity.speakers),
        sample_rate=identity.sample_rate,
        n_fft=config.mel.n_fft,
        source_rate=source_rate,
    )


def _build_networks(
    config: TrainConfig, identity: Identity, source_rate: int, group: ProcessGroup
) -> Networks:
    """Return networks on the device, with the weights that the seed gives them."""
    seed_networks(config.run.seed)
    shape = synthesizer_config(config, identity, source_rate)
    generator = Synthesizer(shape).to(group.device)
    discriminator = MultiPeriodDiscriminator(shape.spectral_norm, shape.discriminator_channels)
    return generator, discriminator.to(group.device)
