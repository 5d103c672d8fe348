"""One case for each thing JAX's lowering can emit: a function, its inputs, and whether it has a gradient.

Every case runs as value and gradient, on one device and on a 2 x 2 mesh, against XLA (test_operations.py). Sizes are
even, so that the first two dimensions can be split over the mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lax import linalg as _linalg  # geqrf and ormqr, which jax.lax.linalg does not export

from npu_bridge import ops

R = np.random.RandomState(0)


def f32(*shape: int, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    return R.uniform(low, high, shape).astype(np.float32)


def i32(*shape: int, low: int = -9, high: int = 9) -> np.ndarray:
    return R.randint(low, high, shape).astype(np.int32)


def u32(*shape: int) -> np.ndarray:
    return R.randint(0, 1 << 32, shape, dtype=np.uint64).astype(np.uint32)


@dataclasses.dataclass
class Case:
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    grad: bool = True
    rtol: float = 2e-5  # float32: a few roundings, sums of up to some hundred terms in another order
    atol: float = 2e-5
    host_sync: bool = False


CASES: dict[str, Case] = {}


def case(name: str, fn: Callable[..., Any], *args: Any, **options: Any) -> None:
    assert name not in CASES, name
    CASES[name] = Case(fn, args, **options)


X, Y = f32(4, 8), f32(4, 8)
POS = f32(4, 8, low=0.2, high=3.0)
UNIT = f32(4, 8, low=-0.9, high=0.9)
I, J = i32(4, 8), i32(4, 8)
SPECIAL = np.array([[0.0, -0.0, np.inf, -np.inf], [np.nan, 1.5, -2.5, 0.5]] * 2, np.float32)

# ---- element-wise
# ---------------------------------------------------------------------------------------------------------
for _name in ("exp", "expm1", "sin", "cos", "tan", "tanh", "logistic", "abs", "neg", "square", "erf", "erfc", "atan", "asinh", "sinh", "cosh",
              "cbrt", "floor", "ceil", "sign", "exp2", "bessel_i1e"):  # fmt: skip
    case(_name, getattr(lax, _name), X, grad=_name not in ("floor", "ceil", "sign"))
for _name in ("log", "log1p", "sqrt", "rsqrt", "lgamma", "digamma"):
    case(_name, getattr(lax, _name), POS, rtol=1e-4, grad=_name != "digamma")
for _name in ("asin", "acos", "atanh", "erf_inv"):
    case(_name, getattr(lax, _name), UNIT, rtol=1e-4)
case("acosh", lax.acosh, POS + 1)
case("integer_pow", lambda x: lax.integer_pow(x, 3), X)
case("round_even", lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN), SPECIAL, grad=False)
case("round_away", lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO), SPECIAL, grad=False)
case("sign of special numbers", lax.sign, SPECIAL, grad=False)
case("is_finite", lax.is_finite, SPECIAL, grad=False)
case("isnan, isinf", lambda x: (jnp.isnan(x), jnp.isinf(x), jnp.isposinf(x), jnp.isneginf(x)), SPECIAL, grad=False)
case("reduce_precision", lambda x: (lax.reduce_precision(x, 5, 3), lax.reduce_precision(x, 8, 7)), X, grad=False)
case("add, sub, mul, div", lambda x, y: x + y - x * y / (2.0 + y * y), X, Y)
case("max, min with NaN", lambda x, y: (lax.max(x, y), lax.min(x, y)), SPECIAL, SPECIAL[::-1].copy(), grad=False)
case("max, min", lambda x, y: lax.max(x, y) - lax.min(x, 0.5), X, Y)
case("pow", lax.pow, POS, Y, rtol=1e-4)
case("atan2", lax.atan2, X, Y)
case("rem", lax.rem, X, Y, grad=False)
case("nextafter", lax.nextafter, X, Y, grad=False)
case("polygamma", lambda x: lax.polygamma(jnp.round(x), x), POS, rtol=1e-3, grad=False)
case("zeta", lambda x: lax.zeta(x + 2.0, x), POS, rtol=1e-4, grad=False)
case("clamp", lambda x: lax.clamp(-0.5, x, 1.0) + lax.clamp(x - 1.0, x * 2.0, x + 0.1), X)
case("select", lambda x, y: jnp.where(x > 0, y, 1.0) + jnp.where(y > 0, 2.0, x) + jnp.where(x > y, 1.0, -1.0), X, Y)
case("select_n on integers", lambda i, x, y: lax.select_n(i % 3, x, y, x + y), np.abs(I), X, Y)
case("compare", lambda x, y: (x < y, x <= y, x > y, x >= y, x == y, x != y), X, Y, grad=False)
case("logic", lambda x, y: ((x > 0) & (y > 0), (x > 0) | (y > 0), (x > 0) ^ (y > 0), ~(x > 0)), X, Y, grad=False)
case("bits", lambda i, j: (i & j, i | j, i ^ j, ~i, i << 3, i >> 2, lax.shift_right_logical(i, 2)), I, J, grad=False)
case("shifts by arrays", lambda i, j: (lax.shift_left(i, j), lax.shift_right_logical(i, j), lax.shift_right_arithmetic(i, j)), I, np.arange(32, dtype=np.int32).reshape(4, 8) * 2, grad=False)  # fmt: skip
case(
    "integer division",
    lambda i, j: (lax.div(i, j), lax.rem(i, j), i // 3, i % 3, i // (jnp.abs(j) + 1)),
    I,
    J,
    grad=False,
)
case("integer power", lambda i: (i**3, lax.integer_pow(i, 2), i ** (jnp.abs(i) % 4)), I, grad=False)
case("population count, leading zeros", lambda i: (lax.population_count(i), lax.clz(i)), I * 12345, grad=False)
case(
    "unsigned arithmetic",
    lambda a, b: (a + b, a * b, a - b, a // (b | 1), a % (b | 1), a >> 7, a << 5, a ^ b),
    u32(4, 8),
    u32(4, 8),
    grad=False,
)
case("unsigned order", lambda a, b: (a < b, a >= b, lax.max(a, b), lax.min(a, b), jnp.clip(a, np.uint32(5), np.uint32(1 << 31)), jnp.sort(a, 1), jnp.argmax(a, 1)), u32(4, 8), u32(4, 8), grad=False)  # fmt: skip
case("unsigned conversion", lambda a: (a.astype(jnp.float32), a.astype(jnp.int32), a.astype(jnp.uint8), a.astype(jnp.uint16).astype(jnp.float32)), u32(4, 8), grad=False)  # fmt: skip
case(
    "unsigned widening",
    lambda a: (a.astype(jnp.uint16).astype(jnp.uint32), a.astype(jnp.uint8).astype(jnp.int32)),
    u32(4, 8),
    grad=False,
)
case("unsigned shift by arrays", lambda a, b: lax.shift_right_logical(a, b % 40), u32(4, 8), u32(4, 8), grad=False)
case("convert to integers", lambda x: (x.astype(jnp.int32), x.astype(jnp.int8), x.astype(jnp.uint32), (x * 1e12).astype(jnp.int32), (x > 0).astype(jnp.int32)), np.abs(X), grad=False)  # fmt: skip
case("convert NaN and infinity to integers", lambda x: x.astype(jnp.int32), SPECIAL, grad=False)
case(
    "convert to 16 bits",
    lambda x: x.astype(jnp.bfloat16).astype(jnp.float32) + x.astype(jnp.float16).astype(jnp.float32),
    X,
)
case(
    "fp8 storage",
    lambda x: (x.astype(jnp.float8_e4m3fn).astype(jnp.float32), x.astype(jnp.float8_e5m2).astype(jnp.float32)),
    X,
    grad=False,
)
case("bitcast", lambda x, i: (lax.bitcast_convert_type(x, jnp.int32), lax.bitcast_convert_type(i, jnp.float32), lax.bitcast_convert_type(x, jnp.uint8)), X, I, grad=False)  # fmt: skip
case(
    "booleans as numbers",
    lambda x: ((x > 0).astype(jnp.float32) + jnp.sum(x > 0, 1, keepdims=True), lax.bitwise_not(x > 0)),
    X,
    grad=False,
)


def _numbers(x):
    """Arithmetic on numbers alone, which is done while the program is written."""
    a, b, i, j = lax.full((), 2.25), lax.full((), -0.75), lax.full((), 6, np.int32), lax.full((), -4, np.int32)
    u = lax.full((), 3_000_000_000, np.uint32)
    floats = [a + b, a - b, a * b, a / b, lax.max(a, b), lax.min(a, b), -a, lax.abs(b), lax.sqrt(a), lax.rsqrt(a), lax.log(a), lax.exp(b), lax.floor(b),
              lax.pow(a, b), lax.square(b), lax.clamp(b, a, lax.full((), 1.0)), lax.select(a > b, b, a)]  # fmt: skip
    whole = [
        i + j,
        i - j,
        i * j,
        i & j,
        i | j,
        i ^ j,
        ~i,
        -j,
        lax.abs(j),
        lax.max(i, j),
        lax.min(i, j),
        i << 3,
        lax.select(i < j, i, j),
        i.astype(jnp.uint8),
    ]
    whole += [
        u + u,
        u * u,
        u > u - 1,
        lax.eq(i, j),
        lax.ne(i, j),
        lax.ge(a, b),
        lax.le(i, j),
        lax.is_finite(a / lax.full((), 0.0)),
        u.astype(jnp.float32),
    ]
    return (
        x * sum(floats),
        jnp.stack(floats),
        [w + 0 * (x[0, 0] > 9).astype(w.dtype) if w.dtype != bool else w & (x[0, 0] < 9) for w in whole],
    )


case("arithmetic on numbers", _numbers, X, rtol=1e-5)


def _complex(x, y):
    z, constant = lax.complex(x, y), np.arange(8, dtype=np.complex64) * (1 - 2j)
    moved = jnp.where(x > 0, z, 1j) + jnp.concatenate([z[2:], z[:2]]) + jnp.pad(z[:, 1:], ((0, 0), (1, 0)))
    looped = lax.fori_loop(0, 2, lambda i, c: c * 0.5j + z + i, z)
    return (
        jnp.abs(z * jnp.exp(z) / (2 + 1j) + constant),
        (z @ z.T).real,
        jnp.angle(moved),
        jnp.conj(looped).imag.sum(0),
        jnp.real(x) + jnp.imag(x),
    )


case("complex numbers", _complex, X, Y, rtol=1e-4, atol=1e-4)
case(
    "sort complex numbers",
    lambda x, y: (
        jnp.sort(lax.complex(jnp.round(x), y), 1),
        lax.complex(x, y) == lax.complex(y, x),
        jnp.sign(lax.complex(x, y)),
    ),
    X,
    Y,
    grad=False,
)
case(
    "fft",
    lambda x, y: (
        jnp.abs(jnp.fft.fft2(x)),
        jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(y)),
        jnp.fft.ifft(lax.complex(x, y)).real,
    ),
    X,
    Y,
    rtol=1e-4,
    atol=1e-4,
)


def _factors(a):
    """Factorisations of a batch of matrices. Signs of vectors are free: only what they do not change is compared."""
    s = a @ a.mT + 4 * jnp.eye(4)
    q, r = jnp.linalg.qr(a)
    u, sizes, v = jnp.linalg.svd(a, full_matrices=False)
    values, vectors = jnp.linalg.eigh(s)
    return (
        jnp.linalg.cholesky(s),
        jnp.linalg.solve(s, a),
        q @ r,
        jnp.abs(r),
        u * sizes[:, None] @ v,
        values,
        vectors * values[:, None] @ vectors.mT,
        jnp.linalg.slogdet(s)[1],
    )


SQUARE = f32(4, 4, 4) + 2 * np.eye(4, dtype=np.float32)


def _parts_of_factors(a):
    """Register cases of LAPACK besides factors: reflectors and their products, tridiagonal systems."""
    reflectors, scales = _linalg.geqrf(a)
    product = lax.linalg.householder_product(reflectors, scales)
    below, diagonal, above = a[:, 0].at[:, 0].set(0), a[:, 1], a[:, 2].at[:, -1].set(0)
    return (
        product @ jnp.triu(reflectors),
        _linalg.ormqr(reflectors, scales, a) - product @ a,
        lax.linalg.tridiagonal_solve(below, diagonal, above, a),
    )


case("parts of factors of matrices", _parts_of_factors, SQUARE, grad=False, rtol=1e-3, atol=1e-3)
case("factorisations of matrices", _factors, SQUARE, rtol=1e-3, atol=1e-3)
case(
    "eigenvalues of any matrix",
    lambda a: (jnp.sort(jnp.linalg.eigvals(a), 1), jnp.linalg.svd(a, compute_uv=False)),
    SQUARE,
    grad=False,
    rtol=1e-3,
    atol=1e-3,
)

# ---- shapes
# ---------------------------------------------------------------------------------------------------------------
case("reshape, transpose", lambda x: jnp.transpose(x.reshape(4, 2, 4), (2, 0, 1)) * 2, X)
case(
    "broadcast",
    lambda x: jnp.broadcast_to(x[:, None, :], (4, 3, 8)) + lax.broadcast_in_dim(x[:, 0], (2, 4), (1,)).sum(),
    X,
)
case("slice with steps", lambda x: x[1:4:2, ::3], X)
case("concatenate", lambda x, y: jnp.concatenate([x, y[:2], x], 0), X, Y)
case("reverse", lambda x: lax.rev(x, (0, 1)), X)
case("roll", lambda x: jnp.roll(x, 3, 1) + jnp.roll(x, 1, 0), X)
case("pad", lambda x: lax.pad(x, 0.5, ((1, 2, 0), (0, 0, 0))), X)
case("pad inside and crop", lambda x: lax.pad(x, 0.0, ((-1, 2, 1), (3, -2, 0))), X)
case("pad with shift", lambda x: lax.pad(x, 0.0, ((1, -1, 0), (0, 0, 0))), X)
case("iota", lambda x: x + jnp.arange(8) + jnp.arange(4)[:, None] + lax.broadcasted_iota(jnp.float32, (4, 8), 1), X)
case("constants", lambda x: x + np.arange(32, dtype=np.float32).reshape(4, 8), X)
case("dynamic_slice", lambda x, i: lax.dynamic_slice(x, (i[0, 0], i[0, 1]), (2, 8)), X, I)
case("dynamic_slice out of range", lambda x: lax.dynamic_slice(x, (jnp.int32(3), jnp.int32(-4)), (2, 3)), X)
case("dynamic_update_slice", lambda x, y, i: lax.dynamic_update_slice(x, y[:2], (i[0, 0], jnp.int32(0))), X, Y, I)
case(
    "dynamic_update_slice in two dims",
    lambda x, y, i: lax.dynamic_update_slice(x, y[:2, :3], (i[0, 0], i[1, 0])),
    X,
    Y,
    I,
)
case(
    "tile, repeat, stack, split",
    lambda x: sum(jnp.split(jnp.stack([jnp.tile(x, (2, 1)), jnp.repeat(x, 2, 0)]), 2, axis=1)),
    X,
)
case("triangles", lambda x: jnp.tril(x) + jnp.triu(x, 2), X)

# ---- products
# ---------------------------------------------------------------------------------------------------------------
case("matmul", lambda x, y: x @ y.T, X, Y)
case("einsum with batch", lambda x, y: jnp.einsum("bij,bkj->bik", x, y), f32(4, 6, 8), f32(4, 2, 8))
case("einsum over two dims", lambda x, y: jnp.einsum("abcd,cbe->ade", x, y), f32(4, 2, 6, 8), f32(6, 2, 4))
case("dot of vectors", lambda x, y: jnp.vdot(x[0], y[0]) + x[0] @ y.T, X, Y)
case("wider result", lambda x, y: lax.dot(x.astype(jnp.bfloat16), y.T.astype(jnp.bfloat16), preferred_element_type=jnp.float32), X, Y, grad=False, rtol=1e-4)  # fmt: skip
case("integer matmul", lambda i, j: i @ j.T, I, J, grad=False)
case(
    "bf16 matmul",
    lambda x, y: (x.astype(jnp.bfloat16) @ y.T.astype(jnp.bfloat16)).astype(jnp.float32),
    X,
    Y,
    grad=False,
    rtol=1e-2,
    atol=0.05,
)
case("ragged_dot", lambda x, w: lax.ragged_dot(x, w, jnp.array([1, 3], jnp.int32)), X, f32(2, 8, 4))
_conv = partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
IMG, KER = f32(4, 6, 6, 4), f32(3, 3, 4, 2)
case("convolution", lambda x, k: _conv(x, k, (1, 1), "SAME"), IMG, KER, rtol=1e-4, atol=1e-4)
case("convolution with strides, dilation, uneven padding", lambda x, k: _conv(x, k, (2, 1), ((1, 2), (0, 3)), rhs_dilation=(1, 2)), IMG, KER, rtol=1e-4, atol=1e-4)  # fmt: skip
case("transposed convolution", lambda x, k: lax.conv_transpose(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")), IMG, KER, rtol=1e-4, atol=1e-4)  # fmt: skip
case(
    "grouped convolution",
    lambda x, k: _conv(x, k, (1, 1), "SAME", feature_group_count=2),
    IMG,
    f32(3, 3, 2, 4),
    rtol=1e-4,
    atol=1e-4,
)
case("convolution over time", lambda x, k: lax.conv_general_dilated(x, k, (1,), [(2, 0)], dimension_numbers=("NWC", "WIO", "NWC")), f32(4, 8, 2), f32(3, 2, 4), rtol=1e-4)  # fmt: skip
case("3-D convolution", lambda x, k: lax.conv_general_dilated(x, k, (2, 2, 2), "VALID"), f32(4, 2, 4, 4, 4), f32(6, 2, 2, 2, 2), rtol=1e-4, atol=1e-4)  # fmt: skip

# ---- reductions
# ---------------------------------------------------------------------------------------------------------------
case("sum, mean, var", lambda x: (x.sum(), x.mean(1), jnp.var(x, 0)), X)
case("max, min over dims", lambda x: (x.max(0), x.min(1), x.max()), X)
case("prod", lambda x: (x.prod(1), x.prod()), X)
case("any, all", lambda x: ((x > 1).any(0), (x > -1).all(1)), X, grad=False)
case("integer sums", lambda i: (i.sum(0), i.max(1), i.min(), (i > 0).sum(), jnp.prod(i % 3, 0)), I, grad=False)
case(
    "bitwise reductions",
    lambda i: (lax.reduce_and(i, (0,)), lax.reduce_or(i, (1,)), lax.reduce_xor(i, (0,))),
    I,
    grad=False,
)
case(
    "argmax, argmin with ties and NaN",
    lambda x, i: (jnp.argmax(x, 0), jnp.argmin(x, 1), jnp.argmax(i, 1), jnp.argmin(i)),
    SPECIAL,
    I,
    grad=False,
)
case(
    "reduction with a body of its own",
    lambda x: lax.reduce(x, np.float32(0), lambda a, b: a + b + a * b, (1,)),
    X * 0.1,
    grad=False,
)
case("reduction of two arrays", lambda x, y: lax.reduce((x, y), (np.float32(0), np.float32(1)), lambda a, b: (a[0] + b[0], a[1] * b[1]), (0,)), X, Y, grad=False)  # fmt: skip
case("start that is not neutral", lambda x: lax.reduce(x, np.float32(3), lax.add, (0,)), X, grad=False)
case("logsumexp, softmax", lambda x: (jax.nn.logsumexp(x, 1), jax.nn.softmax(x, 0)), X)
case(
    "cumulative",
    lambda x: (
        jnp.cumsum(x, 1),
        lax.cummax(x, 0),
        lax.cumlogsumexp(x, 1, reverse=True),
        jnp.cumsum(x, 0, dtype=jnp.float32),
    ),
    X,
)
case("cumulative extremes and products", lambda x: (lax.cumprod(x, 1), lax.cummin(x, 1, reverse=True)), POS, grad=False)
case("cumulative without gradient", lambda x, a: (lax.cummax(x, 1), lax.cummax(a, 1), lax.cumlogsumexp(x, 1), lax.cummin(a, 0, reverse=True)), X, u32(4, 8), grad=False)  # fmt: skip
case("products over two dims", lambda x: x.prod((0, 1)), X, grad=False)
case("wider result with batch", lambda x, y: lax.dot_general(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), (((1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32), X, Y, grad=False, rtol=1e-4)  # fmt: skip
case("integer cumsum", lambda i: jnp.cumsum(i, 1), I, grad=False)
case("sort", lambda x: jnp.sort(x, 1) * jnp.arange(8), X)
case("sort with NaN", lambda x: jnp.sort(x, 1), SPECIAL, grad=False)
case("sort by two keys", lambda i, j: lax.sort((i % 3, j, i), dimension=1, num_keys=2), I, J, grad=False)
case("search", lambda x, y: tuple(jnp.searchsorted(jnp.sort(x.ravel()), y.ravel(), method=m) for m in ("scan", "sort", "compare_all")), SPECIAL, SPECIAL[::-1].copy(), grad=False)  # fmt: skip
case("argsort", lambda x, i: (jnp.argsort(x, 0), jnp.argsort(i, 1, descending=True)), X, I, grad=False)
case("top_k", lambda x: lax.top_k(x, 3), X)
case("top_k with ties", lambda i: lax.top_k(i, 5), I, grad=False)


def _pool(x, init, op, **k):
    return lax.reduce_window(x, init, op, (1, 2, 2, 1), (1, 2, 2, 1), "SAME", **k)


case("max pooling", lambda x: _pool(x, -jnp.inf, lax.max), IMG)
case(
    "min pooling with overlap",
    lambda x: lax.reduce_window(x, jnp.inf, lax.min, (1, 3, 3, 1), (1, 2, 2, 1), "VALID"),
    IMG,
)
case("mean pooling", lambda x: _pool(x, 0.0, lax.add) / 4, IMG)
case(
    "window with dilation",
    lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 3), (1, 2), ((0, 1), (2, 2)), window_dilation=(2, 1)),
    X,
    grad=False,
)
case("window with a body of its own", lambda x: lax.reduce_window(x, np.float32(0), lambda a, b: a + b + a * b * 0.1, (1, 3), (1, 1), "VALID"), X, grad=False)  # fmt: skip
case("integer window", lambda i: lax.reduce_window(i, np.int32(0), lax.add, (1, 2), (1, 2), "VALID"), I, grad=False)

# ---- gather and scatter
# ------------------------------------------------------------------------------------------------------------
ROWS = np.array([3, 0, 2, 2, 1, 3], np.int32)
case("take rows", lambda x, r: jnp.take(x, r, axis=0, mode="clip"), X, ROWS)
case("slices at unsigned and narrow indices", lambda x, r: (lax.dynamic_slice(x, (r[0].astype(jnp.uint32), r[1].astype(jnp.uint32)), (2, 8)), lax.dynamic_update_slice(x, x[:2] * 2, (r[2].astype(jnp.uint16) - np.uint16(9), r[1].astype(jnp.uint16)))), X, np.array([3, 0, 2, 2], np.int32))  # fmt: skip
case("take columns", lambda x, r: x[:, r], X, ROWS)
case("index out of range: fill, wrap, clip", lambda x, r: (x.at[r + 2].get(mode="fill", fill_value=7.0), jnp.take(x, r + 2, axis=0, mode="wrap"), x.at[r + 2].get(mode="clip")), X, ROWS)  # fmt: skip
case("take_along_axis", lambda x, i: jnp.take_along_axis(x, jnp.abs(i) % 4, 0), X, I)
case("points", lambda x, r: x[r, r * 2], X, ROWS)
case(
    "slices at points",
    lambda x, r: lax.gather(x, r[:, None], lax.GatherDimensionNumbers((1, 2), (), (0,)), (2, 8)),
    X,
    ROWS,
)
case("masked rows", lambda x: x[jnp.array([True, False, True, True]).nonzero(size=3)[0]], X)
case("batched gather", lambda x, i: jax.vmap(lambda a, b: a[b])(x, jnp.abs(i)[:, :3] % 8), X, I)
case("scatter set", lambda x, y, r: x.at[r[:3]].set(y[:3]), X, Y, np.array([2, 0, 3], np.int32))
case("scatter add", lambda x, y, r: x.at[r].add(y), X, Y, ROWS[:4])
case("scatter add points", lambda x, r: x.at[r, r * 2].add(1.5), X, ROWS)
case("scatter multiply, max, min", lambda x, y, r: (x.at[r].multiply(y, unique_indices=True), x.at[r].max(y), x.at[r].min(y)), X, Y, np.array([2, 0, 3, 1], np.int32), grad=False)  # fmt: skip
case(
    "scatter out of range",
    lambda x, y, r: (x.at[r + 2].set(y, mode="drop"), x.at[r + 2].add(y, mode="drop")),
    X,
    Y,
    ROWS[:4],
    grad=False,
)
case("scatter a window", lambda x, y, i: lax.scatter(x, i[:1, :1] * 0 + 1, y[None, :2], lax.ScatterDimensionNumbers((1, 2), (), (0,))), X, Y, I, grad=False)  # fmt: skip
case("batched scatter", lambda x, i: jax.vmap(lambda a, b: a.at[b].add(1.0))(x, jnp.abs(i)[:, :3] % 8), X, I)
_TARGETS = np.array([5, 0, -3, 9], np.int32)  # two of them outside


def _hits(t):
    return t[:, None] == lax.broadcasted_iota(jnp.int32, (1, 8), 1)


case("element at an index by comparison", lambda x, t: (jax.nn.logsumexp(x, -1) - jnp.where(_hits(t), x, 0).sum(-1), jnp.exp(x) - _hits(t), _hits(t) + x * 2), X, _TARGETS)  # fmt: skip
case("segment sum", lambda x, r: jax.ops.segment_sum(x, r, num_segments=4), X, ROWS[:4])
case("one_hot", lambda i, x: jax.nn.one_hot(jnp.abs(i[:, 0]) % 8, 8) * x, I, X)
case("bincount", lambda i: jnp.bincount(jnp.abs(i[0]), length=10), I, grad=False)

# ---- control flow
# ------------------------------------------------------------------------------------------------------------------
W = f32(3, 8, 8) * 0.3
case("scan", lambda x, w: lax.scan(lambda c, m: (jnp.tanh(c @ m), c.sum(1)), x, w), X, W)
case(
    "scan in reverse with remat",
    lambda x, w: lax.scan(jax.checkpoint(lambda c, m: (jnp.sin(c @ m), c)), x, w, reverse=True),
    X,
    W,
)
case(
    "nested scan",
    lambda x, w: lax.scan(lambda c, m: lax.scan(lambda d, _: (jnp.cos(d @ m), d.sum()), c, None, length=2), x, w),
    X,
    W,
)
case("fori_loop", lambda x: lax.fori_loop(2, 7, lambda i, c: c * 0.9 + i, x), X)
case(
    "loop that counts down",
    lambda x: lax.while_loop(lambda c: c[0] > 0, lambda c: (c[0] - 2, c[1] * 1.1 + c[0]), (7, x))[1],
    X,
    grad=False,
)
case(
    "rows stacked in host memory",
    lambda x: (
        2
        * jax.device_put(
            lax.scan(lambda c, row: (c + row, jax.device_put(c * row, jax.memory.Space.Host)), x[0], x)[1],
            jax.memory.Space.Device,
        )
    ),
    X,
    grad=False,  # jax itself has none for what a scan stacks there
)
case("loop that swaps", lambda x, y: lax.fori_loop(0, 3, lambda i, c: (c[1], c[0] + 1), (x, y)), X, Y)
case(
    "loop index in slices",
    lambda x: lax.fori_loop(0, 6, lambda i, c: c + lax.dynamic_index_in_dim(x, i, 0), jnp.zeros((1, 8))),
    X,
)
case("loop that runs never", lambda x: lax.fori_loop(3, 3, lambda i, c: c + 1, x), X)
case(
    "while on the device",
    lambda x: lax.while_loop(lambda c: c.sum() < 100, lambda c: c * 1.5, jnp.abs(x)),
    X,
    grad=False,
    host_sync=True,
)
case("cond", lambda x: lax.cond(x[0, 0] > 0, lambda a: a * 2, lambda a: jnp.sin(a), x), X)
case("switch", lambda x, i: lax.switch(i[0, 0], [lambda a: a, lambda a: a * 2, lambda a: -a], x), X, I)
case(
    "cond on a loop index",
    lambda x: lax.fori_loop(0, 4, lambda i, c: lax.cond(i % 2 == 0, lambda a: a + 1, lambda a: a * 2, c), x),
    X,
)
case("arithmetic on a loop index", lambda x: lax.fori_loop(0, 5, lambda i, c: c * 0.5 + x[jnp.clip(jnp.minimum(i, 3) - lax.div(i, 2) + lax.rem(i, 3) - jnp.where((i > 1) & ~(i == 3), 1, 0), 0, 3)] * (-i).astype(jnp.float32) + jnp.maximum(i * i - 4, 0), jnp.zeros(8)), X)  # fmt: skip
case("loop index that wraps", lambda i: lax.fori_loop(0, 4, lambda n, c: c ^ (n * 1_000_000_007) + (n - 3).astype(jnp.uint32).astype(jnp.int32) + (n.astype(jnp.uint32) * np.uint32(2654435769)).astype(jnp.int32), i), I, grad=False)  # fmt: skip
case("map", lambda x: lax.map(lambda r: jnp.tanh(r).sum(), x), X)
case("associative_scan", lambda x: lax.associative_scan(jnp.add, x, axis=1), X)
case("optimization_barrier", lambda x: lax.optimization_barrier((x * 2, x + 1)), X)
case(
    "custom_jvp and custom_vjp",
    lambda x: jax.nn.relu(x) + jax.nn.silu(x) + jax.nn.gelu(x) + jax.nn.gelu(x, approximate=False),
    X,
)

# The one fused operator of which a CPU's programs make a part with a helper; the others are in
# test_every_fused_operator_equals_xla_on_a_mesh.
SEGMENTS = np.array([[1] * 5 + [2] * 3, [1] * 4 + [2] * 2 + [0] * 2] * 2, np.int32)
case(
    "attention inside segments",
    lambda x, ids: ops.attention(x, x, x, segment_ids_q=ids, causal=True),
    f32(4, 8, 2, 8),
    SEGMENTS,
)

# ---- random bits
# -------------------------------------------------------------------------------------------------------------------
KEY = np.array([7, 1234567], np.uint32)


def _key(k):
    return jax.random.wrap_key_data(k, impl="threefry2x32")


case("random bits", lambda k: (jax.random.bits(_key(k), (4, 8)), jax.random.bits(_key(k), (5,), jnp.uint8), jax.random.bits(_key(k), (3,), jnp.uint16)), KEY, grad=False)  # fmt: skip
case("random split, fold_in", lambda k: (jax.random.split(k, 3) if k.dtype != np.uint32 else jax.random.key_data(jax.random.split(_key(k), 3)), jax.random.key_data(jax.random.fold_in(_key(k), 5))), KEY, grad=False)  # fmt: skip
case("random uniform, randint, bernoulli", lambda k: (jax.random.uniform(_key(k), (4, 8)), jax.random.randint(_key(k), (4, 8), 0, 1000), jax.random.bernoulli(_key(k), 0.3, (4, 8))), KEY, grad=False)  # fmt: skip
case("random normal, permutation, categorical", lambda k, x: (jax.random.normal(_key(k), (4, 8)), jax.random.permutation(_key(k), 16), jax.random.categorical(_key(k), x)), KEY, X, grad=False, rtol=1e-4)  # fmt: skip
KEYS = R.randint(0, 1 << 31, (4, 2)).astype(np.uint32)
case(
    "a random key a row",
    lambda k: (
        jax.vmap(lambda r: jax.random.uniform(_key(r), (8,)))(k),
        jax.vmap(lambda r: jax.random.bits(_key(r)))(k),
    ),
    KEYS,
    grad=False,
)
case(
    "a random key a row in a product",
    lambda k, x: jnp.sin(x) * jax.vmap(lambda r: jax.random.normal(_key(r), (8,)))(k),
    KEYS,
    X,
    rtol=1e-4,
)
case(
    "a random key for each of a grid",
    lambda k: jax.vmap(jax.vmap(lambda r: jax.random.bits(_key(r), (4, 2)), in_axes=(0,)), in_axes=(0,))(k),
    KEYS.reshape(2, 2, 2),
    grad=False,
)
case("dropout in a scan", lambda k, x: lax.scan(lambda c, kk: (c * jax.random.bernoulli(jax.random.wrap_key_data(kk), 0.5, (4, 8)), None), x, jax.random.key_data(jax.random.split(_key(k), 3)))[0], KEY, X, grad=False)  # fmt: skip
case("rng_bit_generator", lambda k: lax.rng_bit_generator(k, (4, 8)), np.array([7, 123, 9, 4], np.uint32), grad=False)
