"""Fused operators as JAX sees them: reference mathematics, explicit gradients, sharding rules. Imports no torch.

The table in docs/operators.md lists each operator with its torch_npu call, its torch equivalent and its measured error.
"""

from npu_bridge.ops.activations import gelu, swiglu
from npu_bridge.ops.attention import attention, attention_gradients, merge_attention
from npu_bridge.ops.cross_entropy import cross_entropy
from npu_bridge.ops.embedding import embedding
from npu_bridge.ops.linear import linear
from npu_bridge.ops.moe import grouped_matmul, moe_gating, moe_permute, moe_unpermute
from npu_bridge.ops.norms import layer_norm, rms_norm
from npu_bridge.ops.optimizer import fused_adamw, global_norm
from npu_bridge.ops.rotary import rotary

__all__ = [
    "attention",
    "attention_gradients",
    "cross_entropy",
    "embedding",
    "fused_adamw",
    "gelu",
    "global_norm",
    "grouped_matmul",
    "layer_norm",
    "linear",
    "merge_attention",
    "moe_gating",
    "moe_permute",
    "moe_unpermute",
    "rms_norm",
    "rotary",
    "swiglu",
]
