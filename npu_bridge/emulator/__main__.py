"""Run a command with emulated NPUs: ``python -m npu_bridge.emulator [options] -- python anything.py``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence

from npu_bridge.emulator.build import build
from npu_bridge.emulator.environment import refuse_beside_cann
from npu_bridge.emulator.errors import EmulatorError, RealCannFound
from npu_bridge.emulator.settings import Settings, environment_for, parse_bytes


def parser() -> argparse.ArgumentParser:
    defaults = Settings()
    p = argparse.ArgumentParser(
        prog="python -m npu_bridge.emulator", usage="%(prog)s [options] -- command ...",
        description="Runs a command with software NPUs: the torch_npu wheel on an emulated CANN runtime. Kernels are "
            "computed by torch on the CPU; "
        "nothing here says anything about the speed or the rounding of a chip.",
    )  # fmt: skip
    p.add_argument(
        "--devices",
        type=int,
        default=defaults.devices,
        metavar="N",
        help="NPUs that each process sees (default %(default)s)",
    )
    p.add_argument(
        "--soc", default=defaults.soc, metavar="NAME", help="chip that torch_npu shall believe in (default %(default)s)"
    )
    p.add_argument(
        "--memory",
        default="64GiB",
        metavar="SIZE",
        help="memory of a device (default %(default)s); more is torch_npu's OutOfMemoryError",
    )
    p.add_argument(
        "--no-execute",
        action="store_true",
        help="count kernels and plan memory, compute nothing: full-size models in little memory",
    )
    p.add_argument(
        "--trace",
        default="",
        metavar="FILE",
        help="write the counters of each process as JSON (FILE.rankN where there are ranks)",
    )
    p.add_argument(
        "--asynchronous",
        action="store_true",
        help="work runs late, on a thread a stream: a missing event or record_stream becomes a wrong result",
    )
    p.add_argument(
        "--delay",
        type=float,
        default=defaults.delay,
        metavar="S",
        help="with --asynchronous: seconds a task lies in its queue (default %(default)s)",
    )
    p.add_argument(
        "--timeout",
        type=float,
        default=defaults.timeout,
        metavar="S",
        help="seconds a collective waits for its peers (default %(default)s)",
    )
    p.add_argument(
        "--transport", choices=("shm", "tcp"), default="shm", help="what collectives go over (default %(default)s)"
    )
    p.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser()
    given = p.parse_args(arguments)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        p.error("no command; write it after --, such as: -- python train.py")
    if command[0] in ("python", "python3"):
        command = [sys.executable, *command[1:]]  # the environment that was checked, not the first on PATH
    elif shutil.which(command[0]) is None:
        p.error(f"command {command[0]!r} was not found on PATH")
    try:
        memory = parse_bytes(given.memory)
    except ValueError as error:
        p.error(f"--memory {error}")
    try:
        settings = Settings(
            devices=given.devices,
            soc=given.soc,
            memory=memory,
            execute=not given.no_execute,
            asynchronous=given.asynchronous,
            delay=given.delay,
            trace=given.trace,
            timeout=given.timeout,
            transport=given.transport,
        )
        refuse_beside_cann()
        environment = environment_for(settings, build())
    except RealCannFound as found:
        sys.stderr.write(f"{found}\nnpu_bridge.emulator: running the command on the real CANN.\n")
        environment = dict(os.environ)
    except EmulatorError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)  # does not return
    return 1


if __name__ == "__main__":
    sys.exit(main())
