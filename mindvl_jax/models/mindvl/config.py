"""Configuration of MindVL and Qwen2.5-VL. Imports no jax."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, model_validator

from mindvl_jax.config.base import bounded
from mindvl_jax.data.media.geometry import PatchGeometry
from mindvl_jax.models.vision_language.config import VisionLanguageConfig


class VisionConfig(PatchGeometry):
    """Native-resolution vision tower of Qwen2.5-VL."""

    depth: Annotated[int, bounded(10**4)]
    hidden_size: Annotated[int, bounded(2**20)]
    intermediate_size: Annotated[int, bounded(2**22)]
    num_heads: Annotated[int, bounded(2**16)]
    window_size: Annotated[int, bounded(2**20)] = Field(112, description="Side of an attention window, in pixels.")
    fullatt_block_indexes: tuple[NonNegativeInt, ...] = Field(description="Blocks that attend over the whole image.")
    tokens_per_second: Annotated[int, bounded(10_000)] = 2
    rms_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    rope_theta: Annotated[float, Field(gt=0, le=1e15)] = 10000.0

    @model_validator(mode="after")
    def _consistent(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads})")
        if self.hidden_size // self.num_heads % 4:
            raise ValueError(
                f"hidden_size / num_heads ({self.hidden_size // self.num_heads}) must be a multiple of 4: "
                "two-dimensional rotary positions turn pairs of values for rows and columns"
            )
        if beyond := [index for index in self.fullatt_block_indexes if index >= self.depth]:
            raise ValueError(f"fullatt_block_indexes {beyond} lie beyond the depth {self.depth}; blocks count from 0")
        return self

    @property
    def full_blocks(self) -> int:
        """Blocks that attend over the whole image."""
        return len(self.fullatt_block_indexes)


class MindVLConfig(VisionLanguageConfig):
    """Vision tower, two-layer projector, language model."""

    family: Literal["mindvl"] = "mindvl"
    vision: VisionConfig
