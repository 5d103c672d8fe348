"""Shared configuration of decoders with visual tokens. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, NonNegativeInt, model_validator

from mindvl_jax.config.schema import ModelConfig, PhaseConfig
from mindvl_jax.data.marks import MEDIA_TOKENS
from mindvl_jax.data.media.geometry import PatchGeometry, shrinking
from mindvl_jax.models.layers.config import TextConfig


class VisionLanguageConfig(ModelConfig):
    """A family's class gives `vision` its own type."""

    media_tokens: ClassVar[Mapping[str, str]] = MEDIA_TOKENS
    """Key -> name of the token in the family's vocabularies."""
    chat_template: ClassVar[str | None] = None
    """Jinja text of the family's own format; None is Qwen's."""

    vision: PatchGeometry
    text: TextConfig
    image_token_id: NonNegativeInt = Field(
        description="Placeholder of one visual token of an image, in the model's own vocabulary."
    )
    video_token_id: NonNegativeInt
    vision_start_token_id: NonNegativeInt
    vision_end_token_id: NonNegativeInt

    @model_validator(mode="after")
    def _media_tokens(self):
        keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = {key: getattr(self, key) for key in keys if getattr(self, key) is not None}
        if beyond := [f"{key} {value}" for key, value in ids.items() if value >= self.text.vocab_size]:
            raise ValueError(f"{', '.join(beyond)} beyond the text.vocab_size {self.text.vocab_size}")
        return self

    def phase_warnings(self, phase: PhaseConfig) -> list[str]:
        needed = self.vision.image_patches
        if needed is None:
            warning = shrinking(phase, self.vision.patch_size)
            return [warning] if warning else []
        if phase.patches_per_row >= needed:
            return []
        return [
            f"{phase.name}: an image of {self.vision.max_tiles} tiles has {needed:,} patches, patches_per_row has "
            f"room for {phase.patches_per_row:,}: such images are cut into fewer tiles and counted as `shrunk`"
        ]

    def phase_problems(self, phase: PhaseConfig) -> dict[str, str]:
        if not phase.patches_per_row:
            return {"patches_per_row": "must be given: image patches a row"}
        if phase.patches_per_row % self.vision.merge_unit:
            return {"patches_per_row": f"must be a multiple of {self.vision.merge_unit} (patches of one visual token)"}
        view = self.vision.view_patches
        if view is not None and phase.patches_per_row % view:
            return {
                "patches_per_row": f"must be a multiple of {view} (patches of one square of {self.vision.image_side})"
            }
        return {}
