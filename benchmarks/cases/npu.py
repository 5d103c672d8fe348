"""Host side of an NPU, on the emulator: launches and memory of a step. Says nothing about the speed of an NPU."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import Comparison, Side
from benchmarks.registry import Settings, case

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv-npu"


def in_emulator(side: str, layers: int, blocks: int) -> dict[str, Any]:
    """Run `benchmarks.npu` for one side in the emulator's environment and return its figures."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"suite npu-emulated needs {ENVIRONMENT.name}, which has torch_npu: `make setup-npu` makes it")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    emulated = [str(python), "-m", "npu_bridge.emulator", "--no-execute", "--memory", "64GiB", "--"]
    command = [*emulated, "python", "-m", "benchmarks.npu", side, str(layers), str(blocks)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side} in the emulator: {' / '.join(done.stderr.strip().splitlines()[-3:])}")
    return json.loads(done.stdout.splitlines()[-1])


UNITS = {
    "kernels": "kernels",
    "synchronisations": "synchronisations",
    "copies": "copies",
    "host us": "us",
    "peak MiB": "MiB",
}


@case("npu-8b", suite="npu-emulated")
def npu_8b(settings: Settings) -> Iterator[Comparison]:
    """Emulated, host side only: kernels, waits, copies, the host's processor time and the allocator's peak of a step of
    MindVL-8B's layers, bridge beside torch_npu by hand.
    """
    layers, blocks = (1, 1) if settings.dry else (2, 4) if settings.brief else (4, 8)
    found = {
        name: in_emulator(side, layers, blocks)
        for name, side in (("npu_bridge", "bridge"), ("torch_npu by hand", "hand"))
    }
    note = (
        f"{layers} layers and {blocks} blocks of MindVL-8B, 4,096 tokens, 8,192 patches, remat by layer, "
        "bfloat16. Emulated: no speed of an NPU."
    )
    for what, unit in UNITS.items():
        sides = [
            Side(name, size=told[what], facts=told["facts"] if what == "peak MiB" else {})
            for name, told in found.items()
        ]
        yield Comparison(what, sides, unit=unit, note=note)
