"""Element-wise operations: arithmetic, comparison, selection, conversion.

Literals are folded, host integers stay on the host.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from npu_bridge.compiler.codegen.branches import branches
from npu_bridge.compiler.codegen.emitter import Emitter, lowering
from npu_bridge.compiler.codegen.operands import (
    BIT_UNSIGNED,
    BITS,
    HostInt,
    HostTable,
    Literal,
    Operand,
    Tensor,
    torch_dtype,
)
from npu_bridge.compiler.ir import COMPLEX, FLOAT8, FLOATS, UNSIGNED, Op, Type

_NUMPY = {"i1": np.bool_, "i8": np.int8, "ui8": np.uint8, "i16": np.int16, "ui16": np.uint16, "i32": np.int32,
    "ui32": np.uint32,
    "i64": np.int64, "ui64": np.uint64, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32,
    "f64": np.float64}  # fmt: skip

_COMPARE = {"EQ": "==", "NE": "!=", "LT": "<", "LE": "<=", "GT": ">", "GE": ">="}

# name -> torch method; every one has an in-place form with an underscore
_UNARY = {
    "negate": "neg", "exponential": "exp", "exponential_minus_one": "expm1", "log": "log", "log_plus_one": "log1p",
    "tanh": "tanh",
    "logistic": "sigmoid", "rsqrt": "rsqrt", "sqrt": "sqrt", "sine": "sin", "cosine": "cos", "tan": "tan", "abs": "abs",
    "floor": "floor", "ceil": "ceil", "round_nearest_even": "round", "erf": "erf", "erfc": "erfc", "erf_inv": "erfinv",
    "acos": "acos",
    "acosh": "acosh", "asin": "asin", "asinh": "asinh", "atan": "atan", "atanh": "atanh", "cosh": "cosh",
    "sinh": "sinh",
    "lgamma": "lgamma",
    }  # fmt: skip
# name -> helper in runtime/tensor_ops.py
_UNARY_HELPER = {"cbrt": "cbrt", "round_nearest_afz": "round_half_away", "bessel_i1e": "bessel_i1e",
    "digamma": "digamma", "count_leading_zeros": "count_leading_zeros",
    "popcnt": "population_count"}  # fmt: skip
_INFIX = {"add": ("+", "add_"), "subtract": ("-", "sub_"), "multiply": ("*", "mul_"), "divide": ("/", "div_"),
          "and": ("&", "bitwise_and_"), "or": ("|", "bitwise_or_"), "xor": ("^", "bitwise_xor_")}  # fmt: skip
_COMMUTES = {"add", "multiply", "and", "or", "xor", "maximum", "minimum"}


# ---- literals and host integers
# ---------------------------------------------------------------------------------------


def _fold(op: Op, args: list[Operand]) -> float | int | bool | None:
    """Fold to a number if every operand is a literal; None if this operation is not folded."""
    kinds = [_NUMPY.get(a.type.dtype) for a in args]
    out = _NUMPY.get(op.result.dtype)
    if out is None or None in kinds:
        return None
    values = [k(a.value) for k, a in zip(kinds, args)]
    integer = op.result.dtype not in FLOATS
    table = {
        "add": lambda x, y: x + y,
        "subtract": lambda x, y: x - y,
        "multiply": lambda x, y: x * y,
        "maximum": np.maximum,
        "minimum": np.minimum,
        "negate": lambda x: -x,
        "square": lambda x: x * x,
        "and": lambda x, y: x & y,
        "or": lambda x, y: x | y,
        "xor": lambda x, y: x ^ y,
        "not": np.invert,
        "convert": lambda x: x,
        "sqrt": np.sqrt,
        "rsqrt": lambda x: out(1) / np.sqrt(x),
        "select": lambda p, x, y: x if p else y,
        "clamp": lambda lo, x, hi: np.minimum(np.maximum(lo, x), hi),
        "is_finite": np.isfinite,
        "divide": None if integer else (lambda x, y: x / y),
        "shift_left": lambda x, y: x << y if y < BITS[op.result.dtype] else out(0),
        "abs": np.abs,
        "log": np.log,
        "exponential": np.exp,
        "floor": np.floor,
        "power": None if integer else (lambda x, y: x**y),
    }
    function = table.get(op.name)
    if op.name == "compare":
        compare = {
            "EQ": np.equal,
            "NE": np.not_equal,
            "LT": np.less,
            "LE": np.less_equal,
            "GT": np.greater,
            "GE": np.greater_equal,
        }
        function = compare[op.attrs["comparison_direction"]]
    if function is None or op.attrs.get("compare_type") == "TOTALORDER":
        return None
    if op.name == "convert" and integer and not math.isfinite(float(values[0])):
        return None
    with np.errstate(all="ignore"):
        return out(function(*values)).item()


_HOST = {"add": "{} + {}", "subtract": "{} - {}", "multiply": "{} * {}", "maximum": "max({}, {})",
    "minimum": "min({}, {})",
    "select": "{1} if {0} else {2}", "and": "{} and {}", "or": "{} or {}", "not": "not {}",
    "clamp": "min(max({0}, {1}), {2})",
    "remainder": "rt.int_remainder({}, {})", "divide": "rt.int_quotient({}, {})", "negate": "-{}",
    "convert": "{}"}  # fmt: skip

Bounds = tuple[int | None, int | None]


def _bounds(a: Operand) -> Bounds:
    return (int(a.value), int(a.value)) if isinstance(a, Literal) else (a.low, a.high)


def _decide(direction: str, x: Operand, y: Operand) -> bool | None:
    """Decide a comparison by bounds, or return None."""
    (xl, xh), (yl, yh) = _bounds(x), _bounds(y)
    if None in (xl, xh, yl, yh):
        return None
    below, not_above, above, not_below = xh < yl, xh <= yl, xl > yh, xl >= yh
    yes, no = {
        "LT": (below, not_below),
        "LE": (not_above, above),
        "GT": (above, not_above),
        "GE": (not_below, below),
        "EQ": (xl == xh == yl == yh, below or above),
        "NE": (below or above, xl == xh == yl == yh),
    }[direction]
    return True if yes else False if no else None


def _result_bounds(name: str, args: list[Operand]) -> Bounds:
    """Return bounds of the exact result; (None, None) if unknown."""
    if name == "select":
        args = args[1:]
    bounds = [_bounds(a) for a in args]
    if any(None in b for b in bounds):
        return None, None
    lows, highs = [b[0] for b in bounds], [b[1] for b in bounds]
    if name == "select":
        return min(lows), max(highs)
    if name == "negate":
        return -highs[0], -lows[0]
    if name == "convert":
        return bounds[0]
    if name == "clamp":
        return min(max(lows[0], lows[1]), lows[2]), min(max(highs[0], highs[1]), highs[2])
    if name == "remainder":  # the sign of the dividend; x % 0 is x
        most = max(max(map(abs, bounds[1])) - 1, 0) if lows[1] * highs[1] > 0 else max(map(abs, bounds[0]))
        return (-most if lows[0] < 0 else 0), (most if highs[0] > 0 else 0)
    if name == "divide":  # no larger in magnitude than the dividend, except x / 0, which is -1
        most = max(1, *map(abs, bounds[0]))
        return -most, most
    if name in ("maximum", "minimum"):
        choose = max if name == "maximum" else min
        return choose(lows), choose(highs)
    if name == "subtract":
        return lows[0] - highs[1], highs[0] - lows[1]
    if name == "add":
        return lows[0] + lows[1], highs[0] + highs[1]
    corners = [x * y for x in bounds[0] for y in bounds[1]]  # multiply
    return min(corners), max(corners)


def _host_integer(code: str, type: Type, bounds: Bounds) -> HostInt:
    """Wrap a result to its type's range: Python integers do not wrap, XLA's do."""
    bits, unsigned = BITS[type.dtype], type.dtype in UNSIGNED
    low, high = (0, (1 << bits) - 1) if unsigned else (-(1 << bits - 1), (1 << bits - 1) - 1)
    if None not in bounds and low <= bounds[0] and bounds[1] <= high:
        return HostInt(code, type, *bounds)
    return HostInt(f"rt.wrap({code}, {bits}, {unsigned})", type, low, high)


def _host_text(a: Operand) -> str:
    """Return the code of a host integer or literal by value; unsigned numbers are not written as signed bits here."""
    if isinstance(a, HostInt):
        return f"({a.code})"
    value = bool(a.value) if a.type.dtype == "i1" else int(a.value)
    return f"({value})" if value < 0 else str(value)


def _on_host(e: Emitter, op: Op, args: list[Operand]) -> Operand | None:
    dtype = op.result.dtype
    if dtype in FLOATS or any(isinstance(a, Tensor) or a.type.dtype in FLOATS for a in args):
        return None
    if (op.name in ("and", "or", "not") and dtype != "i1") or op.name not in (*_HOST, "compare"):
        return None
    if op.name == "compare" and (decided := _decide(op.attrs["comparison_direction"], *args)) is not None:
        return Literal(decided, op.result.type)
    if op.name == "select" and isinstance(args[0], Literal):
        return args[1] if args[0].value else args[2]
    if op.name in ("add", "subtract") and isinstance(args[1], Literal) and args[1].value == 0:
        return args[0]
    if op.name == "clamp" and _decide("LE", args[0], args[1]) and _decide("LE", args[1], args[2]):
        return args[1]
    text = [_host_text(a) for a in args]
    if op.name == "compare":
        return e.host(
            HostInt(f"{text[0]} {_COMPARE[op.attrs['comparison_direction']]} {text[1]}", op.result.type, 0, 1)
        )
    code = _HOST[op.name].format(*text)
    if dtype == "i1" or any(a.type.dtype == "i1" for a in args if op.name == "convert"):
        if op.name not in ("and", "or", "not", "select", "convert"):
            return None
        return e.host(
            HostInt(
                f"int({code})" if dtype != "i1" else f"bool({code})" if op.name == "convert" else code,
                op.result.type,
                0,
                1,
            )
        )
    return e.host(_host_integer(code, op.result.type, _result_bounds(op.name, args)))


def _known(e: Emitter, op: Op, args: list[Operand]) -> Operand | None:
    if all(isinstance(a, Literal) for a in args):
        value = _fold(op, args)
        return None if value is None else Literal(value, op.result.type)
    return _on_host(e, op, args) if any(isinstance(a, HostInt) for a in args) else None


def _at_least_one_tensor(e: Emitter, args: list[Operand], first: int = 0) -> list[Operand]:
    """Turn host scalars of a shaped operation into tensors: torch needs at least one tensor operand."""
    args = [e.tensor(a) if isinstance(a, HostInt) else a for a in args]
    if not any(isinstance(a, Tensor) for a in args):
        args[first] = e.tensor(args[first])
    return args


def _may_overwrite(op: Op, operand: Operand) -> bool:
    return isinstance(operand, Tensor) and operand.type == op.result.type


# ---- unary
# ---------------------------------------------------------------------------------------------------------------


@lowering(*_UNARY)
def unary(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    if (known := _known(e, op, args)) is not None:
        return known
    x = e.tensor(args[0])
    method = _UNARY[op.name]
    if op.name == "abs" and x.type.dtype in COMPLEX:
        return e.emit(f"{x.name}.abs()", [x], op.result.type, kind="abs")
    if op.name == "abs" and x.type.dtype in BIT_UNSIGNED:
        return x
    inplace = [(x, f"{x.name}.{method}_()")] if x.type == op.result.type else []
    return e.emit(f"{x.name}.{method}()", [x], op.result.type, inplace=inplace, kind=op.name)


@lowering(*_UNARY_HELPER)
def unary_helper(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x = e.tensor(args[0])
    return e.emit(f"T.{_UNARY_HELPER[op.name]}({x.name})", [x], op.result.type, kind=op.name)


@lowering("not")
def logical_not(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    if (known := _known(e, op, args)) is not None:
        return known
    x = e.tensor(args[0])
    return e.emit(f"~{x.name}", [x], op.result.type, inplace=[(x, f"{x.name}.bitwise_not_()")], kind="not")


@lowering("sign")
def sign(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x = e.tensor(args[0])
    if x.type.dtype in COMPLEX:
        return e.emit(f"torch.sgn({x.name})", [x], op.result.type, kind="sign")
    if x.type.dtype in FLOATS:  # torch.sign gives 0 for NaN, XLA gives NaN
        return e.emit(f"T.sign({x.name})", [x], op.result.type, kind="sign")
    code = (
        f"({x.name} != 0).to({torch_dtype(x.type.dtype)})" if x.type.dtype in BIT_UNSIGNED else f"torch.sign({x.name})"
    )
    return e.emit(code, [x], op.result.type, kind="sign")


@lowering("is_finite")
def is_finite(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    if (known := _known(e, op, args)) is not None:
        return known
    x = e.tensor(args[0])
    return e.emit(f"torch.isfinite({x.name})", [x], op.result.type, kind="is_finite")


@lowering("complex")
def complex_(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x, y = (e.tensor(a) for a in args)
    return e.emit(f"torch.complex({x.name}, {y.name})", [x, y], op.result.type, kind="complex")


@lowering("real", "imag")
def part(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    """Return the real or imaginary part as a view. A real number's imaginary part is zero."""
    x = e.tensor(args[0])
    if x.type.dtype not in COMPLEX:
        return x if op.name == "real" else Literal(0.0, op.result.type)
    return e.emit(f"{x.name}.{op.name}", [x], op.result.type, alias=x, kind=op.name)


@lowering("reduce_precision")
def reduce_precision(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x = e.tensor(args[0])
    bits = (op.attrs["exponent_bits"], op.attrs["mantissa_bits"])
    exact = {(8, 7): "torch.bfloat16", (5, 10): "torch.float16", (8, 23): "torch.float32"}
    if exact.get(bits) == torch_dtype(x.type.dtype):
        return x
    if bits in exact:
        return e.emit(
            f"{x.name}.to({exact[bits]}).to({torch_dtype(x.type.dtype)})", [x], op.result.type, kind="reduce_precision"
        )
    return e.emit(f"T.reduce_precision({x.name}, {bits[0]}, {bits[1]})", [x], op.result.type, kind="reduce_precision")


# ---- binary
# --------------------------------------------------------------------------------------------------------------


def _is_number(operand: Operand, value: float) -> bool:
    return (
        isinstance(operand, Literal)
        and operand.value == value
        and not isinstance(operand.value, complex)
        and not (value == 0 and math.copysign(1, float(operand.value)) < 0)
    )


@lowering("add", "subtract", "multiply", "and", "or", "xor")
def infix(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    if (known := _known(e, op, args)) is not None:
        return known
    integer = op.result.dtype not in FLOATS
    x, y = _at_least_one_tensor(e, args)
    if op.name == "multiply" and _is_number(y, 1):
        return x
    if op.name == "multiply" and _is_number(x, 1):
        return y
    if integer and op.name in ("add", "subtract") and _is_number(y, 0):
        return x
    if op.result.dtype == "i1" and op.name in ("add", "multiply"):  # StableHLO: or / and
        sign, method = _INFIX["or" if op.name == "add" else "and"]
    else:
        sign, method = _INFIX[op.name]
    inplace = []
    if _may_overwrite(op, x):
        inplace.append((x, f"{x.name}.{method}({e.text(y)})"))
    if op.name in _COMMUTES and _may_overwrite(op, y):
        inplace.append((y, f"{y.name}.{method}({e.text(x)})"))
    return e.emit(f"{e.text(x)} {sign} {e.text(y)}", [x, y], op.result.type, inplace=inplace, kind=op.name)


@lowering("divide")
def divide(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    if (known := _known(e, op, args)) is not None:
        return known
    x, y = _at_least_one_tensor(e, args)
    if op.result.dtype in FLOATS:
        inplace = [(x, f"{x.name}.div_({e.text(y)})")] if _may_overwrite(op, x) else []
        return e.emit(f"{e.text(x)} / {e.text(y)}", [x, y], op.result.type, inplace=inplace, kind="divide")
    return _integer_division(e, op, x, y, "divide")


@lowering("remainder")
def remainder(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    if (known := _known(e, op, args)) is not None:
        return known
    x, y = _at_least_one_tensor(e, args)
    if op.result.dtype in FLOATS:
        x, y = e.tensor(x), e.tensor(y)
        return e.emit(f"T.float_remainder({x.name}, {y.name})", [x, y], op.result.type, kind="remainder")
    return _integer_division(e, op, x, y, "remainder")


def _integer_division(e: Emitter, op: Op, x: Operand, y: Operand, what: str) -> Operand:
    unsigned = op.result.dtype in BIT_UNSIGNED
    # A literal divisor other than 0 and -1 is safe. Otherwise division by zero and of the smallest number by -1 are
    # defined in StableHLO, while torch raises or traps.
    if not unsigned and isinstance(y, Literal) and y.value > 0:
        x = e.tensor(x)
        code = (
            f"torch.div({x.name}, {e.text(y)}, rounding_mode='trunc')"
            if what == "divide"
            else f"torch.fmod({x.name}, {e.text(y)})"
        )
        return e.emit(code, [x], op.result.type, kind=what)
    x, y = e.tensor(x), e.tensor(y)
    helper = f"{'unsigned' if unsigned else 'integer'}_{what}"
    return e.emit(f"T.{helper}({x.name}, {y.name})", [x, y], op.result.type, kind=what)


@lowering("maximum", "minimum")
def extreme(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    if (known := _known(e, op, args)) is not None:
        return known
    x, y = _at_least_one_tensor(e, args)
    if op.result.dtype == "i1":
        return e.emit(
            f"{e.text(x)} {'|' if op.name == 'maximum' else '&'} {e.text(y)}", [x, y], op.result.type, kind=op.name
        )
    if op.result.dtype in BIT_UNSIGNED:
        x, y = e.tensor(x), e.tensor(y)
        return e.emit(f"T.unsigned_{op.name}({x.name}, {y.name})", [x, y], op.result.type, kind=op.name)
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return e.emit(f"torch.{op.name}({x.name}, {y.name})", [x, y], op.result.type, kind=op.name)
    t, number = (x, y) if isinstance(x, Tensor) else (y, x)
    if t.type.dtype in FLOATS and math.isnan(number.value):
        return Literal(math.nan, op.result.type)
    method = "clamp_min" if op.name == "maximum" else "clamp_max"  # NaN goes through, as in XLA
    return e.emit(
        f"{t.name}.{method}({e.text(number)})",
        [t],
        op.result.type,
        inplace=[(t, f"{t.name}.{method}_({e.text(number)})")],
        kind=op.name,
    )


@lowering("power")
def power(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    if (known := _known(e, op, args)) is not None:
        return known
    x, y = _at_least_one_tensor(e, args)
    if op.result.dtype not in FLOATS:
        e.problem(op, "power of integers, which jax writes as multiplications; use lax.integer_pow")
        return Literal(0, op.result.type)
    if isinstance(y, Literal) and y.value in (0.5, -0.5):  # torch takes a square root, which is NaN for minus infinity
        x, y = e.tensor(x), e.tensor(Literal(y.value, Type((), y.type.dtype)))
    return e.emit(f"torch.pow({e.text(x)}, {e.text(y)})", [x, y], op.result.type, kind="power")


@lowering("atan2", "next_after", "polygamma", "zeta")
def binary_helper(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x, y = (e.tensor(a) for a in args)
    function = {"atan2": "torch.atan2", "next_after": "torch.nextafter", "polygamma": "T.polygamma", "zeta": "T.zeta"}[
        op.name
    ]
    return e.emit(f"{function}({x.name}, {y.name})", [x, y], op.result.type, kind=op.name)


@lowering("shift_left", "shift_right_logical", "shift_right_arithmetic")
def shift(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    if (known := _known(e, op, args)) is not None:
        return known
    x, y = e.tensor(args[0]), args[1]
    bits = BITS[op.result.dtype]
    if isinstance(y, Literal) and 0 <= y.value < bits:
        n = int(y.value)
        if n == 0:
            return x
        if op.name == "shift_left":
            return e.emit(
                f"{x.name} << {n}",
                [x],
                op.result.type,
                inplace=[(x, f"{x.name}.bitwise_left_shift_({n})")],
                kind=op.name,
            )
        if (
            op.name == "shift_right_arithmetic" and op.result.dtype == "ui8"
        ):  # shifts in copies of the top bit, as if signed
            return e.emit(f"({x.name}.view(torch.int8) >> {n}).view(torch.uint8)", [x], op.result.type, kind=op.name)
        if op.name == "shift_right_arithmetic" or op.result.dtype == "ui8":
            return e.emit(f"{x.name} >> {n}", [x], op.result.type, kind=op.name)
        mask = (1 << (bits - n)) - 1  # mask the sign bits that were shifted in
        return e.emit(f"({x.name} >> {n}) & {mask}", [x], op.result.type, kind=op.name)
    y = e.tensor(y)
    return e.emit(f"T.{op.name}({x.name}, {y.name}, {bits})", [x, y], op.result.type, kind=op.name)


# ---- comparison, selection, conversion
# -----------------------------------------------------------------------------------


@lowering("compare")
def compare(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    if (known := _known(e, op, args)) is not None:
        return known
    x, y = _at_least_one_tensor(e, args)
    direction = op.attrs["comparison_direction"]
    if op.attrs.get("compare_type") == "TOTALORDER" and x.type.dtype in FLOATS:
        x, y = e.tensor(x), e.tensor(y)
        code = f"T.total_order({x.name}) {_COMPARE[direction]} T.total_order({y.name})"
        return e.emit(code, [x, y], op.result.type, kind="compare")
    if x.type.dtype in BIT_UNSIGNED and direction not in ("EQ", "NE"):
        x, y = e.tensor(x), e.tensor(y)
        code = f"T.unsigned_order({x.name}) {_COMPARE[direction]} T.unsigned_order({y.name})"
        return e.emit(code, [x, y], op.result.type, kind="compare")
    if not isinstance(x, Tensor):  # number on the left: swap, as Python would
        x, y = y, x
        direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    return e.emit(f"{e.text(x)} {_COMPARE[direction]} {e.text(y)}", [x, y], op.result.type, kind="compare")


@lowering("select")
def select(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    p, x, y = args
    if isinstance(p, Literal):
        return x if p.value else y
    if isinstance(p, HostInt):
        if (known := _on_host(e, op, args)) is not None:
            return known
        return branches(e, p, [([], y), ([], x)], op)
    x, y = (e.tensor(v) if isinstance(v, HostInt) else v for v in (x, y))
    inplace = []
    if not isinstance(x, Tensor) and not isinstance(y, Tensor):
        # Two numbers: make one a 0-d tensor, because torch would choose its default dtype.
        x = e.tensor(Literal(x.value, Type((), x.type.dtype)))
    if isinstance(y, Literal) and isinstance(x, Tensor) and x.type == op.result.type and p.type.shape == x.type.shape:
        inplace = [(x, f"{x.name}.masked_fill_(~{p.name}, {e.text(y)})")]
    elif isinstance(x, Literal) and isinstance(y, Tensor) and y.type == op.result.type and p.type.shape == y.type.shape:
        inplace = [(y, f"{y.name}.masked_fill_({p.name}, {e.text(x)})")]
    return e.emit(
        f"torch.where({p.name}, {e.text(x)}, {e.text(y)})", [p, x, y], op.result.type, inplace=inplace, kind="select"
    )


@lowering("clamp")
def clamp(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    if (known := _known(e, op, args)) is not None:
        return known
    low, x, high = args
    x = e.tensor(x)
    if op.result.dtype in BIT_UNSIGNED:
        low, high = e.tensor(low), e.tensor(high)
        code = f"T.unsigned_minimum(T.unsigned_maximum({low.name}, {x.name}), {high.name})"
    elif isinstance(low, Literal) and isinstance(high, Literal):
        return e.emit(
            f"torch.clamp({x.name}, {e.text(low)}, {e.text(high)})", [x], op.result.type,
            inplace=[(x, f"{x.name}.clamp_({e.text(low)}, {e.text(high)})")], kind="clamp",
        )  # fmt: skip
    else:
        low, high = e.tensor(low), e.tensor(high)
        code = f"torch.minimum(torch.maximum({low.name}, {x.name}), {high.name})"
    return e.emit(code, [low, x, high], op.result.type, kind="clamp")


@lowering("convert")
def convert(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    if (known := _known(e, op, args)) is not None:
        return known
    if isinstance(args[0], HostTable):
        if args[0].type.dtype == op.result.dtype:
            return args[0]
        args = [e.tensor(args[0])]
    x = e.tensor(args[0])
    source, target = x.type.dtype, op.result.dtype
    if source == target:
        return x
    if target == "i1":
        code = f"{x.name} != 0"
    elif target in FLOAT8:
        wide = f"T.unsigned_to_float({x.name}, {BITS[source]}, torch.float32)" if source in BIT_UNSIGNED else x.name
        code = f"T.to_float8({wide}, {torch_dtype(target)})"
    elif source in BIT_UNSIGNED and target in FLOATS:
        code = f"T.unsigned_to_float({x.name}, {BITS[source]}, {torch_dtype(target)})"
    elif source in BIT_UNSIGNED and BITS.get(target, 0) > BITS[source]:
        code = f"T.widen_unsigned({x.name}, {BITS[source]}).to({torch_dtype(target)})"
    elif source in BITS and target in BITS and torch_dtype(source) == torch_dtype(target):
        return e.emit(
            x.name, [x], op.result.type, alias=x, kind="convert"
        )  # reinterpret the bits with the other signedness
    elif source in COMPLEX and target not in COMPLEX:
        code = f"{x.name}.real.to({torch_dtype(target)}, copy=True)"
    elif source in FLOATS and target not in FLOATS:
        code = f"T.float_to_integer({x.name}, {torch_dtype(target)}, {target in BIT_UNSIGNED})"
    else:
        code = f"{x.name}.to({torch_dtype(target)})"
    return e.emit(code, [x], op.result.type, kind="convert")


@lowering("bitcast_convert")
def bitcast(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x = e.tensor(args[0])
    target = torch_dtype(op.result.dtype)
    code = x.name if target == torch_dtype(x.type.dtype) else f"{x.name}.contiguous().view({target})"
    if len(op.result.shape) < len(x.type.shape):
        code += ".squeeze(-1)"
    elif len(op.result.shape) > len(x.type.shape):
        code = f"{x.name}.unsqueeze(-1).contiguous().view({target})"
    return e.emit(code, [x], op.result.type, alias=x, kind="bitcast_convert")
