"""Operators over dtypes, edge values and edge shapes against XLA: one program per group, every result compared by name,
three calls.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import npu_bridge
from npu_bridge import jaxcompat
from tests.bridge.harness import CALLS, assert_close

TOLERANCE = {"float32": 3e-5, "bfloat16": 2e-2, "float16": 4e-3}  # a few roundings of each
WHOLE, UNSIGNED = ("int8", "int32", "uint8", "uint16", "uint32"), ("uint8", "uint16", "uint32")
FLOATS = ("float32", "bfloat16")
EMPTY_OR_ONE = ((0, 3), (3, 0), (1, 4))


@functools.cache
def values(dtype: str) -> np.ndarray:
    """Zeros of both signs, limits, infinities, NaN, ties of rounding; of integers those around zero, half and the
    limits.
    """
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        f = jnp.finfo(dtype)
        some = [
            0.0,
            -0.0,
            1,
            -1,
            0.5,
            -0.5,
            2.5,
            -2.5,
            3.5,
            np.inf,
            -np.inf,
            np.nan,
            float(f.max),
            float(f.min),
            float(f.tiny),
            100,
            -7,
            0.1,
        ]
        return np.array(some, np.float64).astype(dtype)
    i = jnp.iinfo(dtype)
    below = [-1, -2, -7, i.min, i.min + 1, -100] if i.min < 0 else []
    return np.array([0, 1, 2, 3, 5, 7, 33, 100, i.max // 2 + 1, i.max - 1, i.max, *below]).astype(dtype)


def pairs(dtype):
    x, y = np.meshgrid(values(dtype), values(dtype), indexing="ij")
    return x.ravel(), y.ravel()


def filled(dtype, *shape):
    return np.resize(np.roll(values(dtype), 3), shape) if np.prod(shape) else np.zeros(shape, values(dtype).dtype)


def compare(functions, *args, dtype="float32"):
    """All functions in one program, called three times: the arguments, then moved on by one and by two elements."""

    def run(*a):
        return {name: f(*a) for name, f in functions.items()}

    ours, theirs = npu_bridge.jit(run), jax.jit(run)
    for call in range(CALLS):
        moved = [np.roll(a, call) if a.dtype.kind not in "iu" or dtype in WHOLE else a for a in args]
        want, got = theirs(*moved), ours(*moved)
        for name in functions:
            for a, b in zip(jax.tree.leaves(want[name]), jax.tree.leaves(got[name]), strict=True):
                a, b = np.asarray(a), np.asarray(b)
                rtol = TOLERANCE.get(str(a.dtype), 0.07)
                assert_close(
                    [np.nan_to_num(a, posinf=3e38, neginf=-3e38) if a.dtype == np.float32 else a],
                    [np.nan_to_num(b, posinf=3e38, neginf=-3e38) if b.dtype == np.float32 else b],
                    rtol,
                    rtol / 30,
                    f"{name}, {dtype}, call {call}",
                )
                if a.dtype.kind == "f":
                    assert np.array_equal(np.isnan(a), np.isnan(b)), (
                        f"{name}, {dtype}, call {call}: NaN expected {a}, found {b}"
                    )


UNARY = (
    "exp expm1 exp2 log log1p sqrt rsqrt cbrt sin cos tan tanh sinh cosh asin acos atan asinh acosh atanh logistic erf "
    "erfc erf_inv lgamma digamma bessel_i0e bessel_i1e floor ceil is_finite sign neg abs square"
).split()
BINARY = "add sub mul div rem max min eq ne lt le gt ge".split()
ORDERS = {name: getattr(jaxcompat.total_order_primitives(), f"{name}_p").bind for name in ("eq_to", "lt_to", "le_to")}


@pytest.mark.parametrize("dtype", FLOATS)
def test_float_operators_at_edge_values(dtype):
    unary = {name: getattr(lax, name) for name in UNARY}
    unary |= {f"to the power {n}": functools.partial(lax.integer_pow, y=n) for n in (-2, -1, 0, 2, 3)}
    unary |= {
        "round even": lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN),
        "round away": lax.round,
        "5, 2 bits": lambda x: lax.reduce_precision(x, 5, 2),
    }
    numbers = {}
    for number in (0.0, -0.0, 0.5, np.inf):
        for name in ("add", "mul", "div", "rem", "max", "min", "pow", "lt", "atan2"):
            numbers[f"{name}(x, {number})"] = lambda x, f=getattr(lax, name), n=number: f(x, jnp.full_like(x, n))
            numbers[f"{name}({number}, x)"] = lambda x, f=getattr(lax, name), n=number: f(jnp.full_like(x, n), x)
    compare(unary | numbers, values(dtype), dtype=dtype)
    compare({name: getattr(lax, name) for name in (*BINARY, "pow", "atan2")} | ORDERS, *pairs(dtype), dtype=dtype)


@pytest.mark.parametrize("dtype", WHOLE)
def test_integer_operators_at_edge_values(dtype):
    unary = {name: getattr(lax, name) for name in ("neg", "sign", "bitwise_not", "clz", "population_count", "square")}
    for number in (1, 7, int(jnp.iinfo(dtype).max)):
        for name in (*BINARY, "shift_left", "shift_right_logical", "shift_right_arithmetic"):
            unary[f"{name}(x, {number})"] = lambda x, f=getattr(lax, name), n=number: f(x, jnp.full_like(x, n))
            unary[f"{name}({number}, x)"] = lambda x, f=getattr(lax, name), n=number: f(jnp.full_like(x, n), x)
    compare(unary, values(dtype), dtype=dtype)
    names = (
        *BINARY,
        "bitwise_and",
        "bitwise_or",
        "bitwise_xor",
        "shift_left",
        "shift_right_logical",
        "shift_right_arithmetic",
    )
    compare({name: getattr(lax, name) for name in names}, *pairs(dtype), dtype=dtype)


def test_every_dtype_converts_to_every_other_at_edge_values():
    dtypes = (
        "float32",
        "bfloat16",
        "float16",
        "float8_e4m3fn",
        "float8_e5m2",
        "int8",
        "int32",
        "uint8",
        "uint16",
        "uint32",
        "bool",
    )
    for source in dtypes[:-1]:
        x = values(source if not source.startswith("float8") else "bfloat16").astype(jnp.dtype(source))
        compare({f"{source} to {d}": lambda x, d=d: x.astype(d) for d in dtypes}, x, dtype=source)


@pytest.mark.parametrize("dtype", ("float32", "int8", "uint32"))
def test_reductions_and_orders_of_nothing_one_and_edge_values(dtype):
    for shape in ((3, 5), *EMPTY_OR_ONE):
        x, functions = filled(dtype, *shape), {}
        for axis in (0, 1):
            if shape[axis]:
                functions |= {
                    f"{n} {axis}": functools.partial(getattr(jnp, n), axis=axis)
                    for n in ("max", "min", "argmax", "argmin")
                }
                functions |= {
                    f"cum{n} {axis}": functools.partial(getattr(lax, f"cum{n}"), axis=axis, reverse=bool(axis))
                    for n in ("max", "min")
                }
                functions[f"narrow argmax {axis}"] = functools.partial(lax.argmax, axis=axis, index_dtype=np.uint8)
                functions[f"top_k {axis}"] = functools.partial(lax.top_k, k=1, axis=axis)
            functions |= {
                f"{n} of nothing {axis}": lambda x, n=n, axis=axis: getattr(jnp, n)(
                    x[:0] if axis == 0 else x[:, :0], axis=axis, initial=jnp.ones((), x.dtype)
                )
                for n in ("max", "min")
            }
            functions |= {
                f"{n} {axis}": functools.partial(getattr(jnp, n), axis=axis)
                for n in ("sum", "any", "all", "sort", "argsort", "count_nonzero")
            }
            if dtype in FLOATS and shape == (1, 4):
                functions[f"logsumexp {axis}"] = functools.partial(jax.nn.logsumexp, axis=axis)
        compare(functions, x, dtype=dtype)
    searches = {
        f"{m} {side}": lambda a, q, m=m, side=side: jnp.searchsorted(jnp.sort(a), q, side=side, method=m)
        for m in ("scan", "sort", "compare_all")
        for side in ("left", "right")
    }
    compare(searches, values(dtype), values(dtype), dtype=dtype)
    compare(
        {
            "top_k of all": lambda x: lax.top_k(x, x.shape[0]),
            "its signs": lambda x: jnp.signbit(lax.top_k(x, 4)[0].astype(jnp.float32)),
        },
        values(dtype)[:11],
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", ("float32", "uint16", "bool"))
def test_gather_and_scatter_by_every_kind_of_index(dtype):
    x = filled("uint8" if dtype == "bool" else dtype, 300, 2).astype(dtype)
    taken = dict(
        index=lambda x, i: x[i],
        scalar=lambda x, i: x[i[1]],
        clip=lambda x, i: jnp.take(x, i, axis=0, mode="clip"),
        wrap=lambda x, i: jnp.take(x, i, axis=0, mode="wrap"),
        fill=lambda x, i: x.at[i].get(mode="fill", fill_value=1),
        slice=lambda x, i: lax.dynamic_slice(x, (i[1], i[0]), (2, 2)),
        constant=lambda x, i: (x[2], x[np.int32(3)], jnp.take(x[:, 0], i[0])),
        past_the_end=lambda x, i: lax.dynamic_slice(x, (i[3], i[0]), (2, 1)),
        update=lambda x, i: lax.dynamic_update_slice(x, x[:3], (i[1], i[0])),
    )
    for index in ("int8", "uint8", "uint16", "uint32"):
        top = int(jnp.iinfo(index).max)
        compare(taken, x[: min(top, 300)], np.array([0, min(top, 200), 2, top], index))
    small, i, u = x[:5], np.array([0, 2, 2, 4, -1, 7], np.int32), np.roll(x[:6], 1)
    ways = ("set", "max", "min") + (() if dtype == "bool" else ("add", "multiply", "subtract"))
    written = {
        f"{way} {mode}": lambda x, i, u, way=way, mode=mode: getattr(x.at[i], way)(u, mode=mode)
        for way in ways
        for mode in (None, "drop")
    }
    written |= {
        f"{n} of segments": lambda x, i, u, n=n: getattr(jax.ops, f"segment_{n}")(u, i, num_segments=6)
        for n in (("max", "min") if dtype == "bool" else ("sum", "prod", "max", "min"))
    }
    written["body of its own"] = lambda x, i, u: x.at[i].apply(lambda v: ~v if v.dtype == bool else v * v)
    compare(
        written,
        np.nan_to_num(small.astype(np.float32), posinf=9, neginf=-9).clip(0, 60000).astype(dtype)
        if dtype == "float32"
        else small,
        i,
        u[:, :2] if dtype != "float32" else np.ones((6, 2), np.float32) * 3,
    )


@pytest.mark.parametrize("dtype", ("float32", "int32", "uint32"))
def test_windows_with_any_body_leave_their_padding_out(dtype):
    x = np.arange(-9 if dtype != "uint32" else 0, 15 if dtype != "uint32" else 24, dtype=dtype).reshape(4, 6)
    zero, one = np.zeros((), dtype), np.ones((), dtype)
    bodies = {
        "add": (lax.add, zero),
        "max": (lax.max, x.min()),
        "min": (lax.min, x.max()),
        "mul": (lax.mul, one),
        "a + b + ab": (lambda a, b: a + b + a * b, zero),
        "from one": (lax.add, one),
    }
    functions = {}
    for padding in ("VALID", "SAME", ((1, 2), (0, 3))):
        for name, (body, start) in bodies.items():
            functions[f"{name} {padding}"] = lambda x, b=body, s=start, p=padding: lax.reduce_window(
                x, s, b, (2, 3), (1, 2), p
            )
    functions["of nothing"] = lambda x: lax.reduce_window(x[:0], zero, lax.add, (2, 2), (1, 1), "SAME")
    if dtype == "float32":

        def window(x):
            return lax.reduce_window(x * 0.1, np.float32(-np.inf), jnp.logaddexp, (2, 3), (1, 2), "SAME")

        functions["tangent of a body of its own"] = lambda x: jax.jvp(window, (x,), (jnp.cos(x),))
    compare(functions, x, dtype=dtype)


def test_products_and_convolutions_of_every_dtype():
    whole = np.resize(np.arange(-3, 4), (3, 4))
    for dtype in ("bool", "int8", "uint32", "bfloat16", "float8_e5m2"):
        a = np.abs(whole).astype(jnp.dtype(dtype)) if dtype in (*UNSIGNED, "bool") else whole.astype(jnp.dtype(dtype))
        x, k = np.resize(a, (2, 3, 6, 6)), np.resize(a, (4, 3, 3, 3))
        compare(
            {
                "matmul": lambda a, x, k: a @ a.T,
                "batched": lambda a, x, k: jnp.einsum("bij,bkj->bik", a[None], a[None]),
                "of nothing": lambda a, x, k: a[:, :0] @ a[:0, :3],
                "convolution": lambda a, x, k: lax.conv_general_dilated(
                    x, k, (1, 1), ((1, 1), (2, 2)), lhs_dilation=(1, 2), rhs_dilation=(2, 1)
                ),
                "by groups": lambda a, x, k: lax.conv_general_dilated(
                    x, k[:3, :1], (1, 1), "VALID", feature_group_count=3
                ),
            },
            a,
            x,
            k,
            dtype="int8",
        )


def test_factorisations_of_empty_matrices():
    for shape in ((0, 0), (2, 0, 0), (0, 3, 3), (3, 0)):
        functions = {"lu": jax.scipy.linalg.lu} if len(shape) < 3 else {"lu": jax.lax.linalg.lu}
        if shape[-1] == shape[-2]:
            functions |= {
                "solve": lambda a: jnp.linalg.solve(a, a),
                "det": jnp.linalg.det,
                "cholesky": jnp.linalg.cholesky,
            }
        compare(
            functions, np.zeros(shape, np.float32) + (np.eye(3, dtype=np.float32) if shape[-1] == shape[-2] == 3 else 0)
        )


def test_numbered_elements_of_every_dtype():
    for dtype in (np.complex64, ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, np.uint32, np.int8):
        compare(
            {str(dtype): lambda x: (lax.iota(dtype, 5) * x, lax.broadcasted_iota(dtype, (3, 5), 1))},
            np.arange(5).astype(dtype),
        )


def test_8_bit_floats_compute_like_xla():
    for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        x = np.array([0.0, 1, -1, 0.5, 3.5, 100, -7, 0.1, 240], dtype)
        functions = dict(
            sum=lambda x: (x + x, x * x, x - x[::-1], x * 2, -x, abs(x)),
            order=lambda x: (x < x[::-1], jnp.maximum(x, x[::-1]), jnp.sort(x), jnp.argmax(x)),
            moves=lambda x: (
                x[::-1],
                x.reshape(3, 3).T,
                jnp.concatenate([x, x]),
                jnp.pad(x, 1),
                x[jnp.array([1, 2])],
                x.at[0].set(1),
                jnp.where(x > 0, x, 0),
            ),
            sums=lambda x: x[:4].sum(),
            constant=lambda x: x[:4] + np.array([1, 2, 3, 4], dtype),
            loop=lambda x: lax.fori_loop(0, 3, lambda i, c: c * x, x),
        )
        compare(functions, x)
