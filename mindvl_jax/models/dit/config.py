"""Configuration of the class-conditional diffusion transformer. Imports no jax."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mindvl_jax.config.schema import ModelConfig, PhaseConfig


class DiTConfig(ModelConfig):
    """Diffusion transformer over the pixels of small images, conditioned on a class (Peebles and Xie, 2023)."""

    family: Literal["dit"] = "dit"
    image_size: PositiveInt = Field(description="Side of an image in pixels; others are resized to it.")
    patch_size: PositiveInt
    channels: Literal[1, 3] = 3
    classes: tuple[str, ...] = Field(min_length=1, description="Names of the classes, as samples spell them.")
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    layer_norm_eps: PositiveFloat = 1e-6

    @property
    def tokens(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        return self.channels * self.patch_size**2

    @model_validator(mode="after")
    def _consistent(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size})")
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of 4 * num_heads ({4 * self.num_heads})"
            )
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("classes names a class twice")
        return self

    def phase_problems(self, phase: PhaseConfig) -> dict[str, str]:
        if phase.sequence_length != self.tokens:
            return {
                "sequence_length": f"must be {self.tokens}: a row is one image of {self.image_size} pixels "
                f"in patches of {self.patch_size}"
            }
        return {}
