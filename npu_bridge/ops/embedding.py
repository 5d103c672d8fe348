"""Token embedding with a float32 scatter-add gradient.

B rows, T tokens, V vocabulary, D model width.
"""

import jax
import jax.numpy as jnp

from npu_bridge.jaxcompat import define_operator
from npu_bridge.ops._common import accumulator, require, require_float, zero_cotangent


def embedding(table, ids):
    """Rows of a table.

    Args:
      table: (V, D) float. ids: integers of any shape. An id outside [0, V) yields a row of zeros and receives no
        gradient, which is also what each shard of a vocabulary-sharded table does with the ids of the others.

    Returns:
      ids.shape + (D,) in the table's dtype. Repeated ids add their gradients in float32.
    """
    table, ids = jnp.asarray(table), jnp.asarray(ids)
    require_float("embedding", table=table)
    require(table.ndim == 2, "embedding", f"table has shape {table.shape}; expected (V, D)")
    require(jnp.issubdtype(ids.dtype, jnp.integer), "embedding", f"ids have dtype {ids.dtype}; integers are expected")
    return _embedding(table, ids)


def embedding_forward(table, ids):
    """-> rows."""
    inside = (ids >= 0) & (ids < table.shape[0])
    rows = table.at[jnp.where(inside, ids, 0)].get(mode="promise_in_bounds")
    return jnp.where(inside[..., None], rows, 0)


def embedding_backward(g, ids, *, rows):
    """-> gradient of the table (rows, D) in float32."""
    ids = jnp.where((ids >= 0) & (ids < rows), ids, rows)  # negative ids would wrap; past the end is dropped
    return jnp.zeros((rows, g.shape[-1]), accumulator(g.dtype)).at[ids].add(g.astype(accumulator(g.dtype)), mode="drop")


# The vocabulary is a reduction factor: each shard gathers its own rows (`first` is its first row) and the results are
# summed.
_forward = define_operator(
    "embedding",
    reference=embedding_forward,
    rule="v d, ... -> ... d",
    reduces={0: ("v",)},
    shard_starts={"first": ("operand", 0, 0)},
    results=lambda table, ids: [jax.ShapeDtypeStruct((*ids.shape, table.shape[1]), table.dtype)],
)
_backward = define_operator(
    "embedding_backward",
    reference=embedding_backward,
    rule="... d, ... -> v d",
    reduces={0: ("...",)},
    shard_starts={"first": ("result", 0, 0)},
    local_sizes={"rows": ("result", 0, 0)},
    results=lambda g, ids, rows: [jax.ShapeDtypeStruct((rows, g.shape[-1]), accumulator(g.dtype))],
)


@jax.custom_vjp
def _embedding(table, ids):
    return _forward(table, ids)[0]


def _embedding_fwd(table, ids):
    return _forward(table, ids)[0], (ids, jnp.zeros((table.shape[0], 0), table.dtype))


def _embedding_bwd(res, g):
    ids, like_table = res
    return _backward(g, ids, rows=like_table.shape[0])[0].astype(like_table.dtype), zero_cotangent(ids)


_embedding.defvjp(_embedding_fwd, _embedding_bwd)
