"""A run from start to end: phases, checkpoints, evaluation, report. The steps of a phase are in `phase_loop.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
from rich.console import Console

from mindvl_jax.checkpoints import id_table
from mindvl_jax.checkpoints.checkpoint import CheckpointWriter, Progress, room_in
from mindvl_jax.config import loader as config_loader
from mindvl_jax.config.schema import Config
from mindvl_jax.core.devices import known_peak
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import read_json
from mindvl_jax.core.params import Outline
from mindvl_jax.core.progress import LogConsole, working
from mindvl_jax.data.sources.readers import find_files
from mindvl_jax.models.loading import resolve_epochs
from mindvl_jax.models.outline import outline_of
from mindvl_jax.parallel.possible import require_possible
from mindvl_jax.parallel.rules import row_share
from mindvl_jax.training import ema, loggers, nf4_base, replay, resume, scoring
from mindvl_jax.training import state as states
from mindvl_jax.training.backend import Backend, make_backend, use_compilation_cache
from mindvl_jax.training.devices import chosen_mesh
from mindvl_jax.training.display import LiveLine, print_startup
from mindvl_jax.training.hooks import Hooks
from mindvl_jax.training.initial import starting_params
from mindvl_jax.training.metrics import MetricsLog
from mindvl_jax.training.muon import optimizer_init, require_matrices
from mindvl_jax.training.optimizer import learning_rates, parameter_rules
from mindvl_jax.training.phase_loop import PhaseLoop, RunContext
from mindvl_jax.training.recorder import RunLog, TrainingDiverged
from mindvl_jax.training.state import TrainState
from mindvl_jax.training.step import StepPrograms, make_programs
from mindvl_jax.training.stopping import StopRequest
from mindvl_jax.training.validation import Best

LOG = "run.log"
"""Log file of the run, with date and time."""

__all__ = ["RunResult", "Trainer", "TrainingDiverged", "train"]


@dataclasses.dataclass(frozen=True)
class RunResult:
    """Result of `train`.

    Attributes:
      step: optimizer steps done over all phases. finished: whether that is all of them.
      stopped_by: why it stopped before the end (a signal's name, or "stop_after"), else None.
    """

    run_dir: Path
    step: int
    finished: bool
    stopped_by: str | None


def train(
    config: Config, *, stop_after: int | None = None, console: Console | None = None, hooks: Hooks | None = None
) -> RunResult:
    """Train through all phases, or continue where the run folder stands.

    Args:
      stop_after: stop cleanly, as by SIGTERM, once this many optimizer steps of the run are done.
      hooks: evaluation, report and profiler; without them none is made.

    Raises:
      UserError: configuration, data, checkpoint or mesh do not fit, or training diverged; the message says which and
        what to do.
    """
    backend = make_backend(config)
    backend.join()
    use_compilation_cache()
    quiet = jax.process_index() != 0
    console = console or LogConsole(quiet=quiet)
    config = resolve_epochs(config, console.print)
    with _claim(Path(config.run.dir)), backend.precision(), room_in(config.run.dir), contextlib.ExitStack() as stack:
        if isinstance(console, LogConsole) and not quiet:
            console.log_to(Path(config.run.dir) / LOG)
            stack.callback(console.close_log)
        try:
            return Trainer(config, backend, console, hooks or Hooks()).run(stop_after)
        except UserError as error:
            if isinstance(console, LogConsole):
                console.log_only(f"stopped: {error}")
            raise


@contextlib.contextmanager
def _claim(run_dir: Path) -> Iterator[None]:
    """Keep a second run out of the folder. The lock goes with the process, however it ends."""
    if jax.process_index() != 0:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((run_dir / ".lock").open("w"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"run.dir={run_dir}: cannot be made or written "
                f"({getattr(error, 'strerror', None) or error}); choose another folder"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run.dir={run_dir}: another process trains in this folder; wait for it or choose another folder"
            ) from None
        yield


class Trainer:
    """Hold what lives as long as the run."""

    def __init__(self, config: Config, backend: Backend, console: Console, hooks: Hooks):
        self.config = config
        self.backend = backend
        self.console = console
        self.hooks = hooks
        self.run_dir = Path(config.run.dir)
        self.is_main = jax.process_index() == 0
        self.init = optimizer_init(config.training.optimizer)
        self.optimizer_arrays = {"init": self.init, "spread": config.training.optimizer.shard_over_data}
        self.outline: Outline = outline_of(config.model, config.adapters)
        self.mesh, self.mesh_choice = chosen_mesh(config, self.outline, backend.devices())
        require_possible(config, self.mesh.shape)
        self.device_kind = backend.device_kind(self.mesh)
        self.peak = config.logging.peak_flops or known_peak(self.device_kind)
        self.total_steps = sum(phase.steps for phase in config.training.phases)
        ema.require_possible(config)
        nf4_base.require_possible(config, self.outline, self.mesh)
        self.ema: ema.MovingAverage | None = None
        # By what stands in them: phases with equal keys share what was compiled.
        self.programs: dict[tuple, StepPrograms] = {}
        self.totals: dict[str, float] = {"tokens": 0, "samples": 0, "seconds": 0.0}

    def run(self, stop_after: int | None) -> RunResult:
        self._check_files()
        loggers.require_installed(self.config)
        parts = [self._check(index) for index in range(len(self.config.training.phases))]
        plan = resume.plan(self.config, self.outline, self.mesh, parts)
        if plan.step == self.total_steps and (self.run_dir / "report.html").exists():
            self.console.print(
                f"{self.run_dir}: finished already, after {plan.step} steps; the report is "
                f"{self.run_dir / 'report.html'}"
            )
            return RunResult(self.run_dir, plan.step, finished=True, stopped_by=None)
        self._announce(plan)
        state = plan.state
        if state is not None:
            params = state.params
        else:
            with working(self.console, "preparing the parameters"):
                params = starting_params(self.config, self.outline, self.mesh, self.console)
        if self.config.training.ema_decay is not None:
            self._start_average(plan, params)
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            context = self._open(stack, plan.step)
            step = plan.step
            for index in range(plan.phase, len(parts)):
                phase = self.config.training.phases[index]
                here = state is not None and index == plan.phase  # the restored state belongs to this phase
                if not here:
                    state = self._as_jax(state)
                    source = state.params if state is not None else params
                    state = states.start_phase(
                        source,
                        *parts[index],
                        self.mesh,
                        before=state,
                        keep_optimizer=phase.keep_optimizer,
                        **self.optimizer_arrays,
                    )
                params = None  # the state owns them from here on: its buffers are donated
                begin = plan.phase_step if here else 0
                if begin < phase.steps:
                    state, step, ended = PhaseLoop(context, index, *parts[index], stop, stop_after).run(
                        state, step, begin, plan.loader if here else None
                    )
                    if not ended:
                        self._wait(step)
                        self.live.close()
                        why = stop.reason or "stop_after"
                        self.console.print(
                            f"stopped by {why} after step {step} of {self.total_steps}: saved, `run.resume: "
                            "auto` continues exactly here"
                        )
                        return RunResult(self.run_dir, step, finished=False, stopped_by=why)
                if self.config.evaluation.after_phases and index + 1 < len(parts):
                    self._evaluate(state, step, phase.name)
                    self._report(f"scores, answers and curves after {phase.name}:")
            self._wait(step)
            self.live.close()
            self._finish(state, step)
        return RunResult(self.run_dir, step, finished=True, stopped_by=None)

    # --- before the steps --------------------------------------------------------------------------------------------

    def _check(self, index: int) -> tuple[list[str], list[str]]:
        """(trained, frozen) paths of a phase; refuses before any work what would fail when the phase begins."""
        phase, where = self.config.training.phases[index], f"training.phases[{index}]"
        trained, frozen = states.split_trained(list(self.outline.shapes), phase.train, f"{where}.train")
        learning_rates(phase, where)
        parameter_rules(trained, phase, self.config.training.optimizer, where)
        require_matrices(
            {path: self.outline.shapes[path] for path in trained}, self.config.training.optimizer, f"{where}.train"
        )
        row_share(self.mesh, phase.rows, f"{where}.rows")
        return trained, frozen

    def _check_files(self) -> None:
        """Refuse files that are missing, of every phase and task: not hours later, when the phase begins or the run is
        scored.
        """
        wanted = {f"data.sources.{name}": name for phase in self.config.training.phases for name in phase.sources}
        if self.config.validation is not None:
            wanted["validation.source"] = self.config.validation.source
        problems = []
        for where, name in wanted.items():
            try:
                find_files(self.config.data.sources[name], where)
            except UserError as error:
                problems.append(str(error))
        if problems := problems + self.hooks.problems():
            raise UserError("\n".join(problems))

    def _announce(self, plan: resume.Plan) -> None:
        print_startup(self.console, self.config, self.outline, self.mesh, self.peak, self.device_kind, self.mesh_choice)
        for line in plan.notes:
            self.console.print(line)
        self.totals.update(plan.totals)
        id_table.keep(self.config.run, self.config.tokenizer, resumed=plan.step > 0, write=self.is_main)
        if self.is_main:
            (self.run_dir / "config.yaml").write_text(config_loader.dump(self.config), encoding="utf-8")

    def _start_average(self, plan: resume.Plan, params: dict[str, jax.Array]) -> None:
        if plan.state is not None and plan.ema is None:
            self.console.print("the checkpoint holds no moving average: it starts from the parameters there")
        self.ema = ema.MovingAverage(
            plan.ema or params, self.config.training.ema_decay, functools.partial(self.backend.compile, mesh=self.mesh)
        )

    def _open(self, stack: contextlib.ExitStack, step: int) -> RunContext:
        """Open what is written to during the run, which `stack` closes, and gather what the phases share."""
        self.writer = stack.enter_context(CheckpointWriter(self.run_dir, self.config.checkpoint))
        best = Best(self.run_dir, resumed=step)
        self.writer.best = best.step if self.config.checkpoint.keep_best else None
        log = (
            MetricsLog(self.run_dir, trackers=loggers.make_trackers(self.config, step), first_step=step)
            if self.is_main
            else None
        )
        self.log = log
        if log is not None:
            stack.callback(log.close)
        phases = [
            (
                each.name,
                each.steps,
                each.gradient_accumulation * each.rows * (each.sequence_length + each.patches_per_row),
            )
            for each in self.config.training.phases
        ]
        self.live = LiveLine(self.console, self.total_steps, phases=phases)
        stack.callback(self.live.close)
        watcher = self.hooks.watcher(self.console.print) if self.is_main else None
        if watcher is not None:
            stack.callback(watcher.close)
        peak = self.peak * self.mesh.devices.size if self.peak else None
        return RunContext(
            config=self.config,
            backend=self.backend,
            mesh=self.mesh,
            outline=self.outline,
            total_steps=self.total_steps,
            report=RunLog(self.config, self.console, self.live, log, peak, self.totals),
            programs_for=self._programs_for,
            save=self._save,
            watcher=watcher,
            ema=self.ema,
            best=best,
            keep=self._keep,
            kept_if_diverged=self._kept_if_diverged,
            is_main=self.is_main,
        )

    # --- what the phase loop calls --------------------------------------------------------------------------------

    def _programs_for(self, key: tuple, **options) -> StepPrograms:
        """The compiled programs of a phase, shared between phases of equal keys."""
        if key not in self.programs:
            compile = functools.partial(self.backend.compile, mesh=self.mesh)
            self.programs[key] = make_programs(
                self.outline,
                optimizer=self.config.training.optimizer,
                mesh=self.mesh,
                seed=self.config.run.seed,
                compile=compile,
                **options,
            )
        return self.programs[key]

    def _save(self, state: TrainState, progress: Progress) -> None:
        state = self._as_jax(state)
        with self.live.working(f"saving step {progress.step}"):
            self.writer.save(
                state.params,
                states.optimizer_arrays(state),
                progress,
                self.config,
                None if self.ema is None else self._average(),
            )

    def _wait(self, step: int) -> None:
        with self.live.working(f"writing the checkpoint of step {step}"):
            self.writer.wait()

    @contextlib.contextmanager
    def _kept_if_diverged(self, state: TrainState) -> Iterator[None]:
        try:
            yield
        except TrainingDiverged:
            if jax.process_count() == 1:  # several processes may not all be here
                replay.keep_parameters(self.run_dir, self._as_jax(state).params)
            raise

    def _keep(self, step: int) -> None:
        """Keep the checkpoint of this step, whatever comes after it."""
        self.writer.best = step

    def _as_jax(self, state: TrainState | None) -> TrainState | None:
        if state is None:
            return None
        return self.backend.as_jax(
            state,
            states.state_shardings(
                self.outline, list(state.trained), list(state.frozen), self.mesh, **self.optimizer_arrays
            ),
        )

    def _average(self) -> dict[str, jax.Array]:
        return self.backend.as_jax(self.ema.params, self.ema.shardings)

    # --- after the steps ---------------------------------------------------------------------------------------------

    def _evaluate(self, state: TrainState, step: int, phase: str) -> None:
        if not self.hooks.evaluates:
            return
        self.live.close()
        self.console.print(f"scoring held-out tasks after {phase}")
        # Evaluation runs on XLA whatever trained: with npu_bridge on JAX's host devices.
        if self.config.evaluation.ema:
            params = {path: value.astype(self.outline.shapes[path].dtype) for path, value in self._average().items()}
        else:
            params = self._as_jax(state).params
        params = scoring.for_scoring(params, self.outline)
        scoring.in_main_process(lambda: self.hooks.evaluate(self.outline.merge(params), step, phase, self.console))
        if self.log is not None:
            scores = read_json(self.run_dir / "scores.json", {})
            self.log.track(loggers.scores_of(scores), step)
            self.log.show(loggers.answers_of(self.run_dir, phase, scores.get("tasks", ())), step)

    def _finish(self, state: TrainState, step: int) -> None:
        self._evaluate(state, step, self.config.training.phases[-1].name)
        self._report(f"done: {step} steps,")

    def _report(self, said: str) -> None:
        """Write the page of what is known so far and say where it is."""
        if self.is_main:
            page = self.hooks.report(self.run_dir)
            self.console.print(f"{said} {page}" if page else said.rstrip(",:"))
