from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.extract.config import ExtractConfig, fingerprinted, load_config, to_yaml
from pipeline.extract.model_checks import check_models
from pipeline.fingerprint import fingerprint
from pipeline.settings import flatten

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
PRESETS = [
    path
    for path in sorted(CONFIGS.glob("*.yaml"))
    if not re.search(r"^(model|voice|data):", path.read_text(), re.MULTILINE)  # of other commands
]


def test_default_yaml_names_exactly_the_keys_and_defaults() -> None:
    written = yaml.safe_load((CONFIGS / "default.yaml").read_text())
    assert {f"{s}.{k}": v for s, keys in written.items() for k, v in keys.items()} == flatten(
        ExtractConfig()
    )
    assert written.keys() == {field.name for field in dataclasses.fields(ExtractConfig)}


def test_every_line_of_default_yaml_that_sets_a_key_has_a_comment() -> None:
    lines = (CONFIGS / "default.yaml").read_text().splitlines()
    assert [line for line in lines if line.startswith("  ") and "#" not in line] == []


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_presets_load(path: Path) -> None:
    assert isinstance(load_config(path), ExtractConfig)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("f0:\n  method: dio\nslice:\n  threshold_db: -50\n")
    config = load_config(file, ["slice.threshold_db=-45", "quality.min_snr_db=12"])
    assert (config.f0.method, config.slice.threshold_db) == ("dio", -45.0)
    assert config.quality.min_snr_db == 12.0


def test_printed_settings_read_back(tmp_path: Path) -> None:
    config = load_config(None, ["f0.method=harvest", "plan.task_minutes=2.5"])
    (tmp_path / "x.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "x.yaml") == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("f0.metod=dio", "did you mean 'f0.method'"),
        ("f00.method=dio", "did you mean 'f0'"),
        ("f0.method=pitchfork", "pitchfork"),
        ("slice.threshold_db=loud", "threshold_db"),
        ("audio.sample_rate=10", "8000 to 192000"),
        ("audio.sample_rate=88201", "88201; above 65535 Hz, FLAC takes multiples of 10"),
        ("plan.task_minutes=0", "0.05 to 240"),
        ("workers.cpus_per_worker=0", "must be > 0"),
        ("f0.f0_max=22050", "f0.f0_max is 22050.0; .* half of audio.sample_rate, 44100"),
        ("f0.f0_min=.nan", "f0.f0_min is nan; it must be a finite number"),
        ("slice.threshold_db=-.inf", "slice.threshold_db is -inf"),
        ("quality.min_snr_db='nan'", "quality.min_snr_db is nan"),
        ("workers.object_store_gb=inf", "workers.object_store_gb is inf"),
        ("f0.checkpoint=${oc.env:HOME}", "interpolation"),
        ("f0.f0_min='???'", "f0.f0_min is '...'; give it a value"),
        ("encoder.dtype=float64", "encoder.dtype"),
        ("encoders.log-mel.normalise=song", "did you mean 'encoders.log-mel.normalize'"),
        ("encoders.log-mel.name=mfcc", "unknown key 'encoders.log-mel.name'"),
        ("encoders.log-mel.int8=perhaps", "encoders.log-mel.int8"),
        ("encoders.log-mel=3", "'encoders.log-mel' must have keys, not 3"),
        ("encoders.mfcc={}", "mfcc is named twice, by encoder.name and by encoders.mfcc"),
        ("encoders.log-mel.checkpoint=${oc.env:HOME}", "interpolation"),
        ("f0.ensemble=praat,dio", "f0.ensemble must be a list in brackets, .*, not 'praat,dio'"),
        ("f0.ensemble=[praat,dio]", "f0.ensemble must be empty with f0.method=fcpe"),
        ("f0.method", "section.key=value"),
        ("method=dio", "section.key=value"),
    ],
)
def test_wrong_settings_are_refused_in_words(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        load_config(None, [override])


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="twice"):
        load_config(None, ["f0.method=dio", "f0.method=praat"])
    (tmp_path / "x.yaml").write_text("f0:\n  method: dio\n  method: praat\n")
    with pytest.raises(UserError, match="method"):
        load_config(tmp_path / "x.yaml")


def test_further_encoders_are_named_by_their_section(tmp_path: Path) -> None:
    words = ["encoders.whisper-ppg.checkpoint=/medium.pt", "encoders.log-mel={}"]
    config = load_config(None, [*words, "encoders.log-mel.normalize=song"])
    assert list(config.all_encoders) == ["encoder", "encoders.log-mel", "encoders.whisper-ppg"]
    assert [e.name for e in config.all_encoders.values()] == ["mfcc", "log-mel", "whisper-ppg"]
    assert config.all_encoders["encoders.log-mel"].normalize == "song"
    assert config.weight_paths == {"encoders.whisper-ppg.checkpoint": "/medium.pt"}
    (tmp_path / "x.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "x.yaml") == config
    assert list(load_config(tmp_path / "x.yaml", ["encoders.log-mel=null"]).encoders) == [
        "whisper-ppg"
    ]
    (tmp_path / "y.yaml").write_text("encoders:\n  log-mel:\n")
    with pytest.raises(UserError, match=r"encoders\.log-mel is empty; write \{\}"):
        load_config(tmp_path / "y.yaml")
    (tmp_path / "z.yaml").write_text("encoders: [log-mel]\n")
    with pytest.raises(UserError, match=r"'encoders' must have"):
        load_config(tmp_path / "z.yaml")


@pytest.mark.parametrize(
    "overrides",
    [
        ["encoders.log-mel={normalize: song}", "encoders.log-mel.normalize=none"],
        ["encoders.log-mel.normalize=song", "encoders.log-mel={normalize: none}"],
        ["encoders.log-mel=null", "encoders.log-mel.normalize=none"],
    ],
)
def test_a_setting_of_a_further_encoder_given_twice_is_refused(overrides: list[str]) -> None:
    with pytest.raises(UserError, match="sets a key that another override sets"):
        load_config(None, overrides)


def test_settings_over_those_of_another_run() -> None:
    base = dataclasses.asdict(
        load_config(None, ["encoder.name=log-mel", "encoder.normalize=song", "f0.method=dio"])
    )
    same = load_config(None, ["encoder.device=cpu"], base)
    assert (same.encoder.name, same.encoder.normalize, same.f0.method) == ("log-mel", "song", "dio")
    other = load_config(None, ["encoder.name=mfcc"], base)
    assert (other.encoder.name, other.encoder.normalize) == ("mfcc", "none")
    assert base["encoder"]["name"] == "log-mel"


def test_an_ensembles_members_are_settled_and_counted() -> None:
    plain, settled = load_config(), load_config(None, ["f0.method=ensemble"])
    named = load_config(None, ["f0.method=ensemble", "f0.ensemble=[crepe-tiny,dio,fcpe]"])
    assert plain.f0.ensemble is None
    assert settled.f0.members == ("crepe-tiny", "dio", "fcpe") == named.f0.members
    assert fingerprinted(settled) == fingerprinted(named)
    assert fingerprinted(settled)["f0.ensemble"] == ["crepe-tiny", "dio", "fcpe"]


def test_another_method_of_f0_leaves_what_the_first_one_read() -> None:
    settings = ["f0.ensemble=[rmvpe,crepe]", "f0.checkpoint=r.pt", "f0.crepe_hop_ms=20"]
    base = dataclasses.asdict(
        load_config(None, ["f0.method=ensemble", *settings, "f0.median_ms=30", "f0.f0_min=70"])
    )
    same = load_config(None, ["f0.gate=rms"], base).f0
    assert (same.ensemble, same.crepe_hop_ms) == (("rmvpe", "crepe"), 20)
    other = load_config(None, ["f0.method=fcpe"], base).f0
    assert (other.method, other.median_ms, other.f0_min) == ("fcpe", 30, 70)
    assert (other.checkpoint, other.crepe_hop_ms, other.ensemble) == (None, None, None)


def test_paths_of_weights_hold_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    given = ["encoder.checkpoint=a.pt", "encoders.log-mel.codebook=~/b", "xvector.checkpoint=/c"]
    assert load_config(None, given).weight_paths == {
        "encoder.checkpoint": str(tmp_path / "a.pt"),
        "encoders.log-mel.codebook": str(tmp_path / "home" / "b"),
        "xvector.checkpoint": "/c",
    }


@pytest.mark.slow
def test_reading_settings_does_not_import_torch() -> None:
    code = (
        "import sys; from pipeline.extract.config import load_config, fingerprinted;"
        "fingerprinted(load_config(None, ['encoders.log-mel={}']));"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONFIGS.parent)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml"):
        load_config(tmp_path / "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match=r"list\.yaml"):
        load_config(tmp_path / "list.yaml")


def test_fingerprint_is_of_what_changes_the_output() -> None:
    base = fingerprint(fingerprinted(load_config()))

    def changed(override: str) -> bool:
        return fingerprint(fingerprinted(load_config(None, [override]))) != base

    assert changed("f0.method=dio")
    assert changed("slice.threshold_db=-41")
    assert changed("encoder.name=log-mel")
    assert not changed("workers.max_workers=3")
    assert not changed("plan.task_minutes=3")
    assert not changed("encoder.device=cpu")
    assert not changed("decode.timeout_s=77")
    assert changed("encoder.int8=true")
    assert changed("encoder.normalize_wav=false")
    assert changed("encoders.log-mel={}")
    assert not changed("encoder.dtype=float16")
    assert not changed("xvector.device=cpu")
    with_log_mel = fingerprinted(load_config(None, ["encoders.log-mel={}"]))
    assert with_log_mel == fingerprinted(load_config(None, ["encoders.log-mel.dtype=float16"]))
    assert with_log_mel["encoders.log-mel"] is True


def test_a_checkpoint_counts_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"one")
    (tmp_path / "b.pt").write_bytes(b"one")
    (tmp_path / "c.pt").write_bytes(b"two")

    def print_of(name: str) -> str:
        config = load_config(None, [f"encoder.checkpoint={tmp_path / name}"])
        return fingerprint(fingerprinted(config))

    assert print_of("a.pt") == print_of("b.pt") != print_of("c.pt")
    with pytest.raises(UserError, match=r"d\.pt"):
        print_of("d.pt")


def test_rates_that_flac_and_the_f0_range_allow_are_taken() -> None:
    for overrides in (["audio.sample_rate=88200"], ["audio.sample_rate=65535"]):
        load_config(None, overrides)
    load_config(None, ["f0.f0_max=22049"])
    with pytest.raises(UserError, match="f0_max"):  # sections are checked against each other
        load_config(None, ["audio.sample_rate=8000", "f0.f0_max=4000"])


def test_folders_and_bytes_that_are_no_settings_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UserError, match=r"folder: not a regular file"):
        load_config(folder)
    (tmp_path / "wav.yaml").write_bytes(b"f0:\n  method: \xff\n")
    with pytest.raises(UserError, match=r"wav\.yaml is not UTF-8"):
        load_config(tmp_path / "wav.yaml")
    (tmp_path / "number.yaml").write_text("5\n")
    with pytest.raises(UserError, match=r"number\.yaml"):
        load_config(tmp_path / "number.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("on: {}\n", "section True is not text"),
        ("5: {}\n", "section 5 is not text"),
        ("f0:\n  yes: 1\n", "in 'f0', the key True is not text"),
        ("f0:\n  3.5: 1\n", "in 'f0', the key 3.5 is not text"),
        ("null: {}\n", r"x\.yaml: .*key"),
        ("f0:\n  f0_min: .nan\n", "f0.f0_min is nan"),
    ],
)
def test_yaml_that_is_no_text_is_refused_in_words(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        load_config(tmp_path / "x.yaml")


def test_encoders_that_cannot_be_built_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_models(load_config(), local=True)
    with pytest.raises(UserError, match=r"encoder\.name: encoder 'melspec' is unknown .*mfcc"):
        check_models(load_config(None, ["encoder.name=melspec"]), local=False)
    with pytest.raises(UserError, match=r"^encoder\.checkpoint must be empty"):
        check_models(load_config(None, [f"encoder.checkpoint={tmp_path}"]), local=False)

    import torch

    config = load_config(None, ["encoder.device=cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_models(config, local=False)  # the cluster's workers may have a GPU
    with pytest.raises(UserError, match=r"encoder\.device is cuda"):
        check_models(config, local=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_models(config, local=True)
