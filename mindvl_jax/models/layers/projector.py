"""Two-layer projector: norm, four neighbouring patches side by side, two linear layers with GELU (Qwen2.5-VL's merger).

B rows, P patches, D language width.
"""

from __future__ import annotations

import jax
from flax import nnx

from mindvl_jax.models.layers.linear import Linear
from npu_bridge import ops


class Projector(nnx.Module):
    """Merge each group of `merge_unit` neighbouring patches of width `inputs` into one visual token of `width`; `norm`
    is applied to each patch.
    """

    def __init__(self, inputs: int, merge_unit: int, width: int, *, norm: nnx.Module, rngs: nnx.Rngs, dtype):
        merged = inputs * merge_unit
        self.merged = merged
        self.norm = norm
        self.linear1 = Linear(merged, merged, ("merged", "mlp"), bias=True, rngs=rngs, dtype=dtype)
        self.linear2 = Linear(merged, width, ("mlp", "embed"), bias=True, rngs=rngs, dtype=dtype)

    def __call__(self, features: jax.Array) -> jax.Array:
        """(B, P, tower width) patches in window order -> (B, P / merge_unit, D)."""
        B = features.shape[0]
        groups = self.norm(features).reshape(B, -1, self.merged)
        return self.linear2(ops.gelu(self.linear1(groups), approximate=False))
