"""``python -m npu_bridge.launch --nproc 4 script.py ...``: one process a device on this machine.

Sets what torch.distributed reads from the environment (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), so a
script runs the same under torchrun. When a rank fails, the others are stopped within seconds, and the error names the
rank that failed first. For several machines use torchrun.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

GRACE_SECONDS = 1.0  # peers of a dead rank fail a moment later; whoever fails in this window is looked at together
STOP_SECONDS = 5.0  # from the request to end to the order


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@dataclasses.dataclass
class Rank:
    number: int
    process: subprocess.Popen
    tail: collections.deque  # last lines of stderr

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def ending(self) -> str:
        code = self.process.returncode
        if code is not None and code < 0:
            return f"was ended by signal {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def is_victim(self) -> bool:
        """Whether this rank failed because a peer did."""
        return any("CollectiveError" in line for line in self.tail)


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    env = dict(os.environ)
    env.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    env.setdefault("JAX_PLATFORMS", "cpu")  # JAX only traces here; it must not take the accelerator's memory
    env.setdefault("PYTHONUNBUFFERED", "1")
    return env


def _pass_on(stream, out, prefix: str, tail: collections.deque | None) -> None:
    for line in stream:
        if tail is not None:
            tail.append(line)
        out.write(prefix + line)
        out.flush()


def _stop(ranks: Sequence[Rank]) -> None:
    for order, wait in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        for r in ranks:
            if r.code is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(
                        r.process.pid, order
                    )  # each rank leads its own session, so its workers get the signal too
        end = time.monotonic() + wait
        while time.monotonic() < end and any(r.code is None for r in ranks):
            time.sleep(0.05)


def run(command: Sequence[str], count: int, port: int | None = None) -> int:
    """Run `command` once for each rank and return the exit code of the job."""
    port = port or free_port()
    ranks: list[Rank] = []
    threads = []
    for number in range(count):
        process = subprocess.Popen(
            list(command),
            env=_environment(number, count, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        rank = Rank(number, process, collections.deque(maxlen=40))
        prefix = "" if number == 0 else f"[rank {number}] "
        for stream, out, tail in ((process.stdout, sys.stdout, None), (process.stderr, sys.stderr, rank.tail)):
            threads.append(threading.Thread(target=_pass_on, args=(stream, out, prefix, tail), daemon=True))
            threads[-1].start()
        ranks.append(rank)

    def interrupted(signum, frame):
        _stop(ranks)
        sys.exit(128 + signum)

    previous = {s: signal.signal(s, interrupted) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        while any(r.code is None for r in ranks) and not any(r.code for r in ranks):
            time.sleep(0.05)
        failed = [r for r in ranks if r.code]
        if failed:
            time.sleep(GRACE_SECONDS)
            others = [r for r in ranks if r.code is None]
            _stop(others)
            for t in threads:
                t.join(timeout=1)
            failed = (
                [r for r in failed if not r.is_victim()]
                or [r for r in ranks if r.code and r not in others and not r.is_victim()]
                or failed
            )
            first = failed[0]
            sys.stderr.write(
                f"npu_bridge.launch: rank {first.number} {first.ending()}; the other ranks were stopped. Its "
                "own message stands above" + (f" after '[rank {first.number}]'.\n" if first.number else ".\n")
            )
            return first.process.returncode if first.process.returncode > 0 else 1
        for t in threads:
            t.join(timeout=5)
        return 0
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m npu_bridge.launch", description=__doc__.split("\n\n")[0])
    parser.add_argument("--nproc", type=int, required=True, help="processes, one per mesh position")
    parser.add_argument("--port", type=int, default=None, help="rendezvous port (default: a free one)")
    parser.add_argument("-m", dest="module", action="store_true", help="run a module instead of a script")
    parser.add_argument("script", help="Python script (or module with -m)")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="arguments of the script")
    given = parser.parse_args(arguments)
    if given.nproc < 1:
        parser.error(f"--nproc {given.nproc}: expected at least 1")
    if not given.module and not os.path.exists(given.script):
        parser.error(f"script {given.script!r} does not exist")
    command = [sys.executable, *(["-m"] if given.module else []), given.script, *given.args]
    return run(command, given.nproc, given.port)


if __name__ == "__main__":
    sys.exit(main())
