"""Exchanges between devices, read from the text of a program that XLA compiled."""

from __future__ import annotations

import dataclasses
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_CALL = re.compile(rf"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One array of one exchange; XLA puts several into one call.

    Attributes:
      kind: one of `KINDS`. dtype: XLA's name. shape: of the result on one device; of a TPU's reduce-scatter the sum's.
      scope: what the program was doing, as JAX named it; of a combined call, of one of its arrays.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    scope: str

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("f", "bf"))

    def __str__(self) -> str:
        return f"{self.kind} of {self.dtype}[{','.join(map(str, self.shape))}] in {self.scope}"


def exchanges(text: str) -> list[Exchange]:
    """Exchanges of a compiled program (`compiled.as_text()`), in the order of its text. A loop's body counts once."""
    found, computation = [], ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            computation = head[1]
        call = _CALL.match(line)
        if call is None:
            continue
        _, result, kind, start = call.groups()
        arrays = [(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in _ARRAY.findall(result)]
        if start and kind != "all-reduce":  # the results of an asynchronous start: operands first, then what is to come
            arrays = arrays[len(arrays) // 2 :]
        if kind == "all-to-all" and len(arrays) > 1:  # one part for each device: the parts are one array
            arrays = arrays[:1]
        if computation.startswith("all-reduce-scatter"):  # TPU: a sum of which each device keeps a part
            kind = "reduce-scatter"
        scope = _NAME.search(line)
        found += [Exchange(kind, dtype, shape, scope[1] if scope else "") for dtype, shape in arrays]
    return found
