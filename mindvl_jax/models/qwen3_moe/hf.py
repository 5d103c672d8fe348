"""Published files of Qwen3-MoE language models. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindvl_jax.models.hf import ConfigReader, HFMapping, ModelType
from mindvl_jax.models.layers import decoder_hf
from mindvl_jax.models.layers.routed_hf import qwen3_moe_rules, read_qwen3_moe, write_qwen3_moe
from mindvl_jax.models.qwen3_moe.config import Qwen3MoEConfig


def read_config(content: Mapping[str, Any], reader: ConfigReader) -> Qwen3MoEConfig | None:
    """Class defaults of transformers 5 where config.json is silent: `norm_topk_prob` is false there, true in the
    released files.
    """
    text = read_qwen3_moe(content, reader, renormalize=bool(content.get("norm_topk_prob", False)))
    return None if text is None else Qwen3MoEConfig(text=text)


def write_config(config: Qwen3MoEConfig, common: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        **common,
        **write_qwen3_moe(config.text),
        "norm_topk_prob": config.text.moe.renormalize,
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
