"""Voices of so-vits-svc: bit-exact reading of its files, and writing of equal files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoint import CheckpointError, save_safetensors
from models.synthesizer import from_sovits, to_sovits
from models.synthesizer.blocks.discriminators import MultiPeriodDiscriminator
from models.synthesizer.blocks.noise import NoNoise
from models.synthesizer.blocks.snake import Snake
from models.synthesizer.sovits.config import bare_config, read_config
from models.synthesizer.sovits.files import (
    Training,
    read_discriminator,
    read_training,
    read_voice,
    write_voice,
)
from models.synthesizer.sovits.networks import Synthesizer
from models.synthesizer.tensor_layout import TensorLayout, layout_of
from models.synthesizer.voice import synthesizer_layout
from tests.models.synthesizer import sovits_files
from tests.models.synthesizer.conftest import Reference
from tests.models.synthesizer.sovits_files import (
    checksum,
    checksums,
    manifest,
    state_dict,
    tiny_config,
)
from tests.models.synthesizer.tiny import VARIANTS, config_of

FULL_SIZE = tuple(manifest("svc_G_manifest")["variants"])


def assert_layout(layout: TensorLayout, keys: dict[str, Any]) -> None:
    assert list(layout.shapes) == list(keys)
    for name, what in keys.items():
        assert layout.shapes[name] == tuple(what["shape"]), name
        assert layout.first[name] == what.get("alias_of", name), name
    parameters = [n for n, w in keys.items() if w["kind"] == "param" and "alias_of" not in w]
    assert layout.parameters == parameters  # as an optimizer's state numbers them


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == torch.float32, name
        assert torch.equal(ours[name], tensor.float()), name


@pytest.mark.parametrize("variant", FULL_SIZE)
def test_names_shapes_and_order_of_the_full_size_are_theirs(tmp_path: Path, variant: str) -> None:
    found = manifest("svc_G_manifest")
    stated = found["variants"][variant]
    model = stated.get("model") or found["template_model"] | stated["changes"]
    if variant == "vec256l9":  # its encoder is not among the changes
        model = model | {"speech_encoder": "vec256l9"}
    data = tiny_config(manifest("svc_tiny_manifest")["base"]["config"])["data"]
    data |= {"filter_length": 2048, "win_length": 2048, "hop_length": 512}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"train": {}, "data": data, "model": model, "spk": {}}))
    assert_layout(synthesizer_layout(read_config(path).network), stated["keys"])


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tiny_voice_comes_in_and_goes_out_to_the_bit(
    tmp_path: Path, reference: Reference, variant: str
) -> None:
    tiny = manifest("svc_tiny_manifest")[variant]
    g_path, config_path = sovits_files.write_voice(tmp_path, variant)
    theirs = torch.load(g_path, weights_only=True)["model"]

    network = from_sovits(g_path, config_path)
    assert not network.training
    assert network.config == config_of(reference(f"svc_tiny_{variant}"))
    assert_layout(synthesizer_layout(network.config), tiny["keys"])
    assert_same_tensors(network.state_dict(), theirs)
    assert checksum(network.state_dict()) == checksums()[f"svc_tiny/{variant}"]["all"]

    out = tmp_path / "out"
    to_sovits(network, out / "G_801.pth")
    written = torch.load(out / "G_801.pth", weights_only=True)
    assert list(written) == ["model", "iteration", "optimizer", "learning_rate"]
    assert (written["iteration"], written["optimizer"]) == (0, None)
    assert_same_tensors(written["model"], theirs)
    assert read_config(out / "config.json").network == network.config
    assert sorted(p.name for p in out.iterdir()) == ["G_801.pth", "config.json"]


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_discriminators_come_in(tmp_path: Path, spectral_norm: bool) -> None:
    keys = manifest("svc_D_manifest")["spectral_norm" if spectral_norm else "default"]["keys"]
    assert_layout(layout_of(lambda: MultiPeriodDiscriminator(spectral_norm)), keys)
    theirs = constants(keys)
    torch.save({"model": theirs, "iteration": 1, "optimizer": None}, tmp_path / "D_800.pth")
    discriminator = read_discriminator(tmp_path / "D_800.pth", spectral_norm)
    assert_same_tensors(discriminator.state_dict(), theirs)
    scores, _ = discriminator(torch.zeros(1, 1, 300))
    assert all(torch.isfinite(score).all() for score in scores)
    with pytest.raises(CheckpointError, match="does not match so-vits-svc's discriminators"):
        read_discriminator(tmp_path / "D_800.pth", not spectral_norm)


def constants(keys: dict[str, Any]) -> dict[str, Tensor]:
    """Fill each tensor with one number, in half precision, as a released file may have."""
    return {
        name: torch.full(what["shape"], (1 + i) / 1024, dtype=torch.float16)
        for i, (name, what) in enumerate(keys.items())
    }


def test_discriminators_go_out_beside_their_voice(tmp_path: Path) -> None:
    theirs = constants(manifest("svc_D_manifest")["default"]["keys"])
    torch.save({"model": theirs}, tmp_path / "D_800.pth")
    discriminator = read_discriminator(tmp_path / "D_800.pth")
    g_path, config_path = sovits_files.write_voice(tmp_path, "base")
    network = from_sovits(g_path, config_path)
    with pytest.raises(ValueError, match=r"must be named like G_1000\.pth"):
        to_sovits(network, tmp_path / "voice.pth", discriminator=discriminator)
    assert not (tmp_path / "voice.pth").exists(), "refused before anything is written"
    out = tmp_path / "out"
    to_sovits(network, out / "G_9.pth", discriminator=discriminator)
    assert sorted(p.name for p in out.iterdir()) == ["D_9.pth", "G_9.pth", "config.json"]
    written = torch.load(out / "D_9.pth", weights_only=True, mmap=True)
    assert_same_tensors(written["model"], theirs)
    with pytest.raises(CheckpointError, match=r"is a discriminator \(D_\*.pth\), not a synthes"):
        from_sovits(tmp_path / "D_800.pth", config_path)
    with pytest.raises(CheckpointError, match=r"is a synthesizer \(G_\*.pth\), not a discrimin"):
        read_discriminator(g_path)


# --- what is read sings


@pytest.mark.parametrize(
    ("variant", "tolerance"), [("base", 1e-5), ("snake", 8e-5), ("transflow_share", 1e-5)]
)
def test_a_loaded_voice_gives_the_references_audio(
    tmp_path: Path, reference: Reference, variant: str, tolerance: float
) -> None:
    """Ten times the float64 floor of the references: 1e-6, and 8e-6 of snake."""
    arrays = reference(f"svc_tiny_{variant}")
    network = from_sovits(*sovits_files.write_voice(tmp_path, variant))
    assert np.abs(sing(network, arrays) - arrays["infer/audio"][:, 0]).max() < tolerance


def sing(network: Synthesizer, arrays: dict[str, np.ndarray]) -> np.ndarray:
    c, f0, voiced, speaker = (torch.from_numpy(arrays[f"in/{k}"]) for k in ("c", "f0", "uv", "spk"))
    wav, _ = network.infer(c, f0, voiced, speaker[:, 0], noise_scale=0.4, noise=NoNoise())
    return wav.numpy()


@pytest.mark.parametrize("variant", ["base", "snake"])
def test_a_released_voice_infers_and_refuses_the_rest(
    tmp_path: Path, reference: Reference, variant: str
) -> None:
    """compress_model.py: half precision, no posterior encoder, an optimizer without a state."""
    arrays = reference(f"svc_tiny_{variant}")
    whole = state_dict(manifest("svc_tiny_manifest")[variant]["keys"])
    kept = {name: t.half() for name, t in whole.items() if "enc_q" not in name}
    optimizer = {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0, 1]}]}
    content = {"model": kept, "iteration": 0, "optimizer": optimizer, "learning_rate": 1e-4}
    g_path, config_path = sovits_files.write_voice(tmp_path, variant, content)
    network = from_sovits(g_path, config_path)

    # Half precision moves the numbers; the rounded weights in the whole voice move them equally.
    rounded = {name: tensor.half().float() for name, tensor in whole.items()}
    filters = {name: Snake(1).upsample.filter for name in whole if name.endswith("filter")}
    rounded |= filters  # are computed there
    full = tmp_path / "full"
    full.mkdir()
    other = from_sovits(*sovits_files.write_voice(full, variant, {"model": rounded}))
    assert np.array_equal(sing(network, arrays), sing(other, arrays))
    assert np.abs(sing(network, arrays) - arrays["infer/audio"][:, 0]).max() < 0.05

    spec, f0 = (torch.from_numpy(arrays[f"in/{name}"]) for name in ("spec", "f0"))
    lengths, speaker = torch.tensor([f0.shape[1]]), torch.tensor([0])
    with pytest.raises(ValueError, match="released without its posterior encoder"):
        network.resynthesize(spec, lengths, f0, speaker, noise=NoNoise())
    to_sovits(network, full / "G_1.pth")
    written = torch.load(full / "G_1.pth", weights_only=True)["model"]
    assert list(written) == list(kept)
    with pytest.raises(CheckpointError, match=r"lacks 2 of \d+ tensors: enc_q\.pre"):
        partly = kept | {k: v for k, v in whole.items() if "enc_q" in k and "pre" not in k}
        from_sovits(*sovits_files.write_voice(full, variant, {"model": partly}))


# --- other containers


def test_bare_parallel_and_safetensors_files_are_read(tmp_path: Path) -> None:
    g_path, config_path = sovits_files.write_voice(tmp_path, "share")
    theirs = torch.load(g_path, weights_only=True)["model"]
    torch.save(theirs, tmp_path / "bare.pth")
    torch.save({"model": {f"module.{k}": v for k, v in theirs.items()}}, tmp_path / "ddp.pth")
    torch.save(theirs, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file({k: v.clone() for k, v in theirs.items()}, tmp_path / "G.safetensors")
    for name in ("bare.pth", "ddp.pth", "old.pth", "G.safetensors"):
        assert_same_tensors(from_sovits(tmp_path / name, config_path).state_dict(), theirs)


def test_weights_do_not_hang_on_the_file(tmp_path: Path) -> None:
    g_path, config_path = sovits_files.write_voice(tmp_path, "base")
    theirs = torch.load(g_path, weights_only=True)["model"]
    network = from_sovits(g_path, config_path)
    with g_path.open("rb+") as file:
        file.write(bytes(g_path.stat().st_size))
    assert_same_tensors(network.state_dict(), theirs)


def test_flows_that_share_a_network_still_do(tmp_path: Path) -> None:
    network = from_sovits(*sovits_files.write_voice(tmp_path, "share"))
    state = network.state_dict(keep_vars=True)
    name = "in_layers.0.weight_v"
    assert state[f"flow.wn.{name}"] is state[f"flow.flows.4.enc.{name}"]
    assert all(p.requires_grad for p in network.parameters())


# --- what is refused


def edit(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[], dict[str, Any]]:
    """Return the content of a G_800.pth of `share` with its tensors changed."""

    def content() -> dict[str, Any]:
        tensors = state_dict(manifest("svc_tiny_manifest")["share"]["keys"])
        change(tensors)
        return {"model": tensors}

    return content


def bert_vits2() -> dict[str, Any]:
    return {"model": state_dict(manifest("bv2_manifest")["variants"]["tiny_base"]["keys"])}


ONE = torch.ones(1)
WHOLE_NUMBERS = torch.ones(5, 12, dtype=torch.int64)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (edit(lambda t: t.pop("pre.bias")), r"lacks 1 of 369 tensors: pre\.bias$"),
        (edit(lambda t: [t.pop(k) for k in list(t) if k.startswith("dec.ups.")]),
         r"lacks 6 of 369 tensors: .* and 2 more$"),
        (edit(lambda t: t.pop("flow.wn.cond_layer.bias")), r"lacks 1 .*flow\.wn\.cond_layer\.bias"),
        (edit(lambda t: t.update({"pre.bias": torch.ones(17)})),
         r"other shapes: pre\.bias \(is \(17,\), must be \(16,\)\)"),
        (edit(lambda t: t.update({"emb_g.weight": torch.ones(200, 12)})),
         r"emb_g\.weight \(is \(200, 12\), must be \(5, 12\)\)"),
        (edit(lambda t: t.update(extra=ONE)), "has 1 unknown tensors: extra"),
        (edit(lambda t: t.update({"pre.bias": "text"})), r"no floating-point tensor for pre\.bias"),
        (edit(lambda t: t.update({"emb_g.weight": WHOLE_NUMBERS})),
         r"no floating-point tensor for emb_g\.weight \(torch\.int64\)"),
        (edit(lambda t: t.update({"pre.bias": torch.full((16,), torch.nan)})),
         r"not finite \(NaN or infinity\) in pre\.bias"),
        (edit(lambda t: t.update({"flow.wn.cond_layer.bias": torch.ones(64)})),
         r"different values .*flow\.wn\.cond_layer\.bias"),
        (lambda: {"model": {}}, r"lacks (\d+) of \1 tensors"),
        (lambda: [ONE], "has a list, not a network's weights"),
        (lambda: {"mezzo": {"cluster_centers_": np.ones(3)}}, "cluster centres"),
        (bert_vits2, "is a Bert-VITS2 model, which speaks text"),
        (lambda: {"generator": {"conv_pre.weight_v": ONE, "ups.0.weight_v": ONE}},
         "is a vocoder, not a synthesizer"),
        (lambda: {"weight": {"enc_p.emb_phone.weight": ONE, "dec.conv_pre.weight": ONE}},
         "is a voice of RVC"),
        (lambda: {"model": {"denoise_fn.input_projection.weight": ONE}}, "is a diffusion model"),
        (lambda: {"model": {"feature_extractor.conv_layers.0.0.weight": ONE}}, "encoder of units"),
        (lambda: {"model_g": {"enc_p.pit.weight": ONE}}, "so-vits-svc 5"),
        (lambda: {"model": {"unet.encoder.bn.weight": ONE}}, "estimates f0"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused_in_words(
    tmp_path: Path, content: Callable[[], Any], words: str
) -> None:
    g_path, config_path = sovits_files.write_voice(tmp_path, "share", content())
    with pytest.raises(CheckpointError, match=words) as caught:
        from_sovits(g_path, config_path)
    assert str(g_path) in str(caught.value)


def test_a_filter_that_is_not_theirs_is_refused(tmp_path: Path) -> None:
    tensors = state_dict(manifest("svc_tiny_manifest")["snake"]["keys"])
    tensors["dec.snake_post.upsample.filter"] = torch.full((1, 1, 12), 0.1)
    paths = sovits_files.write_voice(tmp_path, "snake", {"model": tensors})
    with pytest.raises(CheckpointError, match=r"another filter .* dec\.snake_post\.upsample"):
        from_sovits(*paths)


def test_damaged_files_and_attacks_are_refused(tmp_path: Path) -> None:
    g_path, config_path = sovits_files.write_voice(tmp_path, "base")
    whole = g_path.read_bytes()
    for length in (0, 3, len(whole) // 2, len(whole) - 40):
        g_path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="G_800"):
            from_sovits(g_path, config_path)
    mark = tmp_path / "mark"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return mark.touch, ()

    torch.save({"model": Bomb()}, g_path)
    with pytest.raises(CheckpointError):
        from_sovits(g_path, config_path)
    assert not mark.exists()
    with pytest.raises(CheckpointError, match="does not exist"):
        from_sovits(tmp_path / "none.pth", config_path)
    own = tmp_path / "own.safetensors"
    save_safetensors(own, {"pre.bias": ONE}, {"cantor": "{}"})
    with pytest.raises(CheckpointError, match="has Cantor's own format"):
        from_sovits(own, config_path)


def test_a_network_that_is_not_theirs_is_not_written(tmp_path: Path) -> None:
    network = from_sovits(*sovits_files.write_voice(tmp_path, "base"))
    with pytest.raises(ValueError, match="config does not match the network"):
        other = from_sovits(*sovits_files.write_voice(tmp_path, "vol"))
        to_sovits(network, tmp_path / "x.pth", config=bare_config(other.config))
    del network.pre
    with pytest.raises(ValueError, match=r"lacks 2 of 354 tensors: pre\.weight, pre\.bias"):
        to_sovits(network, tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


# --- training goes on


def test_an_optimizer_goes_in_and_out(tmp_path: Path) -> None:
    keys = manifest("svc_tiny_manifest")["transflow_share"]["keys"]
    sizes = [w["shape"] for w in keys.values() if w["kind"] == "param" and "alias_of" not in w]
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in sizes]  # theirs, in their order
    adam = torch.optim.AdamW(parameters, 1e-4, betas=(0.8, 0.99), eps=1e-9)
    for i, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, i + 1.0)
    adam.step()
    content = {
        "model": state_dict(keys), "iteration": 7, "optimizer": adam.state_dict(),
        "learning_rate": 1e-4,
    }  # fmt: skip
    g_path, config_path = sovits_files.write_voice(tmp_path, "transflow_share", content)
    network = from_sovits(g_path, config_path)
    training = read_training(g_path, network)
    assert (training.epoch, training.learning_rate) == (7, 1e-4)

    ours = torch.optim.AdamW(network.parameters(), 5.0)
    ours.load_state_dict(training.optimizer)
    assert ours.param_groups[0]["lr"] == 1e-4
    for parameter, there in zip(network.parameters(), parameters, strict=True):
        assert torch.equal(ours.state[parameter]["exp_avg"], adam.state[there]["exp_avg"])

    state = Training(epoch=8, learning_rate=1e-4, optimizer=ours.state_dict())
    to_sovits(network, tmp_path / "G_900.pth", training=state)
    written = torch.load(tmp_path / "G_900.pth", weights_only=True)
    assert written["iteration"] == 8
    adam.load_state_dict(written["optimizer"])
    # Their scheduler begins at a later epoch than 1 only with this.
    torch.optim.lr_scheduler.ExponentialLR(adam, 0.999875, last_epoch=written["iteration"] - 2)

    to_sovits(
        network,
        tmp_path / "G_900.pth",
        training=Training(epoch=8, learning_rate=1e-4, optimizer=None),
    )
    assert torch.load(tmp_path / "G_900.pth", weights_only=True)["iteration"] == 0  # as theirs must
    with pytest.raises(ValueError, match="does not have 354 parameters"):
        other = from_sovits(*sovits_files.write_voice(tmp_path, "base"))
        to_sovits(other, tmp_path / "G_901.pth", training=state)
    training.optimizer["state"][3]["exp_avg"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 3 .* is \(2,\)"):
        to_sovits(network, tmp_path / "G_901.pth", training=training)


def test_a_file_without_an_optimizer_has_none(tmp_path: Path) -> None:
    g_path, config_path = sovits_files.write_voice(tmp_path, "base")
    network = from_sovits(g_path, config_path)
    assert read_training(g_path, network) == Training(epoch=3, learning_rate=1e-4, optimizer=None)
    torch.save({"model": {}, "optimizer": {"state": {0: 3}, "param_groups": []}}, g_path)
    with pytest.raises(CheckpointError, match="one parameter group"):
        read_training(g_path, network)


# --- as a voice of ours


def test_a_base_model_of_other_speakers_is_read_on_request(tmp_path: Path) -> None:
    tensors = state_dict(manifest("svc_tiny_manifest")["base"]["keys"])
    tensors["emb_g.weight"] = torch.randn(200, 12)
    tensors["pre.weight"] = torch.randn(16, 768, 5)
    paths = sovits_files.write_voice(tmp_path, "base", {"model": tensors}, ssl_dim=768)
    with pytest.raises(CheckpointError, match=r"emb_g\.weight \(is \(200, 12\)"):
        read_voice(*paths)
    voice = read_voice(*paths, any_speakers=True)
    assert (voice.config.n_speakers, voice.speakers, voice.step) == (200, (), 800)
    assert torch.equal(voice.tensors["emb_g.weight"], tensors["emb_g.weight"])


def test_a_voice_goes_through_our_format_and_back(tmp_path: Path) -> None:
    tensors = state_dict(manifest("svc_tiny_manifest")["base"]["keys"])
    tensors["pre.weight"] = torch.randn(16, 768, 5)
    g_path, config_path = sovits_files.write_voice(
        tmp_path, "base", {"model": tensors}, ssl_dim=768
    )
    voice = read_voice(g_path, config_path)
    assert voice.speakers == ("mezzo", "unnamed speaker 1", "tenor")
    assert (voice.encoder.name, voice.encoder.dim) == ("contentvec768l12", 768)
    assert (voice.sample_rate, voice.hop_length, voice.expand) == (44100, 64, "left")
    out = tmp_path / "out"
    write_voice(voice, out / "G_800.pth")
    again = read_voice(out / "G_800.pth", out / "config.json")
    assert_same_tensors(dict(again.tensors), tensors)
    assert (again.config, again.mel, again.encoder) == (voice.config, voice.mel, voice.encoder)
    assert (again.speakers, again.expand, again.step) == (voice.speakers, voice.expand, 800)


def test_a_voice_needs_its_encoder(tmp_path: Path) -> None:
    paths = sovits_files.write_voice(tmp_path, "base")  # units of 24 numbers, encoder not stated
    with pytest.raises(CheckpointError, match=r"lacks model\.speech_encoder"):
        read_voice(*paths)


def test_settings_are_at_hand_without_torch() -> None:
    program = (
        "import sys, models.synthesizer, models.synthesizer.config\n"
        "assert not hasattr(models.synthesizer, 'nothing')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
