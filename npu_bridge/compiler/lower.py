"""Trace a JAX function over abstract arguments and lower it to StableHLO for platform ``npu``.

Nothing is compiled by XLA.

`check` looks at the traced program first and gathers everything the bridge refuses, each with the user's source line.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxlib.mlir import ir

from npu_bridge import jaxcompat
from npu_bridge.compiler import callbacks, linear_algebra, primitives
from npu_bridge.compiler.codegen.contraction import MOST_SPATIAL_DIMS
from npu_bridge.compiler.codegen.indexing import PHILOX
from npu_bridge.compiler.ir import ELEMENT_BYTES
from npu_bridge.errors import UnsupportedError

# Primitives that cannot run inside one captured device program, with reason and workaround.
REFUSED = {
    "infeed": "host transfer inside a step; pass the data as an argument",
    "outfeed": "host transfer inside a step; return the data from the step",
    "rng_uniform": "is not reproducible across devices; use jax.random",
    "pallas_call": "a Pallas kernel is written for one accelerator; use npu_bridge.ops or plain jax",
}
_LINEAR_ALGEBRA = {"cholesky", "eig", "eigh", "geqrf", "householder_product", "lu", "qr", "schur", "svd",
    "triangular_solve",
    "tridiagonal", "tridiagonal_solve", "hessenberg", "ormqr", "symmetric_product"}  # fmt: skip
_DTYPES = {"bool": "i1", "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64", "uint8": "ui8", "uint16": "ui16",
    "uint32": "ui32", "uint64": "ui64", "float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64",
    "complex64": "complex<f32>", "complex128": "complex<f64>", "float8_e4m3fn": "f8E4M3FN",
    "float8_e5m2": "f8E5M2", "float8_e4m3fnuz": "f8E4M3FNUZ", "float8_e5m2fnuz": "f8E5M2FNUZ"}  # fmt: skip


@dataclasses.dataclass
class Traced:
    """A lowered program with properties of its arguments and results."""

    module: ir.Module
    kept: list[int]  # flat argument number of each argument of the module
    donated: list[bool]  # for each flat argument
    in_tree: Any
    out_tree: Any
    in_avals: list[jax.ShapeDtypeStruct]
    out_avals: list[jax.ShapeDtypeStruct]
    callbacks: list[callbacks.Callback] = dataclasses.field(default_factory=list)


def mlir_dtype(dtype: Any) -> str:
    """Return MLIR's name of a dtype. Raises KeyError for one without storage in the bridge."""
    return _DTYPES[np.dtype(dtype).name]


def _refused_by_arguments(eqn: Any) -> str | None:
    """Return the reason why this use of a supported primitive is refused, or None. The code generator refuses the same
    for bare modules.
    """
    if eqn.primitive.name == "conv_general_dilated" and eqn.invars[0].aval.ndim > 2 + MOST_SPATIAL_DIMS:
        return (
            f"{eqn.invars[0].aval.ndim - 2} spatial dimensions; torch has convolutions over up to "
            f"{MOST_SPATIAL_DIMS}, write the others as a sum"
        )
    if eqn.primitive.name == "rng_bit_generator":
        algorithm = str(getattr(eqn.params["algorithm"], "name", eqn.params["algorithm"])).removeprefix("RNG_")
        if algorithm not in PHILOX:
            return (
                f"algorithm {algorithm} has no torch form; use the default one (Philox), or jax.random with "
                "threefry keys"
            )
    return None


@functools.cache
def refused_dtype(dtype: Any, x64: bool) -> str | None:
    """Return the reason why arrays of a dtype cannot be lowered, or None.

    Cached: a deep program asks 100,000 times about five dtypes.
    """
    if (
        jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jax.dtypes.float0
    ):  # tangents of integers, which are empty
        return None
    name = np.dtype(dtype).name
    if name == "float64" and not x64:
        return "float64 found while jax_enable_x64 is off"
    return None if name in _DTYPES else f"dtype {name} has no torch storage; use one of {', '.join(_DTYPES)}"


def _lost_placement(eqn: Any, device: str) -> str | None:
    """Return the reason why a compute placement cannot be honoured, or None. On a CPU the host computes in any case."""
    if device == "cpu":
        return None
    if getattr(eqn.ctx, "compute_type", None):
        return (
            f"compute_on({eqn.ctx.compute_type!r}) asks the host to compute this; the bridge runs a step on "
            f"{device} alone"
        )
    return None


def _refused_callback(eqn: Any, device: str, allow_host_sync: bool) -> str | None:
    if device != "cpu" and not allow_host_sync:
        return (
            "calls back to Python on the host during a step, which is captured as one graph; return the value "
            "from the step instead, or compile with allow_host_sync=True, which runs it operator by operator"
        )
    if any(jax.dtypes.issubdtype(v.aval.dtype, jax.dtypes.extended) for v in eqn.invars):
        return "a random key is given to the host; give it jax.random.key_data of the key"
    return None


def check(jaxpr: Any, device: str = "cpu", allow_host_sync: bool = False) -> list[str]:
    """List everything in a traced program that the bridge refuses on a kind of device."""
    problems: dict[str, None] = {}

    def add(eqn: Any, text: str) -> None:
        problems.setdefault(f"{eqn.primitive.name} at {jaxcompat.source_line(eqn)}: {text}")

    for eqn in jaxcompat.equations(jaxpr):
        name = eqn.primitive.name
        if name in REFUSED:
            add(eqn, REFUSED[name])
        elif name in callbacks.PRIMITIVES:
            if (reason := _refused_callback(eqn, device, allow_host_sync)) is not None:
                add(eqn, reason)
        elif name in _LINEAR_ALGEBRA and (reason := linear_algebra.refused(name, eqn.params)) is not None:
            add(eqn, reason)
        elif device == "npu" and (name in _LINEAR_ALGEBRA or name == "fft"):
            add(eqn, "torch_npu has no such operator; compute it outside the step")
        elif (reason := _refused_by_arguments(eqn) or _lost_placement(eqn, device)) is not None:
            add(eqn, reason)
        elif not jaxcompat.has_lowering(eqn.primitive):
            add(eqn, "jax has no platform-independent lowering for this primitive")
        for var in (*eqn.invars, *eqn.outvars):
            dtype = getattr(var.aval, "dtype", None)
            shape = getattr(var.aval, "shape", ())
            if not all(isinstance(n, (int, np.integer)) for n in shape):
                add(eqn, f"dynamic shape {shape}; the bridge needs every size fixed at compile time")
            if device == "npu" and dtype is not None and jax.dtypes.issubdtype(dtype, np.complexfloating):
                add(
                    eqn,
                    "complex numbers: torch_npu has next to no operators for them; keep real and imaginary parts apart",
                )
            if dtype is not None and (reason := refused_dtype(dtype, jax.config.jax_enable_x64)) is not None:
                add(eqn, reason)
    return list(problems)


def lower(
    fn: Callable[..., Any],
    args: Sequence[Any],
    *,
    named: Mapping[str, Any] | None = None,
    mesh: jax.sharding.AbstractMesh | None,
    donate_argnums: Sequence[int] = (),
    static_argnums: Sequence[int] = (),
    out_shardings: Any = None,
    name: str = "this program",
    device: str = "cpu",
    static_argnames: Sequence[str] = (),
    keep_unused: bool = False,
    allow_host_sync: bool = False,
) -> Traced:
    """Trace `fn` on abstract `args`, and `named` ones, (pytrees of ShapeDtypeStruct with shardings) and lower it.

    Raises UnsupportedError with every problem of the traced program at once, VersionError for an untested jax.
    """
    jaxcompat.require_tested_version()
    primitives.register()
    options = {} if out_shardings is None else {"out_shardings": out_shardings}
    with jaxcompat.abstract_mesh(mesh):
        jitted = jaxcompat.xla_jit(
            fn,
            donate_argnums=tuple(donate_argnums),
            static_argnums=tuple(static_argnums),
            static_argnames=tuple(static_argnames),
            keep_unused=keep_unused,
            **options,
        )
        traced = jitted.trace(*args, **(named or {}))
        problems = check(traced.jaxpr.jaxpr, device, allow_host_sync)
        if problems:
            raise UnsupportedError(problems, name)
        with jaxcompat.callbacks_in_program_order():
            lowered = traced.lower(lowering_platforms=(jaxcompat.PLATFORM,))
    flat_out, out_tree = jax.tree.flatten(traced.out_info)  # with weak types, which lowered.out_info has not
    flat_in, in_tree = jax.tree.flatten(lowered.args_info)
    module = jaxcompat.module_of(lowered)
    return Traced(
        module=module,
        kept=jaxcompat.kept_arguments(lowered),
        donated=[info.donated for info in flat_in],
        in_tree=in_tree,
        out_tree=out_tree,
        in_avals=[jax.ShapeDtypeStruct(i.shape, i.dtype) for i in flat_in],
        out_avals=[jax.ShapeDtypeStruct(o.shape, o.dtype, weak_type=o.weak_type) for o in flat_out],
        callbacks=callbacks.collect(module),
    )


assert set(_DTYPES.values()) == set(ELEMENT_BYTES)
