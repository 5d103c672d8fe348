"""Patch geometry of a vision tower: all that the data pipeline must know of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mindvl_jax.config.base import Section, bounded
from mindvl_jax.config.schema import PhaseConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Channel means of CLIP, of values from 0 to 1; also the colour that images are padded with."""


class PatchGeometry(Section):
    """Patches of an image or video, and the visual tokens that they are merged into."""

    patch_size: Annotated[int, bounded(1024)] = 14
    temporal_patch_size: Annotated[int, bounded(64)] = 2
    spatial_merge_size: Annotated[int, bounded(64)] = 2
    in_channels: Annotated[int, bounded(1024)] = 3
    window_size: Annotated[int, bounded(2**20)] | None = Field(
        112, description="Side of an attention window, in pixels; null: no windows."
    )
    tokens_per_second: Annotated[int, bounded(10_000)] | None = Field(
        2, description="Steps of the temporal position in a second of video; null: one for each frame pair."
    )

    frame_text: str | None = Field(
        None,
        description="What stands in the text before each frame pair of a video, then an image of its own: with "
        "{time} in seconds, {number} from 1, {line} a newline before all but the first; null: a video is one block.",
    )
    image_side: Annotated[int, bounded(2**14)] | None = Field(
        None, description="Side in pixels of the squares that images are cut into; null: images keep their shape."
    )
    fit: Literal["tiles", "crop", "pad", "inside"] = Field(
        "tiles",
        description="How an image becomes squares. tiles: a grid of its shape; crop: its middle; pad: the whole on a "
        "square of CLIP's mean colour, made small together; inside: the whole made small, then put on a grey square.",
    )
    max_tiles: Annotated[int, bounded(4096)] = Field(
        1, description="Most squares of an image; an image of several is followed by the whole, made small."
    )

    @model_validator(mode="after")
    def _windows_hold_a_token(self):
        if self.window_size is not None and self.window_size < self.pixels_per_token:
            raise ValueError(
                f"window_size ({self.window_size}) is smaller than the {self.pixels_per_token} pixels of one "
                "visual token"
            )
        if self.image_side is not None and self.image_side % self.pixels_per_token:
            raise ValueError(
                f"image_side ({self.image_side}) must be a multiple of the {self.pixels_per_token} pixels of one "
                "visual token"
            )
        return self

    @property
    def view_patches(self) -> int | None:
        """Patches of one square; None where images keep their shape."""
        return None if self.image_side is None else (self.image_side // self.patch_size) ** 2

    @property
    def image_patches(self) -> int | None:
        """Most patches of one image; None where only budgets bound them."""
        return None if self.image_side is None else self.view_patches * (self.max_tiles + (self.max_tiles > 1))

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        return self.spatial_merge_size**2

    @property
    def window_tokens(self) -> int | None:
        """Side of an attention window in merged tokens; None without windows."""
        return None if self.window_size is None else self.window_size // self.pixels_per_token

    @property
    def pixels_per_token(self) -> int:
        """Side of the square of pixels that one merged token covers."""
        return self.patch_size * self.spatial_merge_size


def shrinking(phase: PhaseConfig, patch_size: int) -> str | None:
    """Return a warning when a row or `max_image_patches` has no room for the largest image that max_pixels allows."""
    needed = phase.max_pixels // patch_size**2
    room = min(phase.patches_per_row, phase.max_image_patches or needed)
    if room >= needed:
        return None
    what = (
        "max_image_patches"
        if phase.max_image_patches and phase.max_image_patches < phase.patches_per_row
        else "patches_per_row"
    )
    return (
        f"{phase.name}: max_pixels {phase.max_pixels:,} allows images of {needed:,} patches, {what} has room "
        f"for {room:,}: larger images are shrunk and counted as "
        f"`shrunk`. Raise {what} to {-(-needed // 4) * 4:,}, or lower max_pixels to "
        f"{room * patch_size**2:,}; data.on_shrink: refuse leaves such samples out"
    )
