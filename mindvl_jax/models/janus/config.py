"""Configuration of Janus-Pro's understanding half. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mindvl_jax.config.base import bounded
from mindvl_jax.data.media.geometry import PatchGeometry
from mindvl_jax.models.vision_language.config import VisionLanguageConfig

SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
"""System text of the published format, where a conversation has none."""
BEGIN, END = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"

CHAT_TEMPLATE = (
    """\
{{- 'BEGIN' }}
{%- if messages[0].role != 'system' %}{{- 'SYSTEM\\n\\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'system' %}{{- message.content + '\\n\\n' }}
{%- elif message.role == 'assistant' %}{{- '<|Assistant|>: ' + message.content + 'END' }}
{%- elif message.role == 'user' %}{{- '<|User|>: ' + message.content + '\\n\\n' }}
{%- else %}{{- raise_exception('this format has no turns of tools') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|>:' }}{%- endif %}
""".replace("SYSTEM", SYSTEM)
    .replace("BEGIN", BEGIN)
    .replace("END", END)
)


class VisionConfig(PatchGeometry):
    """SigLIP: every block attends over the whole square; no class token."""

    patch_size: Annotated[int, bounded(1024)] = 16
    temporal_patch_size: Annotated[int, bounded(1)] = 1
    spatial_merge_size: Annotated[int, bounded(1)] = 1
    depth: Annotated[int, bounded(10**4)]
    hidden_size: Annotated[int, bounded(2**20)]
    intermediate_size: Annotated[int, bounded(2**22)]
    num_heads: Annotated[int, bounded(2**16)]
    attention_bias: bool = Field(True, description="Biases of queries, keys and values.")
    image_side: Annotated[int, bounded(2**14)] = 384
    fit: Literal["inside"] = "inside"
    max_tiles: Annotated[int, bounded(1)] = 1
    window_size: None = Field(None, description="The tower has no windows.")
    tokens_per_second: None = Field(None, description="Positions are one running index.")
    layer_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-6

    @property
    def full_blocks(self) -> int:
        """Blocks that attend over the whole square."""
        return self.depth


class JanusConfig(VisionLanguageConfig):
    """Vision tower, projector, language model. Videos have no place."""

    media_tokens: ClassVar[Mapping[str, str]] = {
        "image_token_id": "<image_placeholder>",
        "vision_start_token_id": "<begin_of_image>",
        "vision_end_token_id": "<end_of_image>",
    }
    chat_template: ClassVar[str | None] = CHAT_TEMPLATE

    family: Literal["janus"] = "janus"
    vision: VisionConfig
    video_token_id: None = None

    @model_validator(mode="after")
    def _running_index(self):
        if self.text.rope != "1d":
            raise ValueError("text.rope must be 1d: Janus' positions are one running index")
        return self
