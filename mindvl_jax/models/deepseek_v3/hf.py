"""Published files of DeepSeek-V3. Imports no jax."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mindvl_jax.models.deepseek_v3.config import DeepSeekV3Config
from mindvl_jax.models.hf import ConfigReader, HFMapping, ModelType
from mindvl_jax.models.layers import decoder_hf
from mindvl_jax.models.layers.config import DeepSeekV3TextConfig, MoEConfig, YarnConfig
from mindvl_jax.models.layers.routed_hf import deepseek_v3_rules, mtp_copies, rope_of

# Ours -> theirs, where the value is the same.
_TEXT = dict(
    vocab_size="vocab_size",
    hidden_size="hidden_size",
    intermediate_size="intermediate_size",
    num_layers="num_hidden_layers",
    num_heads="num_attention_heads",
    q_lora_rank="q_lora_rank",
    kv_lora_rank="kv_lora_rank",
    qk_nope_head_dim="qk_nope_head_dim",
    qk_rope_head_dim="qk_rope_head_dim",
    v_head_dim="v_head_dim",
    dense_layers="first_k_dense_replace",
)
_MOE = dict(
    experts="n_routed_experts",
    experts_per_token="num_experts_per_tok",
    intermediate_size="moe_intermediate_size",
    shared_experts="n_shared_experts",
    groups="n_group",
    groups_kept="topk_group",
    renormalize="norm_topk_prob",
    scale="routed_scaling_factor",
)


def read_config(content: Mapping[str, Any], reader: ConfigReader) -> DeepSeekV3Config | None:
    """Read a decoder with the MTP layers that the file counts; see `settle` for files that count absent ones."""
    reader.expect(content, "hidden_act", ("silu",), "silu")
    reader.expect(content, "attention_bias", (False, None), False)
    reader.expect(content, "scoring_func", ("sigmoid",), "sigmoid")
    reader.expect(content, "topk_method", ("noaux_tc",), "noaux_tc")
    reader.expect(content, "moe_layer_freq", (1,), 1)
    if content.get("quantization_config"):
        reader.problems.append(
            "quantization_config: the weights are quantised (block-scaled FP8); `mindvl convert fp8` makes plain ones"
        )
    rope = rope_of(content)
    yarn = None
    if rope["rope_type"] == "yarn":
        defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
        values = {name: rope.get(name) for name in ("factor", "original_max_position_embeddings")} | {
            name: rope.get(name) or value for name, value in defaults.items()
        }
        yarn = reader.build(YarnConfig, values, "rope_scaling.")
    elif rope["rope_type"] != "default":
        reader.problems.append(f"rope type is {rope['rope_type']!r}; supported: 'default', 'yarn'")
    reader.expect(content, "rope_interleave", (True,), True)
    moe = reader.build(MoEConfig, {ours: content.get(theirs) for ours, theirs in _MOE.items()} | dict(
        scoring="sigmoid", selection_bias=True, balance="sequence", balance_loss=content.get("aux_loss_alpha", 0.0)
    ))  # fmt: skip
    if moe is None:
        return None
    text = reader.build(
        DeepSeekV3TextConfig,
        {ours: content.get(theirs) for ours, theirs in _TEXT.items()}
        | dict(
            moe=moe,
            yarn=yarn,
            rope_theta=rope["rope_theta"],
            rms_norm_eps=content.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(content.get("tie_word_embeddings", False)),
            max_position_embeddings=content.get("max_position_embeddings", 4096),
            mtp_layers=content.get("num_nextn_predict_layers") or 0,
        ),
    )
    return None if text is None else DeepSeekV3Config(text=text)


def write_config(config: DeepSeekV3Config, common: Mapping[str, Any]) -> dict[str, Any]:
    text, moe, yarn = config.text, config.text.moe, config.text.yarn
    rope: dict[str, Any] = {"rope_type": "default" if yarn is None else "yarn", "rope_theta": text.rope_theta}
    return {
        "model_type": "deepseek_v3",
        **common,
        **{theirs: getattr(text, ours) for ours, theirs in _TEXT.items()},
        **{theirs: getattr(moe, ours) for ours, theirs in _MOE.items()},
        "num_key_value_heads": text.num_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": text.mtp_layers,
        "aux_loss_alpha": moe.balance_loss,
        "rms_norm_eps": text.rms_norm_eps,
        "tie_word_embeddings": text.tie_word_embeddings,
        "max_position_embeddings": text.max_position_embeddings,
        "rope_interleave": True,
        "rope_parameters": rope | ({} if yarn is None else yarn.model_dump()),
    }


def settle(config: DeepSeekV3Config, names: Collection[str]) -> DeepSeekV3Config:
    """Without MTP layers where the folder has no tensor of one: transformers drops them and keeps their number."""
    first = f"model.layers.{config.text.num_layers}."
    if not config.text.mtp_layers or any(name.startswith(first) for name in names):
        return config
    return config.model_copy(update=dict(text=config.text.model_copy(update=dict(mtp_layers=0))))


_ATTENTION = {
    f"layer {{layer}} {ours}": (f"model.layers.{{layer}}.{theirs}",)
    for ours, theirs in (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm"))
}

MAPPING = HFMapping(
    model_types={"deepseek_v3": ModelType("DeepSeek-V3", "DeepseekV3ForCausalLM")},
    rules=lambda config: deepseek_v3_rules(config.text),
    read_config=read_config,
    write_config=write_config,
    tied=decoder_hf.tied,
    copies=lambda config: mtp_copies(config.text),
    settle=settle,
    aliases=decoder_hf.ALIASES,
    reference_parts={"embed": ("model.embed_tokens",), "norm": ("model.norm",), "head": ("lm_head",), **_ATTENTION},
)
