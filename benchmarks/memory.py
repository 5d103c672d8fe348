"""Peak memory of one side, measured in its own process."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any


def anonymous_bytes() -> int:
    """Memory of this process that is not mapped from files.

    Raises:
      RuntimeError: the system does not report it (Linux does).
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not report RssAnon; memory is measured on Linux only")


def trim() -> None:
    """Return freed memory to the system, so that earlier use is not counted."""
    with contextlib.suppress(OSError, AttributeError):  # another C library: its figures then include what it keeps
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Peak:
    """Largest anonymous memory while it is entered, sampled every two milliseconds."""

    def __enter__(self):
        self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())


def in_own_process(probe: str, **arguments) -> Any:
    """Run `probe` in a new process and return its result.

    Args:
      probe: "module:function"; the function takes `arguments` and returns plain data.

    Raises:
      RuntimeError: with the end of the process's output.
    """
    code = (
        "import importlib, json, sys; module, name = sys.argv[1].split(':'); "
        "print(json.dumps(getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))))"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, probe, json.dumps(arguments)],
        env=dict(os.environ),
        cwd=root,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{probe} {arguments}: {' / '.join(done.stderr.strip().splitlines()[-3:])}")
    return json.loads(done.stdout.strip().splitlines()[-1])
