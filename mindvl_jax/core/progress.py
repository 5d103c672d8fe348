"""Progress output of long work, on a terminal and in a pipe.

A terminal gets bars that redraw. A pipe or a log file gets whole lines with the time of day, none of them wrapped, and
a line at least
every few seconds: a reader of a log must see whether a job still works.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.control import Control
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mindvl_jax.core.errors import printable

WIDTH = 160  # of a line that nobody's window wraps
SOON, EVERY = 2.0, 10.0  # seconds until work says that it takes longer, and between two such lines


def duration(seconds: float) -> str:
    """3725 -> 1:02:05."""
    if not 0 <= seconds < float("inf"):
        return "?"
    hours, rest = divmod(int(seconds + 0.5), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class LogConsole(Console):
    """A console whose lines carry the time of day wherever no terminal shows them, and go into a log file too.

    Args:
      stderr: write there instead of standard output. stamp: put the time of day before each line of a pipe.
    """

    def __init__(self, *, stderr: bool = False, stamp: bool = True, file: TextIO | None = None, **options: Any):
        stream = file or (sys.stderr if stderr else sys.stdout)
        width = None if getattr(stream, "isatty", lambda: False)() else WIDTH
        # Names and paths are printed as they are: `[red]` in one is no style.
        super().__init__(stderr=stderr, file=file, width=width, markup=False, **options)
        self._stamp = stamp
        self._log: TextIO | None = None

    def log_to(self, path: Path) -> None:
        """Append everything that is said from here on to a file, with date and time."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._log = path.open("a", encoding="utf-8")

    def close_log(self) -> None:
        """Stop writing to the file of `log_to`."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def log_only(self, text: str) -> None:
        """Write a line to the log file alone."""
        if self._log is not None:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            self._log.writelines(f"{stamp} {line.rstrip()}\n" for line in text.splitlines())
            self._log.flush()

    def print(self, *objects: Any, **options: Any) -> None:
        objects = tuple(printable(each) if isinstance(each, str) else each for each in objects)
        if self.quiet or (all(isinstance(each, Control) for each in objects) and objects):
            super().print(*objects, **options)
            return
        text = self._plain(*objects, **options) if self._log is not None or not self.is_terminal else ""
        self.log_only(text)
        if self.is_terminal:
            super().print(*objects, **options)
            return
        stamp = time.strftime("%H:%M:%S ") if self._stamp else ""
        self.file.write("".join(f"{stamp}{line.rstrip()}\n" for line in text.splitlines()))
        self.file.flush()

    def _plain(self, *objects: Any, **options: Any) -> str:
        if all(isinstance(each, str) for each in objects):
            options["soft_wrap"] = True
        text = io.StringIO()
        sink = Console(file=text, width=WIDTH, color_system=None, force_terminal=False, highlight=False, markup=False)
        sink.print(*objects, **options)
        return text.getvalue()


@contextlib.contextmanager
def heartbeat(
    say: Callable[[str], None], what: Callable[[], str] | str, *, soon: float = SOON, every: float = EVERY
) -> Iterator[None]:
    """Call `say` after `soon` seconds and then every `every` seconds while the body runs."""
    started, ended = time.monotonic(), threading.Event()
    text = (lambda: what) if isinstance(what, str) else what

    def beat() -> None:
        wait = soon
        while not ended.wait(wait):
            say(f"{text()} ({duration(time.monotonic() - started)} so far)")
            wait = every

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def working(console: Console, what: str, *, soon: float = SOON, every: float = EVERY) -> Iterator[None]:
    """Say what is being done while it takes longer than a moment: a spinner on a terminal, lines elsewhere."""
    if console.quiet:
        yield
    elif console.is_terminal:
        with console.status(what):
            yield
    else:
        started = time.monotonic()
        with heartbeat(lambda text: console.print(text, highlight=False), what, soon=soon, every=every):
            yield
        if time.monotonic() - started > soon:
            console.print(f"{what}: done in {duration(time.monotonic() - started)}", highlight=False)


@contextlib.contextmanager
def counting(
    console: Console, *, soon: float = SOON, every: float = EVERY, first: str = ""
) -> Iterator[Callable[[int, int, str], None]]:
    """Yield `show(done, total, label)`: bars on a terminal, elsewhere a line every few seconds with the time left.

    Args:
      first: what the first of them waits for, such as a compiler; said in lines.
    """
    if console.quiet:
        yield lambda done, total, label: None
        return
    if console.is_terminal:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        ) as bars:
            tasks: dict[str, Any] = {}

            def draw(done: int, total: int, label: str) -> None:
                if label not in tasks:
                    tasks[label] = bars.add_task(label, total=total or None)
                bars.update(tasks[label], completed=done)

            yield draw
        return
    counts = _Counts(first)
    with heartbeat(
        lambda text: console.print(text, highlight=False, markup=False), counts.text, soon=soon, every=every
    ):
        yield counts.show


class _Counts:
    """The newest count of a piece of work, and its time left."""

    def __init__(self, first: str = "") -> None:
        self._waits = first
        self._label, self._done, self._first, self._total = "reading samples", 0, 0, 0
        self._since = time.monotonic()

    def show(self, done: int, total: int, label: str) -> None:
        if label != self._label:
            self._label, self._first, self._since = label, done, time.monotonic()
        self._done, self._total = done, total

    def text(self) -> str:
        if not self._total:
            return self._label
        made, seconds = self._done - self._first, time.monotonic() - self._since
        waits = f" ({self._waits})" if self._waits and not self._done else ""
        left = f", ETA {duration((self._total - self._done) * seconds / made)}" if made else waits
        return f"{self._label}: {self._done} of {self._total}{left}"
