"""A packed row teaches the model what its samples teach alone: losses and every gradient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from data_toys import MODEL, encoded, picture, tokenizer
from flax import nnx

from mindvl_jax.data.sample import Media, Message, Sample
from mindvl_jax.models.mindvl.config import MindVLConfig
from mindvl_jax.models.mindvl.model import MindVL
from mindvl_jax.models.vision_language.collate import collate, shape_for
from mindvl_jax.models.vision_language.example import EncodeLimits, ExampleEncoder


def test_a_packed_row_gives_the_losses_and_gradients_of_its_samples_alone():
    # The real tokenizer with a softmax over 151,936 ids would be all of the test's time: fold the ids into 512.
    model_config = MindVLConfig.model_validate({**MODEL, "compute_dtype": "float32"})
    model_config = model_config.model_copy(update={"text": model_config.text.model_copy(update={"vocab_size": 512})})
    encoder = ExampleEncoder(model_config, tokenizer(), EncodeLimits(min_pixels=784, max_pixels=50176))
    samples = [
        Sample(
            "pictures",
            (Message("user", "<image> and <image>?"), Message("assistant", "one ship, two masts")),
            tuple(Media(data=encoded(picture(k, *size))) for k, size in enumerate([(140, 168), (28, 56)])),
        ),
        Sample("text", (Message("user", "Say five words."), Message("assistant", "here are five short words"))),
        Sample(
            "small",
            (Message("user", "<image>"), Message("assistant", "a mast")),
            (Media(data=encoded(picture(9, 56, 84))),),
        ),
    ]
    examples = [encoder.encode(sample).with_pixels(model_config.vision, "bicubic") for sample in samples]

    def batch_of(rows):
        shape = shape_for(model_config.vision, rows=len(rows), tokens=128, patches=176, samples=3)
        batch = collate(rows, shape, pad_id=0, vision=model_config.vision).batch

        def fold(ids):
            return np.where(batch.segment_ids > 0, ids % 512, ids)

        return batch.replace(tokens=fold(batch.tokens), targets=fold(batch.targets))

    compiled = functools.partial(
        jax.jit, compiler_options={"xla_backend_optimization_level": 0}
    )  # quick to compile, run twice
    graph, _ = nnx.split(nnx.eval_shape(lambda: MindVL(model_config, rngs=nnx.Rngs(0))), nnx.Param)
    params = compiled(lambda: nnx.state(MindVL(model_config, rngs=nnx.Rngs(0)), nnx.Param))()

    @compiled
    def loss_and_gradients(params, batch):
        return jax.value_and_grad(lambda p: jnp.sum(nnx.merge(graph, p).token_losses(batch, chunk=64)))(params)

    packed_loss, packed = loss_and_gradients(params, batch_of([examples, [], []]))
    alone_loss, alone = loss_and_gradients(params, batch_of([[example] for example in examples]))
    relative = abs(float(packed_loss - alone_loss)) / float(alone_loss)
    # float32 sums over about 130 tokens in another order: a few units in the last place, 1e-5 is the project's bar.
    assert relative < 1e-5, f"losses differ by {relative:.2e}"
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(alone))
    for path, (one, other) in zip(
        jax.tree_util.tree_flatten_with_path(alone)[0],
        zip(jax.tree.leaves(alone), jax.tree.leaves(packed)),
        strict=True,
    ):
        difference = float(jnp.abs(one - other).max())
        assert difference < 1e-5 * largest, (
            f"{jax.tree_util.keystr(path[0])}: gradients differ by {difference:.2e} (largest gradient {largest:.2e})"
        )
