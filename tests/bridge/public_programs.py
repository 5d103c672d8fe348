"""Five training programs made of public packages' own parts (flax.linen, flax.nnx, optax, jax.example_libraries), none
written for the bridge. Each gives ``step(state, batch) -> (state, loss)``, a state and a function of the step number
that makes a batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from jax.example_libraries import optimizers, stax


def _images(i, rows=8, size=8, channels=4, classes=8):
    r = np.random.RandomState(i)
    return {
        "x": r.randn(rows, size, size, channels).astype(np.float32),
        "y": r.randint(0, classes, rows).astype(np.int32),
    }


def _tokens(i, rows=4, length=8, vocab=32):
    t = np.random.RandomState(i).randint(0, vocab, (rows, length + 1)).astype(np.int32)
    return {"x": t[:, :-1], "y": t[:, 1:]}


def linen_cnn():
    """Convolutions, batch norm with running averages, pooling, dropout; SGD with Nesterov momentum."""

    class CNN(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            for width in (8, 16):
                x = linen.Conv(width, (3, 3))(x)
                x = linen.BatchNorm(use_running_average=not train)(x)
                x = linen.max_pool(linen.relu(x), (2, 2), (2, 2))
            x = linen.Dropout(0.25, deterministic=not train)(x.reshape(x.shape[0], -1))
            return linen.Dense(8)(x)

    model, tx = CNN(), optax.sgd(0.05, momentum=0.9, nesterov=True)
    variables = model.init(jax.random.key(0), _images(0)["x"], False)
    state = {
        "params": variables["params"],
        "stats": variables["batch_stats"],
        "opt": tx.init(variables["params"]),
        "step": np.int32(0),
    }

    def step(state, batch):
        def loss(p):
            key = jax.random.fold_in(jax.random.key(1), state["step"])
            out, new = model.apply(
                {"params": p, "batch_stats": state["stats"]},
                batch["x"],
                True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            return optax.softmax_cross_entropy_with_integer_labels(out, batch["y"]).mean(), new["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state["params"])
        updates, opt = tx.update(grads, state["opt"], state["params"])
        return {
            "params": optax.apply_updates(state["params"], updates),
            "stats": stats,
            "opt": opt,
            "step": state["step"] + 1,
        }, value

    return step, state, _images


def linen_lstm():
    """An LSTM language model over time by scan; Adam with clipping, gradients accumulated over two steps (a cond)."""

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            h = linen.Embed(32, 16)(x)
            h = linen.RNN(linen.LSTMCell(16))(h)
            return linen.Dense(32)(h)

    model = Model()
    tx = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)), every_k_schedule=2)
    params = model.init(jax.random.key(0), _tokens(0)["x"])
    state = (params, tx.init(params))

    def step(state, batch):
        params, opt = state

        def loss(p):
            return optax.softmax_cross_entropy_with_integer_labels(model.apply(p, batch["x"]), batch["y"]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), value

    return step, state, _tokens


def nnx_transformer():
    """flax.nnx attention, layer norm and embedding; AdamW with a warm-up schedule."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm1, self.norm2 = nnx.LayerNorm(16, rngs=rngs), nnx.RMSNorm(16, rngs=rngs)
            # Without biases: softmax does not feel the keys' bias, its gradient is all rounding, and Adam makes steps
            # of it.
            self.attend = nnx.MultiHeadAttention(num_heads=4, in_features=16, decode=False, use_bias=False, rngs=rngs)
            self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

        def __call__(self, x):
            mask = nnx.make_causal_mask(jnp.zeros(x.shape[:2]))
            x = x + self.attend(self.norm1(x), mask=mask)
            return x + self.down(nnx.gelu(self.up(self.norm2(x))))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(32, 16, rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(2)])

        def __call__(self, x):
            h = self.embed(x)
            for b in self.blocks:
                h = b(h)
            return self.embed.attend(h)

    graph, params = nnx.split(Model(nnx.Rngs(0)))
    params = nnx.to_pure_dict(params)
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 50), weight_decay=0.01)
    state = (params, tx.init(params))

    def step(state, batch):
        params, opt = state

        def loss(p):
            model = nnx.merge(graph, nnx.State(p))
            return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), value

    return step, state, _tokens


def stax_resnet():
    """A residual block of jax.example_libraries.stax with its own momentum optimizer."""
    main = stax.serial(
        stax.Conv(8, (3, 3), padding="SAME"),
        stax.BatchNorm(),
        stax.Relu,
        stax.Conv(4, (3, 3), padding="SAME"),
        stax.BatchNorm(),
    )
    block = stax.serial(stax.FanOut(2), stax.parallel(main, stax.Identity), stax.FanInSum, stax.Relu)
    init, apply = stax.serial(block, stax.AvgPool((2, 2), (2, 2)), block, stax.Flatten, stax.Dense(8), stax.LogSoftmax)
    _, params = init(jax.random.key(0), (8, 8, 8, 4))
    # At a rate of 0.02 XLA differs from itself by 2.6e-3 when the parameters move by 1e-7: a rounding decides a ReLU.
    # Here it is 3e-7.
    opt_init, update, get = optimizers.momentum(optimizers.exponential_decay(0.005, 10, 0.9), mass=0.9)
    state = {"opt": opt_init(params), "step": np.int32(0)}

    def step(state, batch):
        def loss(p):
            logp = apply(p, batch["x"])
            return -jnp.mean(jnp.take_along_axis(logp, batch["y"][:, None], 1))

        value, grads = jax.value_and_grad(loss)(get(state["opt"]))
        return {"opt": update(state["step"], grads, state["opt"]), "step": state["step"] + 1}, value

    return step, state, _images


def linen_vae():
    """A variational auto-encoder: random normals inside the step; Lion."""

    class VAE(linen.Module):
        @linen.compact
        def __call__(self, x, key):
            h = linen.tanh(linen.Dense(32)(x))
            mean, log_variance = jnp.split(linen.Dense(16)(h), 2, -1)
            z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
            out = linen.Dense(x.shape[-1])(linen.swish(linen.Dense(32)(z)))
            return out, mean, log_variance

    def flat(i):
        return {"x": np.random.RandomState(i).uniform(0, 1, (8, 32)).astype(np.float32)}

    model, tx = VAE(), optax.lion(1e-3)
    params = model.init(jax.random.key(0), flat(0)["x"], jax.random.key(1))
    state = (params, tx.init(params), np.int32(0))

    def step(state, batch):
        params, opt, i = state

        def loss(p):
            out, mean, log_variance = model.apply(p, batch["x"], jax.random.fold_in(jax.random.key(2), i))
            kl = -0.5 * jnp.mean(1 + log_variance - mean**2 - jnp.exp(log_variance))
            return optax.sigmoid_binary_cross_entropy(out, batch["x"]).mean() + kl

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt, i + 1), value

    return step, state, flat


PROGRAMS = {f.__name__: f for f in (linen_cnn, linen_lstm, nnx_transformer, stax_resnet, linen_vae)}
