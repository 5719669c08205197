"""A step follows from the state before it: what stops a run leaves no trace in its numbers."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from models.checkpoint import read_safetensors
from models.synthesizer.sovits.files import to_sovits
from models.synthesizer.voice import load_network, load_voice
from pipeline.errors import Interrupted, UserError
from pipeline.storage.lock import lock
from pipeline.train.run_folder import part_of
from pipeline.train.trainer import TrainOutcome, fit
from pipeline.train.watch import SilentWatch
from tests.pipeline.train.small_training import losses, small_config, start_fit, write_small_dataset

# So slow that the discriminators' step changes nothing for the synthesizer's gradients. In float32
# those of the mel loss alone differ by 1e-6 where they are added up in another order (logarithms of
# near silence; measured at its weight of 45), so it weighs less here: then all differ by 2e-7.
STANDING = ("optimizer.learning_rate=1e-12", "model.dropout=0", "loss.mel=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 clips of two speakers; not to be written to."""
    return write_small_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps, into the second epoch, that nothing stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    fit(data, run, small_config("run.steps=12"))
    return run


def training(run: Path, step: int) -> dict[str, Tensor]:
    return read_safetensors(run / "checkpoints" / f"step-{step:08d}" / "training.safetensors")[0]


def steps_kept(run: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in (run / "checkpoints").iterdir())


def assert_same_run(run: Path, whole: Path) -> None:
    """Compare, to the bit, losses and everything in the last checkpoint."""
    assert losses(run) == losses(whole)
    last = len(losses(whole))
    actual, expected = training(run, last), training(whole, last)
    assert actual.keys() == expected.keys()
    assert [
        name for name, tensor in actual.items() if not torch.equal(tensor, expected[name])
    ] == []


class StopAt(SilentWatch):
    """Asks to stop after a step, by its answer or by a signal."""

    def __init__(self, step: int, number: int | None = None) -> None:
        self.at, self.number = step, number
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def step(self, done: int, losses: Mapping[str, float]) -> bool:
        if done == self.at and self.number is not None:
            os.kill(os.getpid(), self.number)
        return done == self.at and self.number is None


@pytest.mark.slow
def test_the_log_has_a_line_a_step_and_epochs_follow_each_other(whole: Path) -> None:
    lines = losses(whole)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["epoch"] for line in lines] == [0] * 10 + [1] * 2
    assert lines[0]["lr"] == 1e-4 and lines[11]["lr"] == 1e-4 * 0.999875
    assert len({line["total"] for line in lines}) == 12
    assert steps_kept(whole) == [2, 4, 6, 8, 10, 12]


@pytest.mark.slow
def test_a_run_that_was_ended_twice_and_made_longer_equals_a_whole_one(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = fit(data, run, small_config("run.steps=3"))
    assert (first.begun_at, first.steps, steps_kept(run)) == (0, 3, [2, 3])
    with pytest.raises(Interrupted):
        fit(data, run, small_config("run.steps=12", "run.save_every=100"), watch=StopAt(5))
    assert steps_kept(run) == [2, 3, 5]
    last = fit(data, run, small_config("run.steps=12", "data.prefetch=1"))
    assert (last.begun_at, last.steps) == (5, 12)
    assert_same_run(run, whole)
    again = fit(data, run, small_config("run.steps=12"), console=(console := quiet()))
    assert (again.begun_at, again.steps, again.checkpoint) == (12, 12, last.checkpoint)
    assert "12 steps are done already" in console.file.getvalue()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_step_keeps_the_state_and_leaves(
    data: Path, whole: Path, tmp_path: Path, number: int
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted):
        fit(data, tmp_path, small_config("run.save_every=100"), watch=StopAt(1, number))
    assert signal.getsignal(number) is before
    assert steps_kept(tmp_path) == [1]
    assert losses(tmp_path) == losses(whole)[:1]


def test_a_damaged_checkpoint_is_named_and_its_steps_are_done_again(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    file = run / "checkpoints" / "step-00000012" / "training.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 13, "ep')
    watch = StopAt(-1)
    outcome = fit(data, run, small_config("run.steps=12"), watch=watch)
    assert outcome.begun_at == 10
    assert any("step-00000012/training.safetensors" in line for line in watch.lines)
    assert_same_run(run, whole)


def kill_while_it_trains(data: Path, run: Path, rng: random.Random) -> None:
    """At a random moment after a random number of further steps."""
    before = len(losses(run)) if (run / "log.jsonl").exists() else 0
    process = start_fit(data, run, "run.steps=12")
    wanted = before + rng.randint(1, 4)
    while process.poll() is None and (
        not (run / "log.jsonl").exists() or len(losses(run)) < min(wanted, 12)
    ):
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.4))
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_losses(data: Path, whole: Path, tmp_path: Path) -> None:
    kill_while_it_trains(data, tmp_path / "run", random.Random(4))
    assert losses(tmp_path / "run") == losses(whole)[: len(losses(tmp_path / "run"))]
    fit(data, tmp_path / "run", small_config("run.steps=12"))
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.soak
def test_soak(data: Path, whole: Path, tmp_path: Path) -> None:
    """CANTOR_SOAK_KILLS random kills (10 by default), seeded by CANTOR_SOAK_SEED."""
    rng = random.Random(int(os.environ.get("CANTOR_SOAK_SEED", "0")))
    left = int(os.environ.get("CANTOR_SOAK_KILLS", "10"))
    for number in range(left):
        run = tmp_path / str(number % 3)  # several kills a run
        kill_while_it_trains(data, run, rng)
        if number >= left - 3:
            fit(data, run, small_config("run.steps=12"))
            assert_same_run(run, whole)


def test_other_settings_are_refused_by_name(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for word, change in (
        ("optimizer.learning_rate=0.1", r"optimizer\.learning_rate was 0\.0001 and is 0\.1"),
        ("data.batch_size=4", r"data\.batch_size was 2 and is 4"),
        ("run.seed=1", r"run\.seed was 1234 and is 1"),
        ("run.precision=bf16", r"run\.precision was fp32 and is bf16"),
    ):
        with pytest.raises(UserError, match=f"other settings \\({change}\\)"):
            fit(data, run, small_config("run.steps=12", word))
    other = write_small_dataset(tmp_path / "other", clips=5)
    with pytest.raises(UserError, match=r"\(dataset\.clips was 20 "):
        fit(other, run, small_config("run.steps=12"))
    monkeypatch.setattr("pipeline.storage.lock._LOCK_WAIT_S", 0.1)
    with lock(run), pytest.raises(UserError, match="is in use by process"):
        fit(data, run, small_config("run.steps=12"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"has thesis\.tex and no run\.json"):
        fit(data, tmp_path / "mine", small_config())
    with pytest.raises(
        UserError, match="upsample_rates is 32, but the dataset has a frame every 64"
    ):
        words = ("model.upsample_rates=[8, 4]", "model.upsample_kernel_sizes=[16, 8]")
        fit(data, tmp_path / "new", small_config(*words))
    assert not (tmp_path / "new").exists()


def test_losses_that_are_no_numbers_stop_the_run_and_name_the_clips(
    data: Path, tmp_path: Path
) -> None:
    """They come with the second step, after a first one of a learning rate that is none."""
    rate = ("optimizer.learning_rate=1e34", "loss.adversarial_from=9")
    words = ("data.batch_size=10", "run.save_every=1", *rate)
    with pytest.raises(UserError, match=r"became (nan|inf) at step 2, at a learning rate of"):
        fit(data, tmp_path, small_config(*words))
    (report,) = tmp_path.glob("nan-step-*.json")
    values = json.loads(report.read_text())
    assert report.name == "nan-step-000002.json" and values["lr"] == pytest.approx(1e34)
    assert len(values["clips"]) == 10 and all("#" in clip for clip in values["clips"])
    assert values["total"] in ("nan", "inf")
    assert steps_kept(tmp_path) == [1]
    assert len(losses(tmp_path)) == 1


def test_weights_that_are_not_finite_are_not_saved(data: Path, tmp_path: Path) -> None:
    """The loss of the step that makes them is finite."""
    words = ("optimizer.learning_rate=1e39", "loss.adversarial_from=9", "run.save_every=1")
    with pytest.raises(UserError, match=r"generator/.* became not finite .* at step 1, which is"):
        fit(data, tmp_path, small_config(*words))
    assert not (tmp_path / "checkpoints").exists()
    assert len(losses(tmp_path)) == 1


def test_a_voice_whose_validation_is_not_finite_is_not_saved(data: Path, tmp_path: Path) -> None:
    words = ("optimizer.learning_rate=1e34", "loss.adversarial_from=9", "run.validate_every=1",
             "run.validation_clips=1", "run.save_every=1")  # fmt: skip
    with pytest.raises(UserError, match=r"validation's mel_\w+, .* became not finite .* step 1"):
        fit(data, tmp_path, small_config(*words))
    assert not (tmp_path / "checkpoints").exists()


def test_frozen_parameters_stay_and_the_others_move(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    frozen = ("enc_p", "^dec.ups", r"discriminators\.[1-5]")
    words = (f"optimizer.freeze={json.dumps(frozen)}", "run.steps=2", "run.save_every=1")
    fit(data, tmp_path, small_config(*words))
    first, last = training(tmp_path, 1), training(tmp_path, 2)
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert "generator/emb_g.weight" in moved and "generator/dec.conv_pre.weight_v" in moved
    assert "discriminator/discriminators.0.convs.0.weight_v" in moved
    kept = ("generator/enc_p", "generator/dec.ups", "discriminator/discriminators.1")
    assert not [name for name in moved if name.startswith(kept)]
    assert not [name for name in last if name.startswith("optim_g/enc_p")]
    fit(data, tmp_path, small_config(*words, "run.steps=3"))
    for pattern, message in (
        ("encp", "'encp' matches no parameter"),
        ("(", "not a regular expression"),
    ):
        with pytest.raises(UserError, match=message):
            fit(data, tmp_path / pattern, small_config(f"optimizer.freeze=['{pattern}']"))
    with pytest.raises(UserError, match="nothing to train in the MultiPeriodDiscriminator"):
        fit(data, tmp_path / "all", small_config("optimizer.freeze=[discriminators]"))


@pytest.mark.slow
def test_the_voice_is_the_average_where_one_is_kept(data: Path, tmp_path: Path) -> None:
    words = ("optimizer.ema=0.75", "run.save_every=1")
    fit(data, tmp_path / "a", small_config(*words, "run.steps=3"))
    fit(data, tmp_path / "b", small_config(*words, "run.steps=2"))
    fit(data, tmp_path / "b", small_config(*words, "run.steps=3"))
    assert_same_run(tmp_path / "b", tmp_path / "a")
    before, after = (part_of(training(tmp_path / "a", step), "averaged") for step in (2, 3))
    network = part_of(training(tmp_path / "a", 3), "generator")
    voice = load_voice(tmp_path / "a" / "checkpoints" / "step-00000003")
    for name, average in after.items():
        expected = 0.75 * before[name] + 0.25 * network[name]
        torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(voice.tensors[name], average)
    assert not torch.equal(after["dec.conv_pre.weight_v"], network["dec.conv_pre.weight_v"])


def test_the_voice_says_what_it_is_of(whole: Path) -> None:
    voice = load_voice(whole / "checkpoints" / "step-00000012")
    assert (voice.sample_rate, voice.hop_length, voice.step) == (8000, 64, 12)
    assert (voice.speakers, voice.encoder.name, voice.f0_method) == (("ann", "ben"), "mfcc", "dio")
    assert voice.config.source_rate == 8000
    for name, tensor in part_of(training(whole, 12), "generator").items():
        assert torch.equal(voice.tensors[name], tensor)


@pytest.mark.slow
def test_half_precision_goes_on_to_the_bit(data: Path, tmp_path: Path) -> None:
    """With the scaler of its losses."""
    words = ("run.precision=fp16", "run.save_every=1")
    fit(data, tmp_path / "a", small_config(*words, "run.steps=3"))
    fit(data, tmp_path / "b", small_config(*words, "run.steps=1"))
    fit(data, tmp_path / "b", small_config(*words, "run.steps=3"))
    assert_same_run(tmp_path / "b", tmp_path / "a")
    log = (tmp_path / "a" / "log.jsonl").read_text()  # the scaler begins with steps that overflow
    assert "null" in log and "NaN" not in log and "Infinity" not in log


def gradients(run: Path) -> dict[str, Tensor]:
    """Return the gradients of the first step: AdamW's first moment is a fifth of them."""
    return {k: 5 * v for k, v in training(run, 1).items() if k.endswith("/exp_avg")}


def assert_same_gradients(run: Path, other: Path) -> None:
    """Compare to 1e-6 of the norm of all gradients of a network; losses and norms to 1e-6 too."""
    for mine, its in zip(losses(run), losses(other), strict=True):
        assert mine == pytest.approx(its, rel=1e-6)
    actual, expected = gradients(run), gradients(other)
    assert actual.keys() == expected.keys()
    for part in ("optim_g", "optim_d"):
        a, b = (
            torch.cat([g.flatten().double() for name, g in each.items() if name.startswith(part)])
            for each in (actual, expected)
        )
        assert (a - b).norm() <= 1e-6 * a.norm(), part


def test_parts_of_a_batch_add_up_to_its_gradients(data: Path, tmp_path: Path) -> None:
    words = (*STANDING, "run.steps=1", "data.batch_size=4")
    fit(data, tmp_path / "1", small_config(*words))
    fit(data, tmp_path / "2", small_config(*words, "optimizer.accumulate=2"))
    assert_same_gradients(tmp_path / "1", tmp_path / "2")


@pytest.mark.slow
def test_two_workers_have_the_gradients_of_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process is the first of the two."""
    words = (*STANDING, "run.steps=3", "run.save_every=1", "data.batch_size=4")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    second = start_fit(data, tmp_path / "2", *words, RANK="1", **place)
    for name, value in {**place, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo")
    try:
        fit(data, tmp_path / "2", small_config(*words))
    finally:
        dist.destroy_process_group()
        output, _ = second.communicate(timeout=60)
    assert second.returncode == 0, output
    fit(data, tmp_path / "1", small_config(*words))
    assert len(losses(tmp_path / "2")) == 3
    assert_same_gradients(tmp_path / "1", tmp_path / "2")


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.mark.slow
def test_validation_is_measured_and_the_best_kept(data: Path, tmp_path: Path) -> None:
    """A rate so high that the first step's voice stays the best, or the second's."""
    words = (
        "run.validation_clips=1",
        "run.validate_every=1",
        "run.save_every=3",
        "run.keep_last=1",
        "run.steps=3",
        "optimizer.learning_rate=0.01",
        "optimizer.clip_norm=1000",
    )
    console = quiet()
    outcome = fit(data, tmp_path, small_config(*words), console=console)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    distances = {line["step"]: line["validation"]["mel_distance"] for line in lines}
    assert list(distances) == [0, 1, 2, 3]
    assert outcome.validation["mel_distance"] == distances[3]
    del distances[0]  # before training there is nothing to keep
    best = min(distances, key=lambda step: distances[step])
    assert steps_kept(tmp_path) == sorted({best, 3})
    facts = tmp_path / "checkpoints" / f"step-{best:08d}" / "checkpoint.json"
    assert json.loads(facts.read_text())["validation"]["mel_distance"] == distances[best]
    assert "step 3: " in console.file.getvalue()
    assert list((tmp_path / "tensorboard").iterdir()) != []


def test_the_process_is_left_as_it_was(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    fit(data, tmp_path, small_config("run.steps=1", f"run.threads={threads + 1}"))
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def continued(data: Path, run: Path, start: Path, *words: str) -> tuple[TrainOutcome, list[str]]:
    watch = StopAt(-1)
    words = ("run.steps=1", "optimizer.learning_rate=1e-12", *words)
    return fit(data, run, small_config(*words), init_from=start, watch=watch), watch.lines


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_another(data: Path, whole: Path, tmp_path: Path) -> None:
    others = write_small_dataset(tmp_path / "others", speakers=("ben", "eve"), songs=2)
    base = Path(shutil.copytree(whole, tmp_path / "base"))
    _, lines = continued(others, tmp_path / "run", base)
    assert any(line.endswith("to validate with; left out: none") for line in lines)
    (line,) = (line for line in lines if line.startswith("from "))
    assert "those of the same name for ben, the mean of its 2 for eve" in line
    old, new = training(whole, 12), training(tmp_path / "run", 1)
    table = old["generator/emb_g.weight"]
    expected = torch.stack([table[1], table.mean(0)])
    torch.testing.assert_close(new["generator/emb_g.weight"], expected, rtol=0, atol=1e-9)
    for part in ("generator", "discriminator"):
        for name, tensor in part_of(new, part).items():
            if name != "emb_g.weight":
                torch.testing.assert_close(tensor, old[f"{part}/{name}"], rtol=0, atol=1e-9)
    # Going on needs neither --init-from nor what it named; another one is refused.
    shutil.rmtree(base)
    fit(others, tmp_path / "run", small_config("run.steps=2", "optimizer.learning_rate=1e-12"))
    continued(others, tmp_path / "run", base, "run.steps=3")
    with pytest.raises(UserError, match="init_from was "):
        continued(others, tmp_path / "run", whole / "checkpoints" / "step-00000002")
    for start, words, message in (
        (whole, ("model.gin_channels=4",), r"model\.gin_channels is 4, but the voice has 8"),
        (whole, ("mel.n_fft=512",), r"mel\.n_fft is 512"),
        (tmp_path / "none", (), "none does not exist"),
        (tmp_path, (), "holds no voice; name the folder of a voice"),
    ):
        with pytest.raises(UserError, match=message):
            continued(data, tmp_path / "new", start, *words)
    wide = write_small_dataset(tmp_path / "wide", dim=9)
    with pytest.raises(UserError, match="width of the units is 9, but the voice has 8"):
        continued(wide, tmp_path / "new", whole)
    assert list(tmp_path.glob("new/checkpoints/*")) == []


@pytest.mark.slow
def test_a_run_begins_with_a_base_model_of_so_vits_svc(tmp_path: Path) -> None:
    data = write_small_dataset(tmp_path / "data", encoder="hubertsoft", dim=256, songs=2)
    flows = "model.n_flows=4"  # it has no other number
    fit(data, tmp_path / "base", small_config("run.steps=1", flows))
    voice = load_voice(tmp_path / "base" / "checkpoints" / "step-00000001")
    base = tmp_path / "sovits" / "G_0.pth"
    base.parent.mkdir()
    to_sovits(load_network(voice), base)
    config = json.loads((base.parent / "config.json").read_text())
    config["model"] |= {"speech_encoder": "hubertsoft", "n_speakers": 1}  # not the file's
    config["spk"] = {"nobody": 0}
    (base.parent / "config.json").write_text(json.dumps(config))
    _, lines = continued(data, tmp_path / "run", base, flows)
    assert "the mean of its 2 for ann, ben" in lines[0]
    assert "no matching discriminator beside it" in lines[1]
    new = part_of(training(tmp_path / "run", 1), "generator")
    for name, tensor in new.items():
        if name != "emb_g.weight":
            torch.testing.assert_close(tensor, voice.tensors[name], rtol=0, atol=1e-9)
    (base.parent / "config.json").unlink()
    with pytest.raises(UserError, match=r"--init-from .*config\.json does not exist"):
        continued(data, tmp_path / "other", base, flows)
