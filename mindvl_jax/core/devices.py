"""The table of known devices: memory, peak, and the share of the memory that a plan may fill."""

from __future__ import annotations

import dataclasses
import difflib
import os

from mindvl_jax.core.errors import UserError
from npu_bridge.emulator.settings import parse_bytes

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
      mib: memory in MiB, as nvidia-smi and npu-smi report it or as the maker states it (TPU); None if the name does not
        tell.
      flops: dense bfloat16 peak in FLOP/s from the maker's data sheet; None where it is not listed here.
    """

    mib: int | None = None
    flops: float | None = None


# By the prefix of the name: as JAX reports it (`device_kind`), as people write it. One die of an Atlas A3 package
# counts as a device.
DEVICES: dict[str, Device] = {
    "NVIDIA A100": Device(flops=312e12),
    "NVIDIA A100 40GB": Device(40960, 312e12),
    "NVIDIA A100 80GB": Device(81920, 312e12),
    "NVIDIA A800 80GB": Device(81920),
    "NVIDIA H100": Device(81559, 989e12),
    "NVIDIA H100 PCIe": Device(81559, 756e12),
    "NVIDIA H800": Device(81559),
    "NVIDIA H20": Device(97871),
    "NVIDIA H200": Device(143771, 989e12),
    "NVIDIA B200": Device(183359),
    "NVIDIA L40S": Device(46068),
    "NVIDIA GeForce RTX 4090": Device(24564),
    "TPU v4": Device(32 * 1024, 275e12),
    "TPU v5": Device(flops=459e12),
    "TPU v5 lite": Device(16 * 1024, 197e12),
    "TPU v5e": Device(16 * 1024, 197e12),
    "TPU v5p": Device(95 * 1024, 459e12),
    "TPU v6 lite": Device(32 * 1024, 918e12),
    "TPU v6e": Device(32 * 1024, 918e12),
    "Ascend 910B": Device(64 * 1024),
    "Ascend910B1": Device(64 * 1024),
    "Ascend910B2": Device(64 * 1024),
    "Ascend910B3": Device(64 * 1024),
    "Ascend910B4": Device(32 * 1024),
    "Ascend910_93": Device(64 * 1024),
}


def known_peak(device_kind: str) -> float | None:
    """Peak FLOP/s of a device kind, by the longest known prefix of it; None if it is not known."""
    fits = [name for name in DEVICES if device_kind.startswith(name)]
    return DEVICES[max(fits, key=len)].flops if fits else None


@dataclasses.dataclass(frozen=True)
class Limit:
    """Memory of one device.

    Attributes:
      whole: bytes of memory. usable: bytes that a plan may fill. said: how `usable` follows from `whole`, for the
        report.
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
    """Memory in bytes of a device kind, by the longest known prefix of it, or by known names that start with it if they
    agree.

    Raises:
      UserError: unknown, or the name matches kinds of different memory.
    """
    wanted = device_kind.lower()
    mib = {name: device.mib for name, device in DEVICES.items() if device.mib is not None}
    fits = [name for name in mib if wanted.startswith(name.lower())]
    if fits:
        return mib[max(fits, key=len)] * 2**20
    meant = [name for name in mib if wanted in name.lower()]
    if len({mib[name] for name in meant}) == 1:
        return mib[meant[0]] * 2**20
    near = meant or difflib.get_close_matches(device_kind, mib, n=3, cutoff=0.4) or list(mib)
    raise UserError(
        f"--device-kind {device_kind!r}: {'which of them' if meant else 'unknown; did you mean one of'} "
        f"{', '.join(near)}? Or give its memory, such as --memory 64GiB"
    )


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
