"""Counters of the emulated device: kernels by name, synchronisations, copies, bytes, memory.

with npu_bridge.emulator.count() as counts:
    step()
    torch.npu.synchronize()
assert counts.synchronisations == {"stream": 1}
print(counts.table())
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from npu_bridge.emulator.errors import EmulatorError

KINDS = ("kernels", "copies", "synchronisations", "collectives", "graphs", "allocations")


@dataclasses.dataclass
class Counts:
    """Counters of one process.

    Attributes:
      raw: kind -> name -> {"calls", "captured", "replayed", "bytes", "host_us", "compute_us"}. `calls` counts launches
        by the program, `captured` those recorded into a graph instead of run, `replayed` runs inside graph replays.
      memory: for each device, bytes allocated now and at peak (with torch_npu: reserved by its caching allocator).
    """

    raw: dict[str, dict[str, dict[str, float]]]
    memory: list[dict[str, int]]

    @classmethod
    def parse(cls, text: str) -> Counts:
        whole: dict[str, Any] = json.loads(text)
        return cls({kind: whole[kind] for kind in KINDS}, whole["memory"])

    @classmethod
    def read(cls, path: str | Path) -> Counts:
        """Read the file written by `--trace`."""
        return cls.parse(Path(path).read_text())

    def run(self, kind: str) -> dict[str, int]:
        """Name -> number of runs: launched and not captured, or inside a replay."""
        counts = {name: int(c["calls"] - c["captured"] + c["replayed"]) for name, c in self.raw[kind].items()}
        return {name: n for name, n in counts.items() if n}

    @property
    def kernels(self) -> dict[str, int]:
        return self.run("kernels")

    @property
    def copies(self) -> dict[str, int]:
        return self.run("copies")

    @property
    def collectives(self) -> dict[str, int]:
        return self.run("collectives")

    @property
    def synchronisations(self) -> dict[str, int]:
        return self.run("synchronisations")

    @property
    def replays(self) -> int:
        return self.run("graphs").get("replay", 0)

    @property
    def peak_bytes(self) -> int:
        return max((device["peak"] for device in self.memory), default=0)

    def table(self) -> str:
        """Format all counters as text, the most frequent first."""
        lines = []
        for kind in KINDS:
            rows = sorted(self.raw[kind].items(), key=lambda item: -(item[1]["calls"] + item[1]["replayed"]))
            for name, c in rows:
                lines.append(
                    (
                        kind,
                        name,
                        f"{c['calls']:.0f}",
                        f"{c['replayed']:.0f}",
                        f"{c['bytes']:.0f}" if c["bytes"] else "",
                        f"{c['host_us']:.0f}",
                        f"{c['compute_us']:.0f}",
                    )
                )
        head = ("kind", "name", "calls", "replayed", "bytes", "host us", "compute us")
        widths = [max(len(row[i]) for row in (head, *lines)) for i in range(len(head))]
        text = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
            ).rstrip()
            for row in (head, *lines)
        ]
        text += [
            f"device {i}: {m['used']} bytes in use, {m['peak']} at most, of {m['limit']}"
            for i, m in enumerate(self.memory)
            if m["peak"]
        ]
        return "\n".join(text)


def _library(environment: Mapping[str, str] = os.environ) -> ctypes.CDLL:
    folder = environment.get("NPU_EMULATOR_LIBRARIES")
    if not folder:
        raise EmulatorError(
            "npu_bridge.emulator: this process does not run in the emulator; start it with `python -m "
            "npu_bridge.emulator -- python ...`"
        )
    library = ctypes.CDLL(str(Path(folder) / "libascendcl.so"))
    library.npu_emulator_counters.restype = ctypes.c_uint64
    library.npu_emulator_counters.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
    return library


def counters() -> Counts:
    """The counters of this process so far. Raises EmulatorError outside the emulator."""
    library = _library()
    size = library.npu_emulator_counters(None, 0) + 65536  # other threads may keep counting
    buffer = ctypes.create_string_buffer(size)
    library.npu_emulator_counters(buffer, size)
    return Counts.parse(buffer.value.decode())


@contextlib.contextmanager
def count() -> Iterator[Counts]:
    """Count what happens inside the block; the object is filled when the block ends."""
    library = _library()
    library.npu_emulator_reset_counters()
    counts = Counts({kind: {} for kind in KINDS}, [])
    yield counts
    now = counters()
    counts.raw, counts.memory = now.raw, now.memory
