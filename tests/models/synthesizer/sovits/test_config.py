"""config.json of so-vits-svc: reading and writing."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import models.encoders
from models.checkpoint import CheckpointError
from models.synthesizer.config import MelConfig, SynthesizerConfig
from models.synthesizer.sovits.config import (
    ENCODERS,
    SovitsConfig,
    bare_config,
    config_json,
    names_by_row,
    read_config,
)

Content = dict[str, Any]

DATA = {
    "sampling_rate": 44100,
    "filter_length": 2048,
    "hop_length": 512,
    "win_length": 2048,
    "n_mel_channels": 80,
    "mel_fmin": 0.0,
    "mel_fmax": 22050,
    "unit_interpolate_mode": "nearest",
}


@pytest.fixture(scope="module")
def template(golden: Path) -> Content:
    """The template's config.json, with two speakers."""
    path = golden / "synthesizers" / "svc_G_manifest.json.gz"
    model = json.loads(gzip.decompress(path.read_bytes()))["template_model"]
    return {"train": {}, "data": DATA, "model": model, "spk": {"nyaru": 0, "派蒙": 3}}


def written(folder: Path, content: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_the_template_is_what_the_defaults_here_say(tmp_path: Path, template: Content) -> None:
    config = read_config(written(tmp_path, template))
    # Depth is one setting here; the template's flows are residual.
    assert config.network == SynthesizerConfig(units_dim=768, n_speakers=200)
    assert config.mel == MelConfig(f_max=22050.0)
    assert config.speakers == {"nyaru": 0, "派蒙": 3}
    assert (config.encoder, config.expand) == ("contentvec768l12", "nearest")


def test_every_setting_comes_back(tmp_path: Path, template: Content) -> None:
    ours = SovitsConfig(
        network=SynthesizerConfig(
            units_dim=1280, n_speakers=3, sample_rate=32000, n_fft=1024, source_rate=32000,
            inter_channels=20, hidden_channels=24, filter_channels=40, n_heads=3, n_layers=5,
            kernel_size=5, dropout=0.25, decoder="nsf-snake-hifigan", resblock="2",
            resblock_kernel_sizes=(5,), resblock_dilation_sizes=((1, 2),), upsample_rates=(4, 5),
            upsample_initial_channel=36, upsample_kernel_sizes=(8, 11), gin_channels=12,
            flow="transformer", n_flows=2, n_flow_layers=7, share_flow=True, depthwise_conv=True,
            predict_f0=False, volume_embedding=True, spectral_norm=True,
        ),
        mel=MelConfig(n_fft=1024, win_length=800, n_mels=40, f_min=20.0, f_max=None),
        speakers={"a": 0, "c": 2},
        encoder="whisper-ppg-large",
        expand="left",
    )  # fmt: skip
    content = config_json(ours)
    assert read_config(written(tmp_path, content)) == ours
    unlike_the_default = {
        name
        for name in SynthesizerConfig.__dataclass_fields__
        if getattr(ours.network, name)
        != getattr(SynthesizerConfig(units_dim=1, n_speakers=1), name)
    }
    only_ours = {"discriminator_channels"}
    assert unlike_the_default | only_ours == set(SynthesizerConfig.__dataclass_fields__)

    template_like = read_config(written(tmp_path, template))
    model = json.loads(json.dumps(config_json(template_like)["model"]))
    assert model == template["model"]  # nothing more, nothing less
    assert config_json(template_like)["data"].items() >= DATA.items()
    assert config_json(template_like)["train"]["segment_size"] == 10240


def test_a_residual_flow_has_four_of_as_many_layers_as_stated(
    tmp_path: Path, template: Content
) -> None:
    template = copy.deepcopy(template)
    template["model"]["n_flow_layer"] = 2
    residual = read_config(written(tmp_path, template)).network
    assert (residual.n_flows, residual.n_flow_layers) == (4, 2)
    template["model"]["use_transformer_flow"] = True
    transformer = read_config(written(tmp_path, template)).network
    assert (transformer.n_flows, transformer.n_flow_layers) == (2, 3)
    with pytest.raises(ValueError, match="has 4 residual flows, not 6"):
        config_json(bare_config(SynthesizerConfig(units_dim=256, n_speakers=1, n_flows=6)))


def test_dilations_that_no_block_uses_are_none(tmp_path: Path, template: Content) -> None:
    """The template's lists have three; blocks of kind 2 take the first two."""
    content = template | {"model": template["model"] | {"resblock": "2"}}
    network = read_config(written(tmp_path, content)).network
    assert network.resblock_dilation_sizes == ((1, 3), (1, 3), (1, 3))


def test_a_config_of_version_4_0_means_what_so_vits_svc_takes(
    tmp_path: Path, template: Content
) -> None:
    later = "n_layers_trans_flow n_flow_layer vocoder_name speech_encoder speaker_embedding "
    later += "vol_embedding use_depthwise_conv flow_share_parameter use_automatic_f0_prediction "
    later += "use_transformer_flow use_spectral_norm"
    template = copy.deepcopy(template)
    for name in later.split():
        del template["model"][name]
    del template["data"]["unit_interpolate_mode"]
    whole = read_config(written(tmp_path, template))
    assert whole.network == SynthesizerConfig(units_dim=768, n_speakers=200)
    assert (whole.encoder, whole.expand) == ("contentvec768l12", "left")
    template["model"] |= {"ssl_dim": 256, "gin_channels": 256}
    assert read_config(written(tmp_path, template)).encoder == "contentvec256l9"
    template["model"]["ssl_dim"] = 24
    assert read_config(written(tmp_path, template)).encoder is None


def test_every_encoder_has_its_name_here_and_there(tmp_path: Path, template: Content) -> None:
    for theirs, (ours, width) in ENCODERS.items():
        assert ours in models.encoders.ENCODERS
        template = copy.deepcopy(template)
        template["model"] |= {"speech_encoder": theirs, "ssl_dim": width}
        config = read_config(written(tmp_path, template))
        assert config.encoder == ours
        assert config_json(config)["model"]["speech_encoder"] == theirs


def test_speakers_have_the_name_of_their_row() -> None:
    assert names_by_row({"b": 3, "a": 0}) == ("a", "unnamed speaker 1", "unnamed speaker 2", "b")
    assert names_by_row({}) == ()


def change(section: str, **values: Any) -> Callable[[Content], None]:
    return lambda content: content[section].update(values)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda c: c.pop("model"), "the section 'model' is missing"),
        (lambda c: c.update(spk=["nyaru"]), "the section 'spk' is not an object"),
        (lambda c: c["model"].pop("n_heads"), "model.n_heads is missing"),
        (lambda c: [c["data"].pop(k) for k in ("hop_length", "mel_fmax")],
         "data.hop_length, data.mel_fmax are missing"),
        (change("model", vocoder_name="hifigan"),
         "model.vocoder_name is 'hifigan'; choose from nsf-hifigan, nsf-snake-hifigan"),
        (change("model", speech_encoder="vec768l13"), "model.speech_encoder is 'vec768l13'"),
        (change("model", speech_encoder=["vec768l12"]), "model.speech_encoder is"),
        (change("model", speech_encoder="vec256l9"),
         "vec256l9, whose units have the width 256, but model.ssl_dim is 768"),
        (change("data", hop_length=441), "data.hop_length is 441, but the product .* is 512"),
        (change("data", unit_interpolate_mode="area"), "data.unit_interpolate_mode is 'area'"),
        (change("data", filter_length=0), "data.filter_length is 0; it must be 1 or more"),
        (change("data", win_length=4096), "mel.win_length is 4096"),
        (change("model", n_heads=5), "hidden_channels is 192; it must be a multiple"),
        (change("model", n_layers="6"), "model.n_layers is '6'; it must be a whole number"),
        (change("model", n_layers=True), "model.n_layers is True; it must be a whole number"),
        (change("model", n_speakers=0), "model.n_speakers is 0; it must be 1 or more"),
        (change("model", resblock=1), "model.resblock is 1; choose from 1, 2"),
        (change("model", upsample_rates=[8, 8, 2, 2, 0]), r"upsample_rates is \[8, 8, 2, 2, 0\]"),
        (change("model", upsample_rates=[]), "model.upsample_rates is empty"),
        (change("model", resblock_dilation_sizes=[[1, "3"]]),
         r"resblock_dilation_sizes\[0\]\[1\] is '3'; it must be a whole number"),
        (change("model", vol_embedding=1), "model.vol_embedding is 1; it must be a boolean"),
        (change("spk", extra=200), "spk.extra is 200; .* below model.n_speakers, 200"),
        (change("spk", twin=0), "spk.twin and spk.nyaru are both 0"),
    ],
)  # fmt: skip
def test_a_faulty_config_is_refused_in_words(
    tmp_path: Path, template: Content, spoil: Callable[[Content], None], words: str
) -> None:
    content = copy.deepcopy(template)
    spoil(content)
    path = written(tmp_path, content)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_config(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\xff", "null"])
def test_what_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_config(tmp_path / "none.json")


def test_what_so_vits_svc_does_not_have_is_not_written() -> None:
    network = SynthesizerConfig(units_dim=80, n_speakers=1)
    config = SovitsConfig(
        network=network, mel=MelConfig(), speakers={}, encoder="log-mel", expand="left"
    )
    with pytest.raises(ValueError, match="does not have the encoder log-mel"):
        config_json(config)
    assert "speech_encoder" not in config_json(bare_config(network))["model"]
