from __future__ import annotations

import dataclasses
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.settings import dump_yaml, flatten, load_settings
from pipeline.train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "configs"
PRESETS = [
    path.stem for path in sorted(CONFIGS.glob("*.yaml")) if "\nmodel:" in path.read_text()
]  # the others are of extract


def load(*overrides: str, preset: str | None = None) -> TrainConfig:
    path = None if preset is None else CONFIGS / f"{preset}.yaml"
    return load_settings(TrainConfig, path, overrides)


def test_train_yaml_names_exactly_the_keys_and_defaults() -> None:
    written = yaml.safe_load((CONFIGS / "train.yaml").read_text())
    assert {f"{s}.{k}": v for s, keys in written.items() for k, v in keys.items()} == flatten(
        TrainConfig()
    )
    assert written.keys() == {field.name for field in dataclasses.fields(TrainConfig)}


def test_every_line_of_train_yaml_that_sets_a_key_has_a_comment() -> None:
    lines = (CONFIGS / "train.yaml").read_text().splitlines()
    assert [line for line in lines if line.startswith("  ") and "#" not in line] == []


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_load_and_read_back(preset: str, tmp_path: Path) -> None:
    config = load(preset=preset)
    assert config.model.hop_length == 512
    (tmp_path / "x.yaml").write_text(dump_yaml(dataclasses.asdict(config)))
    assert load_settings(TrainConfig, tmp_path / "x.yaml") == config


# so-vits-svc's names of what has another one here.
THEIRS = {
    "dropout": "p_dropout",
    "decoder": "vocoder_name",
    "n_flow_layers": "n_flow_layer",  # of its residual flow, which has 4 couplings always
    "share_flow": "flow_share_parameter",
    "depthwise_conv": "use_depthwise_conv",
    "predict_f0": "use_automatic_f0_prediction",
    "volume_embedding": "vol_embedding",
    "spectral_norm": "use_spectral_norm",
}


@pytest.mark.parametrize(
    ("preset", "variant"), [("sovits-44k-768", "template"), ("sovits-44k-256", "vec256l9")]
)
def test_the_presets_are_so_vits_svcs_templates(preset: str, variant: str) -> None:
    file = ROOT / "tests" / "golden" / "synthesizers" / "svc_G_manifest.json.gz"
    manifest = json.loads(gzip.decompress(file.read_bytes()))
    reference = manifest["template_model"] | manifest["variants"][variant]["changes"]
    settings = flatten(load(preset=preset))
    model = {
        key.removeprefix("model."): v for key, v in settings.items() if key.startswith("model.")
    }
    assert (model.pop("flow"), model.pop("n_flows")) == ("residual", 4)
    assert model.pop("discriminator_channels") == 1024  # a constant in the reference code
    assert not reference["use_transformer_flow"]
    assert model == {key: reference[THEIRS.get(key, key)] for key in model}
    assert settings["loss.segment_frames"] * 512 == 10240


def test_lists_and_lists_of_lists_become_tuples() -> None:
    config = load(
        "model.resblock_kernel_sizes=[3]",
        "model.resblock_dilation_sizes=[[1, 5]]",
        "optimizer.betas=[0.5, 9e-1]",
        "optimizer.freeze=['^enc_p', emb_g]",
    )
    assert config.model.resblock_dilation_sizes == ((1, 5),)
    assert (config.optimizer.betas, config.optimizer.freeze) == ((0.5, 0.9), ("^enc_p", "emb_g"))
    hash(config)
    assert flatten(config)["model.resblock_dilation_sizes"] == [[1, 5]]


def test_a_number_that_is_a_name_is_taken_as_one() -> None:
    assert load("model.resblock=2").model.resblock == "2"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.gin_chanels=3", "did you mean 'model.gin_channels'"),
        ("modell.gin_channels=3", "did you mean 'model'"),
        ("model.resblock=3", "model.resblock: Invalid value '3'"),
        ("model.upsample_rates=512", "model.upsample_rates must be a list in brackets.*not 512"),
        ("model.upsample_rates=[8,8.5]", "model.upsample_rates must have whole numbers, not 8.5"),
        ("model.upsample_rates=[8,true]", "must have whole numbers, not True"),
        ("model.upsample_rates=[8,8]", "upsample_rates has 2 numbers and .*upsample_kernel_sizes"),
        ("model.resblock_dilation_sizes=[1,2,3]", "each entry, must be a list in brackets.*not 1"),
        ("model.resblock_dilation_sizes=[[1],[a],[3]]", "each entry, must have whole numbers"),
        ("optimizer.betas=[0.5]", "optimizer.betas must have 2 numbers, not 1"),
        ("optimizer.betas=[0.5,high]", "optimizer.betas must have numbers, not 'high'"),
        ("optimizer.betas=[.nan,0.9]", "optimizer.betas is .*; it must be a finite number"),
        ("optimizer.freeze=emb_g", "optimizer.freeze must be a list in brackets.*not 'emb_g'"),
        ("optimizer.freeze=['${oc.env:HOME}']", "interpolation is not supported"),
        ("optimizer.freeze=['???']", "give it a value"),
        ("optimizer.accumulate=4", "data.batch_size is 6; it must be a multiple"),
        ("optimizer.betas=[0.8,1]", "optimizer.betas is .*lie in 0 to 1"),
        ("optimizer.decay=1.1", "optimizer.decay is 1.1"),
        ("optimizer.clip_norm=0", "optimizer.clip_norm is 0.0; it must be above 0"),
        ("optimizer.warmup_steps=-1", "optimizer.warmup_steps is -1; it must be 0 or more"),
        ("loss.mel=-3", "loss.mel is -3.0; it must be 0 or more"),
        ("loss.segment_frames=0", "loss.segment_frames is 0; it must be 1 or more"),
        ("data.max_frames=25", "data.max_frames is 25; it must be at least data.min_frames, 30"),
        ("model.n_layers=-1", "model.n_layers is -1; it must be 1 or more"),
        ("model.n_heads=0", "model.n_heads is 0; it must be 1 or more"),
        ("model.upsample_rates=[8,8,4,2,1]", "upsample_kernel_sizes has 4 for the rate 1"),
        ("model.upsample_initial_channel=16", "upsample_initial_channel is 16; it must be 32 or"),
        ("mel.n_mels=0", "mel.n_mels is 0"),
        ("mel.f_max=0", "mel.f_max is 0.0; it must be above mel.f_min, 0.0"),
        ("run.threads=0", "run.threads is 0; it must be 1 or more"),
        ("run.validation_clips=-1", "run.validation_clips is -1"),
        ("run.precision=fp8", "run.precision"),
        ("run.steps=1.5", "run.steps"),
    ],
)
def test_wrong_settings_are_refused_in_words(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(override)


def test_reading_settings_of_training_does_not_import_torch() -> None:
    code = (
        "import sys; from pipeline.settings import load_settings;"
        "from pipeline.train.config import TrainConfig; load_settings(TrainConfig);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
