"""Console display: a start-up summary, then one live line."""

from __future__ import annotations

import collections
import contextlib
import itertools
import math
import os
import platform
import time
from collections.abc import Collection, Iterator, Mapping, Sequence

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from mindvl_jax.config.schema import Config, PhaseConfig
from mindvl_jax.core import processor
from mindvl_jax.core.params import Outline, count_weights, matches_any
from mindvl_jax.core.progress import LogConsole, duration, heartbeat
from mindvl_jax.data.processor import BatchSpec
from mindvl_jax.parallel.mesh import describe_mesh
from mindvl_jax.training.xla_backend import matmul_precision
from npu_bridge.ops.attention import describe_attention

WINDOW = 20  # steps that the shown rates average over
MEASURED = 10  # steps, without the one that compiles, after which a run says how long it takes
LONG = 60.0  # seconds: nobody plans around less


def human(number: float) -> str:
    """1234567 -> 1.23M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def print_startup(
    console: Console,
    config: Config,
    outline: Outline,
    mesh: Mesh,
    peak: float | None,
    device_kind: str,
    mesh_choice: str | None = None,
) -> None:
    """Device, dtype and why, mesh, kernels, parameters by part.

    Args:
      mesh_choice: why this mesh, where the configuration sets none.
    """
    device = mesh.devices.flat[0]
    processes = f", process {jax.process_index()} of {jax.process_count()}" if jax.process_count() > 1 else ""
    rows = Table.grid(padding=(0, 2))
    rows.add_row(
        "device",
        f"{device_kind} ({device.platform if config.backend == 'xla' else 'torch'}) on "
        f"{platform.node() or 'this machine'}{processes}, jax {jax.__version__}",
    )
    if device.platform == "cpu":
        rows.add_row(
            "processor",
            f"{processor.name()}, {os.cpu_count()} cores, bfloat16 units: {processor.bfloat16_unit() or 'none'}",
        )
    rows.add_row(
        "peak", f"{human(peak)}FLOP/s a device" if peak else "unknown for this device: no MFU (set logging.peak_flops)"
    )
    rows.add_row("mesh", describe_mesh(mesh) + (f"; chosen: {mesh_choice} (mesh.* sets it)" if mesh_choice else ""))
    rows.add_row("compute", _precision(config))
    rows.add_row("kernels", kernels_in_use(config, mesh))
    rows.add_row("remat", config.model.remat)
    rows.add_row("run folder", config.run.dir)
    console.print(rows)
    idle = jax.device_count() - mesh.devices.size
    if idle > 0 and config.backend == "xla" and not config.mesh.is_open:
        console.print(
            f"{idle} of {jax.device_count()} devices stay idle: leave mesh out to use all, or set mesh.data=-1 "
            "(copies of the model) or mesh.fsdp=-1 (parameters spread)",
            style="bold yellow",
            soft_wrap=True,
        )
    console.print(parameter_table(config, outline))


def _precision(config: Config) -> str:
    """The dtypes of a run and what they mean."""
    compute, masters = config.model.compute_dtype, config.model.param_dtype
    why = {
        (
            "bfloat16",
            "float32",
        ): "products in bfloat16 with float32 sums; parameters, moments, norms, softmax and loss in float32",
        (
            "float32",
            "float32",
        ): "everything in float32: exact, and slower than bfloat16 where the device has bfloat16 units",
        (
            "bfloat16",
            "bfloat16",
        ): "half the parameter memory; small updates round away: for inference or very large models",
        ("float32", "bfloat16"): "parameters rounded to bfloat16, products in float32",
    }[(compute, masters)]
    if compute == "float32" and matmul_precision(config.model) == "bfloat16":
        why = "products read bfloat16 and sum in float32 (model.matmul_precision); everything else in float32"
    elif compute == "float32" and config.model.matmul_precision == "auto":
        why = (
            "everything in float32: this processor has no bfloat16 units, and products that emulate them would "
            "take longer"
        )
    return f"{compute}, parameters {masters}: {why}"


def kernels_in_use(config: Config, mesh: Mesh) -> str:
    """Describe which implementations compute the operators, and the form of attention."""
    if config.backend == "xla":
        platform_name = mesh.devices.flat[0].platform
        form = describe_attention(config.model.attention, platform_name)
        return f"npu_bridge.ops reference mathematics, compiled by XLA for {platform_name}; attention {form}"
    return f"npu_bridge.ops as torch kernels on {config.bridge.device}"


def parameter_table(config: Config, outline: Outline) -> Table:
    """Parameters of each part, and in which phase each part learns."""
    table = Table(title=None, box=None, padding=(0, 2), header_style="bold")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    for phase in config.training.phases:
        table.add_column(phase.name)
    parts: dict[str, list[str]] = collections.defaultdict(list)
    for path in outline.shapes:
        parts[path.split("/")[0]].append(path)

    def size(paths):
        return sum(count_weights(path, outline.shapes[path]) for path in paths)

    for part, paths in parts.items():
        cells = []
        for phase in config.training.phases:
            learning = [path for path in paths if matches_any(path, phase.train)]
            cells.append(
                "trained"
                if len(learning) == len(paths)
                else f"{human(size(learning))} trained"
                if learning
                else "frozen"
            )
        table.add_row(part, f"{size(paths):,}", *cells)
    totals = [
        f"{human(size([p for p in outline.shapes if matches_any(p, phase.train)]))} trained"
        for phase in config.training.phases
    ]
    table.add_row("all", f"{size(outline.shapes):,}", *totals)
    return table


def print_phase(
    console: Console,
    phase: PhaseConfig,
    index: int,
    count: int,
    spec: BatchSpec,
    trained: Collection[str],
    start: int,
    *,
    reduction: str,
) -> None:
    resumed = f", from step {start}" if start else ""
    console.print(
        Text.assemble(
            (f"phase {index + 1}/{count} {phase.name}", "bold"),
            f": {phase.steps} steps{resumed} of {phase.gradient_accumulation} x {spec.rows} rows, {spec.describe()}, "
            f"{len(trained)} arrays learn ({', '.join(phase.train)}), {phase.schedule} "
            f"{phase.learning_rate:g}, loss by {reduction}",
        )
    )


class LiveLine:
    """One line that keeps up with the run; on a terminal it redraws, elsewhere a plain line appears every few seconds.

    Args:
      phases: name, steps and work of a step (in any unit) of each phase, for the time that later phases will take.
    """

    def __init__(
        self,
        console: Console,
        total_steps: int,
        *,
        plain_seconds: float = 10.0,
        phases: Sequence[tuple[str, int, float]] = (),
    ):
        self._console = console
        self._total = total_steps
        self._plain_seconds = plain_seconds
        self._last_plain = -math.inf
        self._recent: collections.deque[Mapping[str, float]] = collections.deque(maxlen=WINDOW)
        self._phases = list(phases)
        self._expected = False
        self._progress = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.percentage:3.0f}%"),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[line]}"),
                console=console,
            )
            self._task = self._progress.add_task("", total=total_steps, line="starting")
            self._progress.start()

    def new_phase(self) -> None:
        """Rates of another batch shape do not mix with those before."""
        self._recent.clear()
        if self._progress is not None and not self._progress.live.is_started:  # closed for an evaluation
            self._progress.start()

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Say what holds the next step up: in the line itself on a terminal, in lines of its own elsewhere."""
        if self._progress is not None:
            self._progress.update(self._task, line=what)
            yield
            return
        started = time.monotonic()
        with heartbeat(lambda text: self._console.print(text, highlight=False), what):
            yield
        if (seconds := time.monotonic() - started) > 2:
            self._console.print(f"{what}: done in {duration(seconds)}", highlight=False)

    def update(self, record: Mapping[str, float], *, first_of_phase: bool) -> None:
        """Show one step's record (see `trainer`); the first step of a phase holds its compilation and does not count
        for rates.
        """
        if not first_of_phase:
            self._recent.append(record)
        if len(self._recent) >= MEASURED and not self._expected:
            self._expected = True
            self._say_expected(record)
        text = self.text(record)
        if self._progress is not None:
            self._progress.update(self._task, completed=record["step"], line=text)
        if record["step"] == self._total or time.monotonic() - self._last_plain >= self._plain_seconds:
            self._last_plain = time.monotonic()
            line = f"{100 * record['step'] / self._total:3.0f}% {text}"
            if self._progress is None:
                self._console.print(line, highlight=False, soft_wrap=True)
            elif isinstance(self._console, LogConsole):
                self._console.log_only(line)

    def _say_expected(self, record: Mapping[str, float]) -> None:
        """Say once how long the run takes at the speed of its first steps."""
        step, seconds = int(record["step"]), sum(each["step_seconds"] for each in self._recent) / len(self._recent)
        left = self._left(step, seconds)
        if left < LONG:
            return
        text = f"measured: {seconds:.2f} s a step; {self._total - step} steps take about {duration(left)}"
        end = next((end for end in itertools.accumulate(steps for _, steps, _ in self._phases) if step <= end), step)
        if len(self._phases) > 1 and step < end < self._total:
            text += f", this phase {duration((end - step) * seconds)} of them"
        self._console.print(text + "; compiling other shapes and scoring come on top", highlight=False)

    def _left(self, step: int, seconds: float) -> float:
        """Seconds that are left: steps of this phase at its own speed, those of later phases by the work of their
        steps.
        """
        if not self._phases:
            return (self._total - step) * seconds
        end, here, left = 0, None, 0.0
        for _, steps, work in self._phases:
            end += steps
            if here is None:
                if step > end or (step == end and end < self._total):
                    continue
                here = work
                left += (end - step) * seconds
            else:
                left += steps * seconds * work / here
        return left

    def text(self, record: Mapping[str, float]) -> str:
        recent = self._recent or [record]
        seconds = sum(r["step_seconds"] for r in recent)

        def mean(key):
            return sum(r[key] for r in recent) / len(recent)

        def rate(key):
            return sum(r[key] for r in recent) / seconds if seconds else 0.0

        parts = [
            f"{record['phase']} {record['step']}/{self._total}",
            f"loss {record['loss']:.4f}",
        ]
        if self._recent:  # the step that compiles says nothing of the speed
            parts += [f"{human(rate('tokens'))} tok/s", f"{human(rate('samples'))} samples/s"]
        if record.get("mfu") is not None:
            language = (
                f" ({100 * mean('mfu_language'):.1f}% without ViT)" if record.get("mfu_language") is not None else ""
            )
            parts.append(f"MFU {100 * mean('mfu'):.1f}%{language}")
        if "token_efficiency" in record:
            parts.append(f"packed {100 * mean('token_efficiency'):.0f}%")
        if record.get("skipped_steps"):
            parts.append(f"skipped {record['skipped_steps']:.0f}")
        if record.get("quarantined"):
            parts.append(f"quarantined {record['quarantined']:.0f}")
        if record.get("shrunk"):
            parts.append(f"shrunk {record['shrunk']:.0f}")
        if record.get("validation_loss") is not None:
            parts.append(f"validation {record['validation_loss']:.4f}")
        # The first step of a phase holds its compilation: it says nothing of the speed.
        parts.append(f"ETA {duration(self._left(int(record['step']), seconds / len(recent))) if self._recent else '?'}")
        return " | ".join(parts)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
