"""Stopping cleanly: SIGTERM and SIGINT become a request that the loop reads between steps."""

from __future__ import annotations

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Catch SIGTERM and SIGINT while it is entered; a second SIGINT interrupts at once.

    With several processes the request must reach all of them at the same step, or the others would wait for ever in an
    exchange: the coordination service of jax.distributed catches SIGTERM itself and agrees on the step; SIGINT is
    passed on to it.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: dict[int, object] = {}
        self._shared = jax.process_count() > 1

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            caught = (signal.SIGINT,) if self._shared else (signal.SIGTERM, signal.SIGINT)
            self._before = {number: signal.signal(number, self._on_signal) for number in caught}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._shared:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def requested(self, step: int) -> bool:
        """Whether to stop before optimizer step `step`; every process gets the same answer for the same step."""
        if self._shared and self.reason is None and multihost_utils.reached_preemption_sync_point(step):
            self.reason = "SIGTERM"
        return self.reason is not None
