"""The files that describe a dataset: dataset.json for programs, README.md for people.

Tested by tests/pipeline/extract/test_command.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.dataset.account import Account
from pipeline.dataset.shards import (
    has_xvectors,
    iter_shards,
    read_dataset_info,
    units_in_words,
    write_dataset_info,
)
from pipeline.extract.config import ExtractConfig
from pipeline.fingerprint import fingerprint
from pipeline.songs.plan import Task
from pipeline.storage.atomic import commit_file


def write_dataset_json(
    dataset: Path,
    config: ExtractConfig,
    settings: dict[str, Any],
    tasks: dict[int, Task],
    source: Path | None,
) -> None:
    """Write dataset.json unless it is there with the same content.

    source: the dataset whose audio is taken over.
    """
    before = read_dataset_info(dataset) if (dataset / "dataset.json").exists() else {}
    info = {
        "schema_version": settings["schema_version"],
        "fingerprint": fingerprint(settings),
        "settings": settings,
        "config": dataclasses.asdict(config),
        "speakers": sorted({song.speaker for task in tasks.values() for song in task.songs}),
        "encoders": [cfg.name for cfg in config.all_encoders.values()],
        "f0_method": config.f0.method,
        "sample_rate": config.audio.sample_rate,
        "hop_length": config.f0.hop_length,
        "source": None if source is None else source.name,
        "card_sha256": before.get("card_sha256"),
    }
    _update_info(dataset, before, info)


def _update_info(dataset: Path, before: dict[str, Any], info: dict[str, Any]) -> None:
    if json.loads(json.dumps(info)) != before:
        write_dataset_info(dataset, info)


def write_card(dataset: Path, account: Account) -> None:
    """Write README.md, a dataset card for the Hugging Face hub, unless a user has edited it."""
    info = read_dataset_info(dataset)
    splits = sorted({path.name.rpartition("-")[0] for path in iter_shards(dataset)})
    files = "\n".join(f"  - split: {s}\n    path: data/{s}-*.parquet" for s in splits)
    source = f", on the audio of `{info['source']}`" if info.get("source") else ""
    vectors = " Each clip has an x-vector." if has_xvectors(info) else ""
    text = f"""---
license: other
task_categories: [audio-to-audio]
tags: [singing, singing-voice-conversion]
configs:
- config_name: default
  data_files:
{files}
---

# {dataset.name}

{account.clips} clips, {account.hours_kept:.3f} h, from {account.count("kept")} songs of
{len(info["speakers"])} speakers, made with Cantor{source}.
Audio is mono FLAC at {info["sample_rate"]} Hz,
f0 by {info["f0_method"]} every {info["hop_length"]} samples, units by
{", ".join(units_in_words(info))}.{vectors}
The settings are in `dataset.json`, the account of every source song in each shard's footer.

```python
from datasets import Audio, load_dataset

clips = load_dataset(".", split="{splits[0]}")
clips = clips.cast_column("audio", Audio(decode=False))  # FLAC bytes; decoding needs torchcodec
```

The licence is that of the songs: state it here before you share this.
"""
    digest = hashlib.sha256(text.encode()).hexdigest()
    card = dataset / "README.md"
    present = hashlib.sha256(card.read_bytes()).hexdigest() if card.exists() else None
    if present not in (None, digest, info["card_sha256"]):
        return
    if present != digest:
        commit_file(dataset, "README.md", lambda file: file.write(text.encode()))
    _update_info(dataset, info, info | {"card_sha256": digest})
