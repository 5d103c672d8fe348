"""Configuration of MindVL and Qwen2.5-VL. Imports no jax."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from mindvl_jax.config.schema import ModelConfig, PhaseConfig
from mindvl_jax.data.media.geometry import PatchGeometry, shrinking
from mindvl_jax.models.layers.config import TextConfig


class VisionConfig(PatchGeometry):
    """Native-resolution vision tower of Qwen2.5-VL."""

    depth: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_heads: PositiveInt
    window_size: PositiveInt = Field(112, description="Side of an attention window, in pixels.")
    fullatt_block_indexes: tuple[NonNegativeInt, ...] = Field(description="Blocks that attend over the whole image.")
    tokens_per_second: PositiveInt = 2
    rms_norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat = 10000.0


class MindVLConfig(ModelConfig):
    """Vision tower, two-layer projector, language model."""

    family: Literal["mindvl"] = "mindvl"
    vision: VisionConfig
    text: TextConfig
    image_token_id: int = Field(description="Placeholder of one visual token of an image, in the model's own vocabulary.")
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    def phase_warnings(self, phase: PhaseConfig) -> list[str]:
        warning = shrinking(phase, self.vision.patch_size)
        return [warning] if warning else []

    def phase_problems(self, phase: PhaseConfig) -> dict[str, str]:
        if phase.patches_per_row % self.vision.merge_unit:
            return {"patches_per_row": f"must be a multiple of {self.vision.merge_unit} (patches of one visual token)"}
        return {}
