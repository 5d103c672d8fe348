"""Arithmetic whose corner cases differ between StableHLO and torch. Unsigned integers are bits of signed ones."""

from __future__ import annotations

import torch

_MIN = {torch.int8: -(1 << 7), torch.int16: -(1 << 15), torch.int32: -(1 << 31), torch.int64: -(1 << 63)}
_WIDTH = {torch.int8: 8, torch.uint8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64}

# ---- unsigned integers
# ------------------------------------------------------------------------------------------------


def unsigned_order(x: torch.Tensor) -> torch.Tensor:
    """Map unsigned bits to signed numbers of the same order: flips the top bit."""
    return x ^ _MIN[x.dtype]


def unsigned_index(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Convert unsigned bits to an int64 index: 64-bit values above 2^63 become the largest index."""
    return widen_unsigned(x, bits) if bits < 64 else torch.where(x < 0, ~_MIN[torch.int64], x)


def widen_unsigned(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned bits as an int64 of the same value. 64-bit values above 2^63 do not fit and stay negative."""
    return x.to(torch.int64) & ((1 << bits) - 1) if bits < 64 else x


def unsigned_maximum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.where(unsigned_order(x) >= unsigned_order(y), x, y)


def unsigned_minimum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.where(unsigned_order(x) <= unsigned_order(y), x, y)


def _unsigned_quotient(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x / y for y != 0, both unsigned bits of one width."""
    bits = _WIDTH[x.dtype]
    if bits < 64:
        return torch.div(widen_unsigned(x, bits), widen_unsigned(y, bits), rounding_mode="floor").to(x.dtype)
    # No wider integer holds a uint64. With the divisor's top bit set the quotient is 0 or 1. Otherwise divide x / 2,
    # which is not negative, double, and correct by at most one.
    half = (x >> 1) & ~_MIN[torch.int64]
    small = torch.where(y > 0, y, 1)
    quotient = torch.div(half, small, rounding_mode="floor") << 1
    rest = x - quotient * small
    quotient = quotient + (unsigned_order(rest) >= unsigned_order(small)).to(torch.int64)
    return torch.where(y > 0, quotient, (unsigned_order(x) >= unsigned_order(y)).to(torch.int64))


def unsigned_divide(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """All bits set where the divisor is zero, as in XLA."""
    zero = y == 0
    return torch.where(zero, -1, _unsigned_quotient(x, torch.where(zero, 1, y)))


def unsigned_remainder(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x where the divisor is zero, as in XLA."""
    zero = y == 0
    divisor = torch.where(zero, 1, y)
    return torch.where(zero, x, x - _unsigned_quotient(x, divisor) * divisor)


# ---- signed integers
# ----------------------------------------------------------------------------------------------------


def integer_divide(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Round to zero. x / 0 is -1 and the smallest number / -1 is itself, as in XLA; torch raises or traps."""
    zero, minus = y == 0, y == -1 if y.dtype != torch.uint8 else torch.zeros_like(y, dtype=torch.bool)
    quotient = torch.div(x, torch.where(zero | minus, 1, y), rounding_mode="trunc")
    all_bits = 255 if x.dtype == torch.uint8 else -1
    return torch.where(zero, all_bits, torch.where(minus, -x, quotient))


def integer_remainder(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Sign of the dividend; x % 0 is x, x % -1 is 0."""
    zero, minus = y == 0, y == -1 if y.dtype != torch.uint8 else torch.zeros_like(y, dtype=torch.bool)
    rest = torch.fmod(x, torch.where(zero | minus, 1, y))
    return torch.where(zero, x, torch.where(minus, 0, rest))


def shift_left(x: torch.Tensor, y: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifts by the width or more give 0; C leaves them undefined."""
    inside = (y >= 0) & (y < bits)
    return torch.where(inside, x << torch.where(inside, y, 0), 0)


def shift_right_arithmetic(x: torch.Tensor, y: torch.Tensor, bits: int) -> torch.Tensor:
    if x.dtype == torch.uint8:
        return (x.view(torch.int8) >> torch.where(y < bits, y, bits - 1).to(torch.int8)).view(torch.uint8)
    return x >> torch.where((y >= 0) & (y < bits), y, bits - 1)


def shift_right_logical(x: torch.Tensor, y: torch.Tensor, bits: int) -> torch.Tensor:
    if x.dtype == torch.uint8:
        inside = y < bits
        return torch.where(inside, x >> torch.where(inside, y, 0), 0)
    inside = (y > 0) & (y < bits)
    n = torch.where(inside, y, 1)
    mask = ~(torch.full_like(x, _MIN[x.dtype]) >> (n - 1))  # clear the n bits shifted in from the left
    return torch.where(inside, (x >> n) & mask, torch.where(y == 0, x, 0))


def population_count(x: torch.Tensor) -> torch.Tensor:
    count = torch.zeros_like(x)
    for i in range(_WIDTH[x.dtype]):
        count += (x >> i) & 1
    return count


def count_leading_zeros(x: torch.Tensor) -> torch.Tensor:
    width = _WIDTH[x.dtype]
    count, found = torch.full_like(x, width), torch.zeros_like(x, dtype=torch.bool)
    for i in range(width - 1, -1, -1):
        bit = ((x >> i) & 1) != 0
        count = torch.where(bit & ~found, width - 1 - i, count)
        found = found | bit
    return count


# ---- floats
# -------------------------------------------------------------------------------------------------------------


def float_to_integer(x: torch.Tensor, dtype: torch.dtype, unsigned: bool) -> torch.Tensor:
    """Round to zero, saturate, NaN gives 0 (XLA); C leaves numbers out of range undefined."""
    bits = _WIDTH[dtype]
    if unsigned or dtype == torch.uint8:
        low, high = 0, (1 << bits) - 1
    else:
        low, high = _MIN[dtype], -_MIN[dtype] - 1
    x = torch.nan_to_num(x.float() if x.dtype.itemsize < 4 else x, nan=0.0, posinf=float("inf"), neginf=float("-inf"))
    over, under = x >= float(high), x <= float(low)
    inside = torch.where(over | under, 0, x).to(torch.int64)

    def wrap(n):
        return n - (1 << bits) if unsigned and n >= 1 << (bits - 1) else n

    return torch.where(over, wrap(high), torch.where(under, low, inside)).to(dtype)


def float_remainder(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x - trunc(x / y) y, exact. torch's vectorised fmod divides and gives NaN where the quotient overflows: there x is
    first reduced by multiples of y, which leaves the result as it is.
    """
    if x.dtype.itemsize < 4:
        return float_remainder(x.float(), y.float()).to(x.dtype)
    rest, step = x, 2.0 ** (700 if x.dtype == torch.float64 else 90)  # the quotient is below 2 ** 2100, or 2 ** 277
    for multiple in (y * step * step, y * step):
        rest = torch.where(torch.isfinite(multiple) & torch.isinf(rest / y), torch.fmod(rest, multiple), rest)
    return torch.fmod(torch.where(torch.isfinite(x) & (y != 0), rest, x), y)


def total_order(x: torch.Tensor) -> torch.Tensor:
    """Integers in the order -NaN < -inf < .. < -0 < 0 < .. < inf < NaN (IEEE 754, totalOrder)."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]
    bits = x.contiguous().view(kind)
    return bits ^ ((bits >> (_WIDTH[kind] - 1)) & ~_MIN[kind])


def unsigned_to_float(x: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Unsigned bits as a float.

    64-bit values beyond int64 are halved, keeping the last bit so that they are rounded once.
    """
    if bits < 64:
        return widen_unsigned(x, bits).to(dtype)
    half = ((x >> 1) & ~_MIN[torch.int64]) | (x & 1)
    return (
        torch.where(x < 0, half.to(torch.float64) * 2, x.to(torch.float64)).to(dtype)
        if dtype != torch.float32
        else torch.where(x < 0, half.to(dtype) * 2, x.to(dtype))
    )


def to_float8(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to an 8-bit float.

    Overflow gives NaN where the type has no infinity; torch saturates.
    """
    x = x.float()
    y = x.to(dtype)
    if dtype == torch.float8_e5m2:
        return y
    # Half a step above the largest number; the tie goes to it when its last bit is even, to NaN otherwise.
    largest, step, even = {
        torch.float8_e4m3fn: (448.0, 32.0, True),
        torch.float8_e4m3fnuz: (240.0, 16.0, False),
        torch.float8_e5m2fnuz: (57344.0, 8192.0, False),
    }[dtype]
    beyond = (x.abs() > largest + step / 2) | ((x.abs() == largest + step / 2) & (not even))
    nan = torch.full((), float("nan"), device=x.device).to(dtype)
    return torch.where(beyond, nan.view(torch.uint8), y.view(torch.uint8)).view(dtype)


def sign(x: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.isnan(x) | (x == 0), x, torch.sign(x))


def cbrt(x: torch.Tensor) -> torch.Tensor:
    if x.dtype.itemsize < 4:
        return cbrt(x.float()).to(x.dtype)
    return torch.copysign(x.abs().pow(1.0 / 3.0), x)


def round_half_away(x: torch.Tensor) -> torch.Tensor:
    whole = torch.trunc(x)
    return torch.where((x - whole).abs() >= 0.5, whole + torch.sign(x), whole)


def bessel_i1e(x: torch.Tensor) -> torch.Tensor:
    return torch.special.i1e(x.float()).to(x.dtype) if x.dtype.itemsize < 4 else torch.special.i1e(x)


def digamma(x: torch.Tensor) -> torch.Tensor:
    """NaN at both zeros, as in XLA; torch gives infinities."""
    return torch.where(x == 0, float("nan"), torch.digamma(x))


def zeta(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Hurwitz zeta. At its poles, q = 0, -1, .., XLA gives infinity where x is even or one, and NaN elsewhere."""
    if x.dtype.itemsize < 4:
        return zeta(x.float(), q.float()).to(x.dtype)
    pole = (q <= 0) & (q == torch.floor(q))
    at_pole = torch.where((torch.remainder(x, 2) == 0) | (x == 1), float("inf"), float("nan")).to(x.dtype)
    return torch.where(
        torch.isinf(x) | torch.isnan(x), float("nan"), torch.where(pole, at_pole, torch.special.zeta(x, q))
    )


def polygamma(n: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(-1)^(n+1) n! zeta(n+1, x); torch.polygamma takes only a Python int for n."""
    value = torch.exp(torch.lgamma(n + 1)) * torch.special.zeta(n + 1, x)
    value = torch.where(torch.remainder(n, 2) == 0, -value, value)
    return torch.where(n == 0, torch.digamma(x), value)


def reduce_precision(x: torch.Tensor, exponent_bits: int, mantissa_bits: int) -> torch.Tensor:
    """Round float32 to fewer bits (ties to even); overflow gives infinity, numbers below the smallest normal give
    zero.
    """
    if x.dtype != torch.float32:
        return reduce_precision(x.float(), exponent_bits, mantissa_bits).to(x.dtype)
    drop = 23 - mantissa_bits
    bits = x.contiguous().view(torch.int32)
    if drop > 0:
        tie = (bits >> drop) & 1
        bits = (bits + tie + ((1 << (drop - 1)) - 1)) & ~((1 << drop) - 1)
    rounded = bits.view(torch.float32)
    if exponent_bits < 8:
        top = (1 << (exponent_bits - 1)) - 1
        largest = 2.0**top * (2.0 - 2.0**-mantissa_bits)
        smallest = 2.0 ** (1 - top)
        magnitude = rounded.abs()
        limited = torch.where(magnitude > largest, torch.full_like(x, float("inf")), magnitude)
        limited = torch.where(magnitude < smallest, torch.zeros_like(x), limited)
        rounded = torch.copysign(limited, x)
    return torch.where(torch.isfinite(x), rounded, x)
