"""Training with evaluation, report and profiler, as the commands run it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.data.sources.readers import find_files
from mindvl_jax.evaluation.metrics import rule_of
from mindvl_jax.evaluation.report import write_report
from mindvl_jax.evaluation.run import evaluate_run
from mindvl_jax.evaluation.run_benchmarks import check_benchmarks
from mindvl_jax.profiling.profiler import StepProfiler, make_tracer
from mindvl_jax.training import trainer
from mindvl_jax.training.hooks import Hooks


class RunHooks(Hooks):
    """Evaluation on the configuration's tasks and benchmarks, report.html, and the profiler."""

    def __init__(self, config: Config):
        self._config = config
        self.evaluates = bool(config.evaluation.tasks) or config.evaluation.benchmarks is not None

    def problems(self) -> list[str]:
        settings, found = self._config.evaluation, []
        checks = [
            functools.partial(find_files, task.source, f"evaluation.tasks[{index}].source")
            for index, task in enumerate(settings.tasks)
        ]
        checks += [functools.partial(rule_of, task.metric) for task in settings.tasks]
        if settings.benchmarks is not None:
            checks.append(functools.partial(check_benchmarks, settings.benchmarks))
        for check in checks:
            try:
                check()
            except UserError as error:
                found.append(str(error))
        return found

    def watcher(self, say: Callable[[str], None]) -> StepProfiler:
        return StepProfiler(
            Path(self._config.run.dir), self._config.profile, say, functools.partial(make_tracer, self._config)
        )

    def evaluate(self, model: Any, step: int, phase: str, console: Console) -> None:
        evaluate_run(self._config, model, step, phase, self._config.run.dir, console)

    def report(self, run_dir: Path) -> Path:
        return write_report(run_dir)


def train(config: Config, *, stop_after: int | None = None, console: Console | None = None) -> trainer.RunResult:
    """`training.trainer.train` with the hooks of a whole run."""
    return trainer.train(config, stop_after=stop_after, console=console, hooks=RunHooks(config))
