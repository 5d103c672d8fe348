"""Profile XLA programs: join jax.profiler's trace with the scopes in the optimised programs."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from mindvl_jax.profiling import hlo, trace
from mindvl_jax.profiling.blocks import OTHER, BlockTimes

Programs = Mapping[str, tuple[Callable, tuple]]
"""By name: a jitted function and arguments of the shapes that it ran with."""


class XlaTracer:
    """Tracer for XLA. See `mindvl_jax.profiling.profiler.Tracer`."""

    def start(self, folder: Path) -> None:
        self._folder = folder
        jax.profiler.start_trace(str(folder))

    def stop(self) -> None:
        jax.profiler.stop_trace()

    def times(self, programs: Callable[[], Programs]) -> BlockTimes:
        texts = {
            name: function.lower(*arguments).compile().as_text() for name, (function, arguments) in programs().items()
        }
        times = trace.read(self._folder)
        blocks = by_block(times.operations, texts)
        # Threads and devices overlap: scale their times to the busy time, so that all lines add up to the wall time.
        scale = times.busy / sum(blocks.values())
        return BlockTimes({name: value * scale for name, value in blocks.items()}, times.busy)

    def bytes_in_use(self) -> int | None:
        statistics: dict[str, Any] | None = jax.local_devices()[0].memory_stats()
        return statistics.get("bytes_in_use") if statistics else None


def by_block(operations: Mapping[tuple[str, str], float], texts: Mapping[str, str]) -> dict[str, float]:
    """Sum seconds by block.

    Args:
      operations: seconds by (program, operation); the trace calls a program `jit_NAME`.
      texts: optimised programs by name; operations of other programs count as `other`.
    """
    known = {f"jit_{name}": hlo.blocks_of_program(text) for name, text in texts.items()}
    total: collections.Counter[str] = collections.Counter()
    for (program, operation), seconds in operations.items():
        total[known.get(program, {}).get(operation, OTHER)] += seconds
    total.pop(hlo.SPANS, None)
    return dict(total)
