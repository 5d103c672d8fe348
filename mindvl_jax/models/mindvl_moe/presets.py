"""MindVL-671B-A37B. Imports no jax."""

from __future__ import annotations

from collections.abc import Callable

from mindvl_jax.models.deepseek_v3.presets import deepseek_v3_text
from mindvl_jax.models.mindvl.presets import VISION
from mindvl_jax.models.mindvl_moe.config import MindVLMoEConfig


def _mindvl_671b() -> MindVLMoEConfig:
    """The paper names tower and decoder, not the ids of the media tokens: these are unused ids at the end of
    DeepSeek-V3's vocabulary.
    """
    tokens = dict(
        image_token_id=128815, video_token_id=128816, vision_start_token_id=128817, vision_end_token_id=128818
    )
    return MindVLMoEConfig(vision=VISION["qwen2.5-vit-3420"](), text=deepseek_v3_text(), **tokens)


MODELS: dict[str, Callable[[], MindVLMoEConfig]] = {"mindvl-671b-a37b": _mindvl_671b}
