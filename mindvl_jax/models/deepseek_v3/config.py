"""Configuration of the DeepSeek-V3 language model. Imports no jax."""

from __future__ import annotations

from typing import Literal

from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.models.layers.config import DeepSeekV3TextConfig


class DeepSeekV3Config(ModelConfig):
    """Token table, decoder layers, output matrix."""

    family: Literal["deepseek_v3"] = "deepseek_v3"
    text: DeepSeekV3TextConfig
