"""Voices on disk: saving, loading, and refusal of anything else in one sentence."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint import CheckpointError, read_safetensors, save_safetensors
from models.synthesizer.batch import Batch
from models.synthesizer.blocks.noise import NoNoise
from models.synthesizer.config import MelConfig, SynthesizerConfig
from models.synthesizer.sovits.networks import Synthesizer
from models.synthesizer.voice import (
    DESCRIPTION,
    VERSION,
    WEIGHTS,
    NoPosterior,
    Voice,
    VoiceEncoder,
    load_network,
    load_voice,
    require_compatible,
    save_voice,
)

CONFIG = SynthesizerConfig(
    units_dim=6, n_speakers=3, sample_rate=16000, n_fft=64, inter_channels=4, hidden_channels=8,
    filter_channels=8, n_layers=1, resblock="2", resblock_kernel_sizes=(3,),
    resblock_dilation_sizes=((1, 3),), upsample_rates=(4, 4), upsample_initial_channel=8,
    upsample_kernel_sizes=(8, 8), gin_channels=4, n_flow_layers=1, share_flow=True,
    source_rate=16000,
)  # fmt: skip
MEL = MelConfig(n_fft=64, win_length=64, n_mels=10, f_max=8000.0)
ENCODER = VoiceEncoder(
    name="contentvec768l12", dim=6, dtype="float16", frame_rate_hz=50.0, checkpoint_sha256="ab" * 32
)


def make(**changes: Any) -> Voice:
    torch.manual_seed(changes.pop("seed", 1))
    said = dict(
        tensors=Synthesizer(CONFIG).state_dict(),
        config=CONFIG,
        mel=MEL,
        speakers=("алиса", "bob"),
        encoder=ENCODER,
        expand="left",
        f0_method="fcpe",
        f0_min=50.0,
        f0_max=1100.0,
        step=1234,
        dataset_fingerprint="0123abcd",
        licence="CC BY 4.0",
    )
    return Voice(**(said | changes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voices") / "step-00001234"
    save_voice(folder, make())
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Copy the saved voice, to damage it."""
    return Path(shutil.copytree(saved, tmp_path / "voice"))


def test_what_was_saved_is_loaded(saved: Path) -> None:
    voice = make()
    assert sorted(path.name for path in saved.iterdir()) == [DESCRIPTION, WEIGHTS]
    for path in (saved, saved / WEIGHTS, str(saved / DESCRIPTION)):
        loaded = load_voice(path)
        for field in dataclasses.fields(Voice):
            if field.name != "tensors":
                assert getattr(loaded, field.name) == getattr(voice, field.name), field.name
    assert list(loaded.tensors) == list(voice.tensors)
    assert all(torch.equal(loaded.tensors[name], t) for name, t in voice.tensors.items())
    assert (loaded.sample_rate, loaded.hop_length, loaded.has_posterior) == (16000, 16, True)


def test_everything_that_may_be_unknown_may_be_unknown(tmp_path: Path) -> None:
    encoder = VoiceEncoder(name="mfcc", dim=6)
    voice = make(
        encoder=encoder, f0_method=None, f0_min=None, f0_max=None, dataset_fingerprint=None,
        licence="", mel=MelConfig(n_fft=64, win_length=64), speakers=(),
    )  # fmt: skip
    save_voice(tmp_path / "a" / "voice", voice)
    loaded = load_voice(tmp_path / "a" / "voice")
    assert (loaded.encoder, loaded.mel.f_max, loaded.speakers) == (encoder, None, ())
    assert (loaded.f0_method, loaded.f0_min, loaded.dataset_fingerprint) == (None, None, None)


def test_a_shared_network_is_stored_once(saved: Path) -> None:
    tensors, _ = read_safetensors(saved / WEIGHTS)
    voice = load_voice(saved)
    assert not any(name.startswith(("flow.wn.", "flow.flows.2.enc.")) for name in tensors)
    name = "in_layers.0.weight_v"
    assert voice.tensors[f"flow.wn.{name}"] is voice.tensors[f"flow.flows.0.enc.{name}"]
    network = load_network(voice)
    assert network.flow.wn is network.flow.flows[2].enc


def test_the_network_is_ready_and_its_own(saved: Path) -> None:
    voice = load_voice(saved)
    network = load_network(voice)
    assert not network.training and network.config == CONFIG
    before = voice.tensors["pre.bias"].clone()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(voice.tensors["pre.bias"], before)
    for name, tensor in load_network(voice).state_dict().items():
        assert torch.equal(tensor, voice.tensors[name]), name


def test_a_loaded_network_sings_and_learns_like_the_saved_one(saved: Path) -> None:
    torch.manual_seed(1)
    original = Synthesizer(CONFIG).eval()
    outputs = []
    for network in (original, load_network(load_voice(saved))):
        units, f0 = torch.ones(1, 6, 30), torch.full((1, 30), 220.0)
        speaker = torch.tensor([1])
        wav, _ = network.infer(units, f0, torch.ones(1, 30), speaker, noise=NoNoise())
        batch = Batch(
            clip_ids=("a",), units=units, f0=f0, voiced=torch.ones(1, 30),
            volume=torch.ones(1, 30), wav=torch.zeros(1, 480), speaker=speaker,
            lengths=torch.tensor([30]), noise_keys=(1,),
        )  # fmt: skip
        out = network(batch, torch.ones(1, 33, 30), NoNoise(), 8)
        (out.wav.square().sum() + out.z_p.square().sum()).backward()
        norms = [p.grad.norm() for p in network.parameters() if p.grad is not None]
        outputs.append((wav, torch.stack(norms)))
    assert torch.isfinite(outputs[0][0]).all() and outputs[0][0].abs().max() > 0
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


def test_a_voice_without_its_posterior_is_saved_so(tmp_path: Path) -> None:
    whole = make()
    tensors = {k: t for k, t in whole.tensors.items() if not k.startswith("enc_q.")}
    save_voice(tmp_path, make(tensors=tensors))
    voice = load_voice(tmp_path)
    assert not voice.has_posterior and list(voice.tensors) == list(tensors)
    assert isinstance(load_network(voice).enc_q, NoPosterior)
    tensors.popitem()
    tensors["enc_q.pre.weight"] = whole.tensors["enc_q.pre.weight"]
    with pytest.raises(CheckpointError, match=r"lacks \d+ of \d+ tensors: enc_q\.pre\.bias"):
        save_voice(tmp_path, make(tensors=tensors))


def test_saving_again_replaces_and_leaves_nothing_beside(folder: Path) -> None:
    save_voice(folder, make(seed=2, step=5))
    assert load_voice(folder).step == 5
    assert sorted(path.name for path in folder.iterdir()) == [DESCRIPTION, WEIGHTS]


# --- two files of one voice


def test_files_of_two_voices_are_refused(folder: Path, tmp_path: Path) -> None:
    """A kill between the two writes leaves such files; they are not a voice in either order."""
    save_voice(tmp_path / "later", make(step=2000))
    for name in (WEIGHTS, DESCRIPTION):
        mixed = Path(shutil.copytree(folder, tmp_path / f"mixed {name}"))
        shutil.copy(tmp_path / "later" / name, mixed / name)
        with pytest.raises(CheckpointError, match="do not belong together"):
            load_voice(mixed)


def test_the_licence_alone_may_be_edited_and_the_layout_is_free(folder: Path) -> None:
    path = folder / DESCRIPTION
    content = json.loads(path.read_text(encoding="utf-8"))
    reordered = dict(reversed((content | {"licence": "all rights reserved"}).items()))
    path.write_text(json.dumps(reordered, indent=7), encoding="utf-8")
    assert load_voice(folder).licence == "all rights reserved"
    path.write_text(json.dumps(content | {"speakers": ["eve", "bob"]}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="description was edited"):
        load_voice(folder)


# --- what is refused


def within(*way: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    """Sets values of an object in the description."""

    def change(content: dict[str, Any]) -> None:
        for name in way:
            content = content[name]
        content.update(values)

    return change


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda c: c.pop("format"), "does not describe a Cantor voice"),
        (within(version=VERSION + 1),
         f"has version {VERSION + 1}; this Cantor reads 1 to {VERSION}"),
        (lambda c: c.pop("step"), "step is missing"),
        (lambda c: [c["encoder"].pop(k) for k in ("name", "dim")],
         r"encoder\.name, encoder\.dim are missing"),
        (within(author="me"), "author is unknown"),
        (within("network", layers=3), r"network\.layers is unknown"),
        (within("network", n_layers=6.0), r"network\.n_layers is 6\.0; it must be a whole number"),
        (within("network", decoder="wavenet"), r"network\.decoder is 'wavenet'; choose from nsf-h"),
        (within("network", upsample_rates=[4, "4"]), r"network\.upsample_rates\[1\] is '4'"),
        (within("network", n_heads=3), "must be a multiple of model.n_heads, 3"),
        (within("mel", win_length=128), "mel.win_length is 128"),
        (within("f0", f0_min="low"), r"f0\.f0_min is 'low'; it must be a number"),
        (within(f0=None), "f0 is None; it must be an object"),
        (within(speakers="bob"), "speakers is 'bob'; it must be a list"),
        (within(speakers=["bob", "bob"]), "do not belong together"),
        (within(sample_rate=44100), "sample_rate is 44100, but its network has 16000"),
        (within(hop_length=512), "hop_length is 512, but its network has 16"),
    ],
)  # fmt: skip
def test_a_faulty_description_is_refused_in_words(
    folder: Path, spoil: Callable[[dict[str, Any]], None], words: str
) -> None:
    path = folder / DESCRIPTION
    content = json.loads(path.read_text(encoding="utf-8"))
    spoil(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match=words) as caught:
        load_voice(folder)
    assert str(folder) in str(caught.value)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors, metadata = read_safetensors(folder / WEIGHTS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_safetensors(folder / WEIGHTS, tensors, metadata)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.pop("pre.bias"), r"voice\.safetensors .* lacks 1 of \d+ tensors: pre\.bias"),
        (lambda t: t.update({"pre.bias": torch.ones(3)}), r"pre\.bias \(is \(3,\), must be"),
        (lambda t: t.update({"more": torch.ones(3)}), "has 1 unknown tensors: more"),
        (lambda t: t["pre.bias"].fill_(torch.inf), r"not finite \(NaN or infinity\) in pre\.bias"),
    ],
)
def test_other_tensors_are_refused_in_words(
    folder: Path, spoil: Callable[[dict[str, Any]], Any], words: str
) -> None:
    rewrite(folder, spoil)
    with pytest.raises(CheckpointError, match=words):
        load_voice(folder)


def test_a_folder_without_a_voice_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a voice: it has no voice\.safetensors"):
        load_voice(tmp_path)
    other = folder / "G_800.pth"
    other.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is not a Cantor voice, which is a folder"):
        load_voice(other)
    (folder / DESCRIPTION).write_text("[")
    with pytest.raises(CheckpointError, match=r"voice\.json is not JSON"):
        load_voice(folder)
    (folder / DESCRIPTION).unlink()
    with pytest.raises(CheckpointError, match=r"it has no voice\.json"):
        load_voice(folder)


def test_a_damaged_or_foreign_file_of_weights_is_refused(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_voice(folder)
    (folder / WEIGHTS).write_bytes(whole)
    tensors, metadata = read_safetensors(folder / WEIGHTS)
    save_safetensors(folder / WEIGHTS, dict(tensors), {"cantor": '{"kind": "wav2vec2"}'})
    with pytest.raises(CheckpointError, match="does not have the weights of a Cantor voice"):
        load_voice(folder)
    save_safetensors(folder / WEIGHTS, dict(tensors), {"cantor": "{"})
    with pytest.raises(CheckpointError, match=r"has a damaged header"):
        load_voice(folder)
    save_safetensors(folder / WEIGHTS, dict(tensors), metadata)
    assert load_voice(folder).step == 1234


def test_a_voice_that_makes_no_sense_is_not_built(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has bob more than once"):
        make(speakers=("bob", "bob"))
    with pytest.raises(ValueError, match="has 4 names, and n_speakers is 3"):
        make(speakers=("a", "b", "c", "d"))
    with pytest.raises(CheckpointError, match="other shapes"):
        wider = dataclasses.replace(CONFIG, units_dim=7)
        save_voice(tmp_path / "none", make(config=wider))
    assert not (tmp_path / "none").exists()


# --- does a dataset match a voice?


def test_codebooks_must_be_the_same_or_none() -> None:
    identity = dataclasses.replace(ENCODER, dim=1, codebook_sha256="ef", codebook_size=100)
    ids = make(encoder=identity)
    require_compatible(ids, "it", encoder="contentvec768l12", codebook_sha256="ef")
    require_compatible(ids, "it", sample_rate=16000)
    with pytest.raises(ValueError, match="the voice's units are codebook ids, but its units are"):
        require_compatible(ids, "it", encoder="contentvec768l12")
    with pytest.raises(ValueError, match="its codebook, by SHA-256, is 01, but the voice has ef"):
        require_compatible(ids, "it", codebook_sha256="01")


def test_what_suits_a_voice_passes() -> None:
    require_compatible(
        make(), "the dataset X", encoder="contentvec768l12", encoder_sha256="ab" * 32,
        units_dim=6, sample_rate=16000, hop_length=16,
    )  # fmt: skip
    require_compatible(make(), "the dataset X")
    unknown = make(encoder=VoiceEncoder(name="contentvec768l12", dim=6))
    require_compatible(unknown, "the dataset X", encoder_sha256="cd" * 32)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"encoder": "hubertsoft"}, "its encoder is hubertsoft, but the voice has contentvec768"),
        ({"encoder_sha256": "cd" * 32}, f"SHA-256, is {'cd' * 32}, but the voice has {'ab' * 32}"),
        ({"units_dim": 256}, "its width of the units is 256, but the voice has 6"),
        ({"sample_rate": 44100}, "its sample rate is 44100, but the voice has 16000"),
        ({"hop_length": 512}, "its hop length is 512, but the voice has 16"),
        ({"hop_length": 512, "units_dim": 1}, "is 1, but the voice has 6; its hop length is 512"),
        ({"codebook_sha256": "ef"}, "its units are codebook ids, but the voice's are not"),
    ],
)
def test_what_differs_is_said_in_a_sentence(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"^the dataset X does not match this voice: ") as caught:
        require_compatible(make(), "the dataset X", **given)
    assert words in str(caught.value)
