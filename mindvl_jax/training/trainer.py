"""A run from start to end: phases, steps, checkpoints, evaluation, report.

The loop never waits for the step it has just dispatched: metrics of step k are fetched while step k+1 runs.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from mindvl_jax.config import loader as config_loader
from mindvl_jax.data.batch import BatchShape
from mindvl_jax.config.schema import Config, PhaseConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.progress import LogConsole, working
from mindvl_jax.data.epochs import resolve_epochs
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.parallel.rules import RowShare, row_share
from mindvl_jax.profiling import StepProfiler, profiler
from mindvl_jax.training import ema, resume, scoring, state as states
from mindvl_jax.checkpoints import id_table as vocabulary
from mindvl_jax.training.backend import Backend, make_backend, use_compilation_cache
from mindvl_jax.checkpoints.checkpoint import CheckpointWriter, Progress, room_in
from mindvl_jax.training.display import LiveLine, print_phase, print_startup, shrinking
from mindvl_jax.training.feed import Feed
from mindvl_jax.training.flops import FlopCounter, known_peak
from mindvl_jax.training.initial import starting_params
from mindvl_jax.training.metrics import MetricsLog
from mindvl_jax.training.optimizer import learning_rates, parameter_rules
from mindvl_jax.core.params import Outline
from mindvl_jax.models.outline import outline_of
from mindvl_jax.training.state import TrainState
from mindvl_jax.training.step import COUNTS, StepPrograms, make_programs, program_key
from mindvl_jax.training.stopping import StopRequest
from mindvl_jax.training.validation import Best, Validation


LOG = "run.log"
"""What the run said, with date and time."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What `train` hands back.

    Attributes:
      step: optimizer steps done over all phases. finished: whether that is all of them.
      stopped_by: why it stopped before the end (a signal's name, or "stop_after"), else None.
    """

    run_dir: Path
    step: int
    finished: bool
    stopped_by: str | None


@dataclasses.dataclass
class _Dispatched:
    """A step whose metrics are not fetched yet."""

    step: int
    metrics: dict[str, jax.Array]
    sample_ids: tuple[str, ...]
    counters: dict[str, Any]
    first_of_phase: bool = False
    checked: dict[str, float] = dataclasses.field(default_factory=dict)


class TrainingDiverged(UserError):
    """Loss or gradients stayed non-finite."""


def train(config: Config, *, stop_after: int | None = None, console: Console | None = None) -> RunResult:
    """Trains through all phases, or goes on where the run folder stands.

    Args:
      stop_after: stop cleanly, as by SIGTERM, once this many optimizer steps of the run are done.

    Raises:
      UserError: configuration, data, checkpoint or mesh do not fit, or training diverged; the message says which and what to do.
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
            return Trainer(config, backend, console).run(stop_after)
        except UserError as error:
            if isinstance(console, LogConsole):
                console.log_only(f"stopped: {error}")
            raise


@contextlib.contextmanager
def _claim(run_dir: Path) -> Iterator[None]:
    """Keeps a second run out of the folder; the lock goes with the process, however it ends."""
    if jax.process_index() != 0:
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"run.dir={run_dir}: another process trains in this folder; wait for it or choose another folder") from None
        yield


class Trainer:
    """Holds what lives as long as the run."""

    def __init__(self, config: Config, backend: Backend, console: Console):
        self.config = config
        self.backend = backend
        self.console = console
        self.run_dir = Path(config.run.dir)
        self.is_main = jax.process_index() == 0
        self.mesh: Mesh = make_mesh(config.mesh, backend.devices())
        self.outline: Outline = outline_of(config.model, config.adapters)
        self.device_kind = backend.device_kind(self.mesh)
        self.peak = config.logging.peak_flops or known_peak(self.device_kind)
        self.total_steps = sum(phase.steps for phase in config.training.phases)
        ema.require_possible(config)
        self.ema: ema.MovingAverage | None = None
        self.programs: dict[tuple, StepPrograms] = {}
        self.totals: dict[str, float] = {"tokens": 0, "samples": 0, "seconds": 0.0}

    def run(self, stop_after: int | None) -> RunResult:
        self._check_files()
        parts = [self._check(index) for index in range(len(self.config.training.phases))]
        plan = resume.plan(self.config, self.outline, self.mesh, parts)
        if plan.step == self.total_steps and (self.run_dir / "report.html").exists():
            self.console.print(f"{self.run_dir}: finished already, after {plan.step} steps; the report is {self.run_dir / 'report.html'}")
            return RunResult(self.run_dir, plan.step, finished=True, stopped_by=None)
        print_startup(self.console, self.config, self.outline, self.mesh, self.peak, self.device_kind)
        for line in plan.notes:
            self.console.print(line)
        self.totals.update(plan.totals)
        vocabulary.keep(self.config.run, self.config.tokenizer, resumed=plan.step > 0, write=self.is_main)
        if self.is_main:
            (self.run_dir / "config.yaml").write_text(config_loader.dump(self.config), encoding="utf-8")

        state = plan.state
        if state is None:
            with working(self.console, "preparing the parameters"):
                params = starting_params(self.config, self.outline, self.mesh, self.console)
        if self.config.training.ema_decay is not None:
            start = plan.ema or (params if state is None else state.params)
            if state is not None and plan.ema is None:
                self.console.print("the checkpoint holds no moving average: it starts from the parameters there")
            self.ema = ema.MovingAverage(start, self.config.training.ema_decay)
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            self.writer = stack.enter_context(CheckpointWriter(self.run_dir, self.config.checkpoint))
            self.best = Best(self.run_dir, resumed=plan.step)
            self.writer.best = self.best.step if self.config.checkpoint.keep_best else None
            self.log = MetricsLog(self.run_dir, tensorboard=self.config.logging.tensorboard, first_step=plan.step) if self.is_main else None
            if self.log is not None:
                stack.callback(self.log.close)
            phases = [(each.name, each.steps, each.gradient_accumulation * each.rows * (each.sequence_length + each.patches_per_row)) for each in self.config.training.phases]
            self.live = LiveLine(self.console, self.total_steps, phases=phases)
            stack.callback(self.live.close)
            tracer = functools.partial(profiler.make_tracer, self.config)
            self.profiler = StepProfiler(self.run_dir, self.config.profile, self.console.print, tracer) if self.is_main else None
            if self.profiler is not None:
                stack.callback(self.profiler.close)

            step = plan.step
            for index in range(plan.phase, len(parts)):
                trained, frozen = parts[index]
                phase = self.config.training.phases[index]
                here = state is not None and index == plan.phase  # the restored state belongs to this phase
                if not here:
                    state = self._as_jax(state)
                    source = state.params if state is not None else params
                    state = states.start_phase(source, trained, frozen, self.mesh, before=state, keep_optimizer=phase.keep_optimizer)
                    params = None  # the state owns them from here on: its buffers are donated
                begin = plan.phase_step if here else 0
                if begin < phase.steps:
                    loader_state = plan.loader if here else None
                    state, step, ended = self._run_phase(index, state, trained, frozen, step, begin, loader_state, stop, stop_after)
                    if not ended:
                        self._wait(step)
                        self.live.close()
                        why = stop.reason or "stop_after"
                        self.console.print(f"stopped by {why} after step {step} of {self.total_steps}: saved, `run.resume: auto` continues exactly here")
                        return RunResult(self.run_dir, step, finished=False, stopped_by=why)
                if self.config.evaluation.after_phases and index + 1 < len(parts):
                    self._evaluate(state, step, phase.name)
            self._wait(step)
            self.live.close()
            self._finish(state, step)
        return RunResult(self.run_dir, step, finished=True, stopped_by=None)

    # --- one phase ---------------------------------------------------------------------------------------------------

    def _check(self, index: int) -> tuple[list[str], list[str]]:
        """(trained, frozen) paths of a phase; refuses before any work what would fail when the phase begins."""
        phase, where = self.config.training.phases[index], f"training.phases[{index}]"
        trained, frozen = states.split_trained(list(self.outline.shapes), phase.train, f"{where}.train")
        learning_rates(phase, where)
        parameter_rules(trained, phase, self.config.training.optimizer, where)
        row_share(self.mesh, phase.rows, f"{where}.rows")
        return trained, frozen

    def _check_files(self) -> None:
        """Refuses files that are missing, of every phase and task: not hours later, when the phase begins or the run is scored."""
        from mindvl_jax.data.sources.readers import find_files

        used = dict.fromkeys(name for phase in self.config.training.phases for name in phase.sources)
        wanted = [(self.config.data.sources[name], f"data.sources.{name}") for name in used]
        if self.config.validation is not None:
            wanted.append((self.config.data.sources[self.config.validation.source], "validation.source"))
        wanted += [(task.source, f"evaluation.tasks[{index}].source") for index, task in enumerate(self.config.evaluation.tasks)]
        problems = []
        for source, where in wanted:
            try:
                find_files(source, where)
            except UserError as error:
                problems.append(str(error))
        if self.config.evaluation.benchmarks is not None:
            from mindvl_jax.evaluation.run_benchmarks import check_benchmarks

            try:
                check_benchmarks(self.config.evaluation.benchmarks)
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError("\n".join(problems))

    def _run_phase(
        self, index: int, state: TrainState, trained: list[str], frozen: list[str], step: int, begin: int, loader_state: dict | None,
        stop: StopRequest, stop_after: int | None,
    ) -> tuple[TrainState, int, bool]:
        """Steps `begin` .. phase.steps; returns (state, step, whether the phase came to its end). The state is saved in every case."""
        from mindvl_jax import data

        phase = self.config.training.phases[index]
        where = f"training.phases[{index}]"
        shape = data.batch_shape(self.config, phase)
        share = row_share(self.mesh, phase.rows, f"{where}.rows")
        key = program_key(phase, shape, trained)
        if key not in self.programs:
            self.programs[key] = make_programs(
                self.outline, phase=phase, optimizer=self.config.training.optimizer, shape=shape, trained=trained, frozen=frozen, mesh=self.mesh,
                loss_chunk=self.config.training.loss_chunk, where=where, compile=functools.partial(self.backend.compile, mesh=self.mesh),
            )  # fmt: skip
        programs = self.programs[key]
        rates = learning_rates(phase, where)
        count_flops = FlopCounter(self.config.model, self.outline.shapes, trained)
        print_phase(self.console, phase, index, len(self.config.training.phases), shape, trained, begin)
        if warning := shrinking(phase, self.config.model.vision.patch_size):
            self.console.print(f"[yellow]{warning}[/yellow]", soft_wrap=True)
        self.live.new_phase()
        with contextlib.closing(data.make_loader(self.config, index, process_index=share.index, process_count=share.count)) as loader:
            if loader_state is not None:
                loader.restore(loader_state)
            feed = Feed(loader, self.mesh, micro_steps=(phase.steps - begin) * phase.gradient_accumulation, accumulation=phase.gradient_accumulation)
            recorder = _Recorder(self, phase, shape, count_flops)
            validation = self._validation(index, shape, share, programs)
            for phase_step in range(begin, phase.steps):
                if self.profiler is not None:
                    self.profiler.before_step(step + 1, lambda: jax.block_until_ready(state.step))
                first = self.live.working(f"reading data and compiling the step of {phase.name}") if phase_step == begin else contextlib.nullcontext()
                with first:
                    done = self._step(programs, state, rates[phase_step], feed, phase.gradient_accumulation, step + 1, lambda: stop.requested(step + 1))
                if done is None:  # asked to stop between micro-steps: the state is still that of the last step
                    self._save(state, step, index, phase_step, trained, loader_state, recorder)
                    return state, step, False
                state, loader_state, dispatched = done
                if self.ema is not None:
                    self.ema.update(state.params, dispatched.metrics["applied"])
                step += 1
                if self.profiler is not None:
                    self.profiler.after_step(step, lambda: _ran(programs, state, shape, phase), lambda: jax.block_until_ready(state.step))
                ended = phase_step + 1 == phase.steps
                checked, is_best = self._validate(validation, state, step, recorder, ended=ended)
                recorder.add(dataclasses.replace(dispatched, first_of_phase=phase_step == begin, checked=checked))
                feed.refill()
                recorder.drain(keep=self.backend.in_flight)
                # A request that arrives now is answered before the next step; asking twice for one step would break the agreement.
                enough = stop_after is not None and step >= stop_after and step < self.total_steps
                if ended or enough or is_best or step % self.config.checkpoint.every_steps == 0:
                    self._save(state, step, index, phase_step + 1, trained, None if ended else loader_state, recorder)
                if enough:
                    return state, step, False
            recorder.drain(keep=0)
        return state, step, True

    def _step(
        self, programs: StepPrograms, state: TrainState, learning_rate: np.float32, feed: Feed, micro_steps: int, step: int,
        stopping: Callable[[], bool],
    ) -> tuple[TrainState, dict | None, _Dispatched] | None:
        """Dispatches optimizer step `step`; returns (state, loader state after it, what is to be recorded).

        None when a stop was asked for before it was complete: the state given is then untouched.
        """
        if stopping():
            return None
        micro = feed.next()
        if micro_steps == 1:
            state, metrics = programs.train_step(state, micro.batch, learning_rate)
            return state, micro.loader_state, _Dispatched(step, metrics, micro.sample_ids, micro.counters)
        totals = programs.zeros()
        ids: list[str] = []
        for number in range(micro_steps):
            if number:
                if jax.process_count() == 1 and stopping():  # one process may stop inside a step; several agree only between steps
                    return None
                micro = feed.next()
            totals = programs.accumulate(state, totals, micro.batch)
            ids.extend(micro.sample_ids)
            if number + 1 < micro_steps:
                feed.refill()
                # At most two micro-steps in flight, so that placed batches do not pile up.
                if number % 2:
                    jax.block_until_ready(totals.numerator)
        state, metrics = programs.update(state, totals, learning_rate)
        return state, micro.loader_state, _Dispatched(step, metrics, tuple(ids), micro.counters)

    def _validation(self, index: int, shape: BatchShape, share: RowShare, programs: StepPrograms) -> Validation | None:
        if self.config.validation is None:
            return None
        own = shape.rows // share.count
        made = Validation(
            self.config, index, outline=self.outline, mesh=self.mesh, shape=shape, rows=slice(share.index * own, (share.index + 1) * own),
            compile=functools.partial(self.backend.compile, mesh=self.mesh), shardings=programs.shardings,
        )  # fmt: skip
        self.console.print(f"validation: {made.samples} samples of {self.config.validation.source} every {self.config.validation.every_steps} steps")
        return made

    def _validate(self, validation: Validation | None, state: TrainState, step: int, recorder: _Recorder, *, ended: bool) -> tuple[dict[str, float], bool]:
        """(metrics of a check that is due, whether this step is to be kept as the best)."""
        if validation is None or not validation.due(step, ended=ended):
            return {}, False
        recorder.drain(keep=0)
        jax.block_until_ready(state.step)
        loss, seconds = validation.loss(state)
        recorder.pause(seconds)
        best = self.best.offer(step, loss, write=self.is_main and self.config.checkpoint.keep_best)
        self.console.print(f"step {step}: validation loss {loss:.4f}" + (" (lowest so far)" if best else f" (lowest {self.best.loss:.4f} at step {self.best.step})") + f", {seconds:.1f} s")
        keep = best and self.config.checkpoint.keep_best
        if keep:
            self.writer.best = step
        return {"validation_loss": loss, "validation_seconds": seconds}, keep

    def _save(
        self, state: TrainState, step: int, index: int, phase_step: int, trained: list[str], loader_state: dict | None, recorder: _Recorder
    ) -> None:
        # First the lines, then the checkpoint: on resume every line up to its step is there.
        recorder.drain(keep=0)
        phase = self.config.training.phases[index]
        progress = Progress(
            step=step, phase=index, phase_name=phase.name, phase_step=phase_step, trained=tuple(trained), loader=loader_state,
            totals=dict(self.totals),
        )  # fmt: skip
        with self.live.working(f"saving step {step}"):
            self.writer.save(self._as_jax(state), progress, self.config, None if self.ema is None else self.ema.params)

    def _wait(self, step: int) -> None:
        with self.live.working(f"writing the checkpoint of step {step}"):
            self.writer.wait()

    def _as_jax(self, state: TrainState | None) -> TrainState | None:
        if state is None:
            return None
        return self.backend.as_jax(state, states.state_shardings(self.outline, list(state.trained), list(state.frozen), self.mesh))

    # --- after the steps ---------------------------------------------------------------------------------------------

    def _evaluate(self, state: TrainState, step: int, phase: str) -> None:
        settings = self.config.evaluation
        if not settings.tasks and settings.benchmarks is None:
            return
        from mindvl_jax.evaluation.run import evaluate_run

        self.live.close()
        self.console.print(f"scoring held-out tasks after {phase}")
        # Decoding runs on XLA whatever trained: with npu_bridge on JAX's host devices.
        if settings.ema:
            params = {path: value.astype(self.outline.shapes[path].dtype) for path, value in self.ema.params.items()}
        else:
            params = self._as_jax(state).params
        params = scoring.for_scoring(params, self.outline)
        scoring.in_main_process(lambda: evaluate_run(self.config, self.outline.merge(params), step, phase, self.run_dir, self.console))

    def _finish(self, state: TrainState, step: int) -> None:
        self._evaluate(state, step, self.config.training.phases[-1].name)
        if self.is_main:
            from mindvl_jax.evaluation.report import write_report

            write_report(self.run_dir)
            self.console.print(f"done: {step} steps, {self.run_dir / 'report.html'}")


def _ran(programs: StepPrograms, state: TrainState, shape: BatchShape, phase: PhaseConfig) -> dict[str, tuple[Callable, tuple]]:
    """The programs of one step of a phase, with arguments to lower them again."""
    batch, rate = shape.empty(), np.float32(0)
    if phase.gradient_accumulation == 1:
        return {"train_step": (programs.train_step, (state, batch, rate))}
    totals = jax.eval_shape(programs.zeros)
    return {"accumulate": (programs.accumulate, (state, totals, batch)), "update": (programs.update, (state, totals, rate))}


class _Recorder:
    """Fetches metrics one step late, writes them down, and stops a run that diverges."""

    def __init__(self, trainer: Trainer, phase: PhaseConfig, shape: BatchShape, count_flops: FlopCounter):
        self._trainer, self._phase, self._shape, self._count_flops = trainer, phase, shape, count_flops
        self._pending: collections.deque[_Dispatched] = collections.deque()
        self._bad: collections.deque[_Dispatched] = collections.deque(maxlen=trainer.config.training.max_bad_steps)
        self._last = time.perf_counter()

    def add(self, dispatched: _Dispatched) -> None:
        self._pending.append(dispatched)

    def pause(self, seconds: float) -> None:
        """Leave out of the next step's time what was spent on something else."""
        self._last += seconds

    def drain(self, keep: int) -> None:
        """Waits for all dispatched steps but the newest `keep`."""
        while len(self._pending) > keep:
            done = self._pending.popleft()
            fetched = jax.device_get(done.metrics)
            by_source = fetched.pop("sources").tolist()
            values = {name: value.item() for name, value in fetched.items()}
            values["losses"] = {f"loss/{name}": total / weight for name, (total, weight) in zip(self._phase.sources, by_source) if weight > 0}
            values |= {name: int(values[name]) for name in ("tokens", "label_tokens", "samples", "patches")}
            now = time.perf_counter()
            self._write(done, values, now - self._last)
            self._last = now

    def _write(self, done: _Dispatched, values: dict[str, Any], seconds: float) -> None:
        trainer, places = self._trainer, self._shape.rows * self._phase.gradient_accumulation
        totals = trainer.totals
        totals["tokens"] += values["tokens"]
        totals["samples"] += values["samples"]
        totals["seconds"] += seconds
        flops = self._count_flops({name: values[name] for name in COUNTS})
        whole_peak = trainer.peak * trainer.mesh.devices.size * seconds if trainer.peak and seconds else None
        record = {
            "step": done.step,
            "phase": self._phase.name,
            "loss": values["loss"],
            **done.checked,
            **values["losses"],
            "grad_norm": values["grad_norm"],
            "learning_rate": values["learning_rate"],
            "tokens": values["tokens"],
            "label_tokens": values["label_tokens"],
            "samples": values["samples"],
            "patches": values["patches"],
            "step_seconds": seconds,
            "tokens_per_second": values["tokens"] / seconds,
            "samples_per_second": values["samples"] / seconds,
            "token_efficiency": values["tokens"] / (places * self._shape.tokens),
            "patch_efficiency": values["patches"] / (places * self._shape.patches),
            "flops": flops.language + flops.vision,
            "mfu": (flops.language + flops.vision) / whole_peak if whole_peak else None,
            "mfu_language": flops.language / whole_peak if whole_peak else None,
            "tokens_total": totals["tokens"],
            "samples_total": totals["samples"],
            "seconds_total": totals["seconds"],
            "applied": bool(values["applied"]),
            "skipped_steps": values["skipped_steps"],
            **{name: done.counters[name] for name in ("quarantined", "truncated", "shrunk", "epochs") if name in done.counters},
        }
        if done.first_of_phase:
            record["includes_compilation"] = True
        if not values["finite"]:
            record["sample_ids"] = list(done.sample_ids)
        if trainer.log is not None and (done.step % trainer.config.logging.every_steps == 0 or not values["applied"]):
            trainer.log.write(record)
        trainer.live.update(record, first_of_phase=done.first_of_phase)
        if not values["finite"]:
            self._on_bad_step(done, values)

    def _on_bad_step(self, done: _Dispatched, values: dict[str, Any]) -> None:
        limit = self._trainer.config.training.max_bad_steps
        self._bad.append(done)
        self._trainer.console.print(
            f"step {done.step}: loss {values['loss']}, gradient norm {values['grad_norm']}: skipped ({values['bad_steps']} in a row, the run stops at {limit})"
        )
        if values["bad_steps"] < limit:
            return
        ids = list(dict.fromkeys(sample for bad in self._bad for sample in bad.sample_ids))
        shown = ", ".join(ids[:20]) + (f" and {len(ids) - 20} more (all stand in metrics.jsonl)" if len(ids) > 20 else "")
        raise TrainingDiverged(
            f"{limit} steps in a row ({done.step - limit + 1} to {done.step}, phase {self._phase.name}) had a non-finite loss or gradient; "
            f"parameters are those from before them. Samples: {shown}. Look at these samples, lower learning_rate, or use compute_dtype: float32; "
            f"the last checkpoint is in {self._trainer.run_dir / 'checkpoints'}"
        )
