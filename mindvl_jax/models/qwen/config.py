"""Configuration of a language model without a vision tower. Imports no jax."""

from __future__ import annotations

from typing import Literal

from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.models.layers.config import TextConfig


class QwenConfig(ModelConfig):
    """Token table, decoder layers, output matrix."""

    family: Literal["qwen"] = "qwen"
    text: TextConfig
