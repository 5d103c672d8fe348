"""Published tensors of routed decoders, and the keys of config.json that describe routing. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindvl_jax.models.hf import TRANSPOSE, Columns, ConfigReader, Rule, linear, norm
from mindvl_jax.models.layers.config import DeepSeekV3TextConfig, MoEConfig, Qwen3MoETextConfig
from mindvl_jax.models.layers.decoder_hf import EMBEDDING, HEAD, text_rules, write_text

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


def joined_expert_rules(ours: str) -> list[Rule]:
    """Router and experts of a stack of routed layers, all experts in one tensor, inputs first, gate and up joined."""
    experts = f"{ours}/moe/experts"
    return [
        Rule(f"{LAYER}.mlp.gate.weight", (f"{ours}/moe/router/kernel",), TRANSPOSE),
        Rule(f"{LAYER}.mlp.experts.gate_up_proj", (f"{experts}/gate", f"{experts}/up"), Columns()),
        Rule(f"{LAYER}.mlp.experts.down_proj", (f"{experts}/down",)),
    ]


def qwen3_moe_rules(config: Qwen3MoETextConfig, *, joined: bool = False) -> list[Rule]:
    """Qwen3's decoder with experts in the place of its feed-forward, one tensor an expert and matrix or `joined`."""
    dense = [rule for rule in text_rules(config) if "/mlp/" not in rule.ours[0]]
    return dense + (joined_expert_rules if joined else expert_rules)("language/layers")


def read_qwen3_moe(
    content: Mapping[str, Any],
    reader: ConfigReader,
    where: str = "",
    *,
    renormalize: bool,
    sections: tuple[int, int, int] | None = None,
) -> Qwen3MoETextConfig | None:
    """The decoder that (a part of) config.json describes.

    Args:
      where: prefix of its keys in messages. sections: interleaved M-RoPE with these, where the file names none; None
        is one running index.
    """
    reader.expect(content, "hidden_act", ("silu",), "silu", where)
    reader.expect(content, "use_sliding_window", (False, None), False, where)
    reader.expect(content, "attention_bias", (False, None), False, where)
    reader.expect(content, "decoder_sparse_step", (1,), 1, where)
    reader.expect(content, "mlp_only_layers", ([], None), [], where)
    rope = rope_of(content)
    if rope["rope_type"] != "default":
        reader.problems.append(
            f"{where}rope type is {rope['rope_type']!r}; supported: 'default' (frequencies are not rescaled)"
        )
    heads, mrope = content.get("num_attention_heads"), sections is not None
    values = dict(
        experts=content.get("num_experts", content.get("num_local_experts")),
        experts_per_token=content.get("num_experts_per_tok"),
        intermediate_size=content.get("moe_intermediate_size"),
        scoring="softmax",
        renormalize=renormalize,
        balance_loss=content.get("router_aux_loss_coef", 0.001),
        balance="pooled",
    )
    moe = reader.build(MoEConfig, values, where)
    if moe is None:
        return None
    values = dict(
        vocab_size=content.get("vocab_size"),
        hidden_size=content.get("hidden_size"),
        intermediate_size=content.get("intermediate_size", 1),
        num_layers=content.get("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=content.get("num_key_value_heads", heads),
        head_dim=content.get("head_dim"),
        rope_theta=rope["rope_theta"],
        rms_norm_eps=content.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(content.get("tie_word_embeddings", False)),
        rope="mrope" if mrope else "1d",
        mrope_section=tuple(rope.get("mrope_section") or sections) if mrope else None,
        mrope_interleaved=mrope,
        max_position_embeddings=content.get("max_position_embeddings", 32768),
        moe=moe,
    )
    return reader.build(Qwen3MoETextConfig, values, where)


def write_qwen3_moe(text: Qwen3MoETextConfig) -> dict[str, Any]:
    """The decoder's part of config.json."""
    moe = text.moe
    return {
        **write_text(text),
        "head_dim": text.head_dim,
        "attention_bias": False,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.intermediate_size,
        "router_aux_loss_coef": moe.balance_loss,
        "output_router_logits": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def deepseek_v3_rules(config: DeepSeekV3TextConfig) -> list[Rule]:
    """Latent attention, dense layers under `language/dense`, routed ones under `language/layers`, MTP heads behind them
    under `language/mtp`. The heads' token table and output matrix are copies: see `mtp_copies`.
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
    rules += _routed_rules(config, "language/layers", first)
    if config.mtp_layers:
        first = config.num_layers
        rules += _routed_rules(config, "language/mtp/layer", first)
        rules += linear(f"{LAYER}.eh_proj", "language/mtp/joint", bias=False, first=first)
        names = {"enorm": "token_norm", "hnorm": "hidden_norm", "shared_head.norm": "norm"}
        rules += [
            rule
            for name, ours in names.items()
            for rule in norm(f"{LAYER}.{name}", f"language/mtp/{ours}", first=first)
        ]
    return rules


def mtp_copies(config: DeepSeekV3TextConfig) -> dict[str, str]:
    """Tensors of the published MTP layers that repeat the main model's token table and output matrix."""
    layers = range(config.num_layers, config.num_layers + config.mtp_layers)
    table, matrix = "model.layers.{}.embed_tokens.weight", "model.layers.{}.shared_head.head.weight"
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    return {table.format(n): EMBEDDING for n in layers} | {matrix.format(n): head for n in layers}


def _routed_rules(config: DeepSeekV3TextConfig, ours: str, first: int) -> list[Rule]:
    rules = [*_latent_rules(config, ours, first), *expert_rules(ours, first=first)]
    if config.moe.selection_bias:
        rules.append(Rule(f"{LAYER}.mlp.gate.e_score_correction_bias", (f"{ours}/moe/router/bias",), first=first))
    if config.moe.shared_experts:
        rules += [
            rule
            for part in ("gate", "up", "down")
            for rule in linear(
                f"{LAYER}.mlp.shared_experts.{part}_proj", f"{ours}/moe/shared/{part}", bias=False, first=first
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
