"""Flags of earlier versions, which now set keys: `--steps 100` is `distill.steps=100`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pipeline.errors import UserError

# The settings that each flag writes, by command. `{}` is the value; flags without it take none.
_UNITS = {
    "--encoder": "data.encoder={}",
    "--split": "data.split={}",
    "--speaker": "data.speaker={}",
}
OLD_FLAGS: dict[str, dict[str, str]] = {
    "codebook": {
        **_UNITS,
        "--clusters": "codebook.clusters={}",
        "--per-speaker": "codebook.per_speaker=true",
        "--epochs": "codebook.epochs={}",
        "--seed": "codebook.seed={}",
        "--device": "codebook.device={}",
    },
    "index": {
        **_UNITS,
        "--max-vectors": "index.max_vectors={}",
        "--nprobe": "index.nprobe={}",
        "--seed": "index.seed={}",
    },
    "purity": {"--checkpoint": "xvector.checkpoint={}", "--device": "xvector.device={}"},
    "distill": {
        "--teacher": "teacher.name={}",
        "--teacher-checkpoint": "teacher.checkpoint={}",
        "--sparsity": "distill.sparsity={}",
        "--steps": "distill.steps={}",
        "--finetune-steps": "distill.finetune_steps={}",
        "--learning-rate": "distill.learning_rate={}",
        "--finetune-learning-rate": "distill.finetune_learning_rate={}",
        "--gate-learning-rate": "distill.gate_learning_rate={}",
        "--multiplier-learning-rate": "distill.multiplier_learning_rate={}",
        "--gates": "distill.gates=[{}]",
        "--layers": "distill.layers=[{}]",
        "--cosine": "distill.cosine={}",
        "--dropout": "distill.dropout={}",
        "--layer-drop": "distill.layer_drop={}",
        "--quant-noise": "distill.quant_noise={}",
        "--split": "data.split={}",
        "--batch": "data.batch_size={}",
        "--crop-seconds": "data.crop_s={}",
        "--save-every": "run.save_every={}",
        "--seed": "run.seed={}",
        "--device": "run.device={}",
    },
}


def translate_old_flags(command: str, words: Sequence[str]) -> list[str]:
    """Return the words of a command line with its old flags as settings at the end.

    A flag that is given twice counts once, with its last value.
    Raises: UserError: when a flag lacks its value.
    """
    flags = OLD_FLAGS.get(command, {})
    rest: list[str] = []
    settings: dict[str, str] = {}
    remaining = iter(words)
    for word in remaining:
        flag, equals, value = word.partition("=")
        if word == "--":
            rest += [word, *remaining]
        elif flag not in flags or (equals and "{}" not in flags[flag]):
            rest.append(word)
        elif "{}" not in flags[flag]:
            settings[flag] = flags[flag]
        else:
            given = value if equals else next(remaining, None)
            if given is None:
                raise UserError(f"{flag} needs a value")
            settings[flag] = _setting(flags[flag], given)
    return [*rest, *settings.values()]


def _setting(template: str, value: str) -> str:
    """Fill in the value: as it is in a list, else quoted, so that YAML reads it as text."""
    return template.format(value if "[" in template else json.dumps(value, ensure_ascii=False))
