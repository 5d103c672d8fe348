"""A small sharded decoder and its AdamW step in plain JAX, which the training tests run through XLA and the bridge."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from npu_bridge import ops

MESH = {"fsdp": 2, "tensor": 2}


@dataclasses.dataclass(frozen=True)
class Config:
    vocab: int = 128
    width: int = 32
    layers: int = 2
    heads: int = 4
    kv: int = 2
    head_dim: int = 8
    ff: int = 64
    dtype: str = "float32"
    fused: bool = False  # npu_bridge.ops instead of jnp
    scan: bool = True
    rows: str | tuple[str, ...] = "fsdp"  # mesh axes of the batch


def init(c: Config, seed: int = 0):
    r = np.random.RandomState(seed)

    def w(*s):
        return (r.randn(*s) * 0.05).astype(np.float32)

    n = (c.layers,)
    block = {
        "norm1": np.ones((*n, c.width), np.float32),
        "norm2": np.ones((*n, c.width), np.float32),
        "wq": w(*n, c.width, c.heads, c.head_dim),
        "wk": w(*n, c.width, c.kv, c.head_dim),
        "wv": w(*n, c.width, c.kv, c.head_dim),
        "wo": w(*n, c.heads, c.head_dim, c.width),
        "wg": w(*n, c.width, c.ff),
        "wu": w(*n, c.width, c.ff),
        "wd": w(*n, c.ff, c.width),
    }
    return {
        "embed": w(c.vocab, c.width) * 20,
        "block": block,
        "norm": np.ones(c.width, np.float32),
        "head": w(c.width, c.vocab),
    }


RULES = [
    ("embed", P("tensor", "fsdp")),
    ("head", P("fsdp", "tensor")),
    ("w[qkv]", P(None, "fsdp", "tensor")),
    ("wo", P(None, "tensor", None, "fsdp")),
    ("w[gu]", P(None, "fsdp", "tensor")),
    ("wd", P(None, "tensor", "fsdp")),
]


def specs(tree):
    def one(path, x):
        name = jax.tree_util.keystr(path)
        return next((s for r, s in RULES if re.search(rf"'{r}'", name)), P())

    return jax.tree_util.tree_map_with_path(one, tree)


def batch(c: Config, rows: int = 4, tokens: int = 16, seed: int = 0):
    r = np.random.RandomState(seed)
    t = r.randint(0, c.vocab, (rows, tokens + 1)).astype(np.int32)
    segments = 1 + np.cumsum(r.rand(rows, tokens) < 0.15, 1).astype(np.int32)
    return {
        "tokens": t[:, :-1],
        "targets": t[:, 1:],
        "segments": segments,
        "weights": (r.rand(rows, tokens) < 0.9).astype(np.float32),
    }


def _hold(x, *spec):
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, P(*spec))


def _norm(c, x, scale):
    if c.fused:
        return ops.rms_norm(x, scale.astype(x.dtype), eps=1e-6)
    xf = x.astype(jnp.float32)
    return (xf * jax.lax.rsqrt(jnp.mean(xf * xf, -1, keepdims=True) + 1e-6)).astype(x.dtype) * scale.astype(x.dtype)


def _rotary(c, x, cos, sin):
    if c.fused:
        return ops.rotary(x, cos, sin)
    half = cos.shape[-1] // 2
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = cos[:, :, None, :half], sin[:, :, None, :half]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def _attend(c, q, k, v, segments):
    if c.fused:
        return ops.attention(q, k, v, segment_ids_q=segments, segment_ids_kv=segments, causal=True)
    b, t, n, h = q.shape
    q = q.reshape(b, t, c.kv, n // c.kv, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k).astype(jnp.float32) * h**-0.5
    mask = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((t, t), bool))
    p = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), -1).astype(q.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", p, v).reshape(b, t, n, h)


def loss_fn(c: Config, params, data):
    dt = jnp.dtype(c.dtype)
    rows, tokens = data["tokens"].shape
    angles = jnp.arange(tokens)[None, :, None] * 1e4 ** (-jnp.arange(c.head_dim // 2) * 2 / c.head_dim)
    angles = jnp.broadcast_to(jnp.concatenate([angles, angles], -1), (rows, tokens, c.head_dim)).astype(jnp.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    table = params["embed"].astype(dt)
    x = ops.embedding(table, data["tokens"]) if c.fused else table[data["tokens"]]
    x = _hold(x, c.rows, None, None)

    def block(x, p):
        with jax.named_scope("attention"):
            h = _norm(c, x, p["norm1"])
            q, k, v = (
                _hold(jnp.einsum("btd,dnh->btnh", h, p[w].astype(dt)), c.rows, None, "tensor", None)
                for w in ("wq", "wk", "wv")
            )
            o = _attend(c, _rotary(c, q, cos, sin), _rotary(c, k, cos, sin), v, data["segments"])
            x = x + _hold(jnp.einsum("btnh,nhd->btd", o, p["wo"].astype(dt)), c.rows, None, None)
        with jax.named_scope("mlp"):
            h = _norm(c, x, p["norm2"])
            g, u = (_hold(jnp.einsum("btd,df->btf", h, p[w].astype(dt)), c.rows, None, "tensor") for w in ("wg", "wu"))
            a = ops.swiglu(g, u) if c.fused else jax.nn.silu(g) * u
            return x + _hold(jnp.einsum("btf,fd->btd", a, p["wd"].astype(dt)), c.rows, None, None), None

    if c.scan:
        x, _ = jax.lax.scan(jax.checkpoint(block), x, params["block"])
    else:
        for i in range(c.layers):
            x, _ = jax.checkpoint(block)(x, jax.tree.map(lambda w: w[i], params["block"]))
    x = _norm(c, x, params["norm"])
    if c.fused:
        total = ops.cross_entropy(x, params["head"].astype(dt), data["targets"], data["weights"], chunk=32).sum()
    else:
        logits = _hold(jnp.einsum("btd,dv->btv", x, params["head"].astype(dt)), c.rows, None, "tensor").astype(
            jnp.float32
        )
        hit = jax.nn.one_hot(data["targets"], c.vocab, dtype=jnp.float32)
        total = ((jax.nn.logsumexp(logits, -1) - (logits * hit).sum(-1)) * data["weights"]).sum()
    return total / data["weights"].sum()


TX = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 200), weight_decay=0.1)
)


def make(c: Config):
    params = init(c)
    # int32 counters, as optax makes them, on the host
    state = jax.tree.map(np.asarray, (params, TX.init(params)))

    def step(state, data):
        params, opt = state
        loss, grads = jax.value_and_grad(lambda p: loss_fn(c, p, data))(params)
        updates, opt = TX.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), {"loss": loss, "grad_norm": optax.global_norm(grads)}

    return step, state
