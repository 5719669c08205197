"""Parameters to train, their optimizer and its learning rate."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from torch.optim import AdamW

from pipeline.errors import UserError
from pipeline.train.config import OptimizerConfig


def freeze(networks: Sequence[nn.Module], patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names match one of the regular expressions.

    Raises: UserError: when a pattern matches no parameter, or a network has none left to train.
    """
    parameters = [pair for network in networks for pair in network.named_parameters()]
    for pattern in patterns:
        try:
            frozen = [p for name, p in parameters if re.search(pattern, name)]
        except re.error as error:
            raise UserError(
                f"optimizer.freeze: '{pattern}' is not a regular expression: {error}"
            ) from error
        if not frozen:
            raise UserError(
                f"optimizer.freeze: '{pattern}' matches no parameter; examples of names are "
                f"{parameters[0][0]} and {parameters[-1][0]}"
            )
        for parameter in frozen:
            parameter.requires_grad_(False)
    for network in networks:
        if not trainable_names(network):
            raise UserError(
                f"optimizer.freeze leaves nothing to train in the {type(network).__name__}"
            )


def trainable_names(network: nn.Module) -> list[str]:
    """Return the names of the parameters that are trained, in the order of the optimizer."""
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


def make_optimizer(network: nn.Module, config: OptimizerConfig) -> AdamW:
    """Return AdamW for the parameters that are trained."""
    return AdamW(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimizerConfig, step: int, epoch: int) -> float:
    """Return the rate of a step, counted from 0: a linear warm-up, and a decay with every epoch."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return config.learning_rate * warm * config.decay**epoch
