"""Routed experts over the mesh: every token meets the experts that it chose, wherever these are; none is ever dropped.

B rows, T tokens, D width, E experts, k experts a token, X devices of the expert axis; n tokens of one device, e = E / X
its experts, M rows of its grouped products.

Each device routes its own tokens. Without an expert axis it also holds all experts, and no token leaves it. With one,
the devices of a group gather each other's tokens, compute what falls to their experts, and scatter the sums back to the
tokens' own devices. Shapes are static and hold the worst case, all n * X tokens choosing the experts of one device, so
there is no capacity to overflow and nothing to drop. (MaxText calls this the ring of experts.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from mindvl_jax.parallel.activations import current, manually
from mindvl_jax.parallel.mesh import ROW_AXES
from npu_bridge import ops

Route = Callable[..., tuple[jax.Array, jax.Array]]
Products = Callable[..., jax.Array]


def routed(
    route: Route,
    products: Products,
    x_BTD: jax.Array,
    logits_BTE: jax.Array,
    real_BT: jax.Array,
    arrays: Sequence[jax.Array],
    dims: Sequence[tuple[str | None, ...]],
    bias_E: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weighted sum of what each token's experts make of it.

    Args:
      route: (logits (n, E), bias or None) -> weights (n, k), experts (n, k).
      products: (rows (M, D) sorted by expert, sizes (e,), *arrays) -> (M, D).
      real_BT: bool, False at padding, which is computed as any token and counted nowhere.
      arrays: of the experts, (E, ..). dims: their names: `experts`, and `mlp` where the tensor axis may split; the
        products sum over it.

    Returns:
      sums (B, T, D) in x's dtype; experts (B, T, k); tokens that arrived at each expert (E,) float32, counted where it
      is.
    """
    placement = current()
    sizes = {} if placement is None else placement.mesh.shape
    groups = sizes.get("expert", 1)
    hidden = next(array.shape[own.index("mlp")] for array, own in zip(arrays, dims, strict=True) if "mlp" in own)
    split = hidden % sizes.get("tensor", 1) == 0 and sizes.get("tensor", 1) > 1
    E = logits_BTE.shape[-1]

    def on_device(x, logits, real, *rest):
        own, bias = rest[: len(arrays)], rest[-1] if bias_E is not None else None
        b, t, D = x.shape
        weights, chosen = route(logits.reshape(b * t, E), bias)
        tokens, here, share, real_N = x.reshape(b * t, D), chosen, weights, real.reshape(-1)
        if groups > 1:
            tokens, here, share, real_N = (
                jax.lax.all_gather(y, "expert", axis=0, tiled=True) for y in (tokens, here, share, real_N)
            )
            here = here - jax.lax.axis_index("expert") * (E // groups)
            mine = (here >= 0) & (here < E // groups)
            # Sort tokens of other devices behind all own experts, where the products yield zeros.
            here, share = jnp.where(mine, here, E // groups), jnp.where(mine, share, 0)
        rows, counts, places = ops.moe_permute(tokens, here, num_experts=E // groups + (groups > 1))
        counts = counts[: E // groups]
        out = ops.moe_unpermute(products(rows, counts, *own), places, share)
        if groups > 1 or split:
            out = out.astype(jnp.float32)
        if groups > 1:
            out = jax.lax.psum_scatter(out, "expert", scatter_dimension=0, tiled=True)
        if split:
            out = jax.lax.psum(out, "tensor")
        arrived = (here[..., None] == jnp.arange(E // groups)) & real_N[:, None, None]
        arrived = jnp.sum(arrived, (0, 1), dtype=jnp.float32)
        if placement is not None:
            apart = [axis for axis in (*ROW_AXES, "context") if axis != "expert" and sizes[axis] > 1]
            arrived = jax.lax.psum(arrived, tuple(apart)) if apart else arrived
        return out.reshape(b, t, D).astype(x.dtype), chosen.reshape(b, t, -1), jax.lax.stop_gradient(arrived)

    biases = () if bias_E is None else (bias_E,)
    everything = (x_BTD, logits_BTE, real_BT, *arrays, *biases)
    if placement is None:
        return on_device(*everything)
    row = ("rows", "places")
    of_arrays = [tuple(None if name == "mlp" and not split else name for name in own) for own in dims]
    names = [(*row, None), (*row, None), row, *of_arrays, *[(None,)] * len(biases)]
    results = [((*row, None), x_BTD.shape), ((*row, None), logits_BTE.shape), (("experts",), (E,))]
    return manually(on_device, everything, names, results, placement)
