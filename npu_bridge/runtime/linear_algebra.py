"""Dense linear algebra as JAX's primitives define their results. Every function returns a tuple."""

from __future__ import annotations

import torch


def math_cholesky(x: torch.Tensor) -> tuple[torch.Tensor]:
    """Lower factor; NaN for a matrix that is not positive definite, where torch raises or stops halfway."""
    factor, failed = torch.linalg.cholesky_ex(x)
    return (torch.where((failed != 0)[..., None, None], float("nan"), factor),)


def math_triangular_solve(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    left_side: bool,
    lower: bool,
    transpose_a: bool,
    conjugate_a: bool,
    unit_diagonal: bool,
) -> tuple[torch.Tensor]:
    """x with op(a) x = b, or x op(a) = b."""
    a = a.conj() if conjugate_a else a
    a, upper = (a.mT, lower) if transpose_a else (a, not lower)
    return (torch.linalg.solve_triangular(a, b, upper=upper, left=left_side, unitriangular=unit_diagonal),)


def math_lu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(both factors in one matrix, rows exchanged counted from 0, permutation of the rows)."""
    factors, pivots, _ = torch.linalg.lu_factor_ex(x)
    if pivots.numel() == 0:
        rows = torch.arange(x.shape[-2], device=x.device, dtype=torch.int32).expand(x.shape[:-1]).clone()
        return factors, pivots, rows
    permutation = torch.lu_unpack(factors, pivots, unpack_data=False)[0].real.argmax(-2)
    return factors, pivots - 1, permutation.to(torch.int32)


def math_qr(x: torch.Tensor, *, full_matrices: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.linalg.qr(x, mode="complete" if full_matrices else "reduced"))


def math_geqrf(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(reflectors below the diagonal of the upper factor, their scales), as LAPACK has them."""
    return tuple(torch.geqrf(x))


def math_householder_product(a: torch.Tensor, taus: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.linalg.householder_product(a, taus),)


def math_tridiagonal_solve(
    below: torch.Tensor, diagonal: torch.Tensor, above: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor]:
    """By the dense matrix: torch has no solver of bands, and elimination without pivoting may divide by zero."""
    matrix = torch.diag_embed(diagonal) + torch.diag_embed(below[..., 1:], -1) + torch.diag_embed(above[..., :-1], 1)
    solution, failed = torch.linalg.solve_ex(matrix, b)
    return (torch.where((failed != 0)[..., None, None], float("nan"), solution),)


def math_svd(x: torch.Tensor, *, full_matrices: bool, compute_uv: bool) -> tuple[torch.Tensor, ...]:
    """(singular values, left vectors, right vectors), or the values alone."""
    if not compute_uv:
        return (torch.linalg.svdvals(x),)
    u, s, vh = torch.linalg.svd(x, full_matrices=full_matrices)
    return s, u, vh


def math_eigh(x: torch.Tensor, *, lower: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(vectors, values in ascending order), from one triangle."""
    values, vectors = torch.linalg.eigh(x, UPLO="L" if lower else "U")
    return vectors, values


def math_eig(x: torch.Tensor, *, compute_right_eigenvectors: bool) -> tuple[torch.Tensor, ...]:
    if not compute_right_eigenvectors:
        return (torch.linalg.eigvals(x),)
    return tuple(torch.linalg.eig(x))
