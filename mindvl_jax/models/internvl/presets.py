"""Published sizes of InternVL 2.5, 3 and 3.5 with Qwen2.5 and Qwen3 decoders. Imports no jax."""

from __future__ import annotations

import functools
from collections.abc import Callable

from mindvl_jax.models.internvl.config import InternVLConfig, VisionConfig
from mindvl_jax.models.layers.config import TextConfig

_SMALL = dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16)
_LARGE = dict(
    depth=45, hidden_size=3200, intermediate_size=12800, num_heads=25, norm="rms", qk_norm=True, attention_bias=False
)
# Layers, width, heads, key/value heads, head dim, feed-forward width.
_QWEN2 = {
    "0.5b": (24, 896, 14, 2, 64, 4864),
    "1.5b": (28, 1536, 12, 2, 128, 8960),
    "3b": (36, 2048, 16, 2, 128, 11008),
    "7b": (28, 3584, 28, 4, 128, 18944),
    "14b": (48, 5120, 40, 8, 128, 13824),
    "32b": (64, 5120, 40, 8, 128, 27648),
    "72b": (80, 8192, 64, 8, 128, 29568),
}
_QWEN3 = {
    "0.6b": (28, 1024, 16, 8, 128, 3072),
    "1.7b": (28, 2048, 16, 8, 128, 6144),
    "4b": (36, 2560, 32, 8, 128, 9728),
    "8b": (36, 4096, 32, 8, 128, 12288),
    "14b": (40, 5120, 40, 8, 128, 17408),
    "32b": (64, 5120, 64, 8, 128, 25600),
}


def _model(vision: dict, family: str, size: str, **options) -> InternVLConfig:
    layers, width, heads, kv_heads, head_dim, feed_forward = (_QWEN2 if family == "qwen2" else _QWEN3)[size]
    # <img>, </img> and <IMG_CONTEXT> follow one another.
    first, vocabulary, positions = (151665, 151674, 32768) if family == "qwen2" else (151669, 151936, 40960)
    text = TextConfig(
        family=family,
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=1e6,
        tie_word_embeddings=False,
        rope="1d",
        max_position_embeddings=positions,
        **options,
    )
    return InternVLConfig(
        vision=VisionConfig(**vision),
        text=text,
        image_token_id=first + 2,
        video_token_id=first + 2,
        vision_start_token_id=first,
        vision_end_token_id=first + 1,
    )


def _internvl3(vision: dict, size: str) -> InternVLConfig:
    return _model(vision, "qwen2", size, rope_dynamic_factor=2.0)


MODELS: dict[str, Callable[[], InternVLConfig]] = {
    "internvl2.5-1b": functools.partial(_model, _SMALL, "qwen2", "0.5b"),
    "internvl2.5-4b": functools.partial(_model, _SMALL, "qwen2", "3b"),
    "internvl2.5-38b": functools.partial(_model, _LARGE, "qwen2", "32b"),
    "internvl2.5-78b": functools.partial(_model, _LARGE, "qwen2", "72b"),
    "internvl3-1b": functools.partial(_internvl3, _SMALL, "0.5b"),
    "internvl3-2b": functools.partial(_internvl3, _SMALL, "1.5b"),
    "internvl3-8b": functools.partial(_internvl3, _SMALL, "7b"),
    "internvl3-14b": functools.partial(_internvl3, _SMALL, "14b"),
    "internvl3-38b": functools.partial(_internvl3, _LARGE, "32b"),
    "internvl3-78b": functools.partial(_internvl3, _LARGE, "72b"),
    "internvl3.5-1b": functools.partial(_model, _SMALL, "qwen3", "0.6b"),
    "internvl3.5-2b": functools.partial(_model, _SMALL, "qwen3", "1.7b"),
    "internvl3.5-4b": functools.partial(_model, _SMALL, "qwen3", "4b"),
    "internvl3.5-8b": functools.partial(_model, _SMALL, "qwen3", "8b"),
    "internvl3.5-14b": functools.partial(_model, _SMALL, "qwen3", "14b"),
    "internvl3.5-38b": functools.partial(_model, _LARGE, "qwen3", "32b"),
}
