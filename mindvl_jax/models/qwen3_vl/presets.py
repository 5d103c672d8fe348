"""Published sizes of Qwen3-VL. Imports no jax."""

from __future__ import annotations

from collections.abc import Callable

from mindvl_jax.models.layers.config import TextConfig
from mindvl_jax.models.layers.qwen_vl_hf import TOKENS
from mindvl_jax.models.qwen3_vl.config import Qwen3VLConfig, VisionConfig

# Keys of the decoder that all sizes, routed ones too, have in common.
TEXT = dict(
    vocab_size=151936,
    head_dim=128,
    rope_theta=5e6,
    rope="mrope",
    mrope_section=(24, 20, 20),
    mrope_interleaved=True,
    max_position_embeddings=262144,
)


def large_tower() -> VisionConfig:
    """The tower of 8B and more."""
    return VisionConfig(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, deepstack_blocks=(8, 16, 24))


def _small_tower() -> VisionConfig:
    return VisionConfig(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, deepstack_blocks=(5, 11, 17))


def _model(
    vision: VisionConfig, layers: int, width: int, heads: int, feed_forward: int, *, tied: bool
) -> Qwen3VLConfig:
    text = TextConfig(
        family="qwen3",
        hidden_size=width,
        intermediate_size=feed_forward,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        tie_word_embeddings=tied,
        **TEXT,
    )
    return Qwen3VLConfig(vision=vision, text=text, **TOKENS)


MODELS: dict[str, Callable[[], Qwen3VLConfig]] = {
    "qwen3-vl-2b": lambda: _model(_small_tower(), 28, 2048, 16, 6144, tied=True),
    "qwen3-vl-4b": lambda: _model(_small_tower(), 36, 2560, 32, 9728, tied=True),
    "qwen3-vl-8b": lambda: _model(large_tower(), 36, 4096, 32, 12288, tied=False),
    "qwen3-vl-32b": lambda: _model(large_tower(), 64, 5120, 64, 25600, tied=False),
}
