"""What vision towers share: pixels to normalised patches, attention with two-dimensional rotary positions.

B rows, P patches, N heads, H head dim, D tower width, L layers.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mindvl_jax.data.media.geometry import PatchGeometry
from mindvl_jax.models.layers.config import CLIP_MEAN, CLIP_STD
from mindvl_jax.models.layers.linear import Linear
from mindvl_jax.models.layers.stack import keep
from mindvl_jax.parallel.activations import attention
from npu_bridge import ops


def normalize_patches(
    patches: jax.Array,
    config: PatchGeometry,
    dtype,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> jax.Array:
    """uint8 pixels to normalised values in `dtype`; float patches are taken as normalised.

    Args:
      patches: (B, P, patch_dim), entries in (channel, frame, row, column) order.
    """
    if jnp.issubdtype(patches.dtype, jnp.floating):
        return patches.astype(dtype)
    if patches.dtype != jnp.uint8:
        raise TypeError(f"patches have dtype {patches.dtype}; expected uint8 pixels or normalised floats")
    repeat = config.patch_dim // config.in_channels
    shift, spread = (np.repeat(np.asarray(values, np.float64) * 255, repeat) for values in (mean, std))
    return ((patches.astype(jnp.float32) - shift.astype(np.float32)) * (1 / spread).astype(np.float32)).astype(dtype)


class VisionAttention(nnx.Module):
    """Bidirectional attention inside equal ids, with two-dimensional rotary positions.

    Args:
      config: has `hidden_size`, `num_heads` and `depth`.
    """

    def __init__(self, config: Any, *, rngs: nnx.Rngs, dtype):
        D = config.hidden_size
        if D % config.num_heads or D // config.num_heads % 4:
            raise ValueError(
                f"vision.hidden_size {D} over {config.num_heads} heads must give a head dim that is a multiple of 4"
            )
        self.num_heads = config.num_heads
        common = dict(bias=True, rngs=rngs, dtype=dtype, layers=config.depth)
        self.query = Linear(D, D, ("embed", "heads"), **common)
        self.key = Linear(D, D, ("embed", "heads"), **common)
        self.value = Linear(D, D, ("embed", "heads"), **common)
        self.output = Linear(D, D, ("heads", "embed"), scale=1 / math.sqrt(2 * config.depth), **common)

    def __call__(self, x_BPD, cos_BPH, sin_BPH, ids_BP, lengths_BM, longest: int | None) -> jax.Array:
        B, P, _ = x_BPD.shape

        def heads(layer):
            return keep(layer(x_BPD)).reshape(B, P, self.num_heads, -1)

        q_BPNH = ops.rotary(heads(self.query), cos_BPH, sin_BPH)
        k_BPNH = ops.rotary(heads(self.key), cos_BPH, sin_BPH)
        out_BPNH = attention(
            q_BPNH,
            k_BPNH,
            heads(self.value),
            segment_ids=ids_BP,
            causal=False,
            max_segment_length=longest,
            lengths=lengths_BM,
            padding="unread",
        )
        return self.output(keep(out_BPNH.reshape(B, P, -1)))
