"""Published files of Qwen3-MoE language models. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindvl_jax.models.hf import ConfigReader, HFMapping, ModelType
from mindvl_jax.models.layers import decoder_hf
from mindvl_jax.models.layers.config import MoEConfig, Qwen3MoETextConfig
from mindvl_jax.models.layers.routed_hf import qwen3_moe_rules, rope_of
from mindvl_jax.models.qwen3_moe.config import Qwen3MoEConfig


def read_config(content: Mapping[str, Any], reader: ConfigReader) -> Qwen3MoEConfig | None:
    """Class defaults of transformers 5 where config.json is silent: `norm_topk_prob` is false there, true in the
    released files.
    """
    reader.expect(content, "hidden_act", ("silu",), "silu")
    reader.expect(content, "use_sliding_window", (False, None), False)
    reader.expect(content, "attention_bias", (False, None), False)
    reader.expect(content, "decoder_sparse_step", (1,), 1)
    reader.expect(content, "mlp_only_layers", ([], None), [])
    rope = rope_of(content)
    if rope["rope_type"] != "default":
        reader.problems.append(
            f"rope type is {rope['rope_type']!r}; supported: 'default' (frequencies are not rescaled)"
        )
    heads = content.get("num_attention_heads")
    moe = reader.build(
        MoEConfig,
        dict(
            experts=content.get("num_experts", content.get("num_local_experts")),
            experts_per_token=content.get("num_experts_per_tok"),
            intermediate_size=content.get("moe_intermediate_size"),
            scoring="softmax",
            renormalize=bool(content.get("norm_topk_prob", False)),
            balance_loss=content.get("router_aux_loss_coef", 0.001),
            balance="pooled",
        ),
    )
    text = (
        reader.build(
            Qwen3MoETextConfig,
            dict(
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
                rope="1d",
                max_position_embeddings=content.get("max_position_embeddings", 32768),
                moe=moe,
            ),
        )
        if moe is not None
        else None
    )
    return None if text is None else Qwen3MoEConfig(text=text)


def write_config(config: Qwen3MoEConfig, common: Mapping[str, Any]) -> dict[str, Any]:
    text, moe = config.text, config.text.moe
    return {
        "model_type": "qwen3_moe",
        **common,
        **decoder_hf.write_text(text),
        "head_dim": text.head_dim,
        "attention_bias": False,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.renormalize,
        "router_aux_loss_coef": moe.balance_loss,
        "output_router_logits": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


MAPPING = HFMapping(
    model_types={"qwen3_moe": ModelType("Qwen3-MoE", "Qwen3MoeForCausalLM")},
    rules=lambda config: qwen3_moe_rules(config.text),
    read_config=read_config,
    write_config=write_config,
    chat_template=decoder_hf.CHAT_TEMPLATE,
    aliases=decoder_hf.ALIASES,
    tied=decoder_hf.tied,
    reference_parts=decoder_hf.PARTS,
)
