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
    is applied to each patch, or with `norm_merged` to each group.

    Args:
      hidden: width between the two linear layers; that of a group unless given.
      layers: it stands for a stack of so many projectors.
    """

    def __init__(
        self,
        inputs: int,
        merge_unit: int,
        width: int,
        *,
        norm: nnx.Module | None,
        rngs: nnx.Rngs,
        dtype,
        norm_merged: bool = False,
        hidden: int | None = None,
        layers: int | None = None,
    ):
        merged = inputs * merge_unit
        self.merged, self.norm_merged = merged, norm_merged
        self.norm = norm
        common = dict(bias=True, rngs=rngs, dtype=dtype, layers=layers)
        hidden = hidden or merged
        self.linear1 = Linear(merged, hidden, ("merged", "mlp"), **common)
        self.linear2 = Linear(hidden, width, ("mlp", "embed"), **common)

    def __call__(self, features: jax.Array) -> jax.Array:
        """(B, P, tower width) patches in window order -> (B, P / merge_unit, D)."""
        B = features.shape[0]
        if self.norm is not None and not self.norm_merged:
            features = self.norm(features)
        groups = features.reshape(B, -1, self.merged)
        if self.norm is not None and self.norm_merged:
            groups = self.norm(groups)
        return self.linear2(ops.gelu(self.linear1(groups), approximate=False))
