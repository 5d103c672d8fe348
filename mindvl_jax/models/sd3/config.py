"""Configuration of the SD3 transformer. Imports no jax."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from mindvl_jax.config.schema import ModelConfig


class Sd3Config(ModelConfig):
    """Sizes of an SD3 transformer; SD3-Medium has 24 blocks of 24 heads of 64, SD3.5-Large 38 of 38."""

    family: Literal["sd3"] = "sd3"
    channels: PositiveInt  # of the latents
    num_layers: Annotated[int, Field(ge=2)]
    num_heads: PositiveInt
    head_dim: PositiveInt
    text_dim: PositiveInt
    pooled_dim: PositiveInt
    positions_side: PositiveInt  # of the square table that pictures crop
    qk_norm: bool

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @model_validator(mode="after")
    def _consistent(self):
        if self.hidden_size % 4:
            raise ValueError(f"width {self.hidden_size} must be a multiple of 4")
        return self
