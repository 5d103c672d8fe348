"""The steps of one phase.

The loop never waits for the step it has just dispatched: metrics of step k are fetched while step k+1 runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.text import Text

from mindvl_jax.checkpoints.checkpoint import Progress
from mindvl_jax.config.schema import Config, PhaseConfig
from mindvl_jax.core.params import Outline
from mindvl_jax.data.processor import BatchSpec
from mindvl_jax.models.counts import StepFlops
from mindvl_jax.models.loading import batch_spec, make_loader
from mindvl_jax.models.registry import spec_of
from mindvl_jax.objectives.registry import make_objective
from mindvl_jax.parallel.rules import RowShare, row_share
from mindvl_jax.training.backend import Backend
from mindvl_jax.training.display import print_phase
from mindvl_jax.training.ema import MovingAverage
from mindvl_jax.training.feed import Feed
from mindvl_jax.training.hooks import StepWatcher
from mindvl_jax.training.optimizer import learning_rates
from mindvl_jax.training.recorder import Dispatched, Recorder, RunLog
from mindvl_jax.training.state import TrainState
from mindvl_jax.training.step import StepPrograms, program_key
from mindvl_jax.training.stopping import StopRequest
from mindvl_jax.training.validation import Best, Validation


@dataclasses.dataclass
class RunContext:
    """State shared by the phases of a run.

    Attributes:
      programs_for: (program key, options of `make_programs`) -> compiled programs, shared between phases of equal keys.
      save: (state, progress) -> None, writes a checkpoint.
      watcher: the profiler, in the main process.
      ema: the moving average, if the run keeps one.
      best: lowest validation loss so far. keep: (step) -> None, keeps that step's checkpoint.
      kept_if_diverged: (state) -> context in which a run that diverges leaves the parameters of that state for `mindvl
        replay`.
    """

    config: Config
    backend: Backend
    mesh: Mesh
    outline: Outline
    report: RunLog
    total_steps: int
    programs_for: Callable[..., StepPrograms]
    save: Callable[[TrainState, Progress], None]
    watcher: StepWatcher | None
    ema: MovingAverage | None
    best: Best
    keep: Callable[[int], None]
    kept_if_diverged: Callable[[TrainState], contextlib.AbstractContextManager[None]]
    is_main: bool


def _flop_counter(run: RunContext, trained: list[str]) -> Callable[[Mapping[str, float]], StepFlops]:
    """FLOPs of a step by the family's own count; none where the family has no count."""
    flops = spec_of(run.config.model).flops
    return (
        flops(run.config.model, run.outline.shapes, trained)
        if flops is not None
        else lambda counts: StepFlops(0.0, 0.0)
    )


class PhaseLoop:
    """Run the steps of phase `index` that are still to be done."""

    def __init__(
        self,
        run: RunContext,
        index: int,
        trained: list[str],
        frozen: list[str],
        stop: StopRequest,
        stop_after: int | None,
    ):
        self._run, self._index, self._trained = run, index, trained
        self._stop, self._stop_after = stop, stop_after
        self._phase = run.config.training.phases[index]
        self._where = f"training.phases[{index}]"
        self._spec: BatchSpec = batch_spec(run.config, self._phase)
        objective = make_objective(
            run.config.model,
            self._phase,
            loss_chunk=run.config.training.loss_chunk,
            flow=run.config.training.flow_matching,
        )
        self._objective = objective
        self._programs: StepPrograms = run.programs_for(
            program_key(self._phase, objective, self._spec, trained),
            phase=self._phase, objective=objective, spec=self._spec, trained=trained, frozen=frozen, where=self._where,
        )  # fmt: skip
        self._recorder = Recorder(run.report, self._phase, objective, self._spec, _flop_counter(run, trained))

    def run(self, state: TrainState, step: int, begin: int, loader_state: dict | None) -> tuple[TrainState, int, bool]:
        """Step `begin` .. phase.steps; returns (state, step, whether the phase came to its end).

        The state is saved in every case.

        Args:
          step: optimizer steps of the run that are done.
          loader_state: of the loader, to continue after; None at the start of a phase.
        """
        run, phase, recorder = self._run, self._phase, self._recorder
        share = row_share(run.mesh, phase.rows, f"{self._where}.rows")
        for warning in run.config.model.phase_warnings(phase):
            run.report.console.print(Text(warning, style="yellow"), soft_wrap=True)
        validation = self._validation(share)
        rates = learning_rates(phase, self._where)
        print_phase(
            run.report.console,
            phase,
            self._index,
            len(run.config.training.phases),
            self._spec,
            self._trained,
            begin,
            reduction=self._objective.gradients_by,
        )
        run.report.live.new_phase()
        micro_steps = (phase.steps - begin) * phase.gradient_accumulation
        with contextlib.closing(
            make_loader(run.config, self._index, process_index=share.index, process_count=share.count)
        ) as loader:
            if loader_state is not None:
                loader.restore(loader_state)
            feed = Feed(loader, run.mesh, self._spec, micro_steps=micro_steps, accumulation=phase.gradient_accumulation)
            for phase_step in range(begin, phase.steps):
                self._before(step + 1, state)
                compiling = f"reading data and compiling the step of {phase.name}"
                with run.report.live.working(compiling) if phase_step == begin else contextlib.nullcontext():
                    done = self._step(state, rates[phase_step], feed, step + 1)
                if done is None:  # asked to stop between micro-steps: the state is still that of the last step
                    self._save(state, step, phase_step, loader_state)
                    return state, step, False
                before = loader_state
                state, loader_state, dispatched = done
                step += 1
                self._after(step, state, dispatched)
                ended = phase_step + 1 == phase.steps
                checked, is_best = self._validate(validation, state, step, ended=ended)
                recorder.add(
                    dataclasses.replace(
                        dispatched,
                        first_of_phase=phase_step == begin,
                        checked=checked,
                        data_before=before,
                        phase_step=phase_step,
                    )
                )
                feed.refill()
                with run.kept_if_diverged(state):
                    recorder.drain(keep=run.backend.in_flight)
                # A request that arrives now is answered before the next step; asking twice for one step would break the
                # agreement.
                enough = self._stop_after is not None and step >= self._stop_after and step < run.total_steps
                if ended and begin == 0:
                    recorder.require_learning()  # before the phase is saved as done
                if ended or enough or is_best or step % run.config.checkpoint.every_steps == 0:
                    self._save(state, step, phase_step + 1, loader_state)
                if enough:
                    return state, step, False
            with run.kept_if_diverged(state):
                recorder.drain(keep=0)
        return state, step, True

    def _before(self, step: int, state: TrainState) -> None:
        if self._run.watcher is not None:
            self._run.watcher.before_step(step, lambda: jax.block_until_ready(state.step))

    def _after(self, step: int, state: TrainState, dispatched: Dispatched) -> None:
        if self._run.ema is not None:
            self._run.ema.update(state.params, dispatched.metrics["applied"])
        if self._run.watcher is not None:

            def ran():
                return programs_of_step(self._programs, state, self._spec, self._phase)

            self._run.watcher.after_step(step, ran, lambda: jax.block_until_ready(state.step))

    def _step(
        self, state: TrainState, learning_rate: np.float32, feed: Feed, step: int
    ) -> tuple[TrainState, dict | None, Dispatched] | None:
        """Dispatch optimizer step `step`; returns (state, loader state after it, what is to be recorded).

        None if a stop was asked for before it was complete: the state given is then untouched.
        """
        programs, micro_steps = self._programs, self._phase.gradient_accumulation
        if self._stop.requested(step):
            return None
        micro = feed.next()
        if micro_steps == 1:
            state, metrics = programs.train_step(state, micro.batch, learning_rate)
            done = Dispatched(step, metrics, micro.sample_ids, micro.counters, batches=(micro.host,))
            return state, micro.loader_state, done
        totals = programs.zeros()
        ids: list[str] = []
        batches: list[Any] = []
        for number in range(micro_steps):
            if number:
                if jax.process_count() == 1 and self._stop.requested(
                    step
                ):  # several processes agree only between steps
                    return None
                micro = feed.next()
            totals = programs.accumulate(state, totals, micro.batch)
            ids.extend(micro.sample_ids)
            batches.append(micro.host)
            if number + 1 < micro_steps:
                feed.refill()
                # At most two micro-steps in flight, so that placed batches do not pile up.
                if number % 2:
                    jax.block_until_ready(totals.numerator)
        state, metrics = programs.update(state, totals, learning_rate)
        done = Dispatched(step, metrics, tuple(ids), micro.counters, batches=tuple(batches))
        return state, micro.loader_state, done

    def _validation(self, share: RowShare) -> Validation | None:
        run, settings = self._run, self._run.config.validation
        if settings is None:
            return None
        made = Validation(
            run.config,
            self._index,
            self._objective,
            self._spec,
            outline=run.outline,
            mesh=run.mesh,
            rows=slice(share.index * share.rows, (share.index + 1) * share.rows),
            compile=functools.partial(run.backend.compile, mesh=run.mesh),
            shardings=self._programs.shardings,
        )
        run.report.console.print(
            f"validation: {made.samples} samples of {settings.source} every {settings.every_steps} steps"
        )
        return made

    def _validate(
        self, validation: Validation | None, state: TrainState, step: int, *, ended: bool
    ) -> tuple[dict[str, float], bool]:
        """(metrics of a check that is due, whether this step is to be kept as the best)."""
        if validation is None or not validation.due(step, ended=ended):
            return {}, False
        run = self._run
        self._recorder.drain(keep=0)
        jax.block_until_ready(state.step)
        loss, seconds = validation.loss(state)
        self._recorder.pause(seconds)
        keep_best = run.config.checkpoint.keep_best
        best = run.best.offer(step, loss, write=run.is_main and keep_best)
        compared = "lowest so far" if best else f"lowest {run.best.loss:.4f} at step {run.best.step}"
        run.report.console.print(f"step {step}: validation loss {loss:.4f} ({compared}), {seconds:.1f} s")
        if best and keep_best:
            run.keep(step)
        return {"validation_loss": loss, "validation_seconds": seconds}, best and keep_best

    def _save(self, state: TrainState, step: int, phase_step: int, loader_state: dict | None) -> None:
        # First the lines, then the checkpoint: on resume every line up to its step is there.
        self._recorder.drain(keep=0)
        progress = Progress(
            step=step,
            phase=self._index,
            phase_name=self._phase.name,
            phase_step=phase_step,
            trained=tuple(self._trained),
            loader=loader_state,
            totals=dict(self._run.report.totals),
        )
        self._run.save(state, progress)


def programs_of_step(
    programs: StepPrograms, state: TrainState, spec: BatchSpec, phase: PhaseConfig
) -> dict[str, tuple[Callable, tuple]]:
    """The programs of one step of a phase, with arguments to lower them again."""
    batch, rate = spec.empty(), np.float32(0)
    if phase.gradient_accumulation == 1:
        return {"train_step": (programs.train_step, (state, batch, rate))}
    totals = jax.eval_shape(programs.zeros)
    return {
        "accumulate": (programs.accumulate, (state, totals, batch)),
        "update": (programs.update, (state, totals, rate)),
    }
