"""Profile npu_bridge programs: times between scope marks, and the trace of torch's or torch_npu's profiler."""

from __future__ import annotations

import collections
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mindvl_jax.profiling.blocks import COLLECTIVES, BlockTimes, block_of
from npu_bridge.runtime import scopes

ROWS = 20


class BridgeTracer:
    """Tracer for programs on `device`: "npu", "cuda" or "cpu". See `mindvl_jax.profiling.profiler.Tracer`.

    Files in the folder: on cpu and cuda `trace.json` (Perfetto, chrome://tracing) and `operators.txt`, on npu the
    files of torch_npu (MindStudio Insight; `trace_view.json` for Perfetto).
    """

    def __init__(self, device: str):
        self._device = device
        self._module = None if device == "cpu" else torch.get_device_module(device)

    def start(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        if self._module is not None:
            self._module.synchronize()
        self._stack = contextlib.ExitStack()
        self._profiler = self._begin()
        self._scopes = self._stack.enter_context(scopes.record_scopes(self._device))

    def _begin(self) -> Any:
        if self._device == "npu":
            import torch_npu

            kinds = torch_npu.profiler.ProfilerActivity
            written = torch_npu.profiler.tensorboard_trace_handler(str(self._folder))
            return self._stack.enter_context(
                torch_npu.profiler.profile(activities=[kinds.CPU, kinds.NPU], on_trace_ready=written)
            )
        kinds = torch.profiler.ProfilerActivity
        activities = [kinds.CPU] + [kinds.CUDA] * (self._device == "cuda")
        return self._stack.enter_context(torch.profiler.profile(activities=activities, acc_events=True))

    def stop(self) -> None:
        self._stack.close()

    def times(self, programs: Callable[[], Any]) -> BlockTimes:
        notes = []
        if self._device == "npu":
            # torch_npu only prints to standard error why it could not start or parse.
            if not any(self._folder.glob("*/ASCEND_PROFILER_OUTPUT/*")):
                notes.append(
                    "torch_npu's profiler left no trace: CANN's profiler is missing or was refused; its "
                    "messages stand above."
                )
        else:
            self._profiler.export_chrome_trace(str(self._folder / "trace.json"))
            order = "self_device_time_total" if self._device == "cuda" else "self_cpu_time_total"
            (self._folder / "operators.txt").write_text(
                self._profiler.key_averages().table(sort_by=order, row_limit=ROWS), encoding="utf-8"
            )
        if self._device != "cpu":
            notes.append(
                "Steps ran operator by operator, not as a captured graph; a block's time is that of the "
                "stream, waiting for the host included."
            )
        total: collections.Counter[str] = collections.Counter()
        for (_, scope), seconds in self._scopes.seconds.items():
            total[COLLECTIVES if scope == scopes.COLLECTIVES else block_of(scope)] += seconds
        lines = [
            dict(program=program, scope=scope, seconds=seconds)
            for (program, scope), seconds in self._scopes.seconds.most_common()
        ]
        (self._folder / "scopes.json").write_text(json.dumps(lines, indent=1), encoding="utf-8")
        return BlockTimes(dict(total), sum(total.values()), aside=self._scopes.preparing, notes=tuple(notes))

    def bytes_in_use(self) -> int | None:
        return None if self._module is None else self._module.memory_allocated()
