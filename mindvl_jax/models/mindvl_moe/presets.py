"""MindVL-671B-A37B, and a tiny model of the same kind. Imports no jax."""

from __future__ import annotations

from collections.abc import Callable

from mindvl_jax.models.deepseek_v3.presets import deepseek_v3_text
from mindvl_jax.models.layers.config import DeepSeekV3TextConfig, MoEConfig
from mindvl_jax.models.mindvl.presets import MODELS as DENSE
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


def _tiny() -> MindVLMoEConfig:
    """The tower of `mindvl-tiny`, and a decoder of its width and depth in which a token passes as many weights."""
    dense = DENSE["mindvl-tiny"]()
    moe = MoEConfig(
        experts=8,
        experts_per_token=2,
        intermediate_size=168,  # three of eight experts, one of them shared: 504 of the dense layer's 512
        shared_experts=1,
        scoring="sigmoid",
        selection_bias=True,
        renormalize=True,
        scale=1.0,
        bias_update_rate=1e-3,
        balance_loss=1e-4,
        balance="sequence",
    )
    text = DeepSeekV3TextConfig(
        vocab_size=dense.text.vocab_size,
        hidden_size=dense.text.hidden_size,
        intermediate_size=dense.text.intermediate_size,
        num_layers=dense.text.num_layers,
        dense_layers=1,
        num_heads=6,
        q_lora_rank=None,
        kv_lora_rank=48,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        moe=moe,
        tie_word_embeddings=True,
        max_position_embeddings=dense.text.max_position_embeddings,
    )
    tokens = {name: getattr(dense, name) for name in ("image_token_id", "video_token_id")}
    tokens |= {name: getattr(dense, name) for name in ("vision_start_token_id", "vision_end_token_id")}
    return MindVLMoEConfig(vision=dense.vision, text=text, **tokens)


MODELS: dict[str, Callable[[], MindVLMoEConfig]] = {"mindvl-671b-a37b": _mindvl_671b, "mindvl-moe-tiny": _tiny}
