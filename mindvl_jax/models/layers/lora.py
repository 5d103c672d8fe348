"""Low-rank adapters inside a linear layer: LoRA (arXiv 2106.09685), rank-stabilised LoRA (2312.03732) and DoRA
(2402.09353).

D inputs, F outputs, r rank, s scale, W (D, F) the base kernel, A (D, r), B (r, F), m (F,) DoRA's magnitude. The maths
follows PEFT's `tuners/lora`, so that a file of either program gives the same logits in the other. No function here
forms the merged (D, F) weight.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mindvl_jax.models.layers.nf4 import Nf4, dequantized_kernel, product
from npu_bridge import ops


def adapter_scale(alpha: float, rank: int, *, rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) when rank-stabilised."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def initial_lora_a(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw A (.., D, r) as PEFT does: Kaiming uniform with a = sqrt(5), which is uniform in +-1/sqrt(D)."""
    bound = 1 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def merged_column_norm(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """L2 norm (F,) of each column of W + s A B, in float32.

    Expanded into |w|^2 + 2 s b.(A'w) + s^2 b'(A'A)b: two products with r rows in place of a second (D, F) matrix.
    """
    kernel, a, b = (x.astype(jnp.float32) for x in (kernel, a, b))
    cross_rF = jnp.einsum("Dr,DF->rF", a, kernel)
    gram_rF = jnp.einsum("Dr,Dq->rq", a, a) @ b
    square_F = jnp.sum(kernel * kernel, axis=0) + jnp.sum(b * (2 * scale * cross_rF + scale * scale * gram_rF), axis=0)
    return jnp.sqrt(jnp.maximum(square_F, 0))


def adapted_linear(
    x: jax.Array,
    kernel: jax.Array | Nf4,
    bias: jax.Array | None,
    a: jax.Array,
    b: jax.Array,
    scale: float,
    magnitude: jax.Array | None = None,
) -> jax.Array:
    """`x W + s (x A) B (+ bias)`; with a magnitude `(m / n) (x W + s (x A) B) (+ bias)`, n the merged column norm.

    Args:
      x: (.., D). kernel: (D, F), or in NF4. bias: (F,) or None. a: (D, r). b: (r, F). magnitude: (F,) for DoRA.

    n has no gradient (section 4.3 of the DoRA paper), as in PEFT.
    """
    with jax.named_scope("lora"):
        update = ops.linear(ops.linear(x, a), b) * jnp.asarray(scale, x.dtype)
    if magnitude is None:
        return product(x, kernel, bias) + update
    with jax.named_scope("dora"):
        whole = dequantized_kernel(kernel, x.dtype) if isinstance(kernel, Nf4) else kernel
        norm = merged_column_norm(*(jax.lax.stop_gradient(value) for value in (whole, a, b)), scale)
        y = (magnitude / norm).astype(x.dtype) * (product(x, kernel) + update)
    return y if bias is None else y + bias.astype(x.dtype)
