"""The text-conditioned synthesizer against Bert-VITS2's with the same weights and inputs."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.synthesizer import losses
from models.synthesizer.blocks.discriminators import MultiPeriodDiscriminator
from models.synthesizer.blocks.noise import KeyedNoise, NoNoise
from models.synthesizer.tensor_layout import layout_of
from models.synthesizer.text.config import TextSynthesizerConfig
from models.synthesizer.text.durations import DurationDiscriminator, duration_loss
from models.synthesizer.text.synthesizer import TextOutputs, TextSynthesizer
from models.synthesizer.text.text_encoder import Text
from tests.models.synthesizer.conftest import Filled, Reference

TINY = ["base", "resflow", "refenc", "resblock2"]

# Absolute, but relative for losses and gradient norms (README of the references).
MODULES = 4e-5
WAV = 1e-5
LOSSES = 2e-5
GRADIENTS = 2.2e-3
NO_GRADIENT = 5e-5  # norms that are rounding alone, such as those of the keys' biases

# The first attention of "resblock2" magnifies rounding: the reference is 8e-5 from float64 there,
# and only kernels that add up in its order come nearer.
SAME_KERNELS = torch.backends.cpu.get_cpu_capability() == "AVX512"
STEEP = {} if SAME_KERNELS else {"resblock2": 5.0}


def config_of(peer: dict[str, Any]) -> TextSynthesizerConfig:
    """The configuration that Bert-VITS2 was given as a dict."""
    transformer = peer.get("use_transformer_flow", True)
    flows, layers = peer.get("n_flow_layer", 4), peer.get("n_layers_trans_flow", 3)
    return TextSynthesizerConfig(
        n_speakers=peer.get("n_speakers", 256),
        n_fft=2 * (peer["spec_channels"] - 1),
        inter_channels=peer["inter_channels"],
        hidden_channels=peer["hidden_channels"],
        filter_channels=peer["filter_channels"],
        n_heads=peer["n_heads"],
        n_layers=peer["n_layers"],
        kernel_size=peer["kernel_size"],
        dropout=peer["p_dropout"],
        resblock=peer["resblock"],
        resblock_kernel_sizes=tuple(peer["resblock_kernel_sizes"]),
        resblock_dilation_sizes=tuple(map(tuple, peer["resblock_dilation_sizes"])),
        upsample_rates=tuple(peer["upsample_rates"]),
        upsample_initial_channel=peer["upsample_initial_channel"],
        upsample_kernel_sizes=tuple(peer["upsample_kernel_sizes"]),
        gin_channels=peer["gin_channels"],
        flow="transformer" if transformer else "residual",
        n_flows=flows if transformer else 4,
        n_flow_layers=layers if transformer else flows,  # the peer's name says layers, here rightly
    )


class Case:
    """A tiny network of the references with its inputs."""

    def __init__(self, variant: str, reference: Reference, filled: Filled) -> None:
        self.steep = STEEP.get(variant, 1.0)
        self.arrays = arrays = reference(f"bv2_tiny_{variant}")
        self.config = config_of(json.loads(str(arrays["config_json"])))
        network = filled(TextSynthesizer(self.config))
        assert isinstance(network, TextSynthesizer)
        self.network = network
        self.spec, self.frames = self.tensor("in/y"), self.tensor("in/y_lengths")
        self.text = Text(
            symbols=self.tensor("in/x"),
            tones=self.tensor("in/tone"),
            languages=self.tensor("in/language"),
            bert=self.tensor("in/bert"),
            ja_bert=self.tensor("in/ja_bert"),
            lengths=self.tensor("in/x_lengths"),
        )
        self.speaker = self.tensor("in/sid") if self.config.n_speakers else None

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def equal(self, found: Tensor, name: str, atol: float = MODULES, rtol: float = 0) -> None:
        np.testing.assert_allclose(
            found.detach().numpy(), self.arrays[name], rtol=rtol, atol=atol, err_msg=name
        )

    def train(self, segment_frames: int = 4, **options: float) -> TextOutputs:
        noise = NoNoise(float(self.arrays["train/rand"]))
        return self.network(
            self.text, self.spec, self.frames, self.speaker, noise, segment_frames, **options
        )


@pytest.fixture
def case(request: pytest.FixtureRequest, reference: Reference, filled: Filled) -> Case:
    return Case(getattr(request, "param", "base"), reference, filled)


every_variant = pytest.mark.parametrize("case", TINY, indirect=True)


@every_variant
def test_the_references_modules(case: Case) -> None:
    network, g = case.network, case.tensor("g")
    case.equal(network._speaker(case.speaker, case.spec), "g")
    text_mask, mask = case.tensor("enc_p/mask"), case.tensor("enc_q/mask")
    for found, name in zip(network.enc_p(case.text, text_mask, g), ("x", "m", "logs"), strict=True):
        case.equal(found, f"enc_p/{name}", MODULES * case.steep)
    for found, name in zip(
        network.enc_q(case.spec, mask, g, NoNoise()), ("z", "m", "logs"), strict=True
    ):
        case.equal(found, f"enc_q/{name}")
    z = case.tensor("in/z")
    case.equal(network.flow(z, mask, g), "flow/fwd")
    case.equal(network.flow(z, mask, g, reverse=True), "flow/rev")
    case.equal(network.dec(z, g), "dec/out", WAV)


@every_variant
@pytest.mark.parametrize("ratio", [0.0, 0.2, 1.0])
def test_infers_as_the_reference(ratio: float, case: Case) -> None:
    kept = kept_of(case.network)
    sung = case.network.infer(
        case.text,
        case.speaker,
        noise=NoNoise(),
        reference=case.spec,
        noise_scale=0.667,
        length_scale=1.3,
        duration_noise_scale=0.8,
        sdp_ratio=ratio,
    )
    name = f"infer_sdp{ratio}"
    case.equal(sung.path.unsqueeze(1), f"{name}/attn", atol=0)
    assert sung.frames.tolist() == case.arrays[f"{name}/y_mask"].sum((1, 2)).tolist()
    case.equal(sung.wav.unsqueeze(1), f"{name}/audio", WAV * case.steep)
    _, mean, log_std = kept["enc_p"]
    path = sung.path.transpose(1, 2)
    case.equal(mean @ path, f"{name}/m_p", MODULES * case.steep)
    case.equal(log_std @ path, f"{name}/logs_p", MODULES * case.steep)
    case.equal(kept["flow's z_p"], f"{name}/z_p", MODULES * case.steep)
    case.equal(kept["flow"], f"{name}/z", MODULES * case.steep)


def kept_of(network: TextSynthesizer) -> dict[str, Any]:
    """Outputs of the text encoder and of the flow, and the flow's input, from the next call on."""
    kept: dict[str, Any] = {}

    def keep_flow(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept["flow's z_p"], kept["flow"] = inputs[0], output

    network.enc_p.register_forward_hook(lambda *call: kept.update(enc_p=call[2]))
    network.flow.register_forward_hook(keep_flow)
    return kept


@every_variant
def test_trains_on_what_the_reference_trains_on(case: Case) -> None:
    out = case.train()
    case.equal(out.starts, "train/ids_slice", atol=0)
    case.equal(out.path.unsqueeze(1), "train/attn", atol=0)
    for name in ("z_p", "m_q", "logs_q"):
        case.equal(getattr(out, name), f"train/{name}")
    of_text = MODULES * case.steep
    case.equal(out.m_p, "train/m_p", of_text)
    case.equal(out.logs_p, "train/logs_p", of_text)
    case.equal(out.hidden, "train/hidden_x", of_text)
    case.equal(out.log_durations_hat, "train/logw", of_text)
    case.equal(out.log_durations, "train/logw_")
    case.equal(out.wav, "train/y_hat", WAV)


@pytest.fixture(scope="module")
def judge(filled: Filled) -> nn.Module:
    return filled(MultiPeriodDiscriminator()).requires_grad_(False)


@every_variant
def test_the_references_losses_and_gradients(case: Case, judge: nn.Module, filled: Filled) -> None:
    found = losses_of(case, judge, filled)
    for name, loss in found.items():
        case.equal(loss, f"train/{name}", atol=0, rtol=LOSSES * case.steep)
    case.equal(found["loss_dur"].unsqueeze(0), "train/l_length", atol=0, rtol=LOSSES * case.steep)
    total = found["loss_total_no_mel"]
    total.backward()

    names = [str(name) for name in case.arrays["train/g_grad_names"]]
    parameters = dict(case.network.named_parameters())
    assert names == list(parameters)
    norms = [
        -1.0 if (grad := parameters[name].grad) is None else float(grad.norm()) for name in names
    ]
    expected = case.arrays["train/g_grad_norm"]
    rtol = GRADIENTS * case.steep
    np.testing.assert_allclose(norms, expected, rtol=rtol, atol=NO_GRADIENT)


@every_variant
def test_the_references_scores_of_durations(case: Case, filled: Filled) -> None:
    """Predicted durations come first, because Bert-VITS2 treats them as the originals."""
    durations = filled(DurationDiscriminator(16, 16, 3, 0.1, gin_channels=12), "dur.")
    out = case.train()
    pair = (out.log_durations_hat, out.log_durations)
    for score, name in zip(durations(out.hidden, out.text_mask, pair), "rg", strict=True):
        case.equal(score, f"train/dur_prob_{name}", MODULES * case.steep)


def loss_of(out: TextOutputs, total_symbols: float | None = None) -> Tensor:
    """Compute the loss of the durations."""
    return duration_loss(
        out.duration_nll, out.log_durations_hat, out.log_durations, out.text_mask, total_symbols
    )


def losses_of(case: Case, judge: nn.Module, filled: Filled) -> dict[str, Tensor]:
    """The losses of a step from these weights, named as in the references."""
    durations = filled(DurationDiscriminator(16, 16, 3, 0.1, gin_channels=12), "dur.")
    durations.to(case.spec.dtype).requires_grad_(False)
    out = case.train()
    hop, segment = case.config.hop_length, out.wav.shape[-1]
    start = int(out.starts) * hop
    wav = case.tensor("in/wav").to(out.wav)[..., start : start + segment]

    real, real_features = judge(wav)
    fake, fake_features = judge(out.wav)
    # Predicted durations are the discriminator's originals, found ones its fakes: as in the peer.
    of_predicted, of_found = durations(
        out.hidden, out.text_mask, (out.log_durations_hat, out.log_durations)
    )
    found = {
        "loss_disc": losses.discriminator_loss(real, fake),
        "loss_dur_disc": losses.discriminator_loss([of_predicted], [of_found]),
        "loss_dur": loss_of(out),
        "loss_kl": losses.kl_loss(out.z_p, out.logs_q, out.m_p, out.logs_p, out.mask),
        "loss_fm": losses.feature_loss(real_features, fake_features),
        "loss_gen": losses.generator_loss(fake),
        "loss_dur_gen": losses.generator_loss([of_found]),
    }
    of_generator = ("loss_dur", "loss_kl", "loss_fm", "loss_gen", "loss_dur_gen")
    found["loss_total_no_mel"] = torch.stack([found[name] for name in of_generator]).sum()
    return found


# The state dict.


@pytest.fixture(scope="module")
def manifest(golden: Path) -> dict[str, Any]:
    path = golden / "synthesizers" / "bv2_manifest.json.gz"
    content: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return content


def peer_config(manifest: dict[str, Any], variant: str) -> dict[str, Any]:
    entry = manifest["variants"][variant]
    return entry.get("config") or manifest["positional"] | manifest["model"] | entry["changes"]


def built(manifest: dict[str, Any], variant: str) -> Callable[[], nn.Module]:
    match variant:
        case "D":
            return MultiPeriodDiscriminator
        case "DUR":
            return lambda: DurationDiscriminator(192, 192, 3, 0.1, gin_channels=256)
    return lambda: TextSynthesizer(config_of(peer_config(manifest, variant)))


@pytest.mark.parametrize(
    "variant", ["config", "residual_flow", "ref_enc", "D", "DUR", *(f"tiny_{v}" for v in TINY)]
)
def test_the_state_dict_is_the_references(variant: str, manifest: dict[str, Any]) -> None:
    keys = manifest["variants"][variant]["keys"]
    layout = layout_of(built(manifest, variant))
    assert list(layout.shapes.items()) == [(k, tuple(v["shape"])) for k, v in keys.items()]
    assert layout.parameters == [k for k, v in keys.items() if v["kind"] == "param"]


def test_the_defaults_are_the_references(manifest: dict[str, Any]) -> None:
    assert TextSynthesizerConfig(n_speakers=256) == config_of(peer_config(manifest, "config"))


# What the peer does not say.


def changed(change: Callable[..., Tensor], *texts: Text) -> Text:
    """Apply `change` to each tensor of a text, except the lengths."""
    names = [field.name for field in dataclasses.fields(Text) if field.name != "lengths"]
    made = {name: change(*(getattr(text, name) for text in texts)) for name in names}
    return Text(**made, lengths=torch.cat([text.lengths for text in texts]))


def test_an_example_does_not_depend_on_its_neighbours(case: Case) -> None:
    case.network.double()
    text = changed(lambda part: part.double() if part.is_floating_point() else part, case.text)
    short = dataclasses.replace(
        changed(lambda part: part[..., :5], text), lengths=torch.tensor([5])
    )
    padded = changed(lambda part: nn.functional.pad(part, (0, 4), value=2), short)
    both = changed(lambda *parts: torch.cat(parts), text, padded)
    longer, frames = case.spec.double(), torch.tensor([24, 15])
    spec = longer[..., :15].flip(2)
    specs = torch.cat([longer, nn.functional.pad(spec, (0, 9))])
    speakers = torch.tensor([1, 4])

    with torch.no_grad():
        alone = case.network(short, spec, frames[1:], speakers[1:], NoNoise(), 4)
        first = case.network(text, longer, frames[:1], speakers[:1], NoNoise(), 4)
        together = case.network(both, specs, frames, speakers, NoNoise(), 4)
    assert torch.equal(together.path[1:, :15, :5], alone.path)
    for name in ("wav", "starts", "duration_nll"):
        torch.testing.assert_close(getattr(together, name)[1:], getattr(alone, name))
    for name in ("z_p", "m_p", "logs_p"):
        torch.testing.assert_close(getattr(together, name)[1:, :, :15], getattr(alone, name))

    loss = sum(loss_of(out, total_symbols=14) for out in (first, alone))
    torch.testing.assert_close(loss_of(together), loss)

    sung = case.network.infer(both, speakers, noise=NoNoise())
    sung_alone = case.network.infer(short, speakers[1:], noise=NoNoise())
    assert torch.equal(sung.frames[1:], sung_alone.frames)
    end = int(sung_alone.frames)
    assert torch.equal(sung.path[1:, :end, :5], sung_alone.path)


def test_what_follows_a_text_is_silence_to_the_decoder(case: Case, filled: Filled) -> None:
    heard: list[Tensor] = []
    network = filled(TextSynthesizer(dataclasses.replace(case.config, n_flows=1)))
    network.dec.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    text = changed(lambda part: torch.cat([part, part]), case.text)
    text = dataclasses.replace(text, lengths=torch.tensor([9, 4]))
    sung = network.infer(text, torch.tensor([1, 1]), noise=KeyedNoise([1, 2]))
    end = int(sung.frames[1])
    assert end < sung.frames[0] == heard[0].shape[2]
    assert heard[0][1, :, :end].all()
    assert not heard[0][1, :, end:].any()


@pytest.mark.parametrize("case", ["base", "refenc"], indirect=True)
def test_learns_in_half_precision(case: Case) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = case.network.train()(
            case.text, case.spec, case.frames, case.speaker, KeyedNoise([1]), 4, 0.01
        )
    assert out.path.sum() == case.frames.sum()
    assert out.duration_nll.dtype == torch.float32
    loss = out.wav.float().square().mean() + (out.z_p - out.m_p).square().mean()
    (loss + out.duration_nll.sum() + out.log_durations_hat.square().sum()).backward()
    gradients = [p.grad for p in case.network.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_noise_on_the_alignment_moves_it(case: Case) -> None:
    quiet = case.train().path
    assert torch.equal(case.train(alignment_noise=1.0).path, quiet), "NoNoise adds none"
    inputs = (case.text, case.spec, case.frames, case.speaker)
    quiet = case.network(*inputs, KeyedNoise([3]), 4).path
    moved = case.network(*inputs, KeyedNoise([3]), 4, alignment_noise=1.0).path
    assert not torch.equal(moved, quiet)
    assert moved.sum() == quiet.sum()


def test_a_short_inference_is_the_beginning_of_a_long_one(case: Case) -> None:
    whole = case.network.infer(case.text, case.speaker, noise=NoNoise())
    cut = case.network.infer(case.text, case.speaker, noise=NoNoise(), max_frames=9)
    assert cut.wav.shape[1] == 9 * case.config.hop_length
    assert torch.equal(cut.path, whole.path)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"n_layers": 2}, "model.n_layers is 2; the speaker embedding is added before layer 3"),
        ({"n_flow_layers": 1}, "model.n_flow_layers is 1; the speaker"),
        ({"gin_channels": 0}, "model.gin_channels is 0"),
        ({"n_speakers": 1}, "model.n_speakers is 1; it must be 2 or more, or 0"),
        ({"share_flow": True}, "model.share_flow is not supported"),
        ({"decoder": "nsf-hifigan"}, "model.decoder is nsf-hifigan"),
        ({"hidden_channels": 15}, "multiple of model.n_heads"),
    ],
)
def test_refuses_networks_that_cannot_be(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TextSynthesizerConfig(**{"n_speakers": 4, "gin_channels": 8, **change})


def test_a_residual_flow_may_have_few_layers() -> None:
    TextSynthesizerConfig(n_speakers=4, flow="residual", n_flow_layers=1)


def test_needs_the_speaker(reference: Reference, filled: Filled, case: Case) -> None:
    with pytest.raises(ValueError, match="has 5 speakers; name one"):
        case.network.infer(case.text, noise=NoNoise())
    heard = Case("refenc", reference, filled)
    with pytest.raises(ValueError, match="needs a reference spectrogram"):
        heard.network.infer(heard.text, noise=NoNoise())
