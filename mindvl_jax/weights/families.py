"""Which published tensor is which of our parameters: one table a family, used for reading and for writing.

Published matrices are (outputs, inputs); ours are (inputs, outputs) with all layers of a stack on a leading axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from mindvl_jax.models.layers.config import TextConfig
from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.models.mindvl.config import VisionConfig


@dataclasses.dataclass(frozen=True)
class Rule:
    """One published name and the parameters it fills.

    Attributes:
      published: name, with `{layer}` where layers are numbered.
      ours: parameter paths; several when the published tensor holds them one after another along its first axis.
      form: `same`, `transpose` (matrix) or `flatten` (convolution kernel to the matrix of a flattened patch).
    """

    published: str
    ours: tuple[str, ...]
    form: str = "same"

    @property
    def layered(self) -> bool:
        return "{layer}" in self.published

    def name(self, layer: int | None) -> str:
        return self.published.format(layer=layer) if self.layered else self.published


def _linear(published: str, ours: str, *, bias: bool) -> list[Rule]:
    rules = [Rule(f"{published}.weight", (f"{ours}/kernel",), "transpose")]
    return rules + ([Rule(f"{published}.bias", (f"{ours}/bias",))] if bias else [])


def _norm(published: str, ours: str) -> list[Rule]:
    return [Rule(f"{published}.weight", (f"{ours}/scale",))]


def vision_rules(prefix: str = "visual") -> list[Rule]:
    """Vision tower and projector, as Qwen2.5-VL publishes them."""
    block, ours = prefix + ".blocks.{layer}", "vision/blocks"
    qkv = tuple(f"{ours}/attention/{part}" for part in ("query", "key", "value"))
    return [
        Rule(f"{prefix}.patch_embed.proj.weight", ("vision/patch_embed/kernel",), "flatten"),
        *_norm(f"{block}.norm1", f"{ours}/norm1"),
        *_norm(f"{block}.norm2", f"{ours}/norm2"),
        Rule(f"{block}.attn.qkv.weight", tuple(f"{part}/kernel" for part in qkv), "transpose"),
        Rule(f"{block}.attn.qkv.bias", tuple(f"{part}/bias" for part in qkv)),
        *_linear(f"{block}.attn.proj", f"{ours}/attention/output", bias=True),
        *(rule for part in ("gate", "up", "down") for rule in _linear(f"{block}.mlp.{part}_proj", f"{ours}/mlp/{part}", bias=True)),
        *_norm(f"{prefix}.merger.ln_q", "projector/norm"),
        *_linear(f"{prefix}.merger.mlp.0", "projector/linear1", bias=True),
        *_linear(f"{prefix}.merger.mlp.2", "projector/linear2", bias=True),
    ]


def text_rules(config: TextConfig) -> list[Rule]:
    """Decoder of Qwen2.5 (q/k/v biases) or Qwen3 (q/k norms); the head only when it is not tied."""
    layer, ours = "model.layers.{layer}", "language/layers"
    qwen2 = config.family == "qwen2"
    rules = [
        Rule("model.embed_tokens.weight", ("language/embed/embedding",)),
        *_norm(f"{layer}.input_layernorm", f"{ours}/norm1"),
        *(rule for short, part in (("q", "query"), ("k", "key"), ("v", "value"))
          for rule in _linear(f"{layer}.self_attn.{short}_proj", f"{ours}/attention/{part}", bias=qwen2)),
        *_linear(f"{layer}.self_attn.o_proj", f"{ours}/attention/output", bias=False),
        *_norm(f"{layer}.post_attention_layernorm", f"{ours}/norm2"),
        *(rule for part in ("gate", "up", "down") for rule in _linear(f"{layer}.mlp.{part}_proj", f"{ours}/mlp/{part}", bias=False)),
        *_norm("model.norm", "language/norm"),
    ]
    if not qwen2:
        rules += [*_norm(f"{layer}.self_attn.q_norm", f"{ours}/attention/query_norm"), *_norm(f"{layer}.self_attn.k_norm", f"{ours}/attention/key_norm")]
    if not config.tie_word_embeddings:
        rules.append(Rule("lm_head.weight", ("language/head/kernel",), "transpose"))
    return rules


def rules_for(config: ModelConfig) -> list[Rule]:
    """The table of a whole model. MindVL's own layout is the vision table beside its decoder's."""
    return (vision_rules() if config.family == "mindvl" else []) + text_rules(config.text)


# Other spellings of the same tensors: memory names of transformers 4.52 and later, and towers saved alone.
ALIASES = (("model.visual.", "visual."), ("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."))


def canonical(name: str) -> str:
    """The published spelling of a tensor's name."""
    for other, published in ALIASES:
        if name.startswith(other):
            return published + name.removeprefix(other)
    return name


def ignorable(name: str) -> bool:
    """Tables that some releases saved beside the weights and that follow from the configuration."""
    return name.endswith("rotary_emb.inv_freq") or name.endswith("rotary_pos_emb.inv_freq")


@dataclasses.dataclass(frozen=True)
class Slot:
    """One published tensor: the parameters, the layer and the rows that it holds.

    Attributes:
      parts: (our path, rows of the published tensor) in order.
      shape: the published shape. layer: None outside stacks.
    """

    name: str
    rule: Rule
    layer: int | None
    parts: tuple[tuple[str, slice], ...]
    shape: tuple[int, ...]


def slots(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Slot]:
    """Every published tensor of a model whose parameters have `shapes` (by path), with the shape it must have."""
    vision = getattr(config, "vision", None)
    for rule in rules_for(config):
        layers = range(shapes[rule.ours[0]][0]) if rule.layered else [None]
        for layer in layers:
            parts, start, tail = [], 0, ()
            for path in rule.ours:
                own = published_shape(rule.form, shapes[path][1:] if rule.layered else shapes[path], vision)
                parts.append((path, slice(start, start + own[0])))
                start, tail = start + own[0], own[1:]
            yield Slot(rule.name(layer), rule, layer, tuple(parts), (start, *tail))


def published_shape(form: str, shape: tuple[int, ...], vision: VisionConfig | None) -> tuple[int, ...]:
    """Shape of the published tensor of one of our (unstacked) parameters."""
    if form == "same":
        return shape
    if form == "transpose":
        return shape[::-1]
    return (shape[1], vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)


def to_ours(form: str, tensor):
    """Published tensor to ours; works on numpy and JAX arrays."""
    if form == "same":
        return tensor
    return tensor.reshape(tensor.shape[0], -1).T


def to_published(form: str, array: np.ndarray, vision: VisionConfig | None) -> np.ndarray:
    """The inverse of `to_ours`, contiguous."""
    return np.ascontiguousarray(array if form == "same" else array.T).reshape(published_shape(form, array.shape, vision))
