"""Activation sharding: models name logical dims, a step installs the constraints for its mesh.

XLA decides by itself which operand of a product to exchange. Told nothing, it gathers the batch over fsdp and keeps the
weights split (Qwen2.5-VL-7B on 8 x H100: activations summed in every layer, 49.6 GiB of temporaries in place of 30.0).
With rows constrained it gathers weights and scatters their gradients, which is what fsdp means.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mindvl_jax.config.schema import ParallelConfig
from mindvl_jax.parallel.mesh import AXES, FSDP, ROW_AXES
from mindvl_jax.parallel.rules import activation_spec, partition_spec

DEFAULT = ParallelConfig()


@dataclasses.dataclass(frozen=True)
class Placement:
    """Tracing context of a program.

    Attributes:
      mesh: devices behind it are not needed.
      parallel: how its axes are used.
      attention: form of attention on XLA, see `npu_bridge.ops.attention`.
      manual: compute attention and the loss inside a shard_map: XLA cannot partition kernels, and sums the gradient of
        the head over all rows in each chunk of the loss. The bridge partitions its own operators.
    """

    mesh: Mesh | AbstractMesh
    parallel: ParallelConfig = DEFAULT
    attention: str = "auto"
    manual: bool = True


_PLACEMENT: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement", default=None)


@contextlib.contextmanager
def placed(placement: Placement) -> Iterator[None]:
    """Trace what stands inside for this placement."""
    token = _PLACEMENT.set(placement)
    try:
        yield
    finally:
        _PLACEMENT.reset(token)


def current() -> Placement | None:
    """Return the placement being traced for, or None where nothing has to be placed (none given, or one device)."""
    placement = _PLACEMENT.get()
    return None if placement is None or placement.mesh.size == 1 else placement


def tracing(function: Callable, placement: Placement) -> Callable:
    """`function`, traced for this placement wherever that happens."""

    @functools.wraps(function)
    def traced(*args, **keywords):
        with placed(placement):
            return function(*args, **keywords)

    return traced


def places_are_spread() -> bool:
    """Whether the places of a row lie on several devices."""
    placement = current()
    return placement is not None and placement.mesh.shape["context"] > 1


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` with its dims on the mesh axes that the rules give to `names`; `x` itself where no mesh of several devices is
    installed.

    A dim whose name has no rule is whole on every device, so every dim is said. Gradients get the same constraint.
    """
    placement = current()
    if placement is None:
        return x
    ambient = jax.sharding.get_abstract_mesh()
    if not placement.parallel.sequence_norms:
        names = ["places" if name == "norm_places" else name for name in names]
    spec = activation_spec(names, x.shape, placement.mesh, ambient.manual_axes)
    return jax.lax.with_sharding_constraint(x, NamedSharding(placement.mesh, spec) if ambient.empty else spec)


def constrain_rows(x: jax.Array) -> jax.Array:
    """`constrain` for (rows, places, width): the residual stream."""
    return constrain(x, *_names(x, "norm_places"))


def constrain_whole(x: jax.Array) -> jax.Array:
    """The residual stream, or a norm of it, as the blocks read it: gathered over the tensor axis where norms are spread
    over it, else as it lies.
    """
    placement = current()
    return x if placement is None or not placement.parallel.sequence_norms else _whole_places(x)


@jax.custom_vjp
def _whole_places(x: jax.Array) -> jax.Array:
    return constrain(x, *_names(x, "places"))


# Its gradient is scattered at once: constrained as the value, it would be summed whole and then cut.
_whole_places.defvjp(lambda x: (_whole_places(x), None), lambda _, g: (constrain(g, *_names(g, "norm_places")),))


def constrain_features(y: jax.Array, features: str | None) -> jax.Array:
    """The result of a product, (.., F): what adds to the residual stream lies like it."""
    if y.ndim < 2:
        return y
    placement = current()
    if features == "embed" and placement is not None and placement.parallel.sequence_norms:
        return _scattered(y)
    return constrain(y, *_names(y, "norm_places" if features == "embed" else "places", features))


@jax.custom_vjp
def _scattered(y: jax.Array) -> jax.Array:
    return constrain(y, *_names(y, "norm_places", "embed"))


# The product's gradients read it whole: gathered once, not each in a layout of its own.
_scattered.defvjp(lambda y: (_scattered(y), None), lambda _, g: (constrain(g, *_names(g, "places", "embed")),))


def _names(x: jax.Array, places: str, features: str | None = None) -> list[str | None]:
    """Dims of (rows, places, .., features), or of (rows, features)."""
    return ["rows", features] if x.ndim == 2 else ["rows", places, *[None] * (x.ndim - 3), features]


def exchange_rows(x: jax.Array) -> jax.Array:
    """(rows, tokens, embed) that was read from a table whose columns are split over fsdp, as the residual stream.

    Rows and columns swap sharding in one all_to_all, and back in another for the gradient: the table is never gathered,
    nor its gradient whole on a device.
    """
    return constrain_rows(constrain(x, "outer_rows", "places", "columns"))


def within_rows(
    function: Callable[..., jax.Array],
    rows: Sequence[jax.Array],
    whole: Sequence[jax.Array],
    names: Sequence[Sequence[str | None]],
) -> jax.Array:
    """`function(*rows, *whole)` where devices of different rows work apart: what is summed over rows in the gradient of
    `whole` is summed on each device first and exchanged once, however many rounds a loop inside takes.

    Args:
      rows: arrays (rows, places, ..); the result lies as the last of them. whole: parameters, which the function
        reads in the dtype of the first of `rows`: without tensor parallelism they are gathered in it, and their
        gradients scattered in their own.
      names: dims of each of `whole`, as parameters name them.
    """
    placement = current()
    if placement is None or not placement.manual:
        return function(*rows, *whole)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    own = tuple(axis for axis in (*ROW_AXES, "context") if placement.mesh.shape[axis] > 1 and axis not in manual)
    if not own:  # devices share the rows; XLA cannot sum over groups of one device
        return function(*rows, *whole)
    split = [_fsdp_dim(name, x.shape, placement.mesh) for x, name in zip(whole, names, strict=True)]

    def gathering(*arrays):
        held, parts = arrays[: len(rows)], arrays[len(rows) :]
        gathered = (x if dim is None else _gathered(x, dim, rows[0].dtype) for x, dim in zip(parts, split, strict=True))
        return function(*held, *gathered)

    placed = [("rows", "places", *[None] * (x.ndim - 2)) for x in rows]
    placed += [["columns" if d == dim else None for d in range(x.ndim)] for x, dim in zip(whole, split, strict=True)]
    return manually(gathering, [*rows, *whole], placed, len(rows) - 1, placement, axes=own)


def _fsdp_dim(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> int | None:
    """The dim of a parameter that lies on fsdp and is gathered inside of a shard_map over rows; None: it is gathered
    before. With tensor parallelism always before: an explicit gather would take what lies on tensor too.
    """
    spec = partition_spec(names, shape, mesh)
    return spec.index(FSDP) if FSDP in spec and mesh.shape[FSDP] > 1 and mesh.shape["tensor"] == 1 else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(shard: jax.Array, dim: int, dtype: jnp.dtype) -> jax.Array:
    """The whole of a parameter whose dim is split over fsdp, rounded to `dtype` before it moves and in its own dtype
    after: its gradient keeps the precision that the function sums it in, and each device gets its part of the sum.
    """
    return jax.lax.all_gather(shard.astype(dtype), FSDP, axis=dim, tiled=True).astype(shard.dtype)


_gathered.defvjp(
    lambda shard, dim, dtype: (_gathered(shard, dim, dtype), None),
    lambda dim, dtype, _, gradient: (jax.lax.psum_scatter(gradient, FSDP, scatter_dimension=dim, tiled=True),),
)


def manually(
    function: Callable,
    arrays: Sequence[jax.Array],
    names: Sequence[Sequence[str | None]],
    like: int | Sequence[tuple[Sequence[str | None], tuple[int, ...]]],
    placement: Placement,
    axes: Sequence[str] = AXES,
) -> Any:
    """`function` of each device's own part of the arrays over these axes of the mesh.

    Args:
      names: dims of each array, as for `constrain`.
      like: number of the array that the result lies as; or of each of several results the names and sizes of its dims.
    """
    ambient = jax.sharding.get_abstract_mesh()
    others = {*placement.mesh.axis_names} - {*axes} | {*ambient.manual_axes}

    idle = [axis for axis in axes if placement.mesh.shape[axis] == 1 and axis not in others]

    def spec(names, shape):
        """Idle axes are named with the first dim: over an axis that is not named the gradient would be summed, which
        XLA keeps as a sum over groups of one device.
        """
        found = activation_spec(names, shape, placement.mesh, others)
        dims = [(dim,) if isinstance(dim, str) else tuple(dim or ()) for dim in found]
        if dims:
            dims[0] += tuple(axis for axis in idle if not any(axis in dim for dim in dims))
        return PartitionSpec(*(dim or None for dim in dims))

    specs = tuple(spec(name, x.shape) for x, name in zip(arrays, names, strict=True))
    mapped = jax.shard_map(
        function,
        mesh=placement.mesh if ambient.empty else ambient,
        in_specs=specs,
        out_specs=specs[like] if isinstance(like, int) else tuple(spec(*result) for result in like),
        axis_names={*axes} - {*ambient.manual_axes},
        check_vma=False,
    )
    return mapped(*arrays)
