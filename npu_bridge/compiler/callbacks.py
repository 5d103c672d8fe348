"""Host callbacks: `jax.debug.print`, `jax.debug.callback`, `jax.pure_callback`, `jax.experimental.io_callback`.

A callback becomes one custom call that names the Python function by a number; the functions themselves travel beside
the program (`Traced.callbacks`), so that its text is the same in every process and on disk. They run at their statement
of the program, in order, on copies of their operands in host memory. Outside a `shard_map` every process passes whole
operands to a callback, inside one its own shards. Debugging callbacks outside a `shard_map` run on rank 0 only.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxlib.mlir import ir

from npu_bridge import jaxcompat
from npu_bridge.errors import UnsupportedError

TARGET = jaxcompat.CALL_PREFIX + "callback"
PRIMITIVES = ("debug_callback", "debug_print", "io_callback", "pure_callback")


@dataclasses.dataclass(frozen=True)
class Callback:
    """A host function: takes arrays of `operands` (dtypes), returns arrays of `results` (shape, dtype)."""

    name: str
    function: Callable[..., Any]
    operands: tuple[Any, ...]
    results: tuple[tuple[tuple[int, ...], Any], ...]
    first_only: bool  # on the first process alone


_KNOWN: list[Callback] = []  # JAX reuses lowered modules, so a number must stay valid


def _lowering(name: str) -> Callable[..., Any]:
    _, function = jaxcompat.callback_primitive(name)

    def lower(ctx: Any, *operands: ir.Value, **params: Any) -> list[ir.Value]:
        devices, manual = jaxcompat.devices_and_manual_axes(ctx.module_context.axis_context)
        whole = "on several devices outside of a shard_map over all axes"
        if name == "io_callback" and devices > 1 and not manual:
            raise UnsupportedError(
                [f"io_callback {whole}: every process would call it; return the value instead"], name
            )
        if manual is None:
            raise UnsupportedError([f"{name} in a shard_map over some axes; map over all axes of the mesh"], name)
        debug = name.startswith("debug")
        known = Callback(
            name,
            lambda *arrays: function(*arrays, **params),
            tuple(a.dtype for a in ctx.avals_in),
            tuple((tuple(a.shape), a.dtype) for a in ctx.avals_out),
            debug and devices > 1 and not manual,
        )
        _KNOWN.append(known)
        effect = name != "pure_callback"
        record = {"params": {"number": len(_KNOWN) - 1, "effect": effect, "silent": not ctx.avals_out}}
        return jaxcompat.whole_custom_call(ctx, TARGET, operands, ctx.avals_out, record, has_side_effect=effect)

    return lower


def lowerings() -> dict[Any, Callable[..., Any]]:
    """Return the lowering of each callback primitive."""
    return {jaxcompat.callback_primitive(name)[0]: _lowering(name) for name in PRIMITIVES}


def collect(module: ir.Module) -> list[Callback]:
    """Collect the callbacks of a module, renumbered in program order. Changes `module` in place."""
    found: dict[int, int] = {}

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.name == "stablehlo.custom_call" and ir.StringAttr(op.attributes["call_target_name"]).value == TARGET:
            record = ast.literal_eval(ir.StringAttr(op.attributes["bridge.params"]).value)
            number = found.setdefault(record["params"]["number"], len(found))
            record["params"]["number"] = number
            op.attributes["bridge.params"] = ir.StringAttr.get(repr(record))
        return ir.WalkResult.ADVANCE

    with module.context, ir.Location.unknown():
        module.operation.walk(visit)
    return [_KNOWN[number] for number in found]


def run(known: Callback, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Call the Python function. Raises TypeError when its results differ from the declared ones."""
    found = [np.asarray(x) for x in known.function(*arrays)]
    shapes = [(x.shape, jaxcompat.canonical_dtype(x.dtype)) for x in found]
    if shapes != [(shape, np.dtype(dtype)) for shape, dtype in known.results]:
        raise TypeError(
            f"npu_bridge: {known.name} returned {[f'{d}{list(s)}' for s, d in shapes]}, its result_shape_dtypes say "
            f"{[f'{np.dtype(d)}{list(s)}' for s, d in known.results]}"
        )
    return [x.astype(dtype) for x, (_, dtype) in zip(found, known.results)]
