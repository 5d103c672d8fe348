"""Configuration of Qwen3-VL with a routed decoder. Imports no jax."""

from __future__ import annotations

from typing import Literal

from mindvl_jax.models.layers.config import Qwen3MoETextConfig
from mindvl_jax.models.qwen3_vl.config import Qwen3VLConfig


class Qwen3VLMoEConfig(Qwen3VLConfig):
    """Vision tower, mergers, routed language model."""

    family: Literal["qwen3_vl_moe"] = "qwen3_vl_moe"
    text: Qwen3MoETextConfig
