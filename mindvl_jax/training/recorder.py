"""Metrics of dispatched steps: fetched one step late, written down, and a run that diverges is stopped."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from mindvl_jax.checkpoints.checkpoint import has_checkpoints
from mindvl_jax.config.schema import Config, PhaseConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import replacing, write_json
from mindvl_jax.data.processor import BatchSpec
from mindvl_jax.models.counts import StepFlops
from mindvl_jax.objectives.base import Objective
from mindvl_jax.training.display import LiveLine
from mindvl_jax.training.metrics import MetricsLog
from mindvl_jax.training.step import PART_NORM, STEP_METRICS

BAD_STEP = "bad_step.json"
"""In a run folder: the first bad step of the newest row of them."""
BAD_BATCH = "bad_step_batch.npz"
"""In a run folder: that step's batches, array by array; absent where they are large, or of several processes."""
LISTED_IDS = 20  # sample ids in the message of a diverged run


class TrainingDiverged(UserError):
    """Loss or gradients stayed non-finite."""


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """A step whose metrics are not fetched yet.

    Attributes:
      counters: of the loader, right after the step's last batch.
      first_of_phase: its time includes compilation.
      checked: metrics of a validation after the step.
      data_before: state of the loader before the step, None at the start of a phase. phase_step: steps of the phase
        before it.
      batches: of its micro-steps, on the host; empty where they are not kept.
    """

    step: int
    metrics: dict[str, jax.Array]
    sample_ids: tuple[str, ...]
    counters: dict[str, Any]
    first_of_phase: bool = False
    checked: dict[str, float] = dataclasses.field(default_factory=dict)
    data_before: dict[str, Any] | None = None
    phase_step: int = 0
    batches: tuple[Any, ...] = ()


@dataclasses.dataclass
class RunLog:
    """Outputs and running totals of a run.

    Attributes:
      log: None in all processes but the main one.
      peak: FLOP/s of all devices together, None if unknown.
      totals: tokens, samples and seconds since the start of the run.
    """

    config: Config
    console: Console
    live: LiveLine
    log: MetricsLog | None
    peak: float | None
    totals: dict[str, float]


class Recorder:
    """Record the steps of one phase."""

    def __init__(
        self,
        run: RunLog,
        phase: PhaseConfig,
        objective: Objective,
        spec: BatchSpec,
        count_flops: Callable[[Mapping[str, float]], StepFlops],
    ):
        self._run, self._phase, self._objective, self._spec, self._count_flops = (
            run,
            phase,
            objective,
            spec,
            count_flops,
        )
        self._pending: collections.deque[Dispatched] = collections.deque()
        self._bad: collections.deque[Dispatched] = collections.deque(maxlen=run.config.training.max_bad_steps)
        self._last = time.perf_counter()
        self._applied = 0

    def add(self, dispatched: Dispatched) -> None:
        self._pending.append(dispatched)

    def pause(self, seconds: float) -> None:
        """Leave out of the next step's time what was spent on something else."""
        self._last += seconds

    def drain(self, keep: int) -> None:
        """Wait for all dispatched steps but the newest `keep`, and write them down."""
        while len(self._pending) > keep:
            done = self._pending.popleft()
            fetched = jax.device_get(done.metrics)
            norms = [name for name in fetched if name.startswith(PART_NORM)]
            values = {name: fetched.pop(name).item() for name in (*STEP_METRICS, *norms)}
            now = time.perf_counter()
            self._write(done, values, fetched, now - self._last)
            self._last = now

    def require_learning(self) -> None:
        """Wait for all steps; raise UserError when none of them changed the parameters: such a phase is not done, it
        never began.
        """
        self.drain(keep=0)
        if not self._applied:
            raise UserError(
                f"phase {self._phase.name}: none of its {self._phase.steps} steps had anything to learn: "
                "every sample was left out, had no learned token, or gave "
                f"a loss that is not finite; {Path(self._run.config.run.dir) / 'quarantine.jsonl'} and "
                "metrics.jsonl say which (`mindvl data check` reads the data alone)"
            )

    def _write(self, done: Dispatched, values: dict[str, Any], counted: dict[str, Any], seconds: float) -> None:
        self._applied += bool(values["applied"])
        run, shown = self._run, self._objective.display(counted, self._phase.sources)
        for name in ("tokens", "samples"):
            run.totals[name] += shown[name]
        run.totals["seconds"] += seconds
        # The counts as summed on the device, not as displayed.
        flops = self._count_flops({name: value.item() for name, value in counted.items() if value.ndim == 0})
        peak = run.peak * seconds if run.peak and seconds else None
        record = {
            "step": done.step,
            "phase": self._phase.name,
            "loss": values["loss"],
            **done.checked,
            **shown,
            "grad_norm": values["grad_norm"],
            **{name: value for name, value in values.items() if name.startswith(PART_NORM)},
            "learning_rate": values["learning_rate"],
            "step_seconds": seconds,
            "tokens_per_second": shown["tokens"] / seconds,
            "samples_per_second": shown["samples"] / seconds,
            **self._spec.efficiencies(shown, self._phase.gradient_accumulation),
            "flops": flops.language + flops.vision,
            "mfu": (flops.language + flops.vision) / peak if peak else None,
            "mfu_language": flops.language / peak if peak else None,
            **{f"{name}_total": value for name, value in run.totals.items()},
            "applied": bool(values["applied"]),
            "skipped_steps": values["skipped_steps"],
            **{
                name: done.counters[name]
                for name in ("quarantined", "truncated", "shrunk", "epochs")
                if name in done.counters
            },
        }
        if done.first_of_phase:
            record["includes_compilation"] = True
        if not values["finite"]:
            record["sample_ids"] = list(done.sample_ids)
        if run.log is not None and (done.step % run.config.logging.every_steps == 0 or not values["applied"]):
            run.log.write(record)
        run.live.update(record, first_of_phase=done.first_of_phase)
        if not values["finite"]:
            self._on_bad_step(done, values)

    def _keep_bad(self, done: Dispatched, values: dict[str, Any]) -> None:
        """Write down what `mindvl replay` needs to build the batch of this step again."""
        numbers = {
            name: str(value)
            for name, value in values.items()
            if name in ("loss", "grad_norm", "learning_rate") or name.startswith(PART_NORM)
        }
        phases = [phase.name for phase in self._run.config.training.phases]
        folder = Path(self._run.config.run.dir)
        (folder / BAD_BATCH).unlink(missing_ok=True)
        if done.batches and None not in done.batches:
            arrays = {
                f"{micro}/{leaf}": np.asarray(value)
                for micro, batch in enumerate(done.batches)
                for leaf, value in enumerate(jax.tree.leaves(batch))
            }
            with replacing(folder / BAD_BATCH) as file, open(file, "wb") as out:
                np.savez(out, **arrays)
        write_json(
            folder / BAD_STEP,
            {
                "step": done.step,
                "phase": self._phase.name,
                "phase_index": phases.index(self._phase.name),
                "phase_step": done.phase_step,
                "sample_ids": list(done.sample_ids),
                "values": numbers,
                "data_before": done.data_before,
            },
        )

    def _on_bad_step(self, done: Dispatched, values: dict[str, Any]) -> None:
        limit = self._run.config.training.max_bad_steps
        self._bad.append(done)
        parts = ", ".join(
            f"{name.removeprefix(PART_NORM)} {value:.3g}"
            for name, value in values.items()
            if name.startswith(PART_NORM)
        )
        self._run.console.print(
            f"step {done.step}: loss {values['loss']}, gradient norm {values['grad_norm']} ({parts}): "
            f"skipped ({values['bad_steps']} in a row, the run stops at {limit})"
        )
        if values["bad_steps"] == 1 and self._run.log is not None:
            self._keep_bad(done, values)
        if values["bad_steps"] < limit:
            return
        ids = list(dict.fromkeys(sample for bad in self._bad for sample in bad.sample_ids))
        shown = ", ".join(ids[:LISTED_IDS]) + (
            f" and {len(ids) - LISTED_IDS} more (all stand in metrics.jsonl)" if len(ids) > LISTED_IDS else ""
        )
        folder = Path(self._run.config.run.dir)
        kept = (
            f"the last checkpoint is in {folder / 'checkpoints'}"
            if has_checkpoints(folder)
            else "there is no checkpoint yet (checkpoint.every_steps)"
        )
        raise TrainingDiverged(
            f"{limit} steps in a row ({done.step - limit + 1} to {done.step}, phase {self._phase.name}) had "
            "a non-finite loss or gradient; "
            f"parameters are those from before them. Samples: {shown}. Look at these samples, lower "
            f"learning_rate (it was {values['learning_rate']:g}), or use compute_dtype: float32; {kept}. "
            f"`mindvl replay {folder}` runs the first of these steps again and names the layer"
        )
