"""Torch implementations of the fused operators: a plain equivalent everywhere, the fused torch_npu call on Ascend.

Needs torch, and torch_npu only when a kernel is looked up for device `npu`. `python -m npu_bridge.kernels.table` prints
the table.
"""

from npu_bridge.kernels import activations, attention_forms, embedding, moe, norms, optimizer  # noqa: F401  (they enter the table)
from npu_bridge.kernels.registry import KERNELS, Kernel, lookup

__all__ = ["KERNELS", "Kernel", "lookup"]
