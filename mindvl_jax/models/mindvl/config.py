"""Configuration of MindVL and Qwen2.5-VL. Imports no jax."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, model_validator

from mindvl_jax.config.base import bounded
from mindvl_jax.config.schema import ModelConfig, PhaseConfig
from mindvl_jax.data.media.geometry import PatchGeometry, shrinking
from mindvl_jax.models.layers.config import TextConfig


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
            raise ValueError(f"hidden_size / num_heads ({self.hidden_size // self.num_heads}) must be a multiple of 4: two-dimensional rotary positions turn pairs of values for rows and columns")
        if beyond := [index for index in self.fullatt_block_indexes if index >= self.depth]:
            raise ValueError(f"fullatt_block_indexes {beyond} lie beyond the depth {self.depth}; blocks count from 0")
        return self


class MindVLConfig(ModelConfig):
    """Vision tower, two-layer projector, language model."""

    family: Literal["mindvl"] = "mindvl"
    vision: VisionConfig
    text: TextConfig
    image_token_id: NonNegativeInt = Field(description="Placeholder of one visual token of an image, in the model's own vocabulary.")
    video_token_id: NonNegativeInt
    vision_start_token_id: NonNegativeInt
    vision_end_token_id: NonNegativeInt

    @model_validator(mode="after")
    def _media_tokens(self):
        ids = {key: getattr(self, key) for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
        if beyond := [f"{key} {value}" for key, value in ids.items() if value >= self.text.vocab_size]:
            raise ValueError(f"{', '.join(beyond)} beyond the text.vocab_size {self.text.vocab_size}")
        return self

    def phase_warnings(self, phase: PhaseConfig) -> list[str]:
        warning = shrinking(phase, self.vision.patch_size)
        return [warning] if warning else []

    def phase_problems(self, phase: PhaseConfig) -> dict[str, str]:
        if phase.patches_per_row % self.vision.merge_unit:
            return {"patches_per_row": f"must be a multiple of {self.vision.merge_unit} (patches of one visual token)"}
        return {}
