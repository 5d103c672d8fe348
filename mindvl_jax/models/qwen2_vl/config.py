"""Configuration of Qwen2-VL. Imports no jax."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mindvl_jax.config.base import bounded
from mindvl_jax.data.media.geometry import PatchGeometry
from mindvl_jax.models.vision_language.config import VisionLanguageConfig


class VisionConfig(PatchGeometry):
    """Native-resolution vision tower of Qwen2-VL: every block attends over a whole image or frame pair."""

    depth: Annotated[int, bounded(10**4)]
    hidden_size: Annotated[int, bounded(2**20)] = Field(
        description="Width of the tower (`embed_dim` of the published file)."
    )
    intermediate_size: Annotated[int, bounded(2**22)]
    num_heads: Annotated[int, bounded(2**16)]
    window_size: None = Field(None, description="The tower has no windows.")
    tokens_per_second: None = Field(None, description="The temporal position counts frame pairs.")
    layer_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    rope_theta: Annotated[float, Field(gt=0, le=1e15)] = 10000.0

    @model_validator(mode="after")
    def _consistent(self):
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size ({self.hidden_size}) over {self.num_heads} heads must give a head dim that is "
                "a multiple of 4"
            )
        return self

    @property
    def full_blocks(self) -> int:
        """Blocks that attend over the whole image."""
        return self.depth


class Qwen2VLConfig(VisionLanguageConfig):
    """Vision tower, merger, language model."""

    family: Literal["qwen2_vl"] = "qwen2_vl"
    vision: VisionConfig
