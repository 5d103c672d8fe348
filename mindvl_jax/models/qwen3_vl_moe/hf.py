"""Published files of Qwen3-VL with a routed decoder. Imports no jax.

The experts of a layer are one tensor, inputs first, as the released files have it. transformers 5 writes it outputs
first (and reads both orders): such a folder is refused by the shape of these tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindvl_jax.models.hf import ConfigReader, HFMapping, ModelType
from mindvl_jax.models.layers import decoder_hf, qwen_vl_hf
from mindvl_jax.models.layers.routed_hf import qwen3_moe_rules, read_qwen3_moe, write_qwen3_moe
from mindvl_jax.models.qwen3_vl import hf
from mindvl_jax.models.qwen3_vl_moe.config import Qwen3VLMoEConfig


def read_config(content: Mapping[str, Any], reader: ConfigReader) -> Qwen3VLMoEConfig | None:
    text_content, where = decoder_hf.nested_text(content)
    text_content = {**hf.TEXT_DEFAULTS, **text_content}
    # The class always divides the chosen scores by their sum, whatever the file says.
    text = read_qwen3_moe(text_content, reader, where, renormalize=True, sections=hf.SECTIONS)
    vision = hf.read_vision(content, reader, text and text.hidden_size)
    if vision is None or text is None:
        return None
    return reader.build(Qwen3VLMoEConfig, dict(vision=vision, text=text, **qwen_vl_hf.read_tokens(content)))


def write_config(config: Qwen3VLMoEConfig, common: Mapping[str, Any]) -> dict[str, Any]:
    return hf.write_parts(config, "qwen3_vl_moe", common, write_qwen3_moe(config.text))


MAPPING = HFMapping(
    model_types={"qwen3_vl_moe": ModelType("Qwen3-VL-MoE", "Qwen3VLMoeForConditionalGeneration")},
    rules=lambda config: hf.with_vision(config.vision, qwen3_moe_rules(config.text, joined=True)),
    read_config=read_config,
    write_config=write_config,
    companions=hf.companions,
    chat_template=decoder_hf.CHAT_TEMPLATE,
    aliases=hf.ALIASES,
    tied=hf.decoder_hf.tied_as(hf.nested),
    reference_parts=hf.PARTS,
)
