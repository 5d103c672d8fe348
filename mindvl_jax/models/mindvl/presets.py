"""Published sizes by name (Qwen2.5-VL and Qwen3 configurations), and MindVL assembled from them. Imports no jax.

Where MindVL's own choice is not public the value is ours, with the reason beside it.
"""

from __future__ import annotations

from collections.abc import Callable

from mindvl_jax.models.layers.config import TextConfig
from mindvl_jax.models.mindvl.config import MindVLConfig, VisionConfig
from mindvl_jax.models.qwen.presets import QWEN3

_TOKENS = dict(image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653)


def _vision(intermediate_size: int) -> VisionConfig:
    return VisionConfig(
        depth=32,
        hidden_size=1280,
        intermediate_size=intermediate_size,
        num_heads=16,
        patch_size=14,
        window_size=112,
        fullatt_block_indexes=(7, 15, 23, 31),
    )


def _qwen2_5_vl_text(
    layers: int, width: int, heads: int, kv_heads: int, feed_forward: int, vocab: int, tied: bool
) -> TextConfig:
    return TextConfig(
        family="qwen2",
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        rope="mrope",
        mrope_section=(16, 24, 24),
        max_position_embeddings=128000,
    )


def _qwen3_text(name: str) -> TextConfig:
    return QWEN3[name]().model_copy(update=dict(rope="mrope", mrope_section=(16, 24, 24)))


TEXT: dict[str, Callable[..., TextConfig]] = {
    "qwen2.5-vl-3b": lambda: _qwen2_5_vl_text(36, 2048, 16, 2, 11008, 151936, True),
    "qwen2.5-vl-7b": lambda: _qwen2_5_vl_text(28, 3584, 28, 4, 18944, 152064, False),
    "qwen2.5-vl-32b": lambda: _qwen2_5_vl_text(64, 5120, 40, 8, 27648, 152064, False),
    "qwen2.5-vl-72b": lambda: _qwen2_5_vl_text(80, 8192, 64, 8, 29568, 152064, False),
}
"""Decoders of Qwen2.5-VL."""

VISION: dict[str, Callable[[], VisionConfig]] = {
    "qwen2.5-vit-3420": lambda: _vision(3420),
    "qwen2.5-vit-3456": lambda: _vision(3456),
}
"""Vision towers: 3420 belongs to Qwen2.5-VL 3B and 7B, 3456 to 32B and 72B."""


def _tiny() -> MindVLConfig:
    vision = VisionConfig(
        depth=4, hidden_size=128, intermediate_size=256, num_heads=4, window_size=112, fullatt_block_indexes=(1, 3)
    )
    text = TextConfig(
        family="qwen3",
        vocab_size=2048,
        hidden_size=192,
        intermediate_size=512,
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        rope_theta=1e4,
        tie_word_embeddings=True,
        rope="mrope",
        mrope_section=(4, 6, 6),
        max_position_embeddings=4096,
    )
    return MindVLConfig(
        vision=vision,
        text=text,
        image_token_id=2044,
        video_token_id=2045,
        vision_start_token_id=2042,
        vision_end_token_id=2043,
    )


def _assembled(vision: str, text: TextConfig) -> MindVLConfig:
    return MindVLConfig(vision=VISION[vision](), text=text, **_TOKENS)


# The paper does not say which of the two Qwen2.5 towers MindVL starts from, nor how Qwen3 counts positions. 3420 is the
# tower of the 7B, the size next to MindVL-8B; M-RoPE is what the nearest public Ascend pairing of this tower with Qwen3
# uses.
MODELS: dict[str, Callable[[], MindVLConfig]] = {
    "qwen2.5-vl-3b": lambda: _assembled("qwen2.5-vit-3420", TEXT["qwen2.5-vl-3b"]()),
    "qwen2.5-vl-7b": lambda: _assembled("qwen2.5-vit-3420", TEXT["qwen2.5-vl-7b"]()),
    "qwen2.5-vl-32b": lambda: _assembled("qwen2.5-vit-3456", TEXT["qwen2.5-vl-32b"]()),
    "qwen2.5-vl-72b": lambda: _assembled("qwen2.5-vit-3456", TEXT["qwen2.5-vl-72b"]()),
    "mindvl-0.6b": lambda: _assembled("qwen2.5-vit-3420", _qwen3_text("qwen3-0.6b")),
    "mindvl-1.7b": lambda: _assembled("qwen2.5-vit-3420", _qwen3_text("qwen3-1.7b")),
    "mindvl-4b": lambda: _assembled("qwen2.5-vit-3420", _qwen3_text("qwen3-4b")),
    "mindvl-8b": lambda: _assembled("qwen2.5-vit-3420", _qwen3_text("qwen3-8b")),
    "mindvl-32b": lambda: _assembled("qwen2.5-vit-3456", _qwen3_text("qwen3-32b")),
    "mindvl-tiny": _tiny,
}
"""Whole vision-language models: what `model.preset` of a config names."""
