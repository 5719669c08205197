"""RMVPE: f0 by a network that sees the log-mel of a clip as an image.

H. Wei, X. Cao, T. Dan, Y. Chen, "RMVPE: A robust model for vocal pitch estimation in polyphonic
music", Interspeech 2023. The network is the one that the community's `rmvpe.pt` holds: a U-Net of
residual blocks, a bidirectional GRU over frames, and a sigmoid for each of 360 bins of 20 cents.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.f0.bins import NUM_BINS

NUM_MELS = 128
_MAPS = 3  # of NUM_MELS features each that leave the U-Net


@dataclass(frozen=True)
class RmvpeConfig:
    """Widths and depths of the network; the defaults are the published one's.

    channels: of the first level; each level doubles them. levels: halvings of frames and mel bins.
    blocks: residual blocks in each layer. inter_layers: layers between encoder and decoder.
    hidden: width of the GRU in each direction. gru_layers: GRUs one after the other.
    timbre_filter: the file has the weights of `unet.tf`, which the published network never uses.
    """

    channels: int = 16
    levels: int = 5
    blocks: int = 4
    inter_layers: int = 4
    hidden: int = 256
    gru_layers: int = 1
    timbre_filter: bool = True


def key_shapes(config: RmvpeConfig) -> dict[str, tuple[int, ...]]:
    """Every key of the published state dict and its shape, in the order of the state dict."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, width: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (width,)
        shapes[f"{name}.num_batches_tracked"] = ()

    def block(name: str, n_in: int, n_out: int) -> None:
        shapes[f"{name}.conv.0.weight"] = (n_out, n_in, 3, 3)
        norm(f"{name}.conv.1", n_out)
        shapes[f"{name}.conv.3.weight"] = (n_out, n_out, 3, 3)
        norm(f"{name}.conv.4", n_out)
        if n_in != n_out:
            shapes[f"{name}.shortcut.weight"] = (n_out, n_in, 1, 1)
            shapes[f"{name}.shortcut.bias"] = (n_out,)

    def layer(name: str, n_in: int, n_out: int) -> None:
        for i in range(config.blocks):
            block(f"{name}.{i}", n_in if i == 0 else n_out, n_out)

    widths = [config.channels << i for i in range(config.levels + 1)]
    norm("unet.encoder.bn", 1)
    for i, (n_in, n_out) in enumerate(zip([1, *widths], widths[:-1], strict=False)):
        layer(f"unet.encoder.layers.{i}.conv", n_in, n_out)
    for i in range(config.inter_layers):
        layer(f"unet.intermediate.layers.{i}.conv", widths[-2 if i == 0 else -1], widths[-1])
    if config.timbre_filter:
        for i, width in enumerate(widths[:-1]):
            block(f"unet.tf.layers.{i}", width, width)
    for i in range(config.levels):
        n_in, n_out = widths[-1 - i], widths[-2 - i]
        name = f"unet.decoder.layers.{i}"
        shapes[f"{name}.conv1.0.weight"] = (n_in, n_out, 3, 3)  # transposed: inputs come first
        norm(f"{name}.conv1.1", n_out)
        layer(f"{name}.conv2", 2 * n_out, n_out)
    shapes["cnn.weight"] = (_MAPS, config.channels, 3, 3)
    shapes["cnn.bias"] = (_MAPS,)
    for i in range(config.gru_layers):
        n_in = _MAPS * NUM_MELS if i == 0 else 2 * config.hidden
        for end in ("", "_reverse"):
            shapes[f"fc.0.gru.weight_ih_l{i}{end}"] = (3 * config.hidden, n_in)
            shapes[f"fc.0.gru.weight_hh_l{i}{end}"] = (3 * config.hidden, config.hidden)
            shapes[f"fc.0.gru.bias_ih_l{i}{end}"] = (3 * config.hidden,)
            shapes[f"fc.0.gru.bias_hh_l{i}{end}"] = (3 * config.hidden,)
    shapes["fc.1.weight"] = (NUM_BINS, 2 * config.hidden)
    shapes["fc.1.bias"] = (NUM_BINS,)
    return shapes
