"""What every operator shares: the accumulation dtype, matrix products that accumulate in it, and argument checks.

Trap this module exists for: on XLA CPU a bfloat16 product that is asked for with a bfloat16 result runs three to five times
slower than the same product asked for with a float32 result and cast afterwards, and JAX's own transpose of a mixed dot casts
an operand to float32 and leaves the fast path. So operators never differentiate through a dot: they write their gradients with
`dot` and `einsum` from here.
"""

import jax
import jax.numpy as jnp
from jax import lax


def accumulator(dtype):
    """float32 for all narrower floats, float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def einsum(spec, x, y):
    """Product of two operands in their common dtype, accumulated and returned in `accumulator(dtype)`."""
    dtype = jnp.promote_types(x.dtype, y.dtype)
    return jnp.einsum(spec, x.astype(dtype), y.astype(dtype), preferred_element_type=accumulator(dtype))


def dot(x, y, contract, batch=((), ())):
    """`lax.dot_general` of operands of one dtype, accumulated and returned in `accumulator(dtype)`."""
    return lax.dot_general(x, y, (contract, batch), preferred_element_type=accumulator(x.dtype))


def require(condition, operator, message):
    """Raise ValueError naming the operator unless `condition`; shapes are static, so this costs nothing at run time."""
    if not condition:
        raise ValueError(f"npu_bridge.ops.{operator}: {message}")


def require_float(operator, **arrays):
    """Refuse anything but real floating-point arrays, naming the argument."""
    for name, array in arrays.items():
        if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            raise TypeError(
                f"npu_bridge.ops.{operator}: {name} has dtype {jnp.result_type(array)}; a floating-point array is expected. "
                f"Convert it first, for example with {name}.astype(jnp.bfloat16)."
            )


def zero_cotangent(array):
    """The cotangent of an integer or boolean argument, which JAX wants as float0 zeros."""
    import numpy as np

    return np.zeros(jnp.shape(array), jax.dtypes.float0)
