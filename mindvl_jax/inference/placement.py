"""Where generation's arrays lie: rows over the mesh's row axes, like the rows of a training batch."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mindvl_jax.inference.programs import KVCache
from mindvl_jax.parallel.mesh import ROW_AXES


def mesh_of(model) -> Mesh | None:
    """The mesh that a model's parameters lie on; None when they lie on a single device."""
    for leaf in jax.tree.leaves(nnx.state(model)):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def place_rows(mesh, tree, rows: int):
    """Puts a pytree whose leaves have `rows` as their leading dim (second in a KVCache) onto the mesh.

    Rows that do not divide over the mesh are kept whole on every device. Without a mesh nothing moves.
    """
    if mesh is None:
        return tree
    groups = int(np.prod([mesh.shape[axis] for axis in ROW_AXES]))
    axes = ROW_AXES if rows % groups == 0 else None

    def place(leaf):
        if isinstance(leaf, KVCache):
            return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(None, axes)))
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(axes)))

    return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, KVCache))
