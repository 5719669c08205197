"""Frozen parameters, the optimizer's parameters and the learning rate."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from pipeline.errors import UserError
from pipeline.train.config import OptimizerConfig
from pipeline.train.optimizer import freeze, learning_rate, make_optimizer, trainable_names


def test_the_learning_rate_warms_up_and_decays_by_epochs() -> None:
    config = OptimizerConfig(learning_rate=0.5, decay=0.5, warmup_steps=4)
    rates = [learning_rate(config, step, step // 3) for step in range(7)]
    assert rates == [0.125, 0.25, 0.375, 0.25, 0.25, 0.25, 0.125]
    assert learning_rate(replace(config, warmup_steps=0), 0, 0) == 0.5


def test_frozen_parameters_are_in_no_optimizer() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    freeze([network], [r"^0\.", "1.bias"])
    assert trainable_names(network) == ["1.weight"]
    (group,) = make_optimizer(network, OptimizerConfig(weight_decay=0.5)).param_groups
    assert group["params"] == [network[1].weight] and group["weight_decay"] == 0.5
    with pytest.raises(UserError, match=r"'2' matches no parameter; .* 0\.weight and 1\.bias"):
        freeze([network], ["2"])
    with pytest.raises(UserError, match=r"'\(' is not a regular expression"):
        freeze([network], ["("])
    with pytest.raises(UserError, match="leaves nothing to train in the Sequential"):
        freeze([network], ["."])
