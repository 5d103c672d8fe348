"""Published tensors of routed decoders, and the keys of config.json that describe routing. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindvl_jax.models.hf import TRANSPOSE, Rule, linear, norm
from mindvl_jax.models.layers.config import DeepSeekV3TextConfig, Qwen3MoETextConfig
from mindvl_jax.models.layers.decoder_hf import EMBEDDING, HEAD, text_rules

LAYER = "model.layers.{layer}"


def expert_rules(ours: str, **options: Any) -> list[Rule]:
    """Router and experts of a stack of routed layers, one published tensor an expert and matrix."""
    experts = [
        Rule(
            f"{LAYER}.mlp.experts.{{expert}}.{part}_proj.weight", (f"{ours}/moe/experts/{part}",), TRANSPOSE, **options
        )
        for part in ("gate", "up", "down")
    ]
    return [Rule(f"{LAYER}.mlp.gate.weight", (f"{ours}/moe/router/kernel",), TRANSPOSE, **options), *experts]


def qwen3_moe_rules(config: Qwen3MoETextConfig) -> list[Rule]:
    """Qwen3's decoder with experts in the place of its feed-forward."""
    dense = [rule for rule in text_rules(config) if "/mlp/" not in rule.ours[0]]
    return dense + expert_rules("language/layers")


def deepseek_v3_rules(config: DeepSeekV3TextConfig) -> list[Rule]:
    """Latent attention, dense layers under `language/dense`, routed ones under `language/layers`.

    The MTP layer is not part of it.
    """
    rules = [Rule(EMBEDDING, ("language/embed/embedding",)), *norm("model.norm", "language/norm")]
    if not config.tie_word_embeddings:
        rules.append(Rule(HEAD, ("language/head/kernel",), TRANSPOSE))
    if config.dense_layers:
        rules += _latent_rules(config, "language/dense", 0)
        rules += [
            rule
            for part in ("gate", "up", "down")
            for rule in linear(f"{LAYER}.mlp.{part}_proj", f"language/dense/mlp/{part}", bias=False)
        ]
    first = config.dense_layers
    rules += [*_latent_rules(config, "language/layers", first), *expert_rules("language/layers", first=first)]
    if config.moe.selection_bias:
        rules.append(
            Rule(f"{LAYER}.mlp.gate.e_score_correction_bias", ("language/layers/moe/router/bias",), first=first)
        )
    if config.moe.shared_experts:
        rules += [
            rule
            for part in ("gate", "up", "down")
            for rule in linear(
                f"{LAYER}.mlp.shared_experts.{part}_proj", f"language/layers/moe/shared/{part}", bias=False, first=first
            )
        ]
    return rules


def _latent_rules(config: DeepSeekV3TextConfig, ours: str, first: int) -> list[Rule]:
    names = {"latent_down": "kv_a_proj_with_mqa", "latent_up": "kv_b_proj", "output": "o_proj"}
    names |= (
        {"query_up": "q_proj"} if config.q_lora_rank is None else {"query_down": "q_a_proj", "query_up": "q_b_proj"}
    )
    rules = [
        rule
        for mine, name in names.items()
        for rule in linear(f"{LAYER}.self_attn.{name}", f"{ours}/attention/{mine}", bias=False, first=first)
    ]
    rules += norm(f"{LAYER}.self_attn.kv_a_layernorm", f"{ours}/attention/latent_norm", first=first)
    if config.q_lora_rank is not None:
        rules += norm(f"{LAYER}.self_attn.q_a_layernorm", f"{ours}/attention/query_norm", first=first)
    return [
        *rules,
        *norm(f"{LAYER}.input_layernorm", f"{ours}/norm1", first=first),
        *norm(f"{LAYER}.post_attention_layernorm", f"{ours}/norm2", first=first),
    ]


def rope_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings of either spelling: `rope_scaling` beside `rope_theta`, or transformers 5's `rope_parameters`."""
    rope = {**(content.get("rope_scaling") or {}), **(content.get("rope_parameters") or {})}
    rope.setdefault("rope_theta", content.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.get("type", "default"))
    return rope
