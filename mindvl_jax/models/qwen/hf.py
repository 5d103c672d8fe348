"""Published files of Qwen2.5 and Qwen3 language models. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindvl_jax.models.hf import ConfigReader, HFMapping, ModelType
from mindvl_jax.models.layers import decoder_hf
from mindvl_jax.models.qwen.config import QwenConfig


def read_config(content: Mapping[str, Any], reader: ConfigReader) -> QwenConfig | None:
    text = decoder_hf.read_text(reader, content, content["model_type"])
    return None if text is None else QwenConfig(text=text)


def write_config(config: QwenConfig, common: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": config.text.family, **common, **decoder_hf.write_text(config.text)}


MAPPING = HFMapping(
    model_types={"qwen3": ModelType("Qwen3", "Qwen3ForCausalLM"), "qwen2": ModelType("Qwen2.5", "Qwen2ForCausalLM")},
    rules=lambda config: decoder_hf.text_rules(config.text),
    read_config=read_config,
    write_config=write_config,
    chat_template=decoder_hf.CHAT_TEMPLATE,
    aliases=decoder_hf.ALIASES,
    tied=decoder_hf.tied,
    reference_parts=decoder_hf.PARTS,
)
