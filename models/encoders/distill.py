"""Distillation of a network to a smaller one: DPHuBERT (Peng et al., 2023).

There are two phases. In "prune" the student starts as the teacher with gates
(`models.encoders.pruning`) and learns weights and gates together, while an augmented Lagrangian
moves its expected size to the target. Then it is pruned, and in "finetune" the dense network is
trained further. In both, selected hidden states of the student, after a linear projection, are
matched to the teacher's by L1 and cosine losses.

Axes as in `models.encoders.wav2vec2`.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.encoders.pruning import GATE_KINDS, GateKind, add_gates, expected_parameters, prune
from models.encoders.quant_noise import quant_noise
from models.encoders.wav2vec2 import Attention, FeedForward, TransformerLayer, Wav2Vec2

Phase = Literal["prune", "finetune"]

_WEIGHTS = ("l1_weight", "cosine_weight")
_POSITIVE = (
    "learning_rate",
    "gate_learning_rate",
    "multiplier_learning_rate",
    "finetune_learning_rate",
    "clip_norm",
)
_SHARES = (
    "warmup",
    "sparsity_warmup",
    "finetune_warmup",
    "dropout",
    "layer_drop",
    "quant_noise",
)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Settings of the distillation. The defaults are those of DPHuBERT's published recipe.

    sparsity: share of the teacher's parameters to remove (without its final projection).
    gates: kinds of parts that may be pruned.
    layers: layers whose outputs are matched, 0 is the input of the first layer; None: 0, the last,
        and those at a third and two thirds. Layer 0 has its own projection, the others share one.
    cosine: "raw" is minus the similarity, "log_sigmoid" DistilHuBERT's -log(sigmoid(similarity)).
    gate_learning_rate: Adam moves a gate by about this much per step, and it must move by about 6
        to close. None: 0.02 as published, more in runs of less than 1500 steps.
    multiplier_learning_rate: of the two Lagrange multipliers. None: 0.02 as published, more in runs
        of less than 7500 steps; if it is too small, the sparsity overshoots.
    dropout, layer_drop: of the student in training, after each block and of whole layers.
    quant_noise: share of weight blocks zeroed in training (`models.encoders.quant_noise`).

    Learning rates rise linearly over the first `warmup` share of a phase, then fall linearly to 0.
    The target sparsity rises linearly over the first `sparsity_warmup` share of the steps.
    """

    sparsity: float = 0.75
    steps: int = 50_000
    finetune_steps: int = 25_000
    gates: tuple[GateKind, ...] = GATE_KINDS
    layers: tuple[int, ...] | None = None
    l1_weight: float = 1.0
    cosine_weight: float = 1.0
    cosine: Literal["raw", "log_sigmoid"] = "raw"
    learning_rate: float = 2e-4
    gate_learning_rate: float | None = None
    multiplier_learning_rate: float | None = None
    finetune_learning_rate: float = 1e-4
    warmup: float = 0.3
    sparsity_warmup: float = 0.1
    finetune_warmup: float = 0.2
    clip_norm: float = 10.0
    dropout: float = 0.0
    layer_drop: float = 0.0
    quant_noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise ValueError(f"distill.sparsity is {self.sparsity}; it must lie between 0 and 1")
        for name, least in (("steps", 1), ("finetune_steps", 0), *((n, 0) for n in _WEIGHTS)):
            if not getattr(self, name) >= least:
                raise ValueError(
                    f"distill.{name} is {getattr(self, name)}; it must be {least} or more"
                )
        unknown = [kind for kind in self.gates if kind not in GATE_KINDS]
        if unknown or not self.gates:
            raise ValueError(
                f"distill.gates is [{', '.join(self.gates)}]; name one or more of "
                f"{', '.join(GATE_KINDS)}"
            )
        if self.cosine not in ("raw", "log_sigmoid"):
            raise ValueError(f"distill.cosine is {self.cosine!r}; it must be raw or log_sigmoid")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"distill.{name} is {value}; it must be above 0")
        for name in _SHARES:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"distill.{name} is {getattr(self, name)}; it must lie in 0 to below 1"
                )


@dataclass(frozen=True)
class StepReport:
    """Result of one step. sparsity: as expected from the gates (in "finetune": actual)."""

    loss: float
    l1: float
    cosine: float
    sparsity: float
    target_sparsity: float


class Distillation:
    """One phase of training: student, teacher and optimizer.

    Call `step` for `cfg.steps` (or `finetune_steps`) steps, then `pruned` or `finished`.
    """

    def __init__(
        self, teacher: Wav2Vec2, student: Wav2Vec2, cfg: DistillConfig, phase: Phase
    ) -> None:
        """Take over `student`: the result of `gated_student` or of `pruned`."""
        self.cfg, self.phase = cfg, phase
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = student.train()
        self.layers = cfg.layers or default_layers(len(teacher.layers))
        check_layers(self.layers, len(teacher.layers))
        self.full_size = _size_without_projection(teacher)
        device, width = teacher.projection.weight.device, teacher.config.width
        self.projections = nn.ModuleDict({name: _identity(width) for name in ("first", "rest")}).to(
            device
        )
        self.multipliers = nn.Parameter(torch.zeros(2, device=device))
        _add_quant_noise(student, cfg.quant_noise)
        _add_dropout(student, cfg.dropout, cfg.layer_drop)
        self.optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.AdamW:
        weights: list[nn.Parameter] = []
        gates: list[nn.Parameter] = []
        for name, parameter in self.student.named_parameters():
            (gates if name.endswith("log_alpha") else weights).append(parameter)
        rate = self.cfg.learning_rate
        if self.phase == "finetune":
            rate = self.cfg.finetune_learning_rate
        groups = [{"params": [*weights, *self.projections.parameters()], "peak": rate}]
        if self.phase == "prune":
            steps = self.cfg.steps
            peak = self.cfg.gate_learning_rate or max(0.02, 30 / steps)
            betas = _betas(steps)
            groups.append({"params": gates, "peak": peak, "betas": betas})
            peak = self.cfg.multiplier_learning_rate or max(0.02, 150 / steps)
            groups.append(
                {"params": [self.multipliers], "peak": peak, "betas": betas, "maximize": True}
            )
        return torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)

    def step(self, index: int, wavs: Tensor, num_samples: list[int]) -> StepReport:
        """Train on one padded batch (B, T). index: of this step in its phase, from 0."""
        cfg = self.cfg
        total, warmup = cfg.steps, cfg.warmup
        if self.phase == "finetune":
            total, warmup = cfg.finetune_steps, cfg.finetune_warmup
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate_factor(index, total, warmup)

        frames = [self.teacher.config.num_frames(n) for n in num_samples]
        with torch.no_grad():
            targets = self.teacher.hidden_states(self.teacher.features(wavs, num_samples), frames)
        states = self.student.hidden_states(self.student.features(wavs, num_samples), frames)
        mask = torch.arange(targets[0].shape[1]) < torch.tensor(frames)[:, None]
        mask = mask.to(wavs.device)
        l1, cosine = self._distances(states, targets, mask)
        loss = cfg.l1_weight * l1 + cfg.cosine_weight * cosine

        sparsity = 1 - expected_parameters(self.student) / self.full_size
        target = cfg.sparsity
        penalty = torch.zeros_like(loss)
        if self.phase == "prune":
            target = target_sparsity(index, cfg)
            gap = sparsity - target
            penalty = self.multipliers[0] * gap + self.multipliers[1] * gap.square()
        self.optimizer.zero_grad()
        torch.autograd.backward(loss + penalty)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, cfg.clip_norm)
        self.optimizer.step()
        loss_, l1_, cosine_, sparsity_ = torch.stack([loss, l1, cosine, sparsity]).tolist()
        return StepReport(loss_, l1_, cosine_, sparsity_, target)

    def _distances(
        self, states: list[Tensor], targets: list[Tensor], mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute mean L1 and cosine loss over layers and unpadded frames; scalars."""
        l1, cosine = [], []
        for layer in self.layers:
            projection = self.projections["first" if layer == 0 else "rest"]
            state, target = projection(states[layer][mask]), targets[layer][mask]  # (frames, H)
            l1.append(F.l1_loss(state, target))
            cosine.append(cosine_loss(state, target, self.cfg.cosine))
        return torch.stack(l1).mean(), torch.stack(cosine).mean()

    def pruned(self) -> Wav2Vec2:
        """Return the dense student after pruning by the gates.

        Raises: ValueError: when a convolution would have no channels left.
        """
        return prune(self._plain_student())

    @torch.no_grad()
    def finished(self) -> Wav2Vec2:
        """Return the dense student as an encoder whose units approximate the teacher's.

        Its final projection is the one used to match the last layer in training, followed by the
        teacher's own if it has one.
        """
        student = self._plain_student()
        projection = self.projections["rest"]
        assert isinstance(projection, nn.Linear)
        weight, bias = projection.weight, projection.bias
        if (after := self.teacher.final_projection) is not None:
            weight, bias = after.weight @ weight, after.weight @ bias + after.bias
        config = dataclasses.replace(student.config, project_dim=len(bias))
        network = Wav2Vec2(config).to(weight.device)
        tensors = student.state_dict()
        tensors |= {"final_projection.weight": weight, "final_projection.bias": bias}
        network.load_state_dict(tensors)
        return network.eval()

    def _plain_student(self) -> Wav2Vec2:
        """Return a copy with gates, without dropout and noise."""
        student = Wav2Vec2(self.student.config)
        if self.phase == "prune":
            add_gates(student, self.cfg.gates)
        noisy = ".parametrizations.weight.original"
        tensors = self.student.state_dict()
        student.load_state_dict({k.replace(noisy, ".weight"): t for k, t in tensors.items()})
        return student.to(self.multipliers.device)

    def state(self) -> dict[str, Tensor]:
        """Return the state that the next step depends on, except its batch and random numbers."""
        tensors = {f"learnt.{name}": p.detach() for name, p in self._parameters().items()}
        for name, parameter in self._parameters().items():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{kind}.{name}"] = value
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Resume from the output of `state`, which is copied."""
        for name, parameter in self._parameters().items():
            parameter.copy_(tensors[f"learnt.{name}"])
            moments = {
                kind: tensors[f"optimizer.{kind}.{name}"].to(
                    "cpu" if kind == "step" else parameter.device, copy=True
                )
                for kind in ("step", "exp_avg", "exp_avg_sq")
                if f"optimizer.{kind}.{name}" in tensors
            }
            if moments:
                self.optimizer.state[parameter] = moments

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {
            **{f"student.{name}": p for name, p in self.student.named_parameters()},
            **{f"projections.{name}": p for name, p in self.projections.named_parameters()},
            "multipliers": self.multipliers,
        }


def gated_student(teacher: Wav2Vec2, cfg: DistillConfig) -> Wav2Vec2:
    """Copy the teacher with randomly initialised gates and without its final projection.

    Raises: ValueError: when the gates cannot reach `cfg.sparsity`.
    """
    student = copy.deepcopy(teacher).requires_grad_(True)
    student.final_projection = None
    student.config = dataclasses.replace(student.config, project_dim=None)
    add_gates(student, cfg.gates)
    closed = copy.deepcopy(student)
    for name, parameter in closed.named_parameters():
        if name.endswith("log_alpha"):
            nn.init.constant_(parameter, -30.0)
    with torch.no_grad():
        most = 1 - float(expected_parameters(closed)) / _size_without_projection(teacher)
    if cfg.sparsity > 0.98 * most:
        raise ValueError(
            f"sparsity is {cfg.sparsity:g}; with the gates {', '.join(cfg.gates)} all closed it is "
            f"only {most:.3f}"
        )
    return student


def default_layers(n_layers: int) -> tuple[int, ...]:
    """Return 0, the last layer, and those at a third and two thirds: 0, 4, 8, 12 of 12."""
    return tuple(sorted({round(n_layers * i / 3) for i in range(4)}))


def check_layers(layers: tuple[int, ...], n_layers: int) -> None:
    """Check the layers to match.

    Raises: ValueError: when they do not rise from 0 or more to the last layer.
    """
    if list(layers) != sorted(set(layers)) or layers[-1:] != (n_layers,) or layers[0] < 0:
        raise ValueError(
            f"layers is {', '.join(map(str, layers))}; it must rise from 0 or more to the last "
            f"layer, {n_layers}"
        )


def target_sparsity(index: int, cfg: DistillConfig) -> float:
    """Return the target at step `index` of phase "prune": it rises linearly, then is constant."""
    return cfg.sparsity * min(1.0, index / max(1.0, cfg.sparsity_warmup * cfg.steps))


def rate_factor(index: int, total: int, warmup: float) -> float:
    """Return the factor of a learning rate: linear warm-up to 1, then linear to 0 at `total`."""
    rising = max(1.0, warmup * total)
    return min((index + 1) / rising, max(0.0, (total - index) / max(1.0, total - rising)))


def cosine_loss(states: Tensor, targets: Tensor, kind: Literal["raw", "log_sigmoid"]) -> Tensor:
    """Compute the cosine loss () of states (N, H) and targets (N, H)."""
    similarity = F.cosine_similarity(states, targets, dim=-1)
    return -(similarity if kind == "raw" else F.logsigmoid(similarity)).mean()


def _betas(steps: int) -> tuple[float, float]:
    """Return Adam's betas for gates and multipliers: a memory of 10 and 1000 of 50 000 steps.

    In a shorter run the memory is shorter. Otherwise closed gates would keep the momentum that
    closed them until the end, and the sparsity would overshoot.
    """
    share = steps / 50_000
    first, second = max(2.0, min(1.0, share) * 10), max(10.0, min(1.0, share) * 1000)
    return 1 - 1 / first, 1 - 1 / second


def _size_without_projection(network: Wav2Vec2) -> int:
    return sum(
        p.numel() for n, p in network.named_parameters() if not n.startswith("final_projection.")
    )


def _identity(width: int) -> nn.Linear:
    linear = nn.Linear(width, width)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _add_quant_noise(network: Wav2Vec2, share: float) -> None:
    for module in [m for m in network.layers.modules() if isinstance(m, nn.Linear)]:
        quant_noise(module, share, 8 if module.in_features % 8 == 0 else 1)


def _add_dropout(network: Wav2Vec2, dropout: float, layer_drop: float) -> None:
    """Drop values after each block, and whole layers, whenever `network` is in training."""

    def drop_values(module: nn.Module, _: object, out: Tensor) -> Tensor:
        return F.dropout(out, dropout, module.training)

    def drop_layer(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return args[0] if module.training and torch.rand(()) < layer_drop else out

    for module in network.layers.modules():
        if dropout and isinstance(module, Attention | FeedForward):
            module.register_forward_hook(drop_values)
        if layer_drop and isinstance(module, TransformerLayer):
            module.register_forward_hook(drop_layer)
