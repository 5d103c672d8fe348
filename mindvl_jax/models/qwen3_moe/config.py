"""Configuration of the Qwen3-MoE language model. Imports no jax."""

from __future__ import annotations

from typing import Literal

from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.models.layers.config import Qwen3MoETextConfig


class Qwen3MoEConfig(ModelConfig):
    """Token table, decoder layers, output matrix."""

    family: Literal["qwen3_moe"] = "qwen3_moe"
    text: Qwen3MoETextConfig
