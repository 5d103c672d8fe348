"""Published sizes of Qwen2-VL. Imports no jax."""

from __future__ import annotations

from collections.abc import Callable

from mindvl_jax.models.layers.config import TextConfig
from mindvl_jax.models.layers.qwen_vl_hf import TOKENS
from mindvl_jax.models.qwen2_vl.config import Qwen2VLConfig, VisionConfig


def _model(
    layers: int, width: int, heads: int, kv_heads: int, feed_forward: int, vocabulary: int, *, tied: bool
) -> Qwen2VLConfig:
    vision = VisionConfig(depth=32, hidden_size=1280, intermediate_size=5120, num_heads=16)
    text = TextConfig(
        family="qwen2",
        vocab_size=vocabulary,
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
        max_position_embeddings=32768,
    )
    return Qwen2VLConfig(vision=vision, text=text, **TOKENS)


MODELS: dict[str, Callable[[], Qwen2VLConfig]] = {
    "qwen2-vl-2b": lambda: _model(28, 1536, 12, 2, 8960, 151936, tied=True),
    "qwen2-vl-7b": lambda: _model(28, 3584, 28, 4, 18944, 152064, tied=False),
    "qwen2-vl-72b": lambda: _model(80, 8192, 64, 8, 29568, 152064, tied=False),
}
