"""Checkpoints are saved and deleted as a whole, and damaged ones are recognised."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from models.checkpoint import CheckpointError
from pipeline.errors import StorageFault, UserError
from pipeline.storage.step_log import StepLog
from pipeline.train.run_folder import (
    TRAINING_FILE,
    Checkpoint,
    Checkpoints,
    RunFolder,
    join,
    load_optimizer,
    move_average,
    network_tensors,
    optimizer_tensors,
    part_of,
    read_checkpoint,
    write_training,
)


def fill(number: float = 1.0):
    return lambda folder: write_training(folder, {"a/b": torch.full((50,), number)}, {"step": "1"})


def steps_in(checkpoints: Checkpoints) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted(checkpoints.folder.iterdir())]


def never(line: str) -> None:
    raise AssertionError(line)


def test_a_distance_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "checkpoints")
    kept.save(1, fill(), {"mel_distance": math.nan})
    assert kept.best() is None
    assert not kept.would_be_best({"mel_distance": math.nan})
    assert kept.would_be_best({"mel_distance": 9.0})


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "checkpoints", keep_last=2, keep_best=True)
    distances = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 1.5, 6: 1.0}
    for step, distance in distances.items():
        kept.save(step, fill(step), {} if distance is None else {"mel_distance": distance})
    assert steps_in(kept) == [2, 5, 6]
    best, latest = kept.best(), kept.latest(never)
    assert best and latest and (best.step, latest.step) == (2, 6)
    assert latest.read()[0]["a/b"][0] == 6
    assert kept.would_be_best({"mel_distance": 0.9})
    assert not kept.would_be_best({"mel_distance": 1.0})
    assert not kept.would_be_best({})
    assert not kept.would_be_best({"mel_distance": math.nan})
    Checkpoints(kept.folder, keep_last=2, keep_best=False).save(7, fill(), {})
    assert steps_in(kept) == [6, 7]


@pytest.mark.parametrize("damage", ["shorter", "bit", "no facts", "no file", "empty facts"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    tmp_path: Path, damage: str
) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(1, fill(), {})
    last = kept.save(2, fill(), {}).folder
    file, facts = last / TRAINING_FILE, last / "checkpoint.json"
    if damage == "shorter":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "bit":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "no facts":
        facts.unlink()
    elif damage == "no file":
        file.unlink()
    else:
        facts.write_text("{}")
    warnings: list[str] = []
    latest = kept.latest(warnings.append)
    assert latest and latest.step == 1
    assert len(warnings) == 1 and "step-00000002" in warnings[0]
    kept.save(2, fill(), {})  # done again
    assert read_checkpoint(last).step == 2
    shutil.rmtree(tmp_path / "step-00000001")
    (last / TRAINING_FILE).unlink()
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        kept.latest(warnings.append)


def test_what_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)

    def half(folder: Path) -> None:
        fill()(folder)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        kept.save(1, half, {})
    assert list(tmp_path.iterdir()) == []
    assert kept.latest(never) is None


def test_leftovers_of_kills_are_no_checkpoints_and_are_swept(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    whole = kept.save(1, fill(), {}).folder
    for name in (".new-step-00000002-abcd", ".old-step-00000000-abcd"):
        shutil.copytree(whole, tmp_path / name)
    latest, best = kept.latest(never), kept.best()
    assert latest and latest.step == 1 and best is None
    kept.sweep()
    assert list(tmp_path.iterdir()) == [whole]
    Checkpoints(tmp_path / "none").sweep()


def test_a_full_disk_is_the_storages_fault(small_disk: Path) -> None:
    def large(folder: Path) -> None:
        write_training(folder, {"a": torch.zeros(4_000_000)}, {})

    kept = Checkpoints(small_disk / "checkpoints")
    kept.save(1, fill(), {})
    with pytest.raises((StorageFault, OSError)):
        kept.save(2, large, {})
    assert steps_in(kept) == [1]


def test_another_folder_is_not_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"has thesis\.tex and no run\.json"):
        RunFolder(tmp_path).require_run()
    RunFolder(tmp_path / "new").require_run()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".lock").touch()
    RunFolder(tmp_path / "empty").require_run()
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(UserError, match=r"is not the run\.json of a Cantor run"):
        RunFolder(tmp_path).settings()


def test_a_run_goes_on_with_its_settings_alone(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.begin("data", {"data.batch_size": 3}, "")  # nothing came of it
    run.begin("data", {"data.batch_size": 4, "dataset.speakers": ("a", "b")}, "a: 1\n")
    Checkpoints(tmp_path / "checkpoints").save(1, fill(), {})
    run.begin("moved", {"data.batch_size": 4, "dataset.speakers": ("a", "b")}, "a: 2\n")
    run.require_run()
    assert (tmp_path / "config.yaml").read_text() == "a: 2\n"
    with pytest.raises(UserError, match=r"data\.batch_size was 4 and is 5"):
        run.begin("data", {"data.batch_size": 5, "dataset.speakers": ("a", "b")}, "a: 3\n")
    assert (tmp_path / "config.yaml").read_text() == "a: 2\n"


def test_lines_of_steps_to_come_and_half_lines_leave_the_log(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log.jsonl")
    with log.open_from(1) as file:
        for step in (1, 2, 3):
            file.write(json.dumps({"step": step}) + "\n")
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in log.lines()] == [1, 2, 3]
    with log.open_from(3) as file:
        file.write('{"step": 3, "again": true}\n')
    assert log.lines() == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def trained(fused: bool = False) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(7, 7))  # one is not used
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=fused)
    for _ in range(3):
        step(network, optimizer)
    return network, optimizer


def step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    network[:2](torch.ones(1, 3)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_goes_on_to_the_bit(tmp_path: Path, fused: bool) -> None:
    network, optimizer = trained(fused)
    names = [name for name, _ in network.named_parameters()]
    parts = {"n": network_tensors(network), "o": optimizer_tensors(optimizer, names)}
    checkpoint = Checkpoints(tmp_path).save(
        3, lambda folder: write_training(folder, join(parts), {}), {}
    )
    step(network, optimizer)

    tensors, _ = checkpoint.read()
    again = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(7, 7))
    again.load_state_dict(part_of(tensors, "n"))
    other = torch.optim.AdamW(again.parameters(), lr=0.1, fused=fused)
    load_optimizer(other, names, part_of(tensors, "o"))
    step(again, other)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert torch.equal(checkpoint.read()[0]["o/0.weight/exp_avg"], tensors["o/0.weight/exp_avg"])

    with pytest.raises(CheckpointError, match=r"optimizer's 9\.weight/exp_avg"):
        load_optimizer(other, names, {"9.weight/exp_avg": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"optimizer's 0\.weight/exp_avg"):
        load_optimizer(other, names, {"0.weight/exp_avg": torch.zeros(4, 4)})


def test_shared_tensors_are_written_under_each_name(tmp_path: Path) -> None:
    network = nn.Module()
    network.first = network.second = nn.Linear(2, 2)
    write_training(tmp_path, network_tensors(network), {})
    tensors, _ = Checkpoint(tmp_path, 1, {}).read()
    assert torch.equal(tensors["second.weight"], network.first.weight)


def test_the_average_moves_by_its_decay_and_buffers_are_copied() -> None:
    network, averaged = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    nn.init.constant_(network.weight, 3.0)
    network.running_mean.fill_(5.0)
    move_average(averaged, network, 0.75)
    assert averaged.weight.item() == 0.75 * 1 + 0.25 * 3
    assert averaged.running_mean.item() == 5.0
