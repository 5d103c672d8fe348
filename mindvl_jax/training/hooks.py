"""Hooks of a run: evaluation, report, profiler.

Injected, so that training imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console


class StepWatcher(Protocol):
    """Called around every step, in the main process."""

    def before_step(self, step: int, wait: Callable[[], None]) -> None:
        """Before step `step` (from 1) is dispatched; `wait` returns when all earlier work is done."""

    def after_step(self, step: int, programs: Callable[[], Any], wait: Callable[[], None]) -> None:
        """After step `step` was dispatched; `programs` gives the functions that it ran, with arguments to lower them
        again.
        """

    def close(self) -> None: ...


class Hooks:
    """A run without evaluation, report and profiler. `mindvl_jax.cli.train` has the one of the command."""

    evaluates: bool = False
    """Whether `evaluate` does anything. If not, parameters are not gathered for it."""

    def problems(self) -> list[str]:
        """Check early for what would fail hours later, such as missing evaluation files."""
        return []

    def watcher(self, say: Callable[[str], None]) -> StepWatcher | None:
        """The profiler of the main process."""
        return None

    def evaluate(self, model: Any, step: int, phase: str, console: Console) -> None:
        """Score the live model after a phase. Runs in the main process alone."""

    def report(self, run_dir: Path) -> Path | None:
        """Write the report of the run so far, after a scored phase and at the end. In the main process alone."""
        return None
