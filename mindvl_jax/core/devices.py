"""Device memory by kind, and the share of it that a plan may fill."""

from __future__ import annotations

import dataclasses
import difflib
import os

from mindvl_jax.core.errors import UserError
from npu_bridge.emulator.settings import parse_bytes

GIB = 2**30

# Memory of one device in MiB, by the prefix of its name: as nvidia-smi and npu-smi report it, or as the maker states it (TPU).
# One die of an Atlas A3 package counts as a device.
KNOWN_MEMORY_MIB: dict[str, int] = {
    "NVIDIA A100 40GB": 40960,
    "NVIDIA A100 80GB": 81920,
    "NVIDIA A800 80GB": 81920,
    "NVIDIA H100": 81559,
    "NVIDIA H800": 81559,
    "NVIDIA H20": 97871,
    "NVIDIA H200": 143771,
    "NVIDIA B200": 183359,
    "NVIDIA L40S": 46068,
    "NVIDIA GeForce RTX 4090": 24564,
    "TPU v4": 32 * 1024,
    "TPU v5 lite": 16 * 1024,
    "TPU v5e": 16 * 1024,
    "TPU v5p": 95 * 1024,
    "TPU v6 lite": 32 * 1024,
    "TPU v6e": 32 * 1024,
    "Ascend 910B": 64 * 1024,
    "Ascend910B1": 64 * 1024,
    "Ascend910B2": 64 * 1024,
    "Ascend910B3": 64 * 1024,
    "Ascend910B4": 32 * 1024,
    "Ascend910_93": 64 * 1024,
}


@dataclasses.dataclass(frozen=True)
class Limit:
    """Memory of one device.

    Attributes:
      whole: bytes of memory. usable: bytes that a plan may fill. said: how `usable` follows from `whole`, for the report.
    """

    whole: int
    usable: int
    said: str


def parse_memory(text: str) -> int:
    """Parse `64GiB`, `80GB` or `24576MiB` to bytes. Raises UserError for anything else."""
    try:
        size = parse_bytes(text)
    except ValueError:
        size = 0
    if size <= 0:
        raise UserError(f"--memory {text!r}; expected a size of one device's memory such as 64GiB or 80GB")
    return size


def known_memory(device_kind: str) -> int:
    """Memory in bytes of a device kind, by the longest known prefix of it, or by known names that start with it if they agree.

    Raises:
      UserError: unknown, or the name matches kinds of different memory.
    """
    wanted = device_kind.lower()
    fits = [name for name in KNOWN_MEMORY_MIB if wanted.startswith(name.lower())]
    if fits:
        return KNOWN_MEMORY_MIB[max(fits, key=len)] * 2**20
    meant = [name for name in KNOWN_MEMORY_MIB if wanted in name.lower()]
    if len({KNOWN_MEMORY_MIB[name] for name in meant}) == 1:
        return KNOWN_MEMORY_MIB[meant[0]] * 2**20
    near = meant or difflib.get_close_matches(device_kind, KNOWN_MEMORY_MIB, n=3, cutoff=0.4) or list(KNOWN_MEMORY_MIB)
    raise UserError(f"--device-kind {device_kind!r}: {'which of them' if meant else 'unknown; did you mean one of'} {', '.join(near)}? Or give its memory, such as --memory 64GiB")


def limit_of(memory: str | None, device_kind: str | None, *, margin: float, backend: str) -> Limit | None:
    """Memory limit of one device; None when neither `memory` nor `device_kind` is given.

    Args:
      margin: share of the memory kept free for what no plan sees: allocator fragments, the driver, kernel workspaces.
    """
    if memory is not None:
        whole = parse_memory(memory)
    elif device_kind is not None:
        whole = known_memory(device_kind)
    else:
        return None
    share, said = 1 - margin, f"{margin:.0%} left to allocator, driver and kernels"
    if backend == "xla" and device_kind is not None and device_kind.upper().startswith("NVIDIA"):
        # XLA preallocates this share of a GPU and never takes more.
        taken = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))
        if taken < share:
            share, said = taken, f"XLA takes {taken:.0%} of a GPU; XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 gives it more"
    return Limit(whole, int(whole * share), said)
