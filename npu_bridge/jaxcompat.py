"""All private JAX interfaces that the bridge uses, pinned by version. Nothing else imports ``jax._src``.

Tested with the versions in `TESTED`, read in the source of those in `READ`. `require_tested_version` refuses others,
because a silent change of a private interface is worse than a missing one. No torch here: the XLA path imports this
module.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.export
from jax._src import (
    callback,
    core,
    debugging,
    dispatch,
    effects,
    shard_map,
    sharding_impls,
    source_info_util,
    xla_bridge,
)
from jax._src import util as jax_util
from jax._src.export import _export
from jax._src.interpreters import batching, mlir
from jaxlib.mlir import ir

from npu_bridge.errors import VersionError
from npu_bridge.sharding_rule import ShardingRule

xla_jit = jax.jit  # jax's own, even while `npu_bridge.use` replaces `jax.jit`
TESTED = ("0.10.2",)  # the tests ran with these
READ = ("0.11.2",)  # names and signatures were checked in these sources; no test ran with them
PLATFORM = "npu"
CALL_PREFIX = "npu_bridge."

# Operations inside an operator get the source line of its caller.
for _path in (__file__, str(pathlib.Path(__file__).parent / "ops") + os.sep):
    source_info_util.register_exclusion(_path)

# The platform needs a name for `lower(lowering_platforms=("npu",))`; it never makes a backend.
xla_bridge.register_backend_factory(PLATFORM, lambda: None, priority=-1000, fail_quietly=True)
if PLATFORM not in mlir._platforms_with_donation:
    mlir._platforms_with_donation.append(PLATFORM)


@functools.cache
def require_tested_version(version: str | None = None) -> None:
    """Raise VersionError unless jax's version is in `TESTED` or `READ`; warn once for the latter."""
    version = version or jax.__version__
    if version in READ:
        warnings.warn(
            f"npu_bridge: jax {version} found. The private interfaces that the bridge uses were looked up in "
            f"it, the tests ran with {', '.join(TESTED)} only",
            stacklevel=3,
        )
    elif version not in TESTED:
        raise VersionError(
            f"npu_bridge: jax {version} found, tested with {', '.join(TESTED)} and looked up in {', '.join(READ)}. "
            "The bridge uses private JAX interfaces (npu_bridge/jaxcompat.py) that may have changed. "
            "Install a tested version, or run tests/bridge and add yours to TESTED."
        )


# ---- MLIR
# -------------------------------------------------------------------------------------------------------------


_TAKES_CONTEXT = len(inspect.signature(mlir.aval_to_ir_type).parameters) > 1  # an argument that 0.10 added


def _ir_type(ctx: Any, aval: core.AbstractValue) -> ir.Type:
    return mlir.aval_to_ir_type(ctx.module_context, aval) if _TAKES_CONTEXT else mlir.aval_to_ir_type(aval)


def kept_arguments(lowered: jax.stages.Lowered) -> list[int]:
    """Positions of the flat arguments that survive in the lowered module (jit drops unused ones)."""
    return sorted(lowered._lowering.compile_args["kept_var_idx"])


def custom_call_with_rule(
    ctx: Any,
    name: str,
    operands: Sequence[ir.Value],
    result_avals: Sequence[core.AbstractValue],
    rule: str | ShardingRule,
    params: Mapping[str, Any],
    *,
    reduces: Mapping[int, Sequence[str]] | None = None,
    replicate: Sequence[str] = (),
    permutation: Sequence[str] = (),
    sizes: Mapping[str, int] | None = None,
) -> list[ir.Value]:
    """Emit ``stablehlo.custom_call @npu_bridge.<name>`` with a sharding rule and ``bridge.params``.

    `reduces` maps a result to the factors that are summed into it. Shardy has no reduction factors per result, so
    results with different reductions become several custom calls on the same operands, each a *part*; the importer
    merges the parts back into one kernel call.
    """
    fitted = (
        rule
        if isinstance(rule, ShardingRule)
        else ShardingRule.fit(
            rule, [ir.ShapedType(o.type).shape for o in operands], [a.shape for a in result_avals], sizes
        )
    )
    unknown = [
        f
        for f in (*replicate, *permutation, *(f for fs in (reduces or {}).values() for f in fs))
        if f not in fitted.sizes
    ]
    if unknown:
        raise ValueError(f"operator {name!r}: factors {unknown} are not in its rule {rule!r}")
    parts: dict[tuple[str, ...], list[int]] = {}
    for i in range(len(result_avals)):
        parts.setdefault(tuple(sorted((reduces or {}).get(i, ()))), []).append(i)
    results: list[ir.Value | None] = [None] * len(result_avals)
    for reduction, members in parts.items():
        types = [_ir_type(ctx, result_avals[i]) for i in members]
        call = mlir.custom_call(
            CALL_PREFIX + name, result_types=types, operands=list(operands), backend_config={}, api_version=4
        )
        record = {"params": dict(params), "part": members, "results": len(result_avals)}
        call.attributes["bridge.params"] = ir.StringAttr.get(repr(record))
        text = fitted.select_results(members).as_attribute(reduction, replicate, permutation)
        call.attributes["sdy.sharding_rule"] = ir.Attribute.parse(text)
        for i, value in zip(members, call.results):
            results[i] = value
    return results


def whole_custom_call(
    ctx: Any,
    target: str,
    operands: Sequence[ir.Value],
    result_avals: Sequence[core.AbstractValue],
    record: Mapping[str, Any],
    *,
    has_side_effect: bool,
) -> list[ir.Value]:
    """Emit a custom call whose operands and results are whole on every device.

    A call without results gets a dummy result, because Shardy reshards operands by the shardings of results.
    """
    types = [_ir_type(ctx, a) for a in result_avals] or [ir.RankedTensorType.get([], ir.IntegerType.get_signless(32))]
    call = mlir.custom_call(
        target,
        result_types=types,
        operands=list(operands),
        has_side_effect=has_side_effect,
        backend_config={},
        api_version=4,
    )
    call.attributes["bridge.params"] = ir.StringAttr.get(repr(dict(record)))
    sides, sizes = [], {}
    for kind, values in (("i", operands), ("o", call.results)):
        shapes = [ir.RankedTensorType(v.type).shape for v in values]
        sides.append(tuple(tuple((f"{kind}{n}x{d}",) for d in range(len(s))) for n, s in enumerate(shapes)))
        sizes |= {f"{kind}{n}x{d}": size for n, s in enumerate(shapes) for d, size in enumerate(s)}
    if operands:
        rule = ShardingRule(*sides, sizes)
        call.attributes["sdy.sharding_rule"] = ir.Attribute.parse(rule.as_attribute([], list(sizes)))
    return list(call.results)[: len(result_avals)]


def register_platform_lowering(primitive: core.Primitive, rule: Callable[..., Sequence[ir.Value]]) -> None:
    """Register a lowering of a primitive for platform ``npu``; other platforms are untouched."""
    mlir.register_lowering(primitive, rule, platform=PLATFORM)


def device_put_primitive() -> core.Primitive:
    return dispatch.device_put_p


def in_host_memory(aval: Any) -> bool:
    """Whether an abstract value lies in the host's memory (`jax.memory.Space.Host`)."""
    return getattr(getattr(aval, "memory_space", None), "name", "") == "Host"


def lower_with(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a lowering rule that traces `function` (JAX code with the primitive's parameters as keywords)."""
    return mlir.lower_fun(function, multiple_results=True)


# ---- operators
# ----------------------------------------------------------------------------------------------------------


def _is_literal(value: Any) -> bool:
    """Whether `repr(value)` is a Python literal that evaluates to `value`."""
    if type(value) in (int, str, bool, type(None)):
        return True
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is tuple:
        return all(map(_is_literal, value))
    try:
        hash(value)  # JAX caches traces by parameters, so they must be hashable
        return bool(ast.literal_eval(repr(value)) == value)
    except (TypeError, ValueError, SyntaxError):
        return False


def _check_static(name: str, params: Mapping[str, Any]) -> None:
    for key, value in params.items():
        if not _is_literal(value):
            raise TypeError(
                f"operator {name!r}: parameter {key!r} is {value!r} ({type(value).__name__}); static "
                "parameters must be plain "
                "Python literals (int, float, str, bool, None and tuples of them), arrays go in as operands"
            )


def _named_factors(names: Sequence[str], present: Mapping[str, int]) -> list[str]:
    """``...`` stands for every leading factor; a rule that depends on ranks may leave a factor out."""
    leading = [f for f in present if f.startswith("batch") and f[5:].isdigit()] if "..." in names else []
    return leading + [f for f in names if f in present]


@jax_util.cache(trace_context_in_key=lambda: jax.config.jax_enable_x64)
def result_shapes(
    function: Callable[..., tuple[jax.Array, ...]],
    operands: tuple[tuple[Any, Any], ...],
    params: tuple[tuple[str, Any], ...],
):
    """Cache result shapes: tracing a reference takes 10 ms, and JAX asks again in each pass (linearisation, remat,
    transposition). `jax.clear_caches` empties this cache as well. Of JAX's settings only
    x64 changes a shape or a dtype.
    """
    return jax.eval_shape(
        partial(function, **dict(params)), *(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in operands)
    )


def _result_types(
    function: Callable[..., tuple[jax.Array, ...]],
    told: Callable[..., Sequence[Any]] | None,
    *avals: core.ShapedArray,
    **params: Any,
) -> list[core.ShapedArray]:
    shapes = (
        result_shapes(function, tuple((a.shape, a.dtype) for a in avals), tuple(params.items()))
        if told is None
        else told(*avals, **params)
    )
    varying = frozenset().union(*(a.manual_axis_type.varying for a in avals))
    if not varying:
        return [core.ShapedArray(s.shape, s.dtype) for s in shapes]
    # Inside a shard_map that checks it, a result varies over every manual axis that an operand varies over.
    axes = core.ManualAxisType(varying=varying)

    def whole(s):
        return core.get_cur_mesh_sharding(jax.sharding.PartitionSpec(*[None] * len(s.shape)))

    return [core.ShapedArray(s.shape, s.dtype, sharding=whole(s), manual_axis_type=axes) for s in shapes]


def single_device_function(
    name: str,
    general: Callable[..., tuple[jax.Array, ...]],
    one_device: Callable[..., tuple[jax.Array, ...]],
    *,
    platforms: Sequence[str] | None = None,
    results: Callable[..., Sequence[Any]] | None = None,
) -> Callable[..., tuple[jax.Array, ...]]:
    """Return a function that programs of one XLA device compute by `one_device`, all others by `general`.

    Work that depends on data (sorting, loops of unknown length) is cheap on one device. Over several devices it would
    exchange data, and through the bridge wait for the host.

    Args:
      general: ``(*arrays, **params) -> tuple``: programs over several devices, inside a shard_map, and platform
        ``npu``.
      one_device: the same results from the same arguments, for programs of one device.
      platforms: of that device; None for every platform of XLA.
      results: as for `define_operator`.

    Returns ``function(*arrays, **params) -> tuple``, without a derivative: use it inside a `jax.custom_vjp`.
    """
    primitive = core.Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(partial(dispatch.apply_primitive, primitive))
    primitive.def_abstract_eval(partial(_result_types, general, results))

    def lower(ctx: Any, *operands: ir.Value, **params: Any) -> Sequence[ir.Value]:
        where = ctx.module_context.axis_context
        is_single = isinstance(where, sharding_impls.ShardingContext) and where.num_devices == 1
        return mlir.lower_fun(one_device if is_single else general, multiple_results=True)(ctx, *operands, **params)

    for platform in platforms or (None,):
        mlir.register_lowering(primitive, lower, platform=platform)
    if platforms:
        mlir.register_lowering(primitive, lower_with(general))
    register_platform_lowering(primitive, lower_with(general))

    def batching_rule(args: Sequence[jax.Array], dims: Sequence[int | None], **params: Any):
        results = jax.vmap(partial(general, **params), in_axes=tuple(dims))(*args)
        return results, (0,) * len(results)

    batching.primitive_batchers[primitive] = batching_rule
    return partial(_bind_all, primitive)


XLA_PLATFORMS = ("cpu", "tpu", "cuda", "rocm")


def chosen_function(
    name: str,
    general: Callable[..., tuple[jax.Array, ...]],
    choose: Callable[..., Callable[..., tuple[jax.Array, ...]]],
    *,
    results: Callable[..., Sequence[Any]] | None = None,
) -> Callable[..., tuple[jax.Array, ...]]:
    """Return a function whose implementation is chosen at lowering, by platform and by whether its operands are local.

    Args:
      general: ``(*arrays, **params) -> tuple``: used for platform ``npu``, vmap and result shapes.
      choose: ``(platform, local, *avals, **params) -> function`` with the same results from the same arguments.
        `platform` is XLA's name. `local`: operands are whole on the computing device (a program of one device, or a
        shard_map over all mesh axes); otherwise XLA partitions the chosen function.
      results: as for `define_operator`.

    Returns ``function(*arrays, **params) -> tuple``, without a derivative: use it inside a `jax.custom_vjp`.
    """
    primitive = core.Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(partial(dispatch.apply_primitive, primitive))
    primitive.def_abstract_eval(partial(_result_types, general, results))

    def lowering(platform: str) -> Callable[..., Sequence[ir.Value]]:
        def lower(ctx: Any, *operands: ir.Value, **params: Any) -> Sequence[ir.Value]:
            function = choose(platform, is_local(ctx.module_context.axis_context), *ctx.avals_in, **params)
            return mlir.lower_fun(function, multiple_results=True)(ctx, *operands, **params)

        return lower

    for platform in XLA_PLATFORMS:
        mlir.register_lowering(primitive, lowering(platform), platform=platform)
    mlir.register_lowering(primitive, lower_with(general))
    register_platform_lowering(primitive, lower_with(general))

    def batching_rule(args: Sequence[jax.Array], dims: Sequence[int | None], **params: Any):
        results = jax.vmap(partial(general, **params), in_axes=tuple(dims))(*args)
        return results, (0,) * len(results)

    batching.primitive_batchers[primitive] = batching_rule
    return partial(_bind_all, primitive)


def is_local(axis_context: Any) -> bool:
    """Whether arrays of a program lowered in this context are whole on one device."""
    if isinstance(axis_context, sharding_impls.ShardingContext):
        return axis_context.num_devices == 1
    return isinstance(axis_context, sharding_impls.SPMDAxisContext) and axis_context.manual_axes == frozenset(
        axis_context.mesh.axis_names
    )


def _bind_all(primitive: core.Primitive, *args: jax.Array, **params: Any) -> tuple[jax.Array, ...]:
    return tuple(primitive.bind(*args, **params))


def define_operator(
    name: str,
    *,
    reference: Callable[..., Any],
    rule: str | Callable[..., str],
    results: Callable[..., Sequence[Any]] | None = None,
    reduces: Mapping[int, Sequence[str]] | None = None,
    replicate: Sequence[str] = (),
    sizes: Mapping[str, int] | Callable[..., Mapping[str, int]] | None = None,
    shard_starts: Mapping[str, tuple[str, int, int]] | None = None,
    local_sizes: Mapping[str, tuple[str, int, int]] | None = None,
    host_operands: Sequence[int] = (),
    inplace: Mapping[int, int] | None = None,
    reference_only: Sequence[str] = (),
    batch: Callable[..., Any] | None = None,
) -> Callable[..., tuple[jax.Array, ...]]:
    """Define a fused operator: its reference on XLA, one custom call with a sharding rule on platform ``npu``.

    Returns ``op(*arrays, **params) -> tuple of arrays`` (always a tuple). It works under jit, scan, remat, vmap,
    shard_map and eval_shape. In a shard_map that checks varying axes, give operands that are whole on each device to
    `jax.lax.pcast` first, so that their gradients are summed over the axes. It has no derivative of its own: wrap it in
    `jax.custom_vjp` with a gradient operator.

    Args:
      name: unique; the custom call and the kernel table entry are ``npu_bridge.<name>``.
      reference: JAX function ``(*arrays, **params)`` returning an array or a tuple of arrays.
      rule: einsum-like sharding rule (see `npu_bridge.sharding_rule`), or a function
        ``(operand_avals, result_avals, **params) -> str`` when it depends on ranks or parameters.
      results: function ``(*operands, **params)`` from shapes and dtypes to those of the results. Without it the
      reference is traced, 10 ms for each new set of shapes.
      reduces: for a result number, the factors whose shards are summed into it (a weight gradient sums over rows);
        ``"..."`` stands for all leading factors of the rule.
      replicate: factors that must not be sharded.
      sizes: sizes of factors that no whole dimension shows (heads per group), or a function like `rule`'s.
      shard_starts: keyword the kernel receives (not the reference) -> ("operand" | "result", number, dim): index of the
        first element of this shard along that dimension, a host int.
      local_sizes: parameter -> ("operand" | "result", number, dim): its value is replaced by this shard's size.
      host_operands: operands the kernel wants on the host (cumulative lengths). Inputs used only so never leave it.
      inplace: result number -> operand number whose storage the kernel may overwrite; the kernel receives
        ``inplace=True`` when all of them are free, else False.
      reference_only: parameters that the reference takes and the kernel does not.
      batch: batching rule ``(arrays, dims, **params) -> (results, dims)``; without one, vmap uses the reference.

    Raises TypeError for parameters that are not literals, RuleError (at lowering) for a rule that does not fit.
    """
    primitive = core.Primitive(CALL_PREFIX + name)
    primitive.multiple_results = True
    primitive.def_impl(partial(dispatch.apply_primitive, primitive))

    def as_tuple(*args: jax.Array, **params: Any) -> tuple[jax.Array, ...]:
        out = reference(*args, **params)
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)

    primitive.def_abstract_eval(partial(_result_types, as_tuple, results))
    mlir.register_lowering(primitive, mlir.lower_fun(as_tuple, multiple_results=True))

    static = {
        "shard_starts": dict(shard_starts or {}),
        "local_sizes": dict(local_sizes or {}),
        "host_operands": tuple(host_operands),
        "inplace": dict(inplace or {}),
        "results": results,
    }
    OPERATORS[CALL_PREFIX + name] = static

    def lower_npu(ctx: Any, *operands: ir.Value, **params: Any) -> list[ir.Value]:
        text = rule if isinstance(rule, str) else rule(ctx.avals_in, ctx.avals_out, **params)
        factor_sizes = sizes(ctx.avals_in, ctx.avals_out, **params) if callable(sizes) else sizes
        fitted = ShardingRule.fit(text, [a.shape for a in ctx.avals_in], [a.shape for a in ctx.avals_out], factor_sizes)
        return custom_call_with_rule(
            ctx,
            name,
            operands,
            ctx.avals_out,
            fitted,
            {key: value for key, value in params.items() if key not in reference_only},
            reduces={i: _named_factors(fs, fitted.sizes) for i, fs in (reduces or {}).items()},
            replicate=_named_factors(replicate, fitted.sizes),
        )

    register_platform_lowering(primitive, lower_npu)

    def batching_rule(args: Sequence[jax.Array], dims: Sequence[int | None], **params: Any):
        if batch is not None:
            return batch(args, dims, **params)
        results = jax.vmap(partial(as_tuple, **params), in_axes=tuple(dims))(*args)
        return results, (0,) * len(results)

    batching.primitive_batchers[primitive] = batching_rule

    def operator(*args: jax.Array, **params: Any) -> tuple[jax.Array, ...]:
        _check_static(name, params)
        return tuple(primitive.bind(*args, **params))

    operator.__name__ = operator.__qualname__ = name
    operator.__doc__ = reference.__doc__
    return operator


# Properties of each operator beyond its custom call; filled by `define_operator`.
OPERATORS: dict[str, dict[str, Any]] = {}


# ---- tracing
# ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def abstract_mesh(mesh: jax.sharding.AbstractMesh | None):
    """Trace under a mesh whose devices need not exist in this process."""
    if mesh is None:
        yield
        return
    check = shard_map._shmap_checks

    def of_this_mesh(given: Any, *rest: Any, **named: Any) -> Any:
        """Let a shard_map over a device mesh with the same axes use the mesh it is traced under."""
        context = jax.sharding.get_abstract_mesh()
        same = (
            given is not None
            and not context.empty
            and (given.axis_names, given.axis_sizes) == (context.axis_names, context.axis_sizes)
        )
        return check(None if same else given, *rest, **named)

    shard_map._shmap_checks = of_this_mesh
    try:
        with jax.sharding.use_abstract_mesh(mesh):
            yield
    finally:
        shard_map._shmap_checks = check


@contextlib.contextmanager
def callbacks_in_program_order():
    """Lower callbacks without tokens and devices: a torch program runs in the order of its statements."""
    ordered, needs_devices = effects.ordered_effects._effect_types, dispatch.prim_requires_devices_during_lowering
    kept = set(ordered), set(needs_devices)
    ordered.difference_update({debugging.OrderedDebugEffect, callback.OrderedIOEffect})
    needs_devices.difference_update({callback.pure_callback_p, callback.io_callback_p})
    try:
        yield
    finally:
        ordered.update(kept[0])
        needs_devices.update(kept[1])


def callback_primitive(name: str) -> tuple[core.Primitive, Callable[..., Any]]:
    """Return a primitive that calls back to Python, and its callable ``(*arrays, **params) -> results``."""
    return {
        "debug_callback": (debugging.debug_callback_p, debugging.debug_callback_p.impl),
        "debug_print": (debugging.debug_print_p, debugging.debug_print_p.impl),
        "io_callback": (callback.io_callback_p, callback.io_callback_impl),
        "pure_callback": (callback.pure_callback_p, callback.pure_callback_impl),
    }[name]


def devices_and_manual_axes(axis_context: Any) -> tuple[int, bool | None]:
    """(number of devices, whether a shard_map over all axes is being lowered; None for one over some of them)."""
    if isinstance(axis_context, sharding_impls.SPMDAxisContext):
        every = axis_context.manual_axes == frozenset(axis_context.mesh.axis_names)
        return axis_context.mesh.size, True if every else None
    return getattr(axis_context, "num_devices", 1), False


def canonical_dtype(dtype: Any) -> Any:
    """Return JAX's dtype for this one: 64 bits become 32 unless jax_enable_x64 is on."""
    return jax.dtypes.canonicalize_dtype(dtype)


# ---- reading programs
# ---------------------------------------------------------------------------------------------------


def module_of(lowered: jax.stages.Lowered) -> ir.Module:
    """Copy the lowered StableHLO module.

    JAX returns the same module when a function is lowered again, and Shardy's passes change it in place: without a copy
    every all_reduce would occur twice.
    """
    module = lowered.compiler_ir("stablehlo")
    with module.context, ir.Location.unknown():
        if lowered._lowering.compile_args["shape_poly_state"].uses_dim_vars:  # exported with symbolic shapes
            return mlir.refine_polymorphic_shapes(module)
        copy = io.BytesIO()
        module.operation.write_bytecode(copy)  # with locations; five times faster than text and back
        return ir.Module.parse(copy.getvalue())


def call_exported_primitive() -> core.Primitive:
    """Return the primitive that calls a function exported by `jax.export`."""
    return _export.call_exported_p


def lower_exported(ctx: Any, *operands: ir.Value, exported: Any) -> Any:
    """Lower a call of an exported function, whatever platform it was exported for.

    What is special to that platform is a custom call, which the importer refuses by name.
    """
    disabled = (*exported.disabled_safety_checks, jax.export.DisabledSafetyCheck.platform())
    exported = dataclasses.replace(exported, disabled_safety_checks=disabled)
    return _export._call_exported_lowering(ctx, *operands, exported=exported)


def read_location(location: ir.Location) -> tuple[str, str, int]:
    """Return (named_scope path, file, line) of an MLIR location; empty strings and 0 if unknown."""
    scope, file, line = "", "", 0
    while location is not None:
        if hasattr(location, "name_str"):
            if "/" in location.name_str and not scope:
                scope = location.name_str
            location = location.child_loc
        elif hasattr(location, "callee"):
            location = location.callee
        elif hasattr(location, "filename"):
            return scope, location.filename, location.start_line
        elif hasattr(location, "locations") and len(location.locations):
            location = location.locations[0]
        else:
            break
    return scope, file, line


def equations(jaxpr: core.Jaxpr) -> Any:
    """Yield every equation of a jaxpr and of its inner jaxprs."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(item, "jaxpr", item)
                if isinstance(inner, core.Jaxpr):
                    yield from equations(inner)


def scope_in_call(caller: str, scope: str) -> str:
    """Return the full path of an operation named `scope` in a function called at `caller`.

    JAX names operations of a function relative to it, because several calls share it. The last part of ``caller`` is
    the call itself and is dropped.
    """
    outer = caller.rpartition("/")[0]
    if not outer or scope.split("/")[0] == caller.split("/")[0]:
        return scope
    return f"{outer}/{scope or 'call'}"


def source_line(eqn: core.JaxprEqn) -> str:
    """Return ``file:line (function)`` of the user's code behind an equation."""
    return source_info_util.summarize(eqn.source_info)


def has_lowering(primitive: core.Primitive) -> bool:
    """Whether JAX can turn the primitive into StableHLO for platform ``npu``."""
    return primitive in mlir._lowerings or primitive in mlir._platform_specific_lowerings.get(PLATFORM, {})


def threefry_primitive() -> core.Primitive:
    """Return the primitive behind jax's default random numbers."""
    from jax.extend.core import primitives

    return primitives.threefry2x32_p


def approximate_top_k_primitive() -> core.Primitive:
    """Return the primitive of jax.lax.approx_max_k and approx_min_k, which jax.lax does not export."""
    from jax._src.lax import ann

    return ann.approx_top_k_p


def ragged_dot_primitive() -> core.Primitive:
    """The primitive behind jax.lax.ragged_dot and its gradients, which jax.lax does not export."""
    from jax._src.lax import lax

    return lax.ragged_dot_general_p


def ragged_dot_reference() -> Callable[..., jax.Array]:
    """JAX's own form of it for platforms without one: dense products with a mask."""
    from jax._src.lax import lax

    return lax._ragged_dot_general_impl


def key_implementation(dtype: Any) -> str:
    """Return the generator's name for `jax.random.wrap_key_data` from a key array's dtype."""
    return dtype._impl.name


def total_order_primitives() -> Any:
    """Return the module of total-order comparisons (IEEE 754; `lt_to_p`, ..), which jax.lax does not export."""
    from jax._src.lax import lax

    return lax


def linear_algebra_primitive(name: str) -> core.Primitive:
    """Return a primitive of jax.lax.linalg; jax exports only some."""
    from jax._src.lax import linalg

    return getattr(linalg, f"{name}_p")
