"""Settings of the emulated device, and the environment that carries them into a process and its children."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

from npu_bridge.emulator.errors import EmulatorError

PREFIX = "NPU_EMULATOR_"
# Names that select code paths inside torch_npu. Others select paths that were never tested.
SOCS = (
    "Ascend910B1",
    "Ascend910B2",
    "Ascend910B3",
    "Ascend910B4",
    "Ascend910_9391",
    "Ascend910_9392",
    "Ascend950PR_957b",
)
_UNITS = {
    "": 1,
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "M": 1 << 20,
    "G": 1 << 30,
}


def parse_bytes(text: str) -> int:
    """Parse `64GiB`, `80 GB` or `24576mib` to bytes. Raises ValueError that lists the known units."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match and next((size for name, size in _UNITS.items() if name.lower() == match[2].lower()), None)
    if not unit:
        raise ValueError(
            f"{text!r} is not an amount of memory; write a number and one of "
            f"{', '.join(u for u in _UNITS if u)}, such as 64GiB"
        )
    return int(float(match[1]) * unit)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the emulated machine.

    Attributes:
      devices: number that a process sees. soc: name of the chip. memory: bytes of each device.
      execute: False counts kernels and computes nothing.
      asynchronous: run every stream on its own thread, each task at least `delay` seconds after its launch.
      trace: file for the counters of each process. timeout: seconds a collective waits for its peers.
      transport: "shm" or "tcp" between the processes of a communicator.
    """

    devices: int = 1
    soc: str = "Ascend910B2"
    memory: int = 64 << 30
    execute: bool = True
    asynchronous: bool = False
    delay: float = 0.002
    trace: str = ""
    timeout: float = 120.0
    transport: str = "shm"

    def __post_init__(self):
        if not 1 <= self.devices <= 64:
            raise EmulatorError(f"npu_bridge.emulator: --devices {self.devices}; expected 1 to 64")
        if self.soc not in SOCS:
            raise EmulatorError(f"npu_bridge.emulator: --soc {self.soc}; known: {', '.join(SOCS)}")
        if self.memory < 64 << 20:
            raise EmulatorError(
                f"npu_bridge.emulator: --memory {self.memory} bytes; expected at least 64MiB, torch_npu's "
                "allocator asks for 20 MiB at a time"
            )
        if self.transport not in ("shm", "tcp"):
            raise EmulatorError(f"npu_bridge.emulator: --transport {self.transport}; expected shm or tcp")

    def variables(self) -> dict[str, str]:
        """Environment variables that the libraries read."""

        def text(value):
            return str(int(value)) if isinstance(value, bool) else str(value)

        values = {PREFIX + name.upper(): text(value) for name, value in dataclasses.asdict(self).items()}
        if self.trace:
            values[PREFIX + "TRACE"] = str(Path(self.trace).resolve())
        return values


def environment_for(settings: Settings, libraries: Path, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return `base` plus the variables that a process needs to run torch_npu in the emulator."""
    environment = dict(base) | settings.variables()
    environment[PREFIX + "LIBRARIES"] = str(libraries)
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(libraries), base.get("LD_LIBRARY_PATH", "")]))
    # With torch_npu's own queue an error comes one call late, and what follows it is skipped silently; without it every
    # refusal is raised where it arises. A program that measures the queue sets the variable itself.
    environment.setdefault("TASK_QUEUE_ENABLE", "0")
    # Importing torch imports an installed torch_npu automatically.
    environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "1"
    return environment


def active(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process runs in the emulator."""
    return PREFIX + "LIBRARIES" in environment
