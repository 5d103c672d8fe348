"""Configuration of LLaVA-1.5. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mindvl_jax.config.base import bounded
from mindvl_jax.data.media.geometry import PatchGeometry
from mindvl_jax.models.vision_language.config import VisionLanguageConfig

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""System text of the published format `v1`, where a conversation has none."""

CHAT_TEMPLATE = """\
{{- '<s>' }}
{%- if messages[0].role != 'system' %}{{- SYSTEM }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'system' %}{{- message.content }}
{%- elif message.role == 'assistant' %}{{- ' ASSISTANT: ' + message.content + '</s>' }}
{%- elif message.role == 'user' %}
{{- ('' if not loop.first and messages[loop.index0 - 1].role == 'assistant' else ' ') + 'USER: ' + message.content }}
{%- else %}{{- raise_exception('this format has no turns of tools') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- ' ASSISTANT:' }}{%- endif %}
""".replace("SYSTEM", repr(SYSTEM).replace("\\'", "'"))


class VisionConfig(PatchGeometry):
    """CLIP: every block attends over the whole square and its class token."""

    temporal_patch_size: Annotated[int, bounded(1)] = 1
    spatial_merge_size: Annotated[int, bounded(1)] = 1
    depth: Annotated[int, bounded(10**4)]
    hidden_size: Annotated[int, bounded(2**20)]
    intermediate_size: Annotated[int, bounded(2**22)]
    num_heads: Annotated[int, bounded(2**16)]
    feature_layer: Annotated[int, Field(lt=0, ge=-(10**4))] = Field(
        -2, description="Output that is projected, counted from the last block: -1 is that of the last."
    )
    image_side: Annotated[int, bounded(2**14)] = 336
    fit: Literal["crop", "pad"] = Field(
        "crop", description="crop: the middle of an image (the -hf folders); pad: all of it (LLaVA's own fine-tuning)."
    )
    max_tiles: Annotated[int, bounded(1)] = 1
    window_size: None = Field(None, description="The tower has no windows.")
    tokens_per_second: None = Field(None, description="Positions are one running index.")
    layer_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-5

    @model_validator(mode="after")
    def _used(self):
        if self.full_blocks < 1:
            raise ValueError(f"feature_layer {self.feature_layer} leaves no block of {self.depth}")
        return self

    @property
    def full_blocks(self) -> int:
        """Blocks whose outputs count; those after the projected output are kept and never run."""
        return self.depth + 1 + self.feature_layer


class LlavaConfig(VisionLanguageConfig):
    """Vision tower, projector, language model. Images have no borders, videos no place."""

    media_tokens: ClassVar[Mapping[str, str]] = {"image_token_id": "<image>"}
    chat_template: ClassVar[str | None] = CHAT_TEMPLATE

    family: Literal["llava"] = "llava"
    vision: VisionConfig
    video_token_id: None = None
    vision_start_token_id: None = None
    vision_end_token_id: None = None

    @model_validator(mode="after")
    def _running_index(self):
        if self.text.rope != "1d":
            raise ValueError("text.rope must be 1d: LLaVA's positions are one running index")
        return self
