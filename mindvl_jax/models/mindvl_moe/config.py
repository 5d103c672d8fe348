"""Configuration of MindVL with a DeepSeek-V3 decoder. Imports no jax."""

from __future__ import annotations

from typing import Literal

from mindvl_jax.models.layers.config import DeepSeekV3TextConfig
from mindvl_jax.models.mindvl.config import MindVLConfig


class MindVLMoEConfig(MindVLConfig):
    """Vision tower, two-layer projector, routed language model. Positions are one running index."""

    family: Literal["mindvl_moe"] = "mindvl_moe"
    text: DeepSeekV3TextConfig
