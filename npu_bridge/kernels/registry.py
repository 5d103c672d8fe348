"""Table of kernels, and the choice between a fused call and its equivalent."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch

PREFIX = "npu_bridge."
# comma-separated families, or "all", that run their torch equivalent in place of the fused call
SWITCH = "NPU_BRIDGE_EQUIVALENT"

Function = Callable[..., tuple[torch.Tensor, ...]]

# Largest difference from the formula in float64, relative to the largest value of the result (worst over results).
# float32: about eighty roundings of 2^-24, as in sums of up to a thousand terms.
FLOAT32 = 5e-6
# bfloat16: inputs are exact, so one rounding of the result (2^-9 = 2e-3 of its largest value) ...
ROUNDED_ONCE = 4e-3
# ... or several, where rounded intermediates feed a product (probabilities and their gradient).
ROUNDED_INSIDE = 1.6e-2


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One custom call and its implementations.

    Attributes:
      name: the custom call without its prefix.
      family: name in the switch; forward and backward of one operator share it, because the saved residuals must match.
      equivalent: plain torch without autograd, ``(*tensors, **params) -> tuple of tensors``, float32 inside.
      npu: the same signature on torch_npu, or None where torch's own operators are the fused kernels (aclnn) already.
      cpu: the same signature by torch's fused CPU kernels, or None where torch has none.
      call: the torch_npu or torch call made on Ascend, as text for the documentation.
      tolerance: dtype name -> bound on the error (see above).
      note: shown in the table.
    """

    name: str
    family: str
    equivalent: Function
    npu: Function | None
    call: str
    tolerance: dict[str, float]
    note: str = ""
    cpu: Function | None = None


KERNELS: dict[str, Kernel] = {}


def register(
    name: str,
    *,
    family: str,
    call: str,
    inside: bool = False,
    npu: Function | None = None,
    cpu: Function | None = None,
    note: str = "",
) -> Callable[[Function], Function]:
    """Register the decorated torch equivalent.

    `inside`: rounded intermediates feed a product, so the bfloat16 tolerance is wider.
    """

    def enter(equivalent: Function) -> Function:
        if name in KERNELS:
            raise ValueError(f"npu_bridge.kernels: {name!r} is registered twice")
        tolerance = {"float32": FLOAT32, "bfloat16": ROUNDED_INSIDE if inside else ROUNDED_ONCE}
        KERNELS[name] = Kernel(name, family, equivalent, npu, call, tolerance, note, cpu)
        return equivalent

    return enter


def families() -> list[str]:
    """Family names that the switch accepts."""
    return sorted({kernel.family for kernel in KERNELS.values()})


def switched_off(setting: str | None = None) -> set[str]:
    """Families that the switch maps to their equivalents.

    Raises:
      ValueError: an unknown family; the message lists the known ones.
    """
    setting = os.environ.get(SWITCH, "") if setting is None else setting
    wanted = {word.strip() for word in setting.split(",") if word.strip()}
    if "all" in wanted:
        return set(families())
    unknown = sorted(wanted - set(families()))
    if unknown:
        raise ValueError(f"{SWITCH} names {', '.join(unknown)}; known families: all, {', '.join(families())}")
    return wanted


def lookup(name: str, device: str, *, equivalents: str | None = None) -> Function:
    """Return the function that runs a custom call on a device.

    Args:
      name: with or without "npu_bridge.". device: "npu", "cuda" or "cpu" (an index after a colon is ignored).
      equivalents: overrides the environment variable NPU_BRIDGE_EQUIVALENT.

    Raises:
      KeyError: no such kernel. ValueError: an unknown family in the switch. ImportError: device "npu" without
        torch_npu.
    """
    kernel = KERNELS.get(name.removeprefix(PREFIX))
    if kernel is None:
        raise KeyError(f"npu_bridge.kernels: no kernel {name!r}; registered: {', '.join(sorted(KERNELS))}. "
                       "A program's own operator is added with npu_bridge.runtime.kernel_table.provide.")  # fmt: skip
    kind = str(device).partition(":")[0]
    fused = {"npu": kernel.npu, "cpu": kernel.cpu}.get(kind)
    if fused is None or kernel.family in switched_off(equivalents):
        return kernel.equivalent
    if kind == "npu":
        torch_npu()
    return fused


def torch_npu() -> Any:
    """Import torch_npu on first use. The import fails where CANN is missing, so no other code does it."""
    try:
        import torch_npu
    except ImportError as error:
        raise ImportError(
            "npu_bridge.kernels: device 'npu' needs torch_npu and CANN, and importing torch_npu failed "
            f"({error}). Install the torch_npu release that fits torch {torch.__version__}, or choose device "
            "'cpu' or 'cuda', "
            f"or run without an NPU in the emulator (python -m npu_bridge.emulator)."
        ) from error
    return torch_npu
