"""The wav2vec 2.0 family as encoders: batches equal single clips, long songs in windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.batching import windows
from models.encoders.ssl import OVERLAP_FRAMES, WINDOW_FRAMES, SslEncoder
from models.encoders.wav2vec2 import LayerShape, RelativeBias, Wav2Vec2, Wav2Vec2Config

STEM = ((24, 10, 5), *((24, 3, 2),) * 4, *((24, 2, 2),) * 2)
LAYER = LayerShape(heads=4, head_dim=12, feed_forward=96)
SMALL = {"stem": STEM, "width": 48, "layers": (LAYER,) * 3}
VARIANTS = {
    "base": Wav2Vec2Config(**SMALL, project_dim=24),
    "large": Wav2Vec2Config(
        **SMALL, stem_norm="layer", stem_bias=True, pre_norm=True, final_norm=True
    ),
    "soft": Wav2Vec2Config(**SMALL, pad=40),
    "wavlm": Wav2Vec2Config(**SMALL, relative_bias=RelativeBias(heads=4), normalize_wav=True),
    "glu": Wav2Vec2Config(**SMALL, activation="glu-swish"),
    "pruned": Wav2Vec2Config(
        stem=((20, 10, 5), (24, 3, 2), (17, 3, 2), *((24, 3, 2),) * 2, (24, 2, 2), (13, 2, 2)),
        stem_scale=True,
        width=48,
        layers=(
            LayerShape(heads=2, head_dim=12, feed_forward=31, kept_heads=(1, 3)),
            LayerShape(heads=0, head_dim=12, feed_forward=50),
            LayerShape(heads=3, head_dim=12, feed_forward=0, kept_heads=(0, 1, 2)),
        ),
        relative_bias=RelativeBias(heads=4),
    ),
}


def network(config: Wav2Vec2Config) -> Wav2Vec2:
    """Draw weights so that activations keep a standard deviation near 1."""
    torch.manual_seed(0)
    net = Wav2Vec2(config)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1:
                p.normal_(0, ((p.ndim - 1) / p[0].numel()) ** 0.5)
            else:
                p.add_(0.1 * torch.randn_like(p))
    return net.eval()


def song(num_samples: int, seed: int = 0) -> Tensor:
    """Make a glide with noise, which changes all the time, so that a wrong frame shows."""
    t = torch.arange(num_samples) / 16000
    tone = torch.sin(2 * torch.pi * (150 * t + 20 * t.square() / 2)) * 0.2
    return tone + 0.02 * torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=sorted(VARIANTS), scope="module")
def config(request: pytest.FixtureRequest) -> Wav2Vec2Config:
    return VARIANTS[request.param]


LENGTHS = [8000, 320000, 401, 100001, 48000, 48000, 7]


@torch.inference_mode()
def test_an_encoder_equals_its_network(config: Wav2Vec2Config) -> None:
    """The tiled stem and packed products equal one pass of plain PyTorch."""
    plain = network(config)
    encoder = SslEncoder("any", network(config))
    for n in LENGTHS[:5]:
        wav = song(n)
        expected = plain(wav[None])[0]
        (units,) = encoder.encode([wav])
        assert units.shape == (config.num_frames(n), config.dim)
        torch.testing.assert_close(units, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@torch.inference_mode()
def test_a_padded_batch_equals_single_clips(config: Wav2Vec2Config) -> None:
    """What a GPU does with clips of different lengths, in any padding (even NaN)."""
    plain = network(config)
    lengths = [n for n in LENGTHS if n > 400]
    rows = torch.full((len(lengths), max(lengths)), torch.nan)
    for row, n in zip(rows, lengths, strict=True):
        row[:n] = song(n)
    together = plain(rows.nan_to_num(7.0), lengths)
    for units, n in zip(together, lengths, strict=True):
        alone = plain(song(n)[None])[0]
        assert alone.std() > 0.3
        torch.testing.assert_close(units[: len(alone)], alone, rtol=0, atol=1e-5)


def test_a_clip_does_not_depend_on_its_neighbours(config: Wav2Vec2Config) -> None:
    encoder = SslEncoder("any", network(config))
    wavs = [song(n, seed=i) for i, n in enumerate(LENGTHS)]
    for wav, units in zip(wavs, encoder.encode(wavs), strict=True):
        torch.testing.assert_close(encoder.encode([wav])[0], units, rtol=0, atol=1e-5)
        assert len(units) >= 1


@pytest.mark.slow
def test_batches_as_on_a_gpu(config: Wav2Vec2Config) -> None:
    """The batched path on this processor: planned by length, results in the clips' order."""
    encoder = SslEncoder("any", network(config))
    wavs = [song(n, seed=i) for i, n in enumerate(LENGTHS)]
    alone = encoder.encode(wavs)
    encoder.one_by_one = False
    for units, expected in zip(encoder.encode(wavs), alone, strict=True):
        torch.testing.assert_close(units, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_sixty_seconds_are_one_piece_and_more_are_windows() -> None:
    """The seam error: what differs from one pass over 100 s of a voice that never stands still.

    Random weights attend to everything equally, so each window lacks the rest: 18 % of
    the units' norm, all over. Where two windows meet it is no more, and nothing clicks.
    """
    plain = network(VARIANTS["base"])
    encoder = SslEncoder("any", network(VARIANTS["base"]))
    wav = song(100 * 16000)
    with torch.inference_mode():
        whole = plain(wav[None])[0]
    (units,) = encoder.encode([wav])
    assert units.shape == whole.shape
    error = (units - whole).norm(dim=1) / whole.norm(dim=1)
    seam = windows(len(whole), WINDOW_FRAMES, OVERLAP_FRAMES)[0].last
    assert 0.01 < error.mean() < 0.25
    assert error[seam - 5 : seam + 5].max() < 1.5 * error.mean()
    jump = (units[seam] - units[seam - 1]).norm()
    steps = (whole[1:] - whole[:-1]).norm(dim=1)
    assert jump < 2 * steps.max()  # no click where two windows meet
    (minute,) = encoder.encode([wav[: 59 * 16000]])
    with torch.inference_mode():
        expected = plain(wav[None, : 59 * 16000])[0]
    torch.testing.assert_close(minute, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_samples", [960319, 960320, 960399])
def test_a_clip_of_a_minute_is_the_same_in_a_batch(num_samples: int) -> None:
    """At the length where windows begin, which the zeros at both ends bring forward."""
    config = Wav2Vec2Config(stem=STEM, width=48, layers=(LAYER,), pad=40)
    encoder = SslEncoder("any", network(config))
    encoder.one_by_one = False
    wav = song(num_samples)
    (alone,) = encoder.encode([wav])
    together, _ = encoder.encode([wav, song(8000)])
    assert len(alone) == config.num_frames(num_samples)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("one_by_one", [True, False])
def test_half_precision_keeps_a_quiet_clip_that_is_normalised(one_by_one: bool) -> None:
    """If cast first, its samples would be rounded to a few steps of float16."""
    config = Wav2Vec2Config(**SMALL, stem_norm="layer", normalize_wav=True)
    encoder = SslEncoder("any", network(config), dtype="float16")
    encoder.one_by_one = one_by_one
    wavs = [1e-5 * song(16000), song(8000)]
    exact = SslEncoder("any", network(config)).encode(wavs[:1])[0]
    error = (encoder.encode(wavs)[0] - exact).norm() / exact.norm()
    assert error < 0.005


def test_half_precision_is_near() -> None:
    exact = SslEncoder("any", network(VARIANTS["base"])).encode([song(48000)])[0]
    near = SslEncoder("any", network(VARIANTS["base"]), dtype="bfloat16").encode([song(48000)])[0]
    assert near.dtype == torch.float32
    relative = (near - exact).norm() / exact.norm()
    assert 0 < relative < 0.1
