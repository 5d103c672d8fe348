"""Dense linear algebra for platform ``npu``: each primitive becomes one call of torch's function of the same name.

Batch dimensions may be sharded; the two dimensions of a matrix are whole on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxlib.mlir import ir

from npu_bridge import jaxcompat


def _rule(avals_in: Any, avals_out: Any) -> tuple[str, list[str]]:
    """Return (sharding rule, unsharded factors). Leading batch dimensions are shared by all operands and results."""
    batch = len(avals_in[0].shape) - 2
    whole: list[str] = []

    def dims(value: str, shape: tuple[int, ...]) -> str:
        names = [f"d{d}" if d < batch else f"{value}x{d}" for d in range(len(shape))]
        whole.extend(n for n in names if not n.startswith("d"))
        return " ".join(names)

    ins = ", ".join(dims(f"i{n}", a.shape) for n, a in enumerate(avals_in))
    outs = ", ".join(dims(f"o{n}", a.shape) for n, a in enumerate(avals_out))
    return f"{ins} -> {outs}", whole


def _lower(name: str, params: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda given: {}):
    def lower(ctx: Any, *operands: ir.Value, **given: Any):
        rule, whole = _rule(ctx.avals_in, ctx.avals_out)
        return jaxcompat.custom_call_with_rule(
            ctx, f"math.{name}", operands, ctx.avals_out, rule, params(given), replicate=whole
        )

    return lower


def _flags(*names: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    return lambda given: {n: bool(given[n]) for n in names}


# What jax writes in terms of others for any platform.
COMPOSED = frozenset({"ormqr", "symmetric_product", "lu_pivots_to_permutation"})
LOWERINGS = {
    "cholesky": _lower("cholesky"),
    "triangular_solve": _lower(
        "triangular_solve", _flags("left_side", "lower", "transpose_a", "conjugate_a", "unit_diagonal")
    ),
    "lu": _lower("lu"),
    "qr": _lower("qr", _flags("full_matrices")),
    "geqrf": _lower("geqrf"),
    "householder_product": _lower("householder_product"),
    "svd": _lower("svd", _flags("full_matrices", "compute_uv")),
    "eigh": _lower("eigh", _flags("lower")),
    "tridiagonal_solve": _lower("tridiagonal_solve"),
    "eig": _lower("eig", _flags("compute_right_eigenvectors")),
}


def refused(name: str, params: Mapping[str, Any]) -> str | None:
    """Return the reason why this use of a primitive has no torch form, or None."""
    if name in COMPOSED:
        return None
    if name not in LOWERINGS:
        return "torch has no such factorisation"
    if params.get("pivoting") or params.get("compute_left_eigenvectors"):
        return "pivoted QR and left eigenvectors have no torch form"
    if params.get("subset_by_index") is not None:
        return "a part of the eigenvalues or singular values cannot be asked for; slice the whole"
    if params.get("perturb_singular"):
        return "torch does not perturb singular systems; add a small number to the diagonal"
    return None
