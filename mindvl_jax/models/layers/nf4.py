"""A frozen matrix held in four bits (NF4 of QLoRA, arXiv 2305.14314), and the product with it.

D inputs, F outputs. The bytes are those of bitsandbytes: the published matrix (F, D) in row-major order, two codes a
byte, the first in the high half, with one float32 `absmax` for each block of 64 weights. A weight is
`TABLE[code] * absmax`, rounded once to the dtype of the computation. Where D is a multiple of 64 no block leaves its
row, and absmax is (F, D / 64); else a block may reach into the next row, and absmax is flat.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from npu_bridge import ops

BLOCK = 64

# The quantiles of a normal distribution that QLoRA chose, as bitsandbytes stores them (`quant_map`).
TABLE = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
_BOUNDS = (TABLE[1:] + TABLE[:-1]) / 2
_PAIRS = np.stack([np.repeat(TABLE, 16), np.tile(TABLE, 16)], axis=1)  # both weights of each byte


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nf4:
    """A matrix, or a stack of matrices, in NF4.

    Attributes:
      codes: uint8 (.., F, D / 2). absmax: float32 (.., F, D / 64), or (.., F * D / 64) where D is no multiple of 64.
    """

    codes: jax.Array
    absmax: jax.Array


def can_hold(inputs: int, outputs: int) -> bool:
    """Whether a (D, F) matrix is a whole number of blocks."""
    return inputs % 2 == 0 and inputs * outputs % BLOCK == 0


def quantize(kernel: jax.Array) -> Nf4:
    """A kernel (.., D, F) in NF4: of each weight over its block's absmax the nearest value of the table.

    Raises:
      ValueError: not a whole number of blocks.
    """
    *lead, inputs, outputs = kernel.shape
    if not can_hold(inputs, outputs):
        raise ValueError(f"a kernel of shape {kernel.shape} is not a whole number of blocks of {BLOCK} weights")
    blocks = jnp.swapaxes(kernel, -1, -2).astype(jnp.float32).reshape(*lead, -1, BLOCK)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    scaled = blocks / jnp.where(absmax == 0, 1, absmax)[..., None]
    codes = sum((scaled > bound).astype(jnp.uint8) for bound in _BOUNDS).reshape(*lead, outputs, inputs // 2, 2)
    of_rows = (outputs, inputs // BLOCK) if inputs % BLOCK == 0 else (-1,)
    return Nf4(codes[..., 0] * jnp.uint8(16) + codes[..., 1], absmax.reshape(*lead, *of_rows))


def dequantize(matrix: Nf4, dtype) -> jax.Array:
    """The published matrix (.., F, D): a kernel's transpose. Products are float32 and rounded once, to `dtype`."""
    with jax.named_scope("dequantize"):
        pairs = jnp.asarray(_PAIRS).at[matrix.codes.astype(jnp.int32)].get(mode="promise_in_bounds")
        values = pairs.reshape(*matrix.absmax.shape, BLOCK) * matrix.absmax[..., None]
        return values.reshape(*matrix.codes.shape[:-1], -1).astype(dtype)


def dequantized_kernel(matrix: Nf4, dtype) -> jax.Array:
    """(.., D, F)."""
    return jnp.swapaxes(dequantize(matrix, dtype), -1, -2)


@jax.custom_vjp
def _product(x: jax.Array, matrix: Nf4) -> jax.Array:
    return ops.linear(x, dequantized_kernel(matrix, x.dtype))


def _backward(matrix: Nf4, gradient: jax.Array) -> tuple[jax.Array, None]:
    # Dequantised again: kept from the forward pass, every layer's matrix would be in memory at once.
    return ops.linear(gradient, dequantize(matrix, gradient.dtype)), None


_product.defvjp(lambda x, matrix: (_product(x, matrix), matrix), _backward)


def product(x: jax.Array, kernel: jax.Array | Nf4, bias: jax.Array | None = None) -> jax.Array:
    """`ops.linear`, also with a matrix in NF4, which has no gradient."""
    if not isinstance(kernel, Nf4):
        return ops.linear(x, kernel, bias)
    y = _product(x, kernel)
    return y if bias is None else y + bias.astype(y.dtype)
