"""Passes over the intermediate form, in the order in which they run."""

from __future__ import annotations

from npu_bridge.compiler.ir import Program
from npu_bridge.compiler.passes.biases import add_biases_before_rounding
from npu_bridge.compiler.passes.collectives import fuse_collectives, widen_reductions
from npu_bridge.compiler.passes.float8 import widen_float8
from npu_bridge.compiler.passes.fused_calls import fit_fused_calls
from npu_bridge.compiler.passes.host_memory import place_values
from npu_bridge.compiler.passes.indices import index_instead_of_comparing
from npu_bridge.compiler.passes.kernels import merge_kernel_parts
from npu_bridge.compiler.passes.loop_invariants import move_loop_invariants
from npu_bridge.compiler.passes.masks import share_masks
from npu_bridge.compiler.passes.overlap import overlap_exchanges
from npu_bridge.compiler.passes.simplify import remove_unread, share_equal_operations
from npu_bridge.compiler.passes.slices import simplify_slices


def run(program: Program, *, device: str = "cpu", reduce_in_float32: bool = False, overlap: bool = True) -> None:
    """Run all passes on a program in place."""
    merge_kernel_parts(program)
    place_values(program, device)
    widen_float8(program.body)
    share_equal_operations(program.body)
    fuse_collectives(program)
    if reduce_in_float32:
        widen_reductions(program)
    simplify_slices(program.body)
    index_instead_of_comparing(program.body)
    if device == "npu":
        remove_unread(program.body)  # stacked residuals count as reads
        fit_fused_calls(program.body)
        move_loop_invariants(program.body)
    if device == "cpu":
        share_masks(program.body)
        add_biases_before_rounding(program.body)
    share_equal_operations(program.body)
    remove_unread(program.body)
    if overlap:
        overlap_exchanges(program)
