"""Configuration of InternVL. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mindvl_jax.config.base import bounded
from mindvl_jax.config.schema import PhaseConfig
from mindvl_jax.data.media.geometry import PatchGeometry
from mindvl_jax.models.vision_language.config import VisionLanguageConfig


class VisionConfig(PatchGeometry):
    """InternViT: every block attends over a whole tile and its class token."""

    temporal_patch_size: Annotated[int, bounded(1)] = 1
    depth: Annotated[int, bounded(10**4)]
    hidden_size: Annotated[int, bounded(2**20)]
    intermediate_size: Annotated[int, bounded(2**22)]
    num_heads: Annotated[int, bounded(2**16)]
    norm: Literal["layer", "rms"] = Field("layer", description="layer: the tower of 300M; rms: that of 6B.")
    qk_norm: bool = Field(False, description="Norms of queries and keys over the whole width: the tower of 6B.")
    attention_bias: bool = Field(True, description="Biases of queries, keys and values.")
    image_side: Annotated[int, bounded(2**14)] = 448
    max_tiles: Annotated[int, bounded(4096)] = 12
    window_size: None = Field(None, description="The tower has no windows.")
    tokens_per_second: None = Field(None, description="Positions are one running index.")
    frame_text: str | None = "{line}Frame-{number}: "
    layer_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-6

    @property
    def full_blocks(self) -> int:
        """Blocks that attend over the whole tile."""
        return self.depth


class InternVLConfig(VisionLanguageConfig):
    """Vision tower, projector, language model."""

    media_tokens: ClassVar[Mapping[str, str]] = {
        "image_token_id": "<IMG_CONTEXT>",
        "video_token_id": "<IMG_CONTEXT>",
        "vision_start_token_id": "<img>",
        "vision_end_token_id": "</img>",
    }

    family: Literal["internvl"] = "internvl"
    vision: VisionConfig

    @model_validator(mode="after")
    def _running_index(self):
        if self.text.rope != "1d":
            raise ValueError("text.rope must be 1d: InternVL's positions are one running index")
        return self

    def phase_problems(self, phase: PhaseConfig) -> dict[str, str]:
        problems = super().phase_problems(phase)
        longest, most = phase.max_sample_length or phase.sequence_length, self.text.max_position_embeddings
        if self.text.rope_dynamic_factor is not None and longest > most:
            problems["max_sample_length"] = (
                f"must be at most {most} (text.max_position_embeddings): beyond it dynamic frequencies change with the "
                "length of a sample, which is not built"
            )
        return problems
