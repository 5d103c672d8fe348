"""Profile steps of a run, named in its configuration or requested while it trains.

In the configuration: `profile.steps: [a, b]`. While it trains: `request(run_dir, steps)` writes a file that the trainer
looks for between steps (one `stat` a step). RUN/profiles/STEP/ then holds

  trace/         for TensorBoard or Perfetto, by the back end's profiler (jax, torch, torch_npu)
  blocks.json    time by block, in seconds a step
  profile.txt    the same as a table
  memory.json    memory of the device, or of the process on a CPU, over time
  profile.png    a plot of both
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from mindvl_jax.config.schema import Config, ProfileConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import write_text
from mindvl_jax.profiling.blocks import BlockTimes

REQUEST = "profile-request.json"
FOLDER = "profiles"
MOST_STEPS = 10_000  # a trace of more fills any disk


class Tracer(Protocol):
    """Interface of a back end's profiler for the steps between `start` and `stop`."""

    def start(self, folder: Path) -> None:
        """Start tracing into `folder`. The caller has waited for earlier work."""

    def stop(self) -> None:
        """Wait for running work and stop."""

    def times(self, programs: Callable[[], Any]) -> BlockTimes:
        """Times by block. `programs`: name -> the step's functions with arguments, to lower them again."""

    def bytes_in_use(self) -> int | None:
        """Memory in use on this process's first device; None if the device is the host. Called from another thread."""


def make_tracer(config: Config) -> Tracer:
    if config.backend == "xla":
        from mindvl_jax.profiling.xla import XlaTracer

        return XlaTracer()
    from mindvl_jax.profiling.bridge import BridgeTracer

    return BridgeTracer(config.bridge.device)


def request(run_dir: Path, steps: int) -> Path:
    """Ask the run in `run_dir` to profile its next `steps` steps. Returns the request file.

    Raises:
      UserError: no run there, or an earlier request is still pending.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is no run folder: it holds no config.yaml")
    path = run_dir / REQUEST
    if path.exists():
        raise UserError(
            f"{path} is not answered yet; is a run training in this folder? Delete the file to withdraw the request"
        )
    write_text(path, json.dumps({"steps": steps}))
    return path


class StepProfiler:
    """Trace the requested steps."""

    def __init__(
        self, run_dir: Path, config: ProfileConfig, say: Callable[[str], None], make_tracer: Callable[[], Tracer]
    ):
        self._run_dir, self._config, self._say, self._make_tracer = run_dir, config, say, make_tracer
        self._running: _Capture | None = None

    def before_step(self, step: int, wait: Callable[[], None]) -> None:
        """Call before dispatching step `step` (from 1). `wait` blocks until earlier work is done."""
        if self._running is not None:
            return
        steps = self._asked(step)
        if steps:
            wait()
            self._running = _Capture(self._run_dir / FOLDER / f"{step:08d}", step, steps, self._make_tracer())

    def after_step(self, step: int, programs: Callable[[], Any], wait: Callable[[], None]) -> None:
        """Call after dispatching step `step`.

        Args:
          programs: returns the step's programs; called when the trace is complete.
        """
        capture = self._running
        if capture is None or step < capture.first + capture.steps - 1:
            return
        wait()
        self._running = None
        self._say(capture.finish(programs))

    def close(self) -> None:
        """Finish a trace cut short by the end of the run."""
        if self._running is not None:
            self._running.abandon()
            self._running = None

    def _asked(self, step: int) -> int:
        if self._config.steps is not None and step == self._config.steps[0]:
            return self._config.steps[1] - self._config.steps[0] + 1
        path = self._run_dir / REQUEST
        if not path.exists():
            return 0
        try:
            steps = int(json.loads(path.read_text(encoding="utf-8"))["steps"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, OSError) as error:
            self._say(f'{path}: not understood ({error}); expected {{"steps": N}}')
            steps = 0
        try:
            path.unlink()
        except OSError:  # a folder of that name: looked at once
            path.rename(path.with_name(f"{REQUEST}.ignored-{os.getpid()}"))
        return min(max(0, steps), MOST_STEPS)


class _Capture:
    def __init__(self, folder: Path, first: int, steps: int, tracer: Tracer):
        self.folder, self.first, self.steps, self._tracer = folder, first, steps, tracer
        folder.mkdir(parents=True, exist_ok=True)
        self._memory = _MemoryWatch(tracer.bytes_in_use)
        tracer.start(folder / "trace")
        self._start = time.perf_counter()

    def finish(self, programs: Callable[[], Any]) -> str:
        from mindvl_jax.profiling import report  # matplotlib is slow to import

        seconds = time.perf_counter() - self._start
        self._tracer.stop()
        samples = self._memory.stop()
        return report.write(
            self.folder,
            self._tracer.times(programs),
            first=self.first,
            steps=self.steps,
            seconds=seconds,
            memory=samples,
        )

    def abandon(self) -> None:
        self._tracer.stop()
        self._memory.stop()


@dataclasses.dataclass(frozen=True)
class MemorySample:
    """Seconds since the trace began, and bytes in use."""

    seconds: float
    bytes: int


class _MemoryWatch:
    """Sample memory every ten milliseconds: as the device reports it, else that of this process (Linux)."""

    def __init__(self, of_device: Callable[[], int | None]):
        self._of_device = of_device
        self._samples: list[MemorySample] = []
        self._stop = threading.Event()
        self._start = time.perf_counter()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="mindvl-memory")
        self._thread.start()

    def stop(self) -> list[MemorySample]:
        self._stop.set()
        self._thread.join()
        return self._samples

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            used = self._of_device()
            if used is None:
                used = _resident_bytes()
            if used is not None:
                self._samples.append(MemorySample(time.perf_counter() - self._start, used))


def _resident_bytes() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
