"""Training of a student: the parts of a step, and that it learns."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from models.encoders.distill import (
    Distillation,
    DistillConfig,
    check_layers,
    cosine_loss,
    default_layers,
    gated_student,
    rate_factor,
    target_sparsity,
)
from models.encoders.pruning import expected_parameters, gates
from models.encoders.wav2vec2 import LayerShape, RelativeBias, Wav2Vec2, Wav2Vec2Config

STEM = tuple((16, k, s) for k, s in ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)))
SHORT = DistillConfig(sparsity=0.3, steps=80, finetune_steps=20, learning_rate=2e-3)


def make_teacher(**settings: object) -> Wav2Vec2:
    torch.manual_seed(0)
    layers = (LayerShape(heads=4, head_dim=8, feed_forward=64),) * 3
    fields = {"stem": STEM, "width": 32, "position_kernel": 16, "layers": layers, **settings}
    return Wav2Vec2(Wav2Vec2Config(**fields)).eval()


def batch(step: int) -> tuple[Tensor, list[int]]:
    generator = torch.Generator().manual_seed(step)
    lengths = [6400, 5000, 6400, 4000]
    wavs = torch.randn(4, 6400, generator=generator) * 0.1
    for wav, length in zip(wavs, lengths, strict=True):
        wav[length:] = 0
    return wavs, lengths


def train(distillation: Distillation, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        losses.append(distillation.step(step, *batch(step)).loss)
    return losses


def weights(network: Wav2Vec2) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_cosine_losses() -> None:
    x = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    y = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert cosine_loss(x, y, "raw").item() == pytest.approx(-0.5)
    expected = (math.log(1 + math.exp(-1)) + math.log(2)) / 2
    assert cosine_loss(x, y, "log_sigmoid").item() == pytest.approx(expected)


def test_layers_to_match() -> None:
    assert default_layers(12) == (0, 4, 8, 12)
    assert default_layers(24) == (0, 8, 16, 24)
    assert default_layers(1) == (0, 1)
    for wrong in ((0, 4), (4, 0, 12), (-1, 12), (0, 0, 12), (0, 13)):
        with pytest.raises(ValueError, match="to the last layer, 12"):
            check_layers(wrong, 12)


def test_schedules() -> None:
    cfg = DistillConfig(sparsity=0.75, steps=1000, sparsity_warmup=0.1)
    assert target_sparsity(0, cfg) == 0
    assert target_sparsity(50, cfg) == pytest.approx(0.375)
    assert target_sparsity(100, cfg) == target_sparsity(999, cfg) == 0.75
    assert rate_factor(0, 1000, 0.3) == pytest.approx(1 / 300)
    assert rate_factor(299, 1000, 0.3) == 1
    assert rate_factor(650, 1000, 0.3) == pytest.approx(0.5)
    assert 0 < rate_factor(999, 1000, 0.3) < 0.01
    assert rate_factor(0, 1, 0.0) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"steps": 0}, "distill.steps is 0; it must be 1 or more"),
        (
            {"gates": ("heads", "hands")},
            r"distill.gates is \[heads, hands\]; name one or more of stem",
        ),
        ({"gates": ()}, r"distill.gates is \[\]; name one"),
        ({"cosine": "log"}, "must be raw or log_sigmoid"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"gate_learning_rate": -1.0}, "gate_learning_rate is -1.0"),
        ({"layer_drop": 1.0}, "layer_drop is 1.0"),
        ({"warmup": 1.0}, "distill.warmup is 1.0; it must lie in 0 to below 1"),
        ({"l1_weight": -1.0}, "distill.l1_weight is -1.0; it must be 0 or more"),
        ({"clip_norm": 0.0}, "distill.clip_norm is 0.0; it must be above 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**settings)


def test_a_sparsity_out_of_reach_is_refused() -> None:
    cfg = dataclasses.replace(SHORT, sparsity=0.75, gates=("heads",))
    with pytest.raises(
        ValueError, match=r"sparsity is 0.75; with the gates heads all closed it is only 0\.\d"
    ):
        gated_student(make_teacher(), cfg)


def test_loss_is_that_of_the_frames_that_are_there() -> None:
    """Frames beyond a clip's end must not matter."""
    teacher = make_teacher()
    cfg = dataclasses.replace(SHORT, learning_rate=1e-9, gates=("heads",), sparsity=0.05)
    reports = []
    for padding in (0.0, 5.0):
        torch.manual_seed(1)
        student = gated_student(teacher, cfg)
        torch.nn.init.normal_(student.projection.bias)
        distillation = Distillation(teacher, student, cfg, "prune")
        wavs, lengths = batch(0)
        for wav, length in zip(wavs, lengths, strict=True):
            wav[length:] = padding
        torch.manual_seed(2)
        reports.append(distillation.step(0, wavs, lengths))
    assert reports[0].loss == pytest.approx(reports[1].loss, abs=1e-6)
    assert reports[0].loss > -0.9


VARIANTS = {
    "post-norm": {"project_dim": 12},
    "pre-norm": {"pre_norm": True, "final_norm": True, "stem_norm": "layer", "stem_bias": True},
    "wavlm": {"relative_bias": RelativeBias(buckets=12, max_distance=20, heads=4)},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_student_reaches_its_size_and_follows_its_teacher(variant: str) -> None:
    teacher = make_teacher(**VARIANTS[variant])
    before = weights(teacher).clone()
    gate_kinds = ("stem", "heads", "inner")
    cfg = dataclasses.replace(SHORT, steps=100, gates=gate_kinds)
    torch.manual_seed(0)
    first = Distillation(teacher, gated_student(teacher, cfg), cfg, "prune")
    losses = train(first, range(cfg.steps))
    assert sum(losses[-10:]) < sum(losses[:10])
    expected = expected_parameters(first.student).item()
    assert 1 - expected / first.full_size == pytest.approx(0.3, abs=0.02)
    pruned = first.pruned()
    assert gates(pruned) == {}
    size = sum(p.numel() for p in pruned.parameters())
    assert 1 - size / first.full_size == pytest.approx(0.3, abs=0.03)

    last = Distillation(teacher, pruned, cfg, "finetune")
    last.projections.load_state_dict(first.projections.state_dict())
    losses = train(last, range(cfg.finetune_steps))
    assert sum(losses[-5:]) < sum(losses[:5])
    student = last.finished()
    assert torch.equal(weights(teacher), before)
    assert student.config.dim == teacher.config.dim
    wavs, lengths = batch(1000)
    with torch.no_grad():
        wanted, given = teacher(wavs, lengths)[0], student(wavs, lengths)[0]
    blank = wanted.mean(dim=0)  # what one gets right without listening
    assert (given - wanted).abs().mean() < 0.6 * (blank - wanted).abs().mean()


def test_the_projection_leads_to_the_teachers_own() -> None:
    teacher = make_teacher(project_dim=12)
    cfg = dataclasses.replace(SHORT, steps=3)
    distillation = Distillation(teacher, gated_student(teacher, cfg), cfg, "prune")
    train(distillation, range(3))
    dense = Distillation(teacher, distillation.pruned(), cfg, "finetune")
    train(dense, range(5))
    wavs, lengths = batch(9)
    frames = [teacher.config.num_frames(n) for n in lengths]
    with torch.no_grad():
        student = dense.student.eval()
        hidden = student.hidden_states(student.features(wavs, lengths), frames)[-1]
        expected = teacher.final_projection(dense.projections["rest"](hidden))
        torch.testing.assert_close(
            dense.finished()(wavs, lengths)[0], expected[0], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1, "layer_drop": 0.2, "quant_noise": 0.1}])
def test_goes_on_from_a_state_as_if_never_stopped(options: dict[str, float]) -> None:
    teacher = make_teacher()
    cfg = dataclasses.replace(SHORT, **options)

    def new() -> Distillation:
        torch.manual_seed(0)
        return Distillation(teacher, gated_student(teacher, cfg), cfg, "prune")

    through = new()
    train(through, range(6))
    stopped = new()
    train(stopped, range(3))
    state = {name: tensor.clone() for name, tensor in stopped.state().items()}
    resumed = new()
    resumed.load_state(state)
    train(resumed, range(3, 6))
    assert torch.equal(weights(resumed.student), weights(through.student))
    assert torch.equal(resumed.multipliers, through.multipliers)


def test_training_options_are_gone_from_the_student() -> None:
    teacher = make_teacher()
    noisy = {"dropout": 0.3, "layer_drop": 0.3, "quant_noise": 0.3}
    cfg = dataclasses.replace(SHORT, gates=("heads", "inner"), **noisy)
    distillation = Distillation(teacher, gated_student(teacher, cfg), cfg, "prune")
    train(distillation, range(2))
    student = distillation.pruned().train()
    assert set(student.state_dict()) <= set(teacher.state_dict()) | {"stem_scale"}
    wavs, lengths = batch(0)
    torch.testing.assert_close(student(wavs, lengths), student(wavs, lengths), rtol=0, atol=0)
    gated = distillation.student.eval()
    torch.testing.assert_close(student(wavs, lengths)[0], gated(wavs, lengths)[0])
