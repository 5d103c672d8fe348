"""Configuration of the Flux transformer. Imports no jax."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt, model_validator

from mindvl_jax.config.schema import ModelConfig


class FluxConfig(ModelConfig):
    """Sizes of a Flux transformer; the published ones have 19 joint and 38 parallel blocks of 24 heads of 128."""

    family: Literal["flux"] = "flux"
    channels: PositiveInt  # of a token: 4 times those of the latents, whose 2 x 2 neighbours are one token
    joint_layers: PositiveInt
    parallel_layers: PositiveInt
    num_heads: PositiveInt
    head_dim: PositiveInt
    text_dim: PositiveInt
    pooled_dim: PositiveInt
    guidance_embedding: bool
    rope_axes: tuple[PositiveInt, ...]
    rope_theta: float = 10000.0

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def intermediate_size(self) -> int:
        return 4 * self.hidden_size

    @model_validator(mode="after")
    def _consistent(self):
        if sum(self.rope_axes) != self.head_dim or any(axis % 2 for axis in self.rope_axes):
            raise ValueError(f"rope_axes {self.rope_axes} must be even and sum to head_dim ({self.head_dim})")
        if len(self.rope_axes) != 3 or self.channels % 4:
            raise ValueError("expected three rope_axes (index, row, column) and channels in multiples of 4")
        return self
