"""Key names of each family of encoder files.

Tested by tests/models/encoders/layouts/test_encoder_file.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

_SUFFIX = re.compile(
    r"(?:\.(weight|bias|weight_g|weight_v|parametrizations\.weight\.original[01]))?$"
)
_OLD_NAMES = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


@dataclass(frozen=True)
class KeyLayout:
    """Key names of one family of files.

    title: its name for users. signature: a key that only this family has.
    modules: (Cantor's name of a part, the file's name), {i} is a number. Query, key and value are
    separate, and the position convolution's weight is weight_g and weight_v; a file with one matrix
    maps to the fused name.
    ignored: patterns of keys that belong to training or to a head.
    """

    title: str
    signature: str
    modules: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...] = ()
    pad: int = field(default=0, kw_only=True)

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], str]]:
        return [
            (re.compile(re.escape(key).replace(r"\{i\}", r"(\d+)") + _SUFFIX.pattern), name)
            for name, key in self.modules
        ]

    def name_of(self, key: str) -> str | None:
        """Return Cantor's name of a file's key, None if the key is unknown."""
        for pattern, template in self._patterns:
            if match := pattern.fullmatch(key):
                *index, suffix = match.groups()
                name = template.format(i=index[0]) if index else template
                return f"{name}.{_OLD_NAMES.get(suffix, suffix)}" if suffix else name
        return None

    def key_of(self, name: str) -> str:
        """Return the file's key of Cantor's name, for error messages."""
        for module, template in self.modules:
            pattern = re.escape(module).replace(r"\{i\}", r"(\d+)") + _SUFFIX.pattern
            if match := re.fullmatch(pattern, name):
                *index, suffix = match.groups()
                key = template.format(i=index[0]) if index else template
                return f"{key}.{suffix}" if suffix else key
        return name

    def ignores(self, key: str) -> bool:
        return any(re.fullmatch(pattern, key) for pattern in self.ignored)


def _layers(stack: str, attention: str, parts: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the parts of one layer; `attention` and the names in `parts` are below `stack`.{i}."""
    qkv = [(f"attention.{n}", f"{attention}.{n}_proj") for n in ("q", "k", "v", "out")]
    return [(f"layers.{{i}}.{name}", f"{stack}.{{i}}.{key}") for name, key in [*qkv, *parts]]


FAIRSEQ = KeyLayout(
    "a fairseq HuBERT or a WavLM",
    "post_extract_proj.weight",
    (
        ("stem.{i}.conv", "feature_extractor.conv_layers.{i}.0"),
        ("stem.{i}.norm", "feature_extractor.conv_layers.{i}.2"),
        ("stem.{i}.norm", "feature_extractor.conv_layers.{i}.2.1"),
        ("stem_out_norm", "layer_norm"),
        ("projection", "post_extract_proj"),
        ("position.conv", "encoder.pos_conv.0"),
        ("norm", "encoder.layer_norm"),
        ("relative_bias", "encoder.layers.0.self_attn.relative_attention_bias"),
        ("final_projection", "final_proj"),
        *_layers(
            "encoder.layers",
            "self_attn",
            (
                ("attention.bias_gate.linear", "self_attn.grep_linear"),
                ("attention.bias_gate.scale", "self_attn.grep_a"),
                ("attention_norm", "self_attn_layer_norm"),
                ("feed_forward.fc1", "fc1"),
                ("feed_forward.fc1", "fc1.linear"),
                ("feed_forward.fc2", "fc2"),
                ("feed_forward_norm", "final_layer_norm"),
            ),
        ),
    ),
    (r"mask_emb", r"label_embs_concat"),
)


def _transformers_layout(
    title: str, signature: str, outer: str, stack: str, ignored: str
) -> KeyLayout:
    """Build the layout of transformers or torchaudio, which differ in the prefixes of parts."""
    return KeyLayout(
        title,
        signature,
        (
            ("stem.{i}.conv", "feature_extractor.conv_layers.{i}.conv"),
            ("stem.{i}.norm", "feature_extractor.conv_layers.{i}.layer_norm"),
            ("stem_scale", "feature_extractor.dummy_weight"),
            ("stem_out_norm", f"{outer}feature_projection.layer_norm"),
            ("projection", f"{outer}feature_projection.projection"),
            ("position.conv", f"{stack}pos_conv_embed.conv"),
            ("norm", f"{stack}layer_norm"),
            ("relative_bias", f"{stack}layers.0.attention.rel_attn_embed"),
            ("final_projection", "final_proj"),
            *_layers(
                f"{stack}layers",
                "attention",
                (
                    ("attention.bias_gate.linear", "attention.gru_rel_pos_linear"),
                    ("attention.bias_gate.scale", "attention.gru_rel_pos_const"),
                    ("attention_norm", "layer_norm"),
                    ("feed_forward.fc1", "feed_forward.intermediate_dense"),
                    ("feed_forward.fc2", "feed_forward.output_dense"),
                    ("feed_forward_norm", "final_layer_norm"),
                ),
            ),
        ),
        (ignored,),
    )


HUGGING_FACE = _transformers_layout(
    "a Hugging Face HuBERT or WavLM",
    "feature_projection.projection.weight",
    "",
    "encoder.",
    # the vector for masked frames, and the heads of fine-tuned models
    r"masked_spec_embed|layer_weights|(lm_head|classifier|projector|tdnn|objective)\..*"
    r"|feature_extractor\.(weight|bias)|adapter\..*",
)
DPHUBERT = _transformers_layout(
    "a DPHuBERT or DPWavLM",
    "encoder.feature_projection.projection.weight",
    "encoder.",
    "encoder.transformer.",
    r"mask_embedding|aux\..*",
)
HUBERT_SOFT = KeyLayout(
    "a HuBERT-Soft",
    "feature_extractor.conv0.weight",
    (
        ("stem.{i}.conv", "feature_extractor.conv{i}"),
        ("stem.{i}.norm", "feature_extractor.norm{i}"),
        ("stem_out_norm", "feature_projection.norm"),
        ("projection", "feature_projection.projection"),
        ("position.conv", "positional_embedding.conv"),
        ("norm", "norm"),
        ("final_projection", "proj"),
        ("layers.{i}.attention.qkv.weight", "encoder.layers.{i}.self_attn.in_proj_weight"),
        ("layers.{i}.attention.qkv.bias", "encoder.layers.{i}.self_attn.in_proj_bias"),
        ("layers.{i}.attention.out", "encoder.layers.{i}.self_attn.out_proj"),
        ("layers.{i}.attention_norm", "encoder.layers.{i}.norm1"),
        ("layers.{i}.feed_forward.fc1", "encoder.layers.{i}.linear1"),
        ("layers.{i}.feed_forward.fc2", "encoder.layers.{i}.linear2"),
        ("layers.{i}.feed_forward_norm", "encoder.layers.{i}.norm2"),
    ),
    (r"masked_spec_embed", r"label_embedding\.weight"),
    pad=40,
)
CANTOR = KeyLayout("an encoder in Cantor's format", "stem_out_norm.weight", ())

LAYOUTS = (HUBERT_SOFT, FAIRSEQ, HUGGING_FACE, DPHUBERT)
