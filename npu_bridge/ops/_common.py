"""Shared by all operators: the accumulation dtype, matrix products that accumulate in it, argument checks.

The trap: on XLA CPU a bfloat16 product with a bfloat16 result takes three to five times as long as one with a float32
result that is cast afterwards, and JAX's transpose of a mixed dot casts an operand to float32 and leaves the fast path.
So operators never differentiate through a product: they write their gradients with `dot`, `einsum` and `sum_over_rows`.
tests/ops/test_fast_paths.py checks the optimized program for slow products.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from npu_bridge.ops._platform import platform_function


def accumulator(dtype):
    """Return float32 for all narrower floats, float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def product_operands(x, y):
    """Cast both operands for a product: float32 becomes bfloat16 under `jax.default_matmul_precision("bfloat16")`.

    That is JAX's own name for one bfloat16 pass with float32 accumulation. XLA applies it on TPU only; here it applies
    on every XLA back end, so that a CPU with bfloat16 matrix units keeps float32 activations and multiplies at the
    units' speed. The setting must be in force while a program is traced and lowered, not when it runs.
    """
    if x.dtype == y.dtype == jnp.float32 and jax.config.jax_default_matmul_precision == "bfloat16":
        return x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return x, y


def einsum(spec, x, y):
    """Product of two operands in their common dtype, accumulated and returned in `accumulator(dtype)`.

    Fast on XLA CPU when x contracts its last dims. Cast the result, or pass it through `settle`, before transposing it.
    """
    dtype = jnp.promote_types(x.dtype, y.dtype)
    x, y = product_operands(x.astype(dtype), y.astype(dtype))
    return jnp.einsum(spec, x, y, preferred_element_type=accumulator(dtype))


def settle(product):
    """Keep XLA from folding a later transpose into the product, which it then could not run quickly, or (bfloat16
    operands with a float32 result, jax 0.10) not at all: "Unsupported element type for DotThunk".
    """
    return lax.optimization_barrier(product)


def sum_over_rows(x, y, batch=0, *, apart=False):
    """(batch.., rows.., X), (batch.., rows.., Y) -> (batch.., X, Y): the product of a weight gradient, in
    `accumulator(dtype)`.

    XLA CPU runs a narrow product that contracts a single leading dim on a path four times slower than one that
    contracts two (there it transposes x first), so a lone row dim is cut in two. In float32 it is the other way round:
    one dim needs no transposition at all. Under `batch`, give the smaller operand as x: it is the one that is
    transposed; without, the float32 product is turned around where y is the smaller, a third faster for 512 and 192
    columns.

    Args:
      apart: leave the row dims as they are, for programs over several devices: merged, a dim that is spread and not the
        first has no layout, and both operands would be gathered.
    """
    x, y = product_operands(x, y)
    rows = [size for size in x.shape[batch:-1] if size > 1]
    if apart:
        pass
    elif x.dtype == jnp.float32:
        x, y = (a.reshape(*a.shape[:batch], -1, a.shape[-1]) for a in (x, y))
        if not batch and x.shape[-1] > y.shape[-1]:
            return _turned(x, y)
    elif len(rows) == 1 and rows[0] % 2 == 0:
        x = x.reshape(*x.shape[:batch], 2, rows[0] // 2, x.shape[-1])
        y = y.reshape(*y.shape[:batch], 2, rows[0] // 2, y.shape[-1])
    contract = tuple(range(batch, x.ndim - 1))
    leading = tuple(range(batch))
    return settle(
        lax.dot_general(x, y, ((contract, contract), (leading, leading)), preferred_element_type=accumulator(x.dtype))
    )


def _product_over_rows(x, y):
    return settle(lax.dot_general(x, y, (((0,), (0,)), ((), ()))))


# Not on the NPU: its matrix unit takes operands as they come, and the gradient would lie transposed.
_turned = platform_function("npu_bridge.sum_over_rows", lambda x, y: _product_over_rows(y, x).T, _product_over_rows)


def dot(x, y, contract):
    """`lax.dot_general` of two operands of one dtype, accumulated and returned in `accumulator(dtype)`."""
    x, y = product_operands(x, y)
    return lax.dot_general(x, y, (contract, ((), ())), preferred_element_type=accumulator(x.dtype))


def require(condition, operator, message):
    """Raise ValueError naming the operator unless `condition`; shapes are static, so this costs nothing at run time."""
    if not condition:
        raise ValueError(f"npu_bridge.ops.{operator}: {message}")


def require_float(operator, **arrays):
    """Refuse anything but real floating-point arrays, naming the argument."""
    for name, array in arrays.items():
        if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            raise TypeError(
                f"npu_bridge.ops.{operator}: {name} has dtype {jnp.result_type(array)}; a floating-point "
                "array is expected. "
                f"Convert it first, for example with {name}.astype(jnp.bfloat16)."
            )


def zero_cotangent(array):
    """The cotangent of an integer or boolean argument, which JAX wants as float0 zeros."""
    return np.zeros(jnp.shape(array), jax.dtypes.float0)
