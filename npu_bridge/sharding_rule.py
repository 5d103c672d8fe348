"""Sharding rules of operators, written like einsum: ``"b s (k g) h, b t k h -> b s (k g) h"``.

A rule names the *factors* of every dimension of every operand and result. A dimension in round brackets is the product
of several factors, major first. A leading ``...`` stands for all leading dimensions that are not named (all values with
``...`` must then have the same number of them). Shardy reads a rule to decide how shardings travel through an operator.

This module only handles text: no jax, no MLIR, so that rules can be tested and printed without them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

_TOKEN = re.compile(r"\.\.\.|\(|\)|[A-Za-z_][A-Za-z_0-9]*")


class RuleError(ValueError):
    """A sharding rule is malformed or does not fit the shapes."""


Dim = tuple[str, ...]  # the factors of one dimension, major first


def _parse_value(text: str) -> list[Dim]:
    dims: list[Dim] = []
    group: list[str] | None = None
    stripped = _TOKEN.sub("", text).strip()
    if stripped:
        raise RuleError(
            f"sharding rule: cannot read {stripped!r} in {text!r}; expected factor names, brackets or '...'"
        )
    for token in _TOKEN.findall(text):
        if token == "(":
            if group is not None:
                raise RuleError(f"sharding rule: nested brackets in {text!r}")
            group = []
        elif token == ")":
            if not group:
                raise RuleError(f"sharding rule: empty or unopened brackets in {text!r}")
            dims.append(tuple(group))
            group = None
        elif group is not None:
            group.append(token)
        else:
            dims.append((token,))
    if group is not None:
        raise RuleError(f"sharding rule: bracket not closed in {text!r}")
    return dims


def _expand_ellipsis(dims: list[Dim], rank: int, what: str) -> list[Dim]:
    if ("...",) in dims:
        if dims[0] != ("...",):
            raise RuleError(f"sharding rule: '...' must come first in {what}")
        extra = rank - (len(dims) - 1)
        if extra < 0:
            raise RuleError(
                f"sharding rule: {what} has rank {rank}, the rule names {len(dims) - 1} dimensions besides '...'"
            )
        dims = [(f"batch{i}",) for i in range(extra)] + dims[1:]
    if len(dims) != rank:
        raise RuleError(f"sharding rule: {what} has rank {rank}, the rule names {len(dims)} dimensions")
    return dims


@dataclasses.dataclass(frozen=True)
class ShardingRule:
    """A rule fitted to shapes: every factor has a size, and size-one factors are removed from products."""

    operands: tuple[tuple[Dim, ...], ...]
    results: tuple[tuple[Dim, ...], ...]
    sizes: Mapping[str, int]

    @classmethod
    def fit(
        cls,
        rule: str,
        operand_shapes: Sequence[Sequence[int]],
        result_shapes: Sequence[Sequence[int]],
        sizes: Mapping[str, int] | None = None,
    ) -> ShardingRule:
        """Read `rule` and fit it to shapes. `sizes` gives factors that no whole dimension shows.

        Raises RuleError when counts, ranks or sizes disagree or a factor's size cannot be found.
        """
        left, arrow, right = rule.partition("->")
        if not arrow:
            raise RuleError(f"sharding rule: no '->' in {rule!r}")

        def side(text: str, shapes: Sequence[Sequence[int]], kind: str) -> list[list[Dim]]:
            parts = text.split(",") if text.strip() or len(shapes) == 1 else []
            if len(parts) != len(shapes):
                raise RuleError(f"sharding rule {rule!r}: {len(parts)} {kind}s named, {len(shapes)} given")
            return [
                _expand_ellipsis(_parse_value(p), len(s), f"{kind} {i} of {rule!r}")
                for i, (p, s) in enumerate(zip(parts, shapes))
            ]

        operands, results = side(left, operand_shapes, "operand"), side(right, result_shapes, "result")
        known: dict[str, int] = dict(sizes or {})
        everything = list(zip([*operands, *results], [*operand_shapes, *result_shapes]))
        for _ in range(len(everything) + 1):  # a product can need a size that another product determines
            for dims, shape in everything:
                for dim, size in zip(dims, shape):
                    unknown = [f for f in dim if f not in known]
                    if len(unknown) == 1:
                        rest = math.prod(known[f] for f in dim if f in known)
                        if rest == 0 or size % rest:
                            raise RuleError(
                                f"sharding rule {rule!r}: dimension of size {size} is not divisible by {rest} ({dim})"
                            )
                        known[unknown[0]] = size // rest
        for dims, shape in everything:
            for dim, size in zip(dims, shape):
                missing = [f for f in dim if f not in known]
                if missing:
                    raise RuleError(
                        f"sharding rule {rule!r}: size of factor {missing[0]!r} cannot be found; pass it in `sizes`"
                    )
                if math.prod(known[f] for f in dim) != size:
                    raise RuleError(
                        f"sharding rule {rule!r}: {dim} has size {[known[f] for f in dim]}, the dimension has {size}"
                    )

        def dissolve(dim: Dim) -> Dim:  # Shardy refuses size-one factors inside a product of factors
            return tuple(f for f in dim if known[f] != 1) or dim[:1]

        def tidy(values):
            return tuple(tuple(dissolve(d) for d in v) for v in values)

        return cls(tidy(operands), tidy(results), known)

    def factors(self) -> list[str]:
        """Factors in order of first appearance: the order in which Shardy numbers them."""
        return list(dict.fromkeys(f for value in (*self.operands, *self.results) for dim in value for f in dim))

    def select_results(self, keep: Sequence[int]) -> ShardingRule:
        """Return the rule with only the results numbered in `keep`."""
        return ShardingRule(self.operands, tuple(self.results[i] for i in keep), self.sizes)

    def as_attribute(
        self, reduction: Sequence[str] = (), replicate: Sequence[str] = (), permutation: Sequence[str] = ()
    ) -> str:
        """Text of the ``#sdy.op_sharding_rule`` attribute. Special factors that do not occur are ignored."""
        order = self.factors()
        name = {f: (chr(ord("i") + n) if n < 18 else f"z_{n - 17}") for n, f in enumerate(order)}

        def value(dims):
            return "[" + ", ".join("".join(name[f] for f in d) for d in dims) + "]"

        def side(values):
            return "(" + ", ".join(value(v) for v in values) + ")"

        sizes = ", ".join(f"{name[f]}={self.sizes[f]}" for f in order)
        special = ""
        # Shardy wants the members of each set in order of their numbers.
        for word, chosen in (("reduction", reduction), ("need_replication", replicate), ("permutation", permutation)):
            members = [name[f] for f in order if f in chosen]
            if members:
                special += f" {word}={{{', '.join(members)}}}"
        return f"#sdy.op_sharding_rule<{side(self.operands)}->{side(self.results)} {{{sizes}}}{special}, custom>"
