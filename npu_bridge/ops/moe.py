"""Mixture-of-experts routing and the grouped matrix product.

T tokens (rows of all sequences together), D model width, F output width, E experts, k experts chosen a token.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from npu_bridge.jaxcompat import define_operator
from npu_bridge.ops._common import accumulator, dot, require, require_float, sum_over_rows, zero_cotangent


def grouped_matmul(x, w, group_sizes):
    """Rows of x, sorted by expert, times the matrix of their expert.

    Args:
      x: (T, D). w: (E, D, F), cast to x's dtype for the products. group_sizes: (E,) integers, rows of each expert in
        order; rows past their sum belong to no expert and yield zeros.

    Returns:
      (T, F) in x's dtype, accumulated in float32; gradients of w are summed in float32.
    """
    x, w, group_sizes = jnp.asarray(x), jnp.asarray(w), jnp.asarray(group_sizes)
    require_float("grouped_matmul", x=x, w=w)
    require(
        x.ndim == 2 and w.ndim == 3 and x.shape[1] == w.shape[1] and group_sizes.shape == w.shape[:1],
        "grouped_matmul",
        f"x has shape {x.shape}, w {w.shape}, group_sizes {group_sizes.shape}; expected (T, D), (E, D, F), (E,)",
    )
    return _grouped_matmul(x, w, group_sizes)


def tile_plan(rows, group_sizes, tile):
    """Cut the sorted rows into ceil(rows / tile) + E tiles that each touch one expert.

    -> first row (n,), expert (n,) and live-row count (n,) of each tile; a tile without work has count 0. The number of
    tiles is static whatever the routing, because each expert wastes at most one partial tile.
    """
    experts = group_sizes.shape[0]
    group_sizes = group_sizes.astype(jnp.int32)
    ends = jnp.cumsum(group_sizes)
    tiles = -(-group_sizes // tile)
    tile_ends = jnp.cumsum(tiles)
    index = jnp.arange(-(-rows // tile) + experts, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(tile_ends, index, side="right"), experts - 1).astype(jnp.int32)
    first = (ends - group_sizes)[expert] + (index - (tile_ends - tiles)[expert]) * tile
    live = jnp.where(index < tile_ends[-1], jnp.clip(ends[expert] - first, 0, tile), 0)
    return first, expert, live


def _tile_size(rows, experts):
    """Large enough for the matrix unit, small enough that partial tiles do not dominate."""
    mean = max(1, rows // max(1, experts))
    return max(8, min(256, 1 << (mean - 1).bit_length()))


def _tiles(x, group_sizes):
    tile = _tile_size(x.shape[0], group_sizes.shape[0])
    return tile, jnp.pad(x, ((0, tile), (0, 0))), tile_plan(x.shape[0], group_sizes, tile)


def grouped_forward(x, w, group_sizes, *, transpose=False):
    """-> (T, F) float32-accumulated; with `transpose` w is (E, F, D)."""
    tile, padded, plan = _tiles(x, group_sizes)
    out = jnp.zeros((padded.shape[0], w.shape[1 if transpose else 2]), x.dtype)

    def one(out, item):
        first, expert, live = item
        rows = lax.dynamic_slice_in_dim(padded, first, tile)
        y = dot(rows, lax.dynamic_index_in_dim(w, expert, keepdims=False), ((1,), (1 if transpose else 0,)))
        old = lax.dynamic_slice_in_dim(out, first, tile)
        y = jnp.where((jnp.arange(tile) < live)[:, None], y.astype(out.dtype), old)
        return lax.dynamic_update_slice_in_dim(out, y, first, 0), None

    return lax.scan(one, out, plan)[0][: x.shape[0]]


def grouped_weight_gradient(x, g, group_sizes):
    """-> (E, D, F) float32."""
    tile, padded, plan = _tiles(x, group_sizes)
    g = jnp.pad(g, ((0, tile), (0, 0)))

    def one(dw, item):
        first, expert, live = item
        rows = lax.dynamic_slice_in_dim(padded, first, tile)
        # Mask rows of other experts in the tile by a select, not a product: they may be NaN.
        keep = (jnp.arange(tile) < live)[:, None]
        rows, slope = jnp.where(keep, rows, 0), jnp.where(keep, lax.dynamic_slice_in_dim(g, first, tile), 0)
        part = sum_over_rows(rows, slope)
        old = lax.dynamic_index_in_dim(dw, expert, keepdims=False)
        return lax.dynamic_update_index_in_dim(dw, old + part, expert, 0), None

    return lax.scan(one, jnp.zeros((group_sizes.shape[0], x.shape[1], g.shape[1]), accumulator(x.dtype)), plan)[0]


# Rows stay whole (the groups' bounds count all of them); the contracted dim is a reduction, the other is free.
_product = define_operator(
    "grouped_matmul", reference=grouped_forward, rule="t c, e c o, e -> t o", reduces={0: ("c",)}, replicate=("t", "e")
)
_product_transposed = define_operator(
    "grouped_matmul_transposed",
    reference=partial(grouped_forward, transpose=True),
    rule="t c, e o c, e -> t o",
    reduces={0: ("c",)},
    replicate=("t", "e"),
)
_weight_gradient = define_operator(
    "grouped_matmul_weight_gradient",
    reference=grouped_weight_gradient,
    rule="t d, t f, e -> e d f",
    replicate=("t", "e"),
)


def grouped_product(x, w, group_sizes):
    """(T, D), (E, D, F) of one dtype -> (T, F), without a gradient."""
    return _product(x, w, group_sizes)[0]


def grouped_product_transposed(x, w, group_sizes):
    """(T, D), (E, F, D) of one dtype -> (T, F), without a gradient."""
    return _product_transposed(x, w, group_sizes)[0]


def grouped_weight_product(x, g, group_sizes):
    """(T, D), (T, F) of one dtype -> (E, D, F) float32, without a gradient."""
    return _weight_gradient(x, g, group_sizes)[0]


@jax.custom_vjp
def _grouped_matmul(x, w, group_sizes):
    return _product(x, w.astype(x.dtype), group_sizes)[0]


def _grouped_bwd(res, g):
    x, w, group_sizes = res
    g = g.astype(x.dtype)
    (dx,) = _product_transposed(g, w.astype(x.dtype), group_sizes)
    return dx, _weight_gradient(x, g, group_sizes)[0].astype(w.dtype), zero_cotangent(group_sizes)


_grouped_matmul.defvjp(lambda x, w, sizes: (_grouped_matmul(x, w, sizes), (x, w, sizes)), _grouped_bwd)


def moe_gating(logits, *, k: int, scoring="softmax", bias=None, groups=1, groups_kept=1, renormalize: bool, scale=1.0):
    """Top-k routing.

    Scores are the softmax (Qwen3-MoE, Mixtral) or the sigmoid (DeepSeek-V3) of the logits in float32. `bias` enters the
    choice of experts only, never their weights (auxiliary-loss-free balancing, DeepSeek-V3 report section 2.1.2). With
    groups > 1 the experts fall into `groups` equal groups, of which the `groups_kept` with the largest sum of their two
    best biased scores stay eligible.

    Args:
      logits: (T, E). bias: (E,) or None; it receives no gradient. renormalize: divide the chosen scores by their sum
        (with 1e-20 added for sigmoid scores). scale: static factor on the weights.

    Returns:
      weights (T, k) float32, differentiable in logits, and experts (T, k) int32, best first; ties go to the lower
      expert.
    """
    logits = jnp.asarray(logits)
    require_float("moe_gating", logits=logits)
    require(scoring in ("softmax", "sigmoid"), "moe_gating", f"scoring is {scoring!r}; expected 'softmax' or 'sigmoid'")
    require(logits.ndim == 2, "moe_gating", f"logits have shape {logits.shape}; expected (T, E)")
    experts = logits.shape[1]
    require(
        experts % groups == 0 and 1 <= groups_kept <= groups and 1 <= k <= groups_kept * (experts // groups),
        "moe_gating",
        f"k={k} of {experts} experts in {groups} groups of which {groups_kept} are kept does not work out",
    )
    require(
        groups == 1 or experts // groups >= 2,
        "moe_gating",
        f"{groups} groups of {experts} experts leave less than two a group",
    )
    params = dict(
        k=k, scoring=scoring, groups=groups, groups_kept=groups_kept, renormalize=bool(renormalize), scale=float(scale)
    )
    # The choice has no gradient, so the operator gets none; the weights' gradient is added by `_with_gradient`.
    operands = lax.stop_gradient((logits,) if bias is None else (logits, bias))
    weights, experts = (_gating_operator if bias is None else _gating_biased)(*operands, **params)
    return _with_gradient(weights, logits, experts, tuple(params.items())), experts


def expert_scores(logits, scoring):
    """(T, E) float32."""
    wide = logits.astype(accumulator(logits.dtype))
    return jax.nn.softmax(wide, -1) if scoring == "softmax" else jax.nn.sigmoid(wide)


def chosen_weights(logits, experts, *, scoring, renormalize, scale):
    """Return (T, k) float32 weights of the chosen experts, differentiable in the logits."""
    weights = jnp.take_along_axis(expert_scores(logits, scoring), experts, 1)
    if renormalize:
        weights = weights / (jnp.sum(weights, -1, keepdims=True) + (1e-20 if scoring == "sigmoid" else 0.0))
    return weights * scale


def gating_forward(logits, *bias, k, scoring, groups, groups_kept, renormalize, scale):
    """-> weights (T, k) float32, experts (T, k) int32."""
    choice = expert_scores(logits, scoring)
    if bias:
        choice = choice + bias[0].astype(choice.dtype)
    if groups > 1:
        width = logits.shape[1] // groups
        strength = jnp.sum(lax.top_k(choice.reshape(-1, groups, width), 2)[0], -1)
        eligible = jnp.any(lax.top_k(strength, groups_kept)[1][:, :, None] == jnp.arange(groups), 1)
        choice = jnp.where(jnp.repeat(eligible, width, 1), choice, -jnp.inf)
    experts = lax.top_k(choice, k)[1].astype(jnp.int32)
    return chosen_weights(logits, experts, scoring=scoring, renormalize=renormalize, scale=scale), experts


_gating_operator = define_operator("moe_gating", reference=gating_forward, rule="t e -> t k, t k", replicate=("e", "k"))
_gating_biased = define_operator(
    "moe_gating_biased", reference=gating_forward, rule="t e, e -> t k, t k", replicate=("e", "k")
)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _with_gradient(weights, logits, experts, params):
    """The weights the operator computed, with the gradient of `chosen_weights`."""
    return weights


def _with_gradient_bwd(params, res, g):
    logits, experts = res
    how = {name: value for name, value in params if name in ("scoring", "renormalize", "scale")}
    (dlogits,) = jax.vjp(lambda x: chosen_weights(x, experts, **how), logits)[1](g)
    return jnp.zeros_like(g), dlogits, zero_cotangent(experts)


_with_gradient.defvjp(lambda weights, logits, experts, params: (weights, (logits, experts)), _with_gradient_bwd)


def moe_permute(tokens, experts, *, num_experts: int):
    """Copy each token to its k experts and sort the copies by expert, keeping token order inside an expert.

    Args:
      tokens: (T, D). experts: (T, k) int32 in [0, num_experts).

    Returns:
      permuted (T * k, D), group_sizes (num_experts,) int32, and destination (T, k) int32: the row of each copy in
      `permuted`.
    """
    tokens, experts = jnp.asarray(tokens), jnp.asarray(experts)
    require(
        tokens.ndim == 2 and experts.ndim == 2 and tokens.shape[0] == experts.shape[0],
        "moe_permute",
        f"tokens have shape {tokens.shape} and experts {experts.shape}; expected (T, D) and (T, k)",
    )
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    destination = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
    group_sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), 0, dtype=jnp.int32)
    destination = destination.reshape(experts.shape).astype(jnp.int32)
    return _permute(tokens, order.astype(jnp.int32), destination), group_sizes, destination


def moe_unpermute(permuted, destination, weights):
    """Gather the experts' rows back: `sum_k weights[t, k] * permuted[destination[t, k]]`, summed in float32.

    Args:
      permuted: (T * k, D). destination: (T, k) int32 from `moe_permute`. weights: (T, k) float.

    Returns:
      (T, D) in permuted's dtype.
    """
    permuted, destination, weights = jnp.asarray(permuted), jnp.asarray(destination), jnp.asarray(weights)
    require(
        permuted.ndim == 2 and destination.shape == weights.shape and destination.size == permuted.shape[0],
        "moe_unpermute",
        f"permuted has shape {permuted.shape}, destination {destination.shape}, weights {weights.shape}; "
        "expected (T * k, D), (T, k), (T, k)",
    )
    return _unpermute(permuted, destination, weights)


def permute_forward(tokens, order, destination):
    """-> permuted (T * k, D); `order` lists the copies by expert, `destination` is its inverse."""
    return tokens[order // destination.shape[1]]


def permute_backward(g, destination):
    """-> dtokens (T, D): the k copies add up in float32."""
    return jnp.sum(g[destination].astype(accumulator(g.dtype)), 1).astype(g.dtype)


def unpermute_forward(permuted, destination, weights):
    """-> tokens (T, D)."""
    rows = permuted[destination].astype(accumulator(permuted.dtype))
    return jnp.sum(rows * weights[..., None].astype(rows.dtype), 1).astype(permuted.dtype)


def unpermute_backward(g, permuted, destination, weights):
    """-> dpermuted (T * k, D), dweights (T, k) float32.

    `destination` is a permutation, so nothing collides in the scatter.
    """
    wide = g.astype(accumulator(g.dtype))
    dweights = jnp.sum(permuted[destination].astype(wide.dtype) * wide[:, None], -1)
    rows = (wide[:, None] * weights[..., None].astype(wide.dtype)).astype(permuted.dtype)
    dpermuted = (
        jnp.zeros_like(permuted).at[destination.reshape(-1)].set(rows.reshape(-1, rows.shape[-1]), unique_indices=True)
    )
    return dpermuted, dweights


_ROWS = ("p", "t", "k")  # routing moves rows anywhere, so they stay whole; the width is free
_permute_operator = define_operator(
    "moe_permute", reference=permute_forward, rule="t d, p, t k -> p d", replicate=_ROWS
)
_permute_gradient = define_operator(
    "moe_permute_backward", reference=permute_backward, rule="p d, t k -> t d", replicate=_ROWS
)
_unpermute_operator = define_operator(
    "moe_unpermute", reference=unpermute_forward, rule="p d, t k, t k -> t d", replicate=_ROWS
)
_unpermute_gradient = define_operator(
    "moe_unpermute_backward",
    reference=unpermute_backward,
    rule="t d, p d, t k, t k -> p d, t k",
    reduces={1: ("d",)},
    replicate=_ROWS,
)


@jax.custom_vjp
def _permute(tokens, order, destination):
    return _permute_operator(tokens, order, destination)[0]


_permute.defvjp(
    lambda tokens, order, destination: (_permute_operator(tokens, order, destination)[0], (order, destination)),
    lambda res, g: (_permute_gradient(g, res[1])[0], zero_cotangent(res[0]), zero_cotangent(res[1])),
)


@jax.custom_vjp
def _unpermute(permuted, destination, weights):
    return _unpermute_operator(permuted, destination, weights)[0]


def _unpermute_bwd(res, g):
    permuted, destination, weights = res
    dpermuted, dweights = _unpermute_gradient(g, permuted, destination, weights)
    return dpermuted, zero_cotangent(destination), dweights.astype(weights.dtype)


_unpermute.defvjp(lambda *args: (_unpermute_operator(*args)[0], args), _unpermute_bwd)
