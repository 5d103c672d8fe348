"""One tiny model and one byte-level tokenizer for all tests of generation."""

import importlib.util
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from mindvl_jax.config.schema import TokenizerConfig
from mindvl_jax.data.text.tokenizer import load_tokenizer
from mindvl_jax.models.layers.config import TextConfig
from mindvl_jax.models.mindvl.config import MindVLConfig, VisionConfig
from mindvl_jax.models.mindvl.model import MindVL

_spec = importlib.util.spec_from_file_location(
    "training_fixtures", Path(__file__).parents[1] / "training" / "conftest.py"
)
_training = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_training)


def byte_tokenizer(folder):
    """Every byte is a token: no text is unknown, and lengths are easy to say."""
    _training.write_tokenizer(folder)
    return load_tokenizer(TokenizerConfig(path=str(folder / "tokenizer.json")))


def tiny_config(tokenizer, **text) -> MindVLConfig:
    vision = VisionConfig(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, window_size=56, fullatt_block_indexes=(1,)
    )
    text = TextConfig(
        **dict(
            family="qwen3",
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            rope_theta=1e4,
            tie_word_embeddings=True,
            rope="mrope",
            mrope_section=(2, 3, 3),
        )
        | text
    )
    return MindVLConfig(
        vision=vision,
        text=text,
        compute_dtype="float32",
        image_token_id=tokenizer.token_id("<|image_pad|>"),
        video_token_id=tokenizer.token_id("<|video_pad|>"),
        vision_start_token_id=tokenizer.token_id("<|vision_start|>"),
        vision_end_token_id=tokenizer.token_id("<|vision_end|>"),
    )


def tiny_model(config: MindVLConfig, seed: int = 0) -> MindVL:
    """Random weights large enough that the images and the words decide what comes next."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MindVL(config, rngs=nnx.Rngs(0))))

    def draw(path, leaf):
        generator = np.random.default_rng([seed, *str(path).encode()])
        if leaf.ndim < 2 or "norm" in str(path):
            return jax.numpy.asarray(1 + generator.normal(0, 0.1, leaf.shape), leaf.dtype)
        return jax.numpy.asarray(generator.normal(0, 1.5 / leaf.shape[-2] ** 0.5, leaf.shape), leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))


def pictures(count: int, seed: int = 0, largest: int = 140) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    return [
        Image.fromarray(generator.integers(0, 256, (*generator.integers(28, largest, 2), 3), np.uint8))
        for _ in range(count)
    ]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def opened(tokenizer):
    return types.SimpleNamespace(
        model=tiny_model(tiny_config(tokenizer)), tokenizer=tokenizer, min_pixels=784, max_pixels=784 * 16
    )


@pytest.fixture(scope="session")
def draw_pictures():
    return pictures
