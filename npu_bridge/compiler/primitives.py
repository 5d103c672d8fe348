"""Own lowerings of JAX primitives for platform ``npu``.

Most primitives keep JAX's default StableHLO. These do not, for one of three reasons: the default is a CHLO operation
that Shardy partitions wrongly silently (``top_k``), a region that cannot be reduced across shards (``argmax``,
``sort``), or a composition far slower than torch's operator (``cumsum`` as a reduce_window, threefry as 300 integer
operations). Each becomes a custom call ``npu_bridge.math.<name>`` with a sharding rule; `npu_bridge.runtime.math` holds
what it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from npu_bridge import jaxcompat
from npu_bridge.compiler import callbacks, linear_algebra
from npu_bridge.ops import moe


def _dims(rank: int, changed: Sequence[int] = (), prefix: str = "d") -> str:
    """``d0 d1 r2``: one factor per dimension; those in `changed` are replicated and get the letter r."""
    return " ".join(f"r{i}" if i in changed else f"{prefix}{i}" for i in range(rank))


def _unsigned(aval: Any) -> bool:
    """Whether the runtime stores the dtype as signed bits, so that comparisons need care."""
    return str(aval.dtype) in ("uint16", "uint32", "uint64")


def _stored(aval: Any) -> str:
    """torch's name of the type that an array is kept in: an unsigned integer wider than a byte as signed bits."""
    return str(aval.dtype).removeprefix("u") if _unsigned(aval) else str(aval.dtype)


def _along(axis: int, operands: Sequence[ir.Value], rank: int) -> str:
    one = _dims(rank, (axis,))
    return ", ".join([one] * len(operands))


def _cumulative(name: str):
    def lower(ctx: Any, x: ir.Value, *, axis: int, reverse: bool):
        rank = len(ctx.avals_in[0].shape)
        rule = f"{_dims(rank, (axis,))} -> {_dims(rank, (axis,))}"
        params = {"axis": int(axis), "reverse": bool(reverse)}
        if name in ("cummax", "cummin"):
            params["unsigned"] = _unsigned(ctx.avals_in[0])
        return jaxcompat.custom_call_with_rule(
            ctx, f"math.{name}", [x], ctx.avals_out, rule, params, replicate=[f"r{axis}"]
        )

    return lower


def _argument_of_extreme(name: str):
    def lower(ctx: Any, x: ir.Value, *, axes: Sequence[int], index_dtype: Any):
        (axis,) = axes
        rank = len(ctx.avals_in[0].shape)
        rest = " ".join(f"d{i}" for i in range(rank) if i != axis)
        rule = f"{_dims(rank, (axis,))} -> {rest}"
        params = {"axis": int(axis), "unsigned": _unsigned(ctx.avals_in[0]), "dtype": _stored(ctx.avals_out[0])}
        return jaxcompat.custom_call_with_rule(
            ctx, f"math.{name}", [x], ctx.avals_out, rule, params, replicate=[f"r{axis}"]
        )

    return lower


def _top_k(ctx: Any, x: ir.Value, *, k: int, **other: Any):
    rank = len(ctx.avals_in[0].shape)
    axis = int(other.get("axis", other.get("operand_axis", rank - 1))) % rank
    lead = " ".join("k" if i == axis else f"d{i}" for i in range(rank))
    rule = f"{_dims(rank, (axis,))} -> {lead}, {lead}"
    params = {"k": int(k), "axis": axis, "unsigned": _unsigned(ctx.avals_in[0])}
    return jaxcompat.custom_call_with_rule(
        ctx, "math.top_k", [x], ctx.avals_out, rule, params, replicate=[f"r{axis}", "k"]
    )


def _approximate_top_k(x: Any, *, k: int, reduction_dimension: int, is_max_k: bool, **options: Any) -> Sequence[Any]:
    """Compute the exact answer, which satisfies any recall target."""
    if is_max_k:
        return lax.top_k(x, k, axis=reduction_dimension)
    values, indices = lax.top_k(-x, k, axis=reduction_dimension)
    return -values, indices


def _ragged_dot(lhs: Any, rhs: Any, sizes: Any, **params: Any) -> Any:
    """Lower `jax.lax.ragged_dot` and its gradients to grouped products; JAX's own form is E dense products with a mask.

    Other layouts (batch dims) keep JAX's form.
    """
    numbers = params["ragged_dot_dimension_numbers"]
    (lhs_contract, rhs_contract), (lhs_batch, _) = numbers.dot_dimension_numbers
    form = tuple(lhs_contract), tuple(rhs_contract), tuple(numbers.rhs_group_dimensions)
    product = _GROUPED.get(form) if tuple(numbers.lhs_ragged_dimensions) == (0,) and not lhs_batch else None
    fits = lhs.ndim == 2 and sizes.ndim == 1 and lhs.dtype == rhs.dtype and jnp.issubdtype(lhs.dtype, jnp.floating)
    if product is None or not fits or rhs.ndim != 3 - (not form[2]):
        return [jaxcompat.ragged_dot_reference()(lhs, rhs, sizes, **params)]
    dtype = jnp.dtype(params.get("preferred_element_type") or lhs.dtype)
    wide = jnp.promote_types(lhs.dtype, dtype)  # kernels round to the dtype of their operands
    return [product(lhs.astype(wide), rhs.astype(wide), sizes).astype(dtype)]


# By the contracted dims of both operands and the group dims of the second.
_GROUPED = {
    ((1,), (1,), (0,)): moe.grouped_product,
    ((1,), (2,), (0,)): moe.grouped_product_transposed,
    ((0,), (0,), ()): moe.grouped_weight_product,
}


def _sort(ctx: Any, *operands: ir.Value, dimension: int, is_stable: bool, num_keys: int):
    rule = (
        f"{_along(dimension, operands, len(ctx.avals_in[0].shape))} -> "
        f"{_along(dimension, operands, len(ctx.avals_in[0].shape))}"
    )
    unsigned = tuple(_unsigned(a) for a in ctx.avals_in[:num_keys])
    params = {"axis": int(dimension), "keys": int(num_keys), "unsigned": unsigned}
    return jaxcompat.custom_call_with_rule(
        ctx, "math.sort", operands, ctx.avals_out, rule, params, replicate=[f"r{dimension}"]
    )


def _threefry(ctx: Any, *operands: ir.Value):
    shape = ctx.avals_out[0].shape
    full = _dims(len(shape))
    replicate: list[str] = []

    def dims(number: int, operand: tuple[int, ...]) -> str:
        if len(operand) != len(shape):
            return ""
        # A key per row (vmap) has unit dimensions that broadcast over the counters.
        names = [f"d{d}" if size == shape[d] else f"e{number}x{d}" for d, size in enumerate(operand)]
        replicate.extend(name for name in names if name.startswith("e"))
        return " ".join(names)

    rule = ", ".join(dims(number, a.shape) for number, a in enumerate(ctx.avals_in)) + f" -> {full}, {full}"
    return jaxcompat.custom_call_with_rule(
        ctx, "math.threefry2x32", operands, ctx.avals_out, rule, {}, replicate=replicate
    )


def _device_put(ctx: Any, *operands: ir.Value, devices: Sequence[Any], **_: Any) -> Sequence[ir.Value]:
    """Write down a move to another memory space; JAX's own lowering for other platforms leaves it out."""
    placed = []
    for x, was, now in zip(operands, ctx.avals_in, ctx.avals_out):
        memory = "host" if jaxcompat.in_host_memory(now) else "device"
        if jaxcompat.in_host_memory(was) != (memory == "host"):
            dims = _dims(len(was.shape))
            (x,) = jaxcompat.custom_call_with_rule(
                ctx, _PLACE, [x], [now], f"{dims} -> {dims}", {"memory": memory}
            )  # fmt: skip
        placed.append(x)
    return placed


_PLACE = "memory.place"
PLACE_TARGET = jaxcompat.CALL_PREFIX + _PLACE


def register() -> None:
    """Register the lowerings; calling it again changes nothing."""
    if getattr(register, "done", False):
        return
    register.done = True
    table = jaxcompat.register_platform_lowering
    # jax lowers it to 1 / (1 + exp(-x)) on unknown platforms: five operations and a slower gradient.
    table(lax.logistic_p, lambda ctx, x, **_: [stablehlo.logistic(x)])
    table(lax.square_p, jaxcompat.lower_with(lambda x: [lax.mul(x, x)]))
    for name, primitive in (
        ("cumsum", lax.cumsum_p),
        ("cumprod", lax.cumprod_p),
        ("cummax", lax.cummax_p),
        ("cummin", lax.cummin_p),
        ("cumlogsumexp", lax.cumlogsumexp_p),
    ):
        table(primitive, _cumulative(name))
    table(jaxcompat.device_put_primitive(), _device_put)
    table(lax.argmax_p, _argument_of_extreme("argmax"))
    table(lax.argmin_p, _argument_of_extreme("argmin"))
    table(lax.top_k_p, _top_k)
    table(lax.sort_p, _sort)
    table(jaxcompat.approximate_top_k_primitive(), jaxcompat.lower_with(_approximate_top_k))
    table(jaxcompat.threefry_primitive(), _threefry)
    table(jaxcompat.ragged_dot_primitive(), jaxcompat.lower_with(_ragged_dot))
    table(jaxcompat.call_exported_primitive(), jaxcompat.lower_exported)
    for primitive, lower in callbacks.lowerings().items():
        table(primitive, lower)
    for name, lower in linear_algebra.LOWERINGS.items():
        table(jaxcompat.linear_algebra_primitive(name), lower)
