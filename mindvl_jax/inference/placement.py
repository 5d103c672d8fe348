"""Place the arrays of generation: rows over the mesh's row axes, like the rows of a training batch."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mindvl_jax.models.layers.cache import Cache
from mindvl_jax.parallel.mesh import ROW_AXES


def mesh_of(model) -> Mesh | None:
    """Mesh of a model's parameters; None if they are on a single device."""
    for leaf in jax.tree.leaves(nnx.state(model)):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def row_groups(mesh: Mesh | None) -> int:
    """Number of device groups that rows are spread over."""
    return 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in ROW_AXES if axis in mesh.shape]))


def place_rows(mesh, tree, rows: int):
    """Put a pytree whose leaves have `rows` as their leading dim (second in a stacked Cache; scalars have none) onto
    the mesh.

    Rows that do not divide over the mesh are replicated. Without a mesh nothing moves.
    """
    if mesh is None:
        return tree
    axes = ROW_AXES if rows % row_groups(mesh) == 0 else None

    def place(leaf):
        if isinstance(leaf, Cache) and not leaf.unrolled:
            return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(None, axes)))
        if isinstance(leaf, Cache):
            return jax.tree.map(place, leaf)
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(axes) if np.ndim(leaf) else PartitionSpec()))

    return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, Cache))
