"""Rewrites of the intermediate form, in the order in which they run."""

from __future__ import annotations

from npu_bridge.ir import Program
from npu_bridge.passes.kernels import merge_kernel_parts


def run(program: Program, *, reduce_in_float32: bool = False) -> None:
    """Rewrites a program in place."""
    merge_kernel_parts(program)
