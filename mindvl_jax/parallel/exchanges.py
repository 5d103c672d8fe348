"""Exchanges between devices, read from the text of a program that XLA compiled."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_CALL = re.compile(rf"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_NAME = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"\bcalls=%?([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One array of one exchange; XLA puts several into one call.

    Attributes:
      kind: one of `KINDS`. dtype: XLA's name. shape: of the result on one device; of a TPU's reduce-scatter the sum's.
      scope: what the program was doing, as JAX named it; of a combined call, of one of its arrays; of a call that the
        compiler wrapped, of the wrap.
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
    found, computation, lines = [], "", text.splitlines()
    wraps = {call[1]: name[1] for line in lines if (call := _CALLS.search(line)) and (name := _NAME.search(line))}
    for line in lines:
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
        named = scope[1] if scope else wraps.get(computation, "")
        found += [Exchange(kind, dtype, shape, named) for dtype, shape in arrays]
    return found


def per_layer(found: list[Exchange]) -> dict[str, Counter[str]]:
    """Count the float arrays that one decoder layer communicates, by kind, in `forward` and `back`: those in the body
    of the loop over its layers.
    """
    counts: dict[str, Counter[str]] = {"forward": Counter(), "back": Counter()}
    for one in found:
        if one.is_float and "language" in one.scope and "/while/" in one.scope:
            counts["back" if "transpose(" in one.scope else "forward"][one.kind] += 1
    return counts
