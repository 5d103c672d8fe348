"""The processor of this machine: its name, and whether it multiplies bfloat16 in hardware."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")
"""Flags of Linux for units that multiply bfloat16: Intel's matrix units, Intel's and AMD's vector units, Arm's."""


@functools.cache
def flags() -> frozenset[str]:
    """Features of the first core as Linux names them; empty where it does not tell."""
    return frozenset(_lines().get("flags", _lines().get("Features", "")).split())


def name() -> str:
    """Model name, such as `AMD EPYC 7763`; the architecture where Linux has none."""
    return _lines().get("model name") or platform.processor() or platform.machine()


def bfloat16_unit() -> str | None:
    """The unit that multiplies bfloat16, by its flag; None where such products are emulated, which is slower than
    float32.
    """
    return next((unit for unit in BFLOAT16_UNITS if unit in flags()), None)


@functools.cache
def _lines() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
