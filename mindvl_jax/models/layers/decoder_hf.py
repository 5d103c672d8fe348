"""Published files of the shared decoder: tensors of Qwen2.5 and Qwen3, their part of config.json. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mindvl_jax.data.text.template import QWEN_TEMPLATE
from mindvl_jax.models.hf import TRANSPOSE, ConfigReader, Rule, linear, norm
from mindvl_jax.models.layers.config import TextConfig

# Spellings of transformers 4.52 and later in memory, and of language models saved alone.
ALIASES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

CHAT_TEMPLATE = QWEN_TEMPLATE

# Our names of the decoder's parts -> paths in transformers' models.
_DECODERS = ("model.language_model", "model")
PARTS: dict[str, tuple[str, ...]] = {
    "embed": tuple(f"{path}.embed_tokens" for path in _DECODERS),
    "norm": tuple(f"{path}.norm" for path in _DECODERS),
    "head": ("lm_head",),
    **{
        f"layer {{layer}} {ours}": tuple(f"{path}.layers.{{layer}}.{theirs}" for path in _DECODERS)
        for ours, theirs in (
            ("norm1", "input_layernorm"),
            ("attention", "self_attn"),
            ("norm2", "post_attention_layernorm"),
            ("mlp", "mlp"),
        )
    },
}


def text_rules(config: TextConfig) -> list[Rule]:
    """Decoder of Qwen2.5 (q/k/v biases), Qwen3 (q/k norms) or Llama; the head only when it is not tied."""
    layer, ours = "model.layers.{layer}", "language/layers"
    qwen2 = config.family == "qwen2"
    rules = [
        Rule(EMBEDDING, ("language/embed/embedding",)),
        *norm(f"{layer}.input_layernorm", f"{ours}/norm1"),
        *(
            rule
            for short, part in (("q", "query"), ("k", "key"), ("v", "value"))
            for rule in linear(f"{layer}.self_attn.{short}_proj", f"{ours}/attention/{part}", bias=qwen2)
        ),
        *linear(f"{layer}.self_attn.o_proj", f"{ours}/attention/output", bias=False),
        *norm(f"{layer}.post_attention_layernorm", f"{ours}/norm2"),
        *(
            rule
            for part in ("gate", "up", "down")
            for rule in linear(f"{layer}.mlp.{part}_proj", f"{ours}/mlp/{part}", bias=False)
        ),
        *norm("model.norm", "language/norm"),
    ]
    if config.family not in ("qwen2", "llama"):
        rules += [
            *norm(f"{layer}.self_attn.q_norm", f"{ours}/attention/query_norm"),
            *norm(f"{layer}.self_attn.k_norm", f"{ours}/attention/key_norm"),
        ]
    if not config.tie_word_embeddings:
        rules.append(Rule(HEAD, ("language/head/kernel",), TRANSPOSE))
    return rules


def tied(config: Any) -> tuple[str, str] | None:
    """The output matrix may be left out of the files of a model that ties it to its token table."""
    return (HEAD, EMBEDDING) if config.text.tie_word_embeddings else None


def tied_as(spell: Callable[[str], str]) -> Callable[[Any], tuple[str, str] | None]:
    """Return `tied` for files that spell the decoder's tensors in another way; `spell` gives the published name."""
    return lambda config: (spell(HEAD), spell(EMBEDDING)) if tied(config) else None


def spelled(rules: Iterable[Rule], spell: Callable[[str], str]) -> list[Rule]:
    """Return `rules` with published names respelled."""
    return [dataclasses.replace(rule, published=spell(rule.published)) for rule in rules]


def read_text(
    reader: ConfigReader,
    content: Mapping[str, Any],
    family: str,
    where: str = "",
    *,
    mrope: bool = False,
    sections: tuple[int, int, int] = (16, 24, 24),
    interleaved: bool = False,
    dynamic: bool = False,
) -> TextConfig | None:
    """The decoder that (a part of) config.json describes.

    Args:
      family: `qwen2`, `qwen3` or `llama`. where: prefix of its keys in messages. mrope: positions in three sections.
      sections: where the file names none, which transformers fills in too. interleaved: the sections take turns.
      dynamic: the family refuses samples for which dynamic frequencies would change.
    """
    reader.expect(content, "hidden_act", ("silu",), "silu", where)
    reader.expect(content, "use_sliding_window", (False, None), False, where)
    if family != "qwen2":
        reader.expect(content, "attention_bias", (False, None), False, where)
    if family == "llama":
        reader.expect(content, "mlp_bias", (False, None), False, where)
    rope = {**(content.get("rope_scaling") or {}), **(content.get("rope_parameters") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    factor = rope.get("factor") if dynamic and rope_type == "dynamic" else None
    if rope_type not in ("default", "mrope") and factor is None:
        reader.problems.append(
            f"{where}rope type is {rope_type!r}; supported: 'default', 'mrope' (frequencies are not rescaled)"
        )
    heads, width = content.get("num_attention_heads"), content.get("hidden_size")
    head_dim = content.get("head_dim") or (
        width // heads if isinstance(heads, int) and isinstance(width, int) and heads else None
    )
    # For another head dim TextConfig refuses the published ones.
    section = rope.get("mrope_section") or sections
    if mrope and "mrope_interleaved" in rope:
        reader.expect(rope, "mrope_interleaved", (interleaved,), interleaved, f"{where}rope ")
    values = dict(
        family=family,
        vocab_size=content.get("vocab_size"),
        hidden_size=width,
        intermediate_size=content.get("intermediate_size"),
        num_layers=content.get("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=content.get("num_key_value_heads", heads),
        head_dim=head_dim,
        rope_theta=rope.get("rope_theta", content.get("rope_theta", 10000.0)),
        rms_norm_eps=content.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(content.get("tie_word_embeddings", False)),
        rope="mrope" if mrope else "1d",
        mrope_section=tuple(section) if mrope else None,
        mrope_interleaved=mrope and interleaved,
        rope_dynamic_factor=factor,
        max_position_embeddings=content.get("max_position_embeddings", 32768),
    )
    return reader.build(TextConfig, values, where)


def nested_text(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The decoder's keys and their prefix in messages: `text_config` where there is one (transformers 5), else the
    whole file.

    In the nested form the outer `tie_word_embeddings` is the one that ties: transformers reads it there.
    """
    nested = content.get("text_config")
    if not isinstance(nested, Mapping):
        return content, ""
    outer = {"tie_word_embeddings": content["tie_word_embeddings"]} if "tie_word_embeddings" in content else {}
    return {**nested, **outer}, "text_config."


def write_text(text: TextConfig) -> dict[str, Any]:
    """The decoder's part of config.json."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": text.rope_theta}
    if text.rope_dynamic_factor is not None:
        rope |= {"rope_type": "dynamic", "factor": text.rope_dynamic_factor}
    if text.rope == "mrope":
        rope["mrope_section"] = list(text.mrope_section)
        if text.mrope_interleaved:
            rope["mrope_interleaved"] = True
    content = dict(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
        num_key_value_heads=text.num_kv_heads,
        rms_norm_eps=text.rms_norm_eps,
        hidden_act="silu",
        tie_word_embeddings=text.tie_word_embeddings,
        max_position_embeddings=text.max_position_embeddings,
        rope_parameters=rope,
        use_sliding_window=False,
        sliding_window=None,
        attention_dropout=0.0,
        use_cache=True,
    )
    if text.family == "qwen3":
        content |= dict(head_dim=text.head_dim, attention_bias=False)
    elif text.num_heads * text.head_dim != text.hidden_size:
        content["head_dim"] = text.head_dim
    return content
