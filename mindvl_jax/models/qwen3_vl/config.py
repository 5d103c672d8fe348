"""Configuration of Qwen3-VL. Imports no jax."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, model_validator

from mindvl_jax.config.base import bounded
from mindvl_jax.data.media.geometry import PatchGeometry
from mindvl_jax.models.vision_language.config import VisionLanguageConfig


class VisionConfig(PatchGeometry):
    """Native-resolution vision tower of Qwen3-VL: every block attends over a whole image or frame pair."""

    patch_size: Annotated[int, bounded(1024)] = 16
    depth: Annotated[int, bounded(10**4)]
    hidden_size: Annotated[int, bounded(2**20)]
    intermediate_size: Annotated[int, bounded(2**22)]
    num_heads: Annotated[int, bounded(2**16)]
    table_side: Annotated[int, bounded(2**12)] = Field(
        48, description="Side of the square grid of learned positions, which is resized to each image's grid."
    )
    deepstack_blocks: tuple[NonNegativeInt, ...] = Field(
        description="Blocks, counted from 0, whose outputs are added to the decoder's first layers, one each."
    )
    window_size: None = Field(None, description="The tower has no windows.")
    tokens_per_second: None = Field(None, description="Times of frames stand in the text, not in the positions.")
    frame_text: str = "<{time:.1f} seconds>"
    layer_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    rope_theta: Annotated[float, Field(gt=0, le=1e15)] = 10000.0

    @model_validator(mode="after")
    def _consistent(self):
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size ({self.hidden_size}) over {self.num_heads} heads must give a head dim that is "
                "a multiple of 4"
            )
        if not self.deepstack_blocks or list(self.deepstack_blocks) != sorted({*self.deepstack_blocks}):
            raise ValueError(f"deepstack_blocks {self.deepstack_blocks} must ascend, and name one block at least")
        if self.deepstack_blocks[-1] >= self.depth:
            raise ValueError(f"deepstack_blocks {self.deepstack_blocks} go beyond a tower of {self.depth} blocks")
        return self

    @property
    def full_blocks(self) -> int:
        """Blocks that attend over the whole image."""
        return self.depth


class Qwen3VLConfig(VisionLanguageConfig):
    """Vision tower, mergers, language model."""

    family: Literal["qwen3_vl"] = "qwen3_vl"
    vision: VisionConfig

    @model_validator(mode="after")
    def _layers_to_add_to(self):
        if len(self.vision.deepstack_blocks) > self.text.num_layers:
            raise ValueError(
                f"{len(self.vision.deepstack_blocks)} deepstack_blocks need as many layers, text has "
                f"{self.text.num_layers}"
            )
        return self
