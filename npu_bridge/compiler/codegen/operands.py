"""Operands while code is written: a torch variable, a literal, or an integer known to the host."""

from __future__ import annotations

import dataclasses
import math

from npu_bridge.compiler.ir import COMPLEX, FLOATS, UNSIGNED, Type

# torch has little arithmetic for unsigned integers wider than a byte. They are kept as the bits of a signed integer:
# addition, multiplication, shifts left and logic are the same on both; comparison, division, shift right and conversion
# are not, and have code of their own (runtime/tensor_ops.py).
STORAGE = {
    "i1": "bool", "i8": "int8", "ui8": "uint8", "i16": "int16", "ui16": "int16", "i32": "int32", "ui32": "int32",
    "i64": "int64",
    "ui64": "int64", "f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64",
    "f8E4M3FN": "float8_e4m3fn",
    "complex<f32>": "complex64", "complex<f64>": "complex128", "f8E5M2": "float8_e5m2",
    "f8E4M3FNUZ": "float8_e4m3fnuz", "f8E5M2FNUZ": "float8_e5m2fnuz",
    }  # fmt: skip
BITS = {"i8": 8, "ui8": 8, "i16": 16, "ui16": 16, "i32": 32, "ui32": 32, "i64": 64, "ui64": 64}
BIT_UNSIGNED = UNSIGNED - {"ui8"}  # stored as signed bits; uint8 is a torch dtype


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A torch variable of the program."""

    name: str
    type: Type


@dataclasses.dataclass(frozen=True)
class Literal:
    """One number repeated over the whole shape; never stored."""

    value: float | int | bool
    type: Type


@dataclasses.dataclass(frozen=True)
class HostInt:
    """An integer or boolean known to the host at run time: a loop counter, the device's mesh index, an element of a
    constant table, and values computed from these. With a shape: that number in every element.

    low, high: known inclusive bounds, so that comparisons and clamps fold.
    """

    code: str
    type: Type
    low: int | None = None
    high: int | None = None


@dataclasses.dataclass(frozen=True)
class HostTable:
    """Part of an integer array known to the host. Elements are looked up on the host and moved to the device only where
    a tensor is needed.

    name: of the flat tuple. offset: code of the first element's index in it. strides: of each dimension, in elements.
    device: code of the whole array on the device, which no statement may overwrite, and its shape.
    """

    name: str
    type: Type
    offset: str
    strides: tuple[int, ...]
    device: str
    whole: tuple[int, ...]
    low: int | None
    high: int | None


Operand = Tensor | Literal | HostInt | HostTable


def torch_dtype(dtype: str) -> str:
    return f"torch.{STORAGE[dtype]}"


def literal_code(value: float | int | bool, dtype: str) -> str:
    """Return the number as Python code in the storage type (unsigned bits read as signed)."""
    if dtype == "i1":
        return repr(bool(value))
    if dtype in COMPLEX:
        return f"complex({literal_code(complex(value).real, 'f64')}, {literal_code(complex(value).imag, 'f64')})"
    if dtype in FLOATS:
        value = float(value)
        return repr(value) if math.isfinite(value) else f"float('{value}')"
    value = int(value)
    if dtype in BIT_UNSIGNED and value >= 1 << (BITS[dtype] - 1):
        value -= 1 << BITS[dtype]
    return repr(value)
