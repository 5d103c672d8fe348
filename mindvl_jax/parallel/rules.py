"""Logical axis names of parameters and activations -> mesh axes; rows of a batch -> mesh axes.

Models name the dims of their parameters ("layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "vocab", ...) and
of their activations ("rows", "tokens", and the same) and know no mesh.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mindvl_jax.core.errors import UserError
from mindvl_jax.parallel.mesh import AXIS_TABLE, ROW_AXES

# Mesh axis of each logical dim; each name has one rule. Dims without a rule are replicated.
RULES: tuple[tuple[str, str], ...] = (
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),
    ("latent", "fsdp"),
    ("experts", "expert"),
)
# Dims of a batch's arrays. Names that stand in no rule stay whole on every device.
BATCH_RULES: dict[str, tuple[str, ...]] = {"rows": ROW_AXES}
# Of activations. `embed` is whole here: parameters are gathered over fsdp for each layer, activations never.
ACTIVATION_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("rows", ROW_AXES),
    # With `columns`: what a table that is split over fsdp yields for all rows of one group of fsdp devices.
    ("outer_rows", tuple(axis for axis in ROW_AXES if axis != "fsdp")),
    ("columns", ("fsdp",)),
    ("places", ("context",)),  # of tokens or patches in a row
    ("norm_places", ("context", "tensor")),  # of the residual stream, where norms are spread over the tensor axis too
    ("experts", ("expert",)),
    ("context_heads", ("tensor", "context")),  # of attention that every device computes over whole rows
    ("vocab", ("tensor",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("mlp", ("tensor",)),
)
STACK = "layers"  # the scanned dim: every device walks through all layers, but for those of pipeline stages
STAGED = "language/layers/"
"""Prefix of the parameters whose layers pipeline stages divide. Towers run before the pipeline, on all its devices."""


def partition_spec(
    names: Sequence[str | None] | None, shape: Sequence[int], mesh: Mesh | AbstractMesh, *, staged: bool = False
) -> PartitionSpec:
    """Mesh axis of each dim of one parameter.

    A dim stays whole when its size is not a multiple of the axis, or when the axis is taken by an earlier dim. Vectors
    (norm scales, biases over `embed`) are not spread over fsdp: gathering them costs more than keeping them.

    Args:
      staged: the layers are divided over pipeline stages.
    """
    if not names:
        return PartitionSpec()
    if len(names) != len(shape):
        raise ValueError(f"a parameter of shape {tuple(shape)} carries {len(names)} axis names {tuple(names)}")
    rules = dict(RULES) | ({STACK: "stage"} if staged else {})
    is_vector = sum(name != STACK for name in names) < 2
    taken: set[str] = set()
    spec: list[str | None] = []
    for name, size in zip(names, shape, strict=True):
        axis = rules.get(name) if name else None
        if axis is None or axis in taken or size % mesh.shape[axis] or (axis == "fsdp" and is_vector):
            spec.append(None)
            continue
        taken.add(axis)
        spec.append(axis)
    return PartitionSpec(*spec)


def activation_spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh, manual: Collection[str] = ()
) -> PartitionSpec:
    """Mesh axes of each dim of an activation.

    A dim whose size is not a multiple of its axes stays whole, as for parameters.

    Args:
      manual: axes of a shard_map around it, over which a value is one device's part already.
    """
    if len(names) != len(shape):
        raise ValueError(f"an activation of shape {tuple(shape)} is given {len(names)} dim names {tuple(names)}")
    rules = dict(ACTIVATION_RULES)

    def axes_of(name: str | None, size: int) -> tuple[str, ...] | None:
        axes = tuple(axis for axis in rules.get(name, ()) if axis not in manual)
        return axes if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None

    return PartitionSpec(*(axes_of(name, size) for name, size in zip(names, shape, strict=True)))


def over_data(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """`spec` with the data axis added, for what no copy of the model needs whole: optimizer state (ZeRO, stage 1).

    It goes to the dim of which a device holds most and that it divides; an array without such a dim stays as it is.
    """
    held = [*spec, *[None] * (len(shape) - len(spec))]
    taken = [() if axes is None else (axes,) if isinstance(axes, str) else tuple(axes) for axes in held]
    own = [size // math.prod(mesh.shape[axis] for axis in axes) for size, axes in zip(shape, taken, strict=True)]
    data = mesh.shape["data"]
    possible = [index for index, size in enumerate(own) if size % data == 0]
    if data == 1 or not possible:
        return spec
    chosen = max(possible, key=lambda index: own[index])
    held[chosen] = (*taken[chosen], "data")
    return PartitionSpec(*held)


def parameter_shardings(
    names: Mapping[str, Sequence[str | None] | None], shapes: Mapping[str, Sequence[int]], mesh: Mesh
) -> dict[str, NamedSharding]:
    """Sharding of every parameter, by path."""
    return {
        path: NamedSharding(mesh, partition_spec(names.get(path), shape, mesh, staged=path.startswith(STAGED)))
        for path, shape in shapes.items()
    }


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Leading dim (rows) over data and fsdp, all else whole: the sharding of an array with rows alone."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def batch_sharding(dims: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Sharding of one array of a batch from the names of its dims, by BATCH_RULES.

    An array without rows is whole everywhere.

    Raises:
      ValueError: `dims` and `shape` differ in length.
    """
    if len(dims) != len(shape):
        raise ValueError(f"an array of shape {tuple(shape)} names {len(dims)} dims {tuple(dims)}")
    spec = [BATCH_RULES.get(dim) if dim else None for dim in dims]
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec))


@dataclasses.dataclass(frozen=True)
class RowShare:
    """Return the global rows that this process feeds: rank `index` of `count`."""

    index: int
    count: int
    rows: int


def row_groups(mesh: Mesh | AbstractMesh) -> int:
    """Groups of devices with rows of their own."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def require_rows(rows: int, mesh: Mesh | AbstractMesh, where: str) -> None:
    """Raise UserError unless `rows` can be spread evenly; `where` names the config key."""
    groups = row_groups(mesh)
    if rows % groups:
        shown = [axis.name for axis in AXIS_TABLE if axis.rows and (axis.always_shown or mesh.shape[axis.name] > 1)]
        axes = " x ".join(f"mesh.{axis}" for axis in shown)
        raise UserError(
            f"{where}={rows} rows cannot be spread over {axes} = {groups}: use a multiple of {groups}, or a smaller "
            "mesh"
        )


def row_share(mesh: Mesh, rows: int, where: str) -> RowShare:
    """The rows that this process's devices hold.

    Processes that share rows (tensor axis across hosts) get the same share.

    Raises:
      UserError: `rows` cannot be spread evenly; `where` names the config key.
    """
    require_rows(rows, mesh, where)
    held = {
        (index[0].start or 0, index[0].stop or rows)
        for device, index in row_sharding(mesh).devices_indices_map((rows,)).items()
        if device.process_index == jax.process_index()
    }
    start, stop = min(low for low, _ in held), max(high for _, high in held)
    own = stop - start
    if sum(high - low for low, high in held) != own or rows % own or start % own:
        raise UserError(
            f"the mesh {dict(mesh.shape)} gives process {jax.process_index()} rows {sorted(held)}, which are "
            f"not one even share of {rows}; "
            "let mesh.tensor divide the devices of a process"
        )
    return RowShare(index=start // own, count=rows // own, rows=own)
