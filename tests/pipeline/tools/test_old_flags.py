"""Command lines of earlier versions: every flag still sets its key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import UserError
from pipeline.tools.old_flags import OLD_FLAGS, translate_old_flags

# The flags as they were, with a value other than the default, and what they set.
FLAGS: dict[str, list[tuple[str, str | None, str, object]]] = {
    "codebook": [
        ("--encoder", "007", "data.encoder", "007"),
        ("--clusters", "12", "codebook.clusters", 12),
        ("--split", "validation", "data.split", "validation"),
        ("--speaker", "yes", "data.speaker", "yes"),
        ("--per-speaker", None, "codebook.per_speaker", True),
        ("--epochs", "1", "codebook.epochs", 1),
        ("--seed", "7", "codebook.seed", 7),
        ("--device", "cpu", "codebook.device", "cpu"),
    ],
    "index": [
        ("--encoder", "mfcc", "data.encoder", "mfcc"),
        ("--split", "validation", "data.split", "validation"),
        ("--speaker", 'ann: "the" second\'s', "data.speaker", 'ann: "the" second\'s'),
        ("--max-vectors", "50", "index.max_vectors", 50),
        ("--nprobe", "1", "index.nprobe", 1),
        ("--seed", "7", "index.seed", 7),
    ],
    "purity": [
        ("--checkpoint", "wavlm: base/", "xvector.checkpoint", "wavlm: base/"),
        ("--device", "cpu", "xvector.device", "cpu"),
    ],
    "distill": [
        ("--teacher", "contentvec768l12", "teacher.name", "contentvec768l12"),
        ("--teacher-checkpoint", "a [b].pt", "teacher.checkpoint", "a [b].pt"),
        ("--sparsity", "0.5", "distill.sparsity", 0.5),
        ("--steps", "100", "distill.steps", 100),
        ("--finetune-steps", "0", "distill.finetune_steps", 0),
        ("--batch", "4", "data.batch_size", 4),
        ("--crop-seconds", "2.5", "data.crop_s", 2.5),
        ("--learning-rate", "1e-3", "distill.learning_rate", 0.001),
        ("--finetune-learning-rate", "1e-5", "distill.finetune_learning_rate", 1e-5),
        ("--gate-learning-rate", "0.1", "distill.gate_learning_rate", 0.1),
        ("--multiplier-learning-rate", "0.3", "distill.multiplier_learning_rate", 0.3),
        ("--gates", "stem,heads", "distill.gates", ["stem", "heads"]),
        ("--layers", "0,2,4", "distill.layers", [0, 2, 4]),
        ("--cosine", "log_sigmoid", "distill.cosine", "log_sigmoid"),
        ("--dropout", "0.1", "distill.dropout", 0.1),
        ("--layer-drop", "0.2", "distill.layer_drop", 0.2),
        ("--quant-noise", "0.05", "distill.quant_noise", 0.05),
        ("--split", "validation", "data.split", "validation"),
        ("--save-every", "10", "run.save_every", 10),
        ("--seed", "7", "run.seed", 7),
        ("--device", "cpu", "run.device", "cpu"),
    ],
}


def printed_settings(*words: str) -> dict[str, object]:
    result = CliRunner().invoke(app, [*words, "--print-config"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    sections = yaml.safe_load(result.output)
    return {f"{s}.{key}": value for s, keys in sections.items() for key, value in keys.items()}


def test_every_old_flag_is_listed_here() -> None:
    assert {c: {flag for flag, *_ in flags} for c, flags in FLAGS.items()} == {
        command: set(flags) for command, flags in OLD_FLAGS.items()
    }


@pytest.mark.parametrize(
    ("command", "flag", "value", "key", "expected"),
    [(command, *flag) for command, flags in FLAGS.items() for flag in flags],
)
def test_an_old_flag_sets_its_key(
    command: str, flag: str, value: str | None, key: str, expected: object
) -> None:
    defaults = printed_settings(command)
    assert defaults[key] != expected
    spellings = [[flag]] if value is None else [[flag, value], [f"{flag}={value}"]]
    for words in spellings:
        assert printed_settings(command, *words) == defaults | {key: expected}


def test_old_flags_are_hidden() -> None:
    for command, flags in OLD_FLAGS.items():
        help_text = CliRunner().invoke(app, [command, "--help"]).output
        assert [flag for flag in flags if flag in help_text] == []


def test_flags_stand_anywhere_and_the_last_one_counts() -> None:
    words = ["--steps", "1", "DATASET", "--steps=2", "OUT", "data.split=x", "--", "--steps"]
    assert translate_old_flags("distill", words) == [
        *("DATASET", "OUT", "data.split=x", "--", "--steps"),
        'distill.steps="2"',
    ]
    assert translate_old_flags("extract", ["--steps", "1"]) == ["--steps", "1"]


def test_a_flag_without_its_value_is_refused() -> None:
    with pytest.raises(UserError, match="--steps needs a value"):
        translate_old_flags("distill", ["--steps"])
    result = CliRunner().invoke(app, ["codebook", "--per-speaker=3"])
    assert result.exit_code == 2


def test_old_and_new_spelling_together_are_refused() -> None:
    words = ["codebook", "codebook.clusters=3", "--clusters", "4", "--print-config"]
    with pytest.raises(UserError, match=r"codebook\.clusters is given twice"):
        CliRunner().invoke(app, words, catch_exceptions=False)


def test_an_old_command_line_runs(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "old.safetensors"
    words = ["codebook", str(dataset), str(out), "--clusters", "12", "--epochs", "1"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0 and "12 of 12 ids used" in result.output
    new = tmp_path / "new.safetensors"
    settings = ["codebook.clusters=12", "codebook.epochs=1"]
    CliRunner().invoke(app, ["codebook", str(dataset), str(new), *settings], catch_exceptions=False)
    assert new.read_bytes() == out.read_bytes()
