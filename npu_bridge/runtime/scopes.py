"""Time of a step by `named_scope`.

    with record_scopes("npu") as times:
        state = step(state, batch)
    times.seconds[("step", "transpose(jvp(mlp))")]

A written program names the scope of its statements in comments (`Lowered.as_text`). While scopes are recorded, programs
run with a mark at each scope change, which ends the last range and begins the next. Ranges are
`torch.profiler.record_function`s, so that the trace of torch's or torch_npu's profiler shows them, and they are timed
here, by the clock on a CPU and by events on the stream of a device. Captured graphs run eagerly meanwhile, because a
graph holds no names.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import re
import time
from builtins import compile as compile_text
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

COLLECTIVES = "collectives"
_PLACE = re.compile(r"^\S+:\d+$")
_EXCHANGE = re.compile(
    r" = (?:rt\.(?:start_)?(?:all_reduce|all_gather|reduce_scatter|all_to_all|permute)\(|\w+\.wait\(\))"
)


def with_marks(text: str) -> tuple[str, list[str]]:
    """Insert calls of `mark(n)` where the scope changes; return the text and the scopes by n.

    Collectives have the scope `collectives`. Statements outside of every scope have "".
    """
    lines, scopes = [], {}
    scope, last, inside = "", None, False
    for line in text.splitlines():
        code = line.strip()
        pad = line[: len(line) - len(line.lstrip())]
        if line.startswith("def main("):
            inside = True
        elif inside and code.startswith("# "):
            said = code[2:].split("  ")
            scope = "" if len(said) == 1 and _PLACE.match(code[2:]) else said[0]
        elif inside and "  # " in line and " = " in code:  # a statement says the types of its results
            here = (COLLECTIVES if _EXCHANGE.search(code) else scope, len(pad))
            # Mark again at another depth: a loop's rounds start after its end as well as before it.
            if here != last:
                lines.append(f"{pad}mark({scopes.setdefault(here[0], len(scopes))})")
                last = here
        lines.append(line)
    return "\n".join(lines) + "\n", list(scopes)


class LoadedStep(Protocol):
    """The part of `npu_bridge.runtime.api.Compiled` that is timed."""

    lowered: Any
    program: Any


class ScopeTimes:
    """Recorded times.

    Attributes:
      seconds: by (program's name, scope), summed over all calls; on a device the time of its stream between marks, in
        which it may have waited for the host.
      calls: of each program.
      preparing: seconds spent on making marked programs, no part of a normal step.
    """

    def __init__(self, device: str):
        self.device = device
        self.seconds: collections.Counter[tuple[str, str]] = collections.Counter()
        self.calls: collections.Counter[str] = collections.Counter()
        self.preparing = 0.0
        self._marked: dict[int, tuple[LoadedStep, Callable]] = {}
        self._events: list[tuple[tuple[str, str], Any, Any]] = []
        self._open: tuple[tuple[str, str], Any, Any] | None = None
        self._module = None if device == "cpu" else torch.get_device_module(device)

    def program(self, compiled: LoadedStep) -> Callable[..., list[torch.Tensor]]:
        """Return the marked program that runs in place of `compiled.program`."""
        if id(compiled) not in self._marked:
            start = time.perf_counter()
            self._marked[id(compiled)] = compiled, self._with_marks(compiled)
            self.preparing += time.perf_counter() - start
        return self._marked[id(compiled)][1]

    def _with_marks(self, compiled: LoadedStep) -> Callable[..., list[torch.Tensor]]:
        name = compiled.lowered.name
        text, scopes = with_marks(compiled.lowered.source.text)
        keys = [(name, scope) for scope in scopes]
        namespace: dict[str, Any] = {"mark": lambda number: self._mark(keys[number])}
        exec(compile_text(text, f"<npu_bridge {name}, marked>", "exec"), namespace)
        loaded = copy.copy(
            compiled.program.program
        )  # the loaded program behind graphs: same constants, kernels and groups
        loaded.main = namespace["main"]

        def run(*args: Any) -> list[torch.Tensor]:
            self.calls[name] += 1
            try:
                return loaded(*args)
            finally:
                self._mark(None)

        return run

    def _now(self) -> Any:
        if self._module is None:
            return time.perf_counter()
        event = self._module.Event(enable_timing=True)
        event.record()
        return event

    def _mark(self, key: tuple[str, str] | None) -> None:
        now = self._now()
        if self._open is not None:
            before, begun, shown = self._open
            shown.__exit__(None, None, None)
            if self._module is None:
                self.seconds[before] += now - begun
            else:
                self._events.append((before, begun, now))
        self._open = None
        if key is not None:
            shown = torch.profiler.record_function(key[1] or "no scope")
            shown.__enter__()
            self._open = key, now, shown

    def finish(self) -> None:
        """Wait for the device and sum the times of its events."""
        if self._module is not None:
            self._module.synchronize()
        for key, begun, ended in self._events:
            self.seconds[key] += begun.elapsed_time(ended) / 1e3
        self._events.clear()


_recording: ScopeTimes | None = None


@contextlib.contextmanager
def record_scopes(device: str) -> Iterator[ScopeTimes]:
    """Record every program of the bridge that runs meanwhile in this process; `device`: "npu", "cuda" or "cpu", where
    they run.

    Raises:
      RuntimeError: scopes are being recorded already.
    """
    global _recording
    if _recording is not None:
        raise RuntimeError("npu_bridge: scopes are being recorded already; end that before another begins")
    _recording = times = ScopeTimes(device)
    try:
        yield times
    finally:
        _recording = None
        times.finish()


def program_to_run(compiled: LoadedStep) -> Callable[..., list[torch.Tensor]]:
    """Return the program, or its marked version while scopes are recorded."""
    return compiled.program if _recording is None else _recording.program(compiled)
