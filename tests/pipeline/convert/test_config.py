"""Settings of a conversion: those of the voice, then those of the user."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from models.synthesizer.config import MelConfig, SynthesizerConfig
from models.synthesizer.voice import Voice, VoiceEncoder
from pipeline.convert.config import ConvertConfig, OutputConfig, convert_config
from pipeline.errors import UserError
from pipeline.extract.config import load_config
from pipeline.settings import dump_yaml, flatten

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
CLIP_SECTIONS = ("audio", "decode", "resample", "slice", "loudness", "f0", "encoder")


def make_voice(extraction: Mapping[str, Any] | None = None) -> Voice:
    """Make a voice of 32 kHz with a hop of 320 samples and no weights."""
    return Voice(
        tensors={},
        config=SynthesizerConfig(
            units_dim=256, n_speakers=2, sample_rate=32000, n_fft=1024,
            upsample_rates=(10, 8, 2, 2), upsample_kernel_sizes=(16, 16, 4, 4),
        ),
        mel=MelConfig(),
        speakers=("ann", "ben"),
        encoder=VoiceEncoder(name="hubertsoft", dim=256),
        extraction=extraction,
    )  # fmt: skip


def extraction(*overrides: str) -> dict[str, Any]:
    """Return what a voice records about a dataset that was extracted with these settings."""
    own = ["encoder.name=hubertsoft", "audio.sample_rate=32000", "f0.hop_length=320"]
    settings = dataclasses.asdict(load_config(None, [*own, *overrides]))
    return {section: settings[section] for section in CLIP_SECTIONS}


def keys_and_values(name: str) -> dict[str, object]:
    sections = yaml.safe_load((CONFIGS / name).read_text())
    return {f"{s}.{k}": v for s, keys in sections.items() for k, v in keys.items()}


def test_default_and_convert_yaml_share_out_the_keys_and_defaults() -> None:
    own, shared = keys_and_values("convert.yaml"), keys_and_values("default.yaml")
    assert own.keys() & shared.keys() == set()
    every = flatten(ConvertConfig())
    assert own.keys() <= every.keys()
    assert {key: (shared | own)[key] for key in every} == every
    sections = list(yaml.safe_load((CONFIGS / "convert.yaml").read_text()))
    every_section = [field.name for field in dataclasses.fields(ConvertConfig)]
    assert sections == [name for name in every_section if name in sections]


def test_convert_yaml_names_the_sections_that_it_shares() -> None:
    text = " ".join((CONFIGS / "convert.yaml").read_text().replace("#", "").split())
    shared = [key for key in flatten(ConvertConfig()) if key in keys_and_values("default.yaml")]
    *most, last = dict.fromkeys(key.partition(".")[0] for key in shared)
    assert f"has the sections {', '.join(most)} and {last} of default.yaml" in text


def test_convert_yaml_is_a_config_file() -> None:
    voice = make_voice()
    assert convert_config(voice, CONFIGS / "convert.yaml") == convert_config(voice)


def test_the_comment_of_output_format_names_every_format() -> None:
    (line,) = [x for x in (CONFIGS / "convert.yaml").read_text().splitlines() if "format:" in x]
    assert [
        name
        for name in get_args(get_type_hints(OutputConfig)["format"])
        if name not in line.partition("#")[2]
    ] == []


def test_every_line_of_convert_yaml_that_sets_a_key_has_a_comment() -> None:
    lines = (CONFIGS / "convert.yaml").read_text().splitlines()
    assert [line for line in lines if line.startswith("  ") and "#" not in line] == []


def test_the_page_of_converting_names_settings_that_are_there() -> None:
    page = (CONFIGS.parent / "docs" / "converting.md").read_text(encoding="utf-8")
    sections = {field.name for field in dataclasses.fields(ConvertConfig)}
    named = re.findall(r"\b(([a-z0-9]+)\.(?!md|onnx|safetensors)[a-z_]+)\b", page)
    keys = {key for key, section in named if section in sections}
    assert keys <= flatten(ConvertConfig()).keys()
    assert len(keys) > 20


def test_clips_are_made_as_those_of_the_voice_were() -> None:
    stated = extraction(
        "slice.threshold_db=-35", "loudness.per=clip", "f0.method=ensemble",
        "f0.ensemble=[dio, praat]", "decode.channels=first", "audio.subtype=PCM_24",
        "resample.quality=HQ", "encoder.normalize=song",
    )  # fmt: skip
    config = dataclasses.asdict(convert_config(make_voice(stated)))
    assert {section: config[section] for section in CLIP_SECTIONS} == stated
    assert config["f0"]["ensemble"] == ("dio", "praat")


def test_a_voice_that_does_not_say_gets_so_vits_svc_s_and_its_own_rate_and_hop() -> None:
    config = convert_config(make_voice())
    assert (config.audio.sample_rate, config.f0.hop_length) == (32000, 320)
    assert (config.encoder.name, config.loudness.mode, config.f0.method) == (
        "hubertsoft", "peak", "fcpe",
    )  # fmt: skip


def test_a_file_goes_over_the_voice_and_words_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("slice: {threshold_db: -50, hop_ms: 10}\nvoice: {seed: 3, speaker: ben}\n")
    voice = make_voice(extraction("slice.threshold_db=-35", "slice.min_length_ms=4000"))
    config = convert_config(voice, path, ["voice.seed=4"])
    assert (config.slice.threshold_db, config.slice.hop_ms) == (-50, 10)
    assert config.slice.min_length_ms == 4000
    assert (config.voice.seed, config.voice.speaker) == (4, "ben")


def test_a_voice_is_left_as_it_was() -> None:
    stated = extraction("f0.method=crepe", "f0.crepe_hop_ms=10")
    before = repr(stated)
    convert_config(make_voice(stated), overrides=["f0.method=dio", "slice.hop_ms=10"])
    assert repr(stated) == before


def test_another_method_of_f0_leaves_what_was_the_method_s_own() -> None:
    voice = make_voice(
        extraction("f0.method=crepe", "f0.crepe_hop_ms=10", "f0.voicing_threshold=0.7",
                   "f0.f0_min=80", "f0.median_ms=30")
    )  # fmt: skip
    f0 = convert_config(voice, overrides=["f0.method=dio"]).f0
    assert (f0.method, f0.crepe_hop_ms, f0.voicing_threshold) == ("dio", None, None)
    assert (f0.f0_min, f0.median_ms) == (80, 30)
    same = convert_config(voice, overrides=["f0.method=crepe", "f0.f0_min=90"]).f0
    assert (same.crepe_hop_ms, same.voicing_threshold, same.f0_min) == (10, 0.7, 90)
    given = convert_config(voice, overrides=["f0.method=dio", "f0.voicing_threshold=0.2"]).f0
    assert given.voicing_threshold == 0.2


def test_a_voice_of_rmvpe_can_do_without_its_file() -> None:
    voice = make_voice(extraction("f0.method=rmvpe", "f0.checkpoint=/far/away/rmvpe.pt"))
    assert convert_config(voice).f0.checkpoint == "/far/away/rmvpe.pt"
    assert convert_config(voice, overrides=["f0.method=fcpe"]).f0.checkpoint is None


@pytest.mark.parametrize(
    "override, words",
    [
        ("encoder.name=mfcc", "encoder.name cannot be mfcc: this voice was trained with huberts"),
        ("audio.sample_rate=44100", "audio.sample_rate cannot be 44100: .* trained with 32000"),
        ("f0.hop_length=512", "f0.hop_length cannot be 512: this voice was trained with 320"),
        ("f0.interpolate=true", "f0.interpolate cannot be True"),
        ("encoder.codebook=centres.safetensors", "encoder.codebook cannot be centres.safetensors"),
    ],
)
@pytest.mark.parametrize("stated", [None, extraction()], ids=["so-vits-svc", "ours"])
def test_what_a_voice_is_made_of_cannot_be_changed(
    override: str, words: str, stated: Mapping[str, Any] | None
) -> None:
    with pytest.raises(UserError, match=words):
        convert_config(make_voice(stated), overrides=[override])


def test_the_settings_of_a_conversion_read_back(tmp_path: Path) -> None:
    voice = make_voice(extraction())
    config = convert_config(voice, overrides=["pitch.transpose=-12.5", "voice.mix=ann=1,ben=3"])
    assert (config.pitch.transpose, config.voice.mix) == ("-12.5", "ann=1,ben=3")
    (tmp_path / "all.yaml").write_text(dump_yaml(dataclasses.asdict(config)))
    assert convert_config(voice, tmp_path / "all.yaml") == config


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["units.index_ratio=0.5"], r"units\.index is not set; make one .* `cantor index`"),
        (["units.index_ratio=0.2", "units.index=null"], r"index_ratio is 0\.2, but units\.index"),
        (["units.codebook_ratio=1", "units.index=i"], r"units\.codebook is not set; .*codebook`"),
    ],
)
def test_a_ratio_without_an_index_or_a_codebook_is_refused(
    overrides: list[str], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        convert_config(make_voice(), overrides=overrides)
    (tmp_path / "own.yaml").write_text(dump_yaml({"units": {"index": None, "index_ratio": 0.9}}))
    with pytest.raises(UserError, match=r"units\.index_ratio is 0\.9"):
        convert_config(make_voice(), tmp_path / "own.yaml")
    listed = Path("configs/convert.yaml")
    assert convert_config(make_voice(), listed).units.index is None
    with pytest.raises(UserError, match=words):
        convert_config(make_voice(), listed, overrides)
    assert convert_config(make_voice(), None, ["units.index_ratio=0"]).units.index_ratio == 0


@pytest.mark.parametrize(
    "given, kept",
    [("auto", "auto"), ("octave", "octave"), ("-12", "-12"), ("+3", "3"), ("0.5", "0.5")],
)
def test_transpositions(given: str, kept: str) -> None:
    config = convert_config(make_voice(), overrides=[f"pitch.transpose={given}"])
    assert config.pitch.transpose == kept


@pytest.mark.parametrize(
    "override, words",
    [
        ("voice.speeker=ann", "did you mean 'voice.speaker'"),
        ("voise.speaker=ann", "unknown section 'voise'"),
        ("quality.min_snr_db=3", "unknown section 'quality'"),
        ("voice.noise_scale=-1", "voice.noise_scale is -1.0; it must be 0 or more"),
        ("voice.noise_scale=.nan", "voice.noise_scale is nan"),
        (
            "pitch.transpose=high",
            "pitch.transpose is 'high'; it must be a number of semitones, auto or octave",
        ),
        ("pitch.transpose=37", "pitch.transpose is 37; it must lie in -36 to 36 semitones"),
        ("pitch.transpose=.nan", "pitch.transpose is nan; it must lie in"),
        ("units.index_ratio=1.1", "units.index_ratio is 1.1; it must lie in 0 to 1"),
        ("units.protect=-0.1", "units.protect is -0.1"),
        ("join.crossfade_ms=-1", "join.crossfade_ms is -1; it must be 0 or more"),
        ("join.pad_ms=40", "join.pad_ms is 40; it must be at least join.crossfade_ms, 50"),
        ("enhancer.silence_front=-1", "enhancer.silence_front is -1.0"),
        ("enhancer.adaptive_key=25", "enhancer.adaptive_key is 25.0; it must lie in -24 to 24"),
        ("output.sample_rate=4000", "output.sample_rate is 4000; it must lie in 8000 to 192000"),
        ("output.channels=stereo", "output.channels: Invalid value 'stereo'"),
        ("output.format=mp4", "output.format: Invalid value 'mp4'"),
        ("output.subtype=PCM_32", "output.subtype: Invalid value 'PCM_32'"),
        ("output.envelope=2", "output.envelope is 2.0; it must lie in 0 to 1"),
        ("compute.device=tpu", "compute.device: Invalid value 'tpu'"),
        ("compute.backend=jax", "compute.backend: Invalid value 'jax'"),
    ],
)
def test_wrong_settings_are_refused_in_words(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        convert_config(make_voice(), overrides=[override])


def test_one_singer_or_a_mix() -> None:
    with pytest.raises(UserError, match=r"voice\.speaker and voice\.mix are both set"):
        convert_config(make_voice(), overrides=["voice.speaker=ann", "voice.mix=ann=1"])
