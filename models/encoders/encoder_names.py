"""Names of encoders, and recognition of files of other kinds.

Tested by tests/models/encoders/layouts/test_encoder_file.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Family = Literal["hubert", "wavlm", "hubert-soft", "dphubert", "dpwavlm"]


@dataclass(frozen=True, kw_only=True)
class Name:
    """Properties that the name of an encoder implies.

    width: of the published network. A file of another published width belongs to another encoder;
    an unpublished width (a custom network) is accepted. None: any.
    layers: number of layers before the units, without a norm; None: all, with the final norm.
    project: units go through the file's final projection, to the width `dim` in published files;
    None: if the file has one.
    normalize_wav: None: as in the file.
    """

    families: tuple[Family, ...]
    width: int | None
    layers: int | None = None
    project: bool | None = False
    dim: int | None = None
    normalize_wav: bool | None = None


PUBLISHED_WIDTHS = (768, 1024)


def _contentvec(layers: int, dim: int) -> Name:
    return Name(
        families=("hubert",), width=768, layers=layers, project=dim == 256, dim=dim,
        normalize_wav=False,
    )  # fmt: skip


NAMES: dict[str, Name] = {
    "contentvec256l9": _contentvec(9, 256),
    "contentvec256l12": _contentvec(12, 256),
    "contentvec768l9": _contentvec(9, 768),
    "contentvec768l12": _contentvec(12, 768),
    "cnhubertlarge": Name(families=("hubert",), width=1024, normalize_wav=False),
    "hubertsoft": Name(families=("hubert-soft",), width=768, project=True, normalize_wav=False),
    "wavlm-base-plus": Name(families=("wavlm",), width=768),
    "wavlm-large": Name(families=("wavlm",), width=1024),
    "dphubert": Name(families=("dphubert", "dpwavlm"), width=None, project=None),
}
FAMILIES: dict[Family, str] = {
    "hubert": "a HuBERT or ContentVec",
    "wavlm": "a WavLM",
    "hubert-soft": "a HuBERT-Soft",
    "dphubert": "a DPHuBERT",
    "dpwavlm": "a DPWavLM",
}


def fits(name: Name, family: Family, width: int) -> bool:
    """Check whether a file of this family and width fits the name."""
    right_width = name.width in (None, width) or width not in PUBLISHED_WIDTHS
    return family in name.families and right_width


def names_for(family: Family, width: int) -> list[str]:
    """Return all names that a file of this family and width fits."""
    return [name for name, what in NAMES.items() if fits(what, family, width)]


WHISPER = "a Whisper, for whisper-ppg or whisper-ppg-large"

# Prefixes of keys that identify other files, and the kind of those files.
_OTHER_KINDS = (
    ("encoder.blocks.0.attn.query", WHISPER),
    ("encoder.embed_positions", WHISPER),
    ("model.encoder.embed_positions", WHISPER),
    ("quantizer.", "a wav2vec 2.0 in pre-training, which is not supported"),
    ("enc_p.", "a voice model (so-vits-svc's G_*.pth or RVC's), not an encoder"),
    ("enc_q.", "a voice model (so-vits-svc's G_*.pth or RVC's), not an encoder"),
    ("dec.conv_pre", "a voice model (so-vits-svc's G_*.pth or RVC's), not an encoder"),
    ("discriminators.", "a discriminator (D_*.pth), which only training needs"),
    ("denoise_fn.", "a diffusion model, not an encoder"),
    ("decoder.denoise_fn.", "a diffusion model, not an encoder"),
    ("unet.encoder.", "RMVPE, which estimates f0"),
    ("cent_table", "FCPE, which estimates f0"),
    ("conv1_BN.", "CREPE, which estimates f0"),
    ("conv_pre.", "a vocoder, not an encoder"),
    ("lstm.weight_ih_l0", "a speaker encoder"),
    ("ups.0.", "a vocoder, not an encoder"),
)


def other_kind(keys: Iterable[str]) -> str | None:
    """Return the kind of a file with these keys if it is known and not an encoder, else None."""
    keys = list(keys)
    for start, what in _OTHER_KINDS:
        if any(key.removeprefix("module.").startswith(start) for key in keys):
            return what
    if any("hard_concrete" in key for key in keys):
        return "a DPHuBERT with its gates: prune it first"
    return None


def other_kind_by_config(config: Mapping[str, Any]) -> str | None:
    """Return the kind of a folder whose config.json names another model, else None."""
    kind = config.get("model_type")
    if kind in (None, "hubert", "wavlm"):
        return None
    if kind == "whisper":
        return WHISPER
    return f"a Hugging Face model of type {kind}, which is not supported"
