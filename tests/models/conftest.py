"""A tiny MindVL and a packed batch of random content."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mindvl_jax.models.layers.config import TextConfig
from mindvl_jax.models.mindvl.config import MindVLConfig, VisionConfig
from mindvl_jax.models.mindvl.model import MindVL
from mindvl_jax.models.vision_language.batch import BatchShape


def tiny_config(**changes):
    vision = VisionConfig(
        depth=4, hidden_size=32, intermediate_size=48, num_heads=2, window_size=56, fullatt_block_indexes=(1, 3)
    )
    text = TextConfig(
        family="qwen3",
        vocab_size=64,
        hidden_size=48,
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
    return MindVLConfig(
        vision=vision,
        text=text,
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
        **(dict(compute_dtype="float32") | changes),
    )


@pytest.fixture(scope="session")
def tiny():
    """tiny(**changes of the model configuration) -> graphdef and parameters, the same values for all."""

    def build(made):
        return MindVL(made, rngs=nnx.Rngs(0))

    values = jax.jit(
        lambda: nnx.state(build(tiny_config()), nnx.Param), compiler_options={"xla_backend_optimization_level": 0}
    )()

    @functools.cache
    def make(**changes):
        graph, _ = nnx.split(nnx.eval_shape(lambda: build(tiny_config(**changes))), nnx.Param)
        return graph, values

    return make


@pytest.fixture(scope="session")
def batch():
    """Two rows of 24 places: an image of 16 patches with 14 tokens of text; two texts of 8 with padding."""
    rng = np.random.default_rng(0)
    made = BatchShape(2, 24, 16, samples=4, images=4, windows=8, patch_dim=1176).empty()
    made.tokens[:] = rng.integers(1, 60, (2, 24))
    made.targets[:] = rng.integers(1, 60, (2, 24))
    made.segment_ids[0, :18], made.segment_ids[1, :8], made.segment_ids[1, 8:16] = 1, 1, 2
    made.loss_weights[:] = made.segment_ids > 0
    made.visual_index[0, 2:6] = [0, 2, 1, 3]
    made.positions[0], made.positions[1] = np.arange(24), np.tile(np.arange(8), 3)
    made.patches[0] = rng.integers(0, 256, (16, 1176))
    made.patch_positions[0] = rng.integers(0, 4, (16, 2))
    made.patch_segment_ids[0], made.patch_window_ids[0] = 1, np.repeat([1, 2], 8)
    return jax.tree.map(jnp.asarray, made)


@pytest.fixture(scope="session")
def config():
    return tiny_config()
