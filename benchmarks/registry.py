"""Registry of benchmark cases, and the settings they run with."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Literal

from benchmarks.measure import Comparison

SUITES = ("cpu", "gpu", "npu-emulated")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Attributes:
      seconds: wanted measuring time of one side of one comparison.
      least: fewest rounds of a comparison.
      threads: of every side, XLA's and torch's alike.
      one_core: measure processor time of one thread in place of wall time: more reliable ratios on a shared machine
        (`--one-core`).
      brief: only what matters most in long cases (`--quick`).
      dry: smallest shapes, to show that a case runs; its figures mean nothing.
    """

    seconds: float = 4.0
    least: int = 7
    threads: int = 2
    one_core: bool = False
    brief: bool = False
    dry: bool = False

    @property
    def clock(self) -> Literal["wall", "cpu"]:
        return "cpu" if self.one_core else "wall"

    @classmethod
    def quick(cls, **rest) -> Settings:
        return cls(seconds=1.0, least=3, brief=True, **rest)

    @classmethod
    def smallest(cls) -> Settings:
        return cls(seconds=0.0, least=2, threads=1, dry=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """A named generator of comparisons; each is measured and released before the next is built."""

    name: str
    suite: str
    summary: str
    build: Callable[[Settings], Iterator[Comparison]]


CASES: dict[str, Case] = {}


def case(name: str, *, suite: str = "cpu") -> Callable:
    """Register `build(settings) -> Iterator[Comparison]`; the first line of its docstring is the summary."""
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r}; there are {', '.join(SUITES)}")

    def register(build: Callable[[Settings], Iterator[Comparison]]):
        if name in CASES:
            raise ValueError(f"two benchmark cases are called {name!r}")
        CASES[name] = Case(name, suite, (build.__doc__ or "").strip().splitlines()[0], build)
        return build

    return register


def load_cases() -> dict[str, Case]:
    """Import every module of `benchmarks.cases`; they import jax and torch only when they run."""
    from benchmarks import cases

    for module in pkgutil.iter_modules(cases.__path__):
        importlib.import_module(f"benchmarks.cases.{module.name}")
    return CASES
