"""Attention by JAX's splash kernels (Pallas, TPU): memory linear in the row, blocks that causality or a band masks are
skipped.

B rows, T query positions, S key positions, N query heads, K key heads, H and J head dims. The kernels are JAX's own
(`jax.experimental.pallas.ops.tpu.splash_attention`); here their operands are padded to what they take (rows to whole
blocks, head dims to 128) and their residuals handed on, so that the backward pass starts from the forward pass that
was.

The softmax scale is multiplied into the queries and rounded to their dtype, which is where these kernels expect it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from npu_bridge.ops._blocked import result_forms

LANES = 128
BLOCK = 512
"""Rows and keys of a block; a row that is shorter is one block."""
ATTENDS_NOTHING = -1e30
"""The kernels mask with a large finite number: a query whose log-sum is below this saw masked keys alone."""

NO_QUERY, NO_KEY = -1, -2


def refusal(queries, keys, *, causal):
    """Return the reason why the kernels cannot be used for these shapes, or None."""
    if min(queries, keys) < LANES:
        return f"rows of {min(queries, keys)} positions are shorter than one block of {LANES}"
    if causal and queries > keys:
        return "queries before the first key attend nothing"
    return None


def _block(positions):
    """The largest block that pads a row by less than a tenth."""
    for size in (BLOCK, 256, LANES):
        if -(-positions // size) * size <= 1.1 * positions:
            return size
    return LANES


@functools.lru_cache(maxsize=64)
def _kernel(heads, queries, keys, offset, left, right, block_q, block_kv, interpret):
    """The kernels' static part for padded rows: which blocks are visited.

    Arrays in it are numpy, so that it outlives a trace.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # Pallas takes a second to import

    class Band(splash.LocalMask):
        """A local mask that tells blocks outside the band without computing them: in long rows nearly all are."""

        def __getitem__(self, index):
            rows, columns = index
            first, last = rows.start + offset - left, rows.stop - 1 + offset + right
            if columns.stop <= first or columns.start > last:
                return np.broadcast_to(False, (rows.stop - rows.start, columns.stop - columns.start))
            return super().__getitem__(index)

    if left is None and right is None:
        mask = splash.FullMask((queries, keys))
    elif left is None and right == 0:
        mask = splash.CausalMask((queries, keys), offset)
    else:
        mask = Band((queries, keys), (left, right), offset)
    sizes = splash.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv, block_q_dq=block_q, block_kv_dq=block_kv,
    )  # fmt: skip
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            save_residuals=True,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
        return *jax.tree.map(np.asarray, infos), kernel.kwargs


class _Call:
    """Sizes of one call, and how its operands become those of the kernels."""

    def __init__(self, q, k, v, ids_q, ids_kv, *, left, right, interpret):
        self.queries, self.keys, self.value_dim = q.shape[1], k.shape[1], v.shape[3]
        block_q, block_kv = _block(self.queries), _block(self.keys)
        self.padded = -(-self.queries // block_q) * block_q, -(-self.keys // block_kv) * block_kv
        self.infos = _kernel(
            q.shape[2], *self.padded, self.keys - self.queries, left, right, block_q, block_kv, interpret
        )
        if ids_q is None:
            ids_q, ids_kv = jnp.ones(q.shape[:2], jnp.int32), jnp.ones(k.shape[:2], jnp.int32)
        ids_q = jnp.where(ids_q == 0, NO_QUERY, ids_q.astype(jnp.int32))

        def fill(x, positions, value):
            return jnp.pad(x, [(0, 0), (0, positions - x.shape[1])], constant_values=value)

        self.ids = fill(ids_q, self.padded[0], NO_QUERY), fill(ids_kv.astype(jnp.int32), self.padded[1], NO_KEY)

    def heads_first(self, x, positions):
        """(B, T, N, H) -> (B, N, T', H')"""
        width = -(-x.shape[-1] // LANES) * LANES
        x = jnp.pad(x, [(0, 0), (0, positions - x.shape[1]), (0, 0), (0, width - x.shape[-1])])
        return x.transpose(0, 2, 1, 3)

    def operands(self, q, k, v, scale):
        q = (q.astype(jnp.float32) * scale).astype(q.dtype)
        return (
            self.heads_first(q, self.padded[0]),
            self.heads_first(k, self.padded[1]),
            self.heads_first(v, self.padded[1]),
        )

    @staticmethod
    def positions_first(x, like):
        """(B, N, T', H') -> the shape of `like`, (B, T, N, H)"""
        return x.transpose(0, 2, 1, 3)[:, : like.shape[1], :, : like.shape[3]]


def splash_forward(q, k, v, ids_q=None, ids_kv=None, *, left, right, scale, interpret=False, wide=False):
    """Forward pass.

    Args:
      left, right: keys that a query reaches before and behind itself; None: all (`right=0` is causal).
      interpret: run the kernels in Pallas' interpreter, on any platform; for tests.
      wide: out in float32 (rounded to q's dtype by the kernel), and -inf as that lse.

    Returns:
      out (B, T, N, J) in q's dtype, lse (B, N, T) in float32 (0 for a query that attends nothing, which yields zeros).
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    call = _Call(q, k, v, ids_q, ids_kv, left=left, right=right, interpret=interpret)
    *infos, options = call.infos
    kernel = splash.SplashAttentionKernel(*infos, **options)

    def one_row(q, k, v, ids_q, ids_kv):
        return kernel(q, k, v, splash.SegmentIds(ids_q, ids_kv))

    out, (lse,) = jax.vmap(one_row)(*call.operands(q, k, v, scale), *call.ids)
    lse = lse[..., : call.queries]
    attends = lse > ATTENDS_NOTHING
    out = out.transpose(0, 2, 1, 3)[:, : call.queries, :, : call.value_dim]
    dtype, nothing = result_forms(q, wide)
    return jnp.where(attends.transpose(0, 2, 1)[..., None], out, 0).astype(dtype), jnp.where(attends, lse, nothing)


def splash_backward(g, q, k, v, out, lse, ids_q=None, ids_kv=None, *, left, right, scale, interpret=False):
    """-> dq, dk, dv in the dtype of q. Arguments as for `splash_forward`, whose results come in as `out` and `lse`."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    call = _Call(q, k, v, ids_q, ids_kv, left=left, right=right, interpret=interpret)
    _, for_queries, for_keys, options = call.infos

    def whole(x):
        return call.heads_first(x, call.padded[0])

    lse = jnp.pad(lse, [(0, 0), (0, 0), (0, call.padded[0] - call.queries)])

    def one_row(q, k, v, ids_q, ids_kv, out, lse, g):
        residuals = q, k, v, splash.SegmentIds(ids_q, ids_kv), None, out, lse, for_queries, for_keys
        keywords = {name: options[name] for name in _BACKWARD}
        # The public kernel keeps its residuals to itself; this is the function that its gradient calls.
        return splash._splash_attention_bwd(save_residuals=False, **keywords, res=residuals, do=g)[3:6]

    rows = *call.operands(q, k, v, scale), *call.ids, whole(out), lse, whole(g.astype(q.dtype))
    dq, dk, dv = jax.vmap(one_row)(*rows)
    dq = (call.positions_first(dq, q).astype(jnp.float32) * scale).astype(q.dtype)
    return dq, call.positions_first(dk, k).astype(k.dtype), call.positions_first(dv, v).astype(v.dtype)


_BACKWARD = (
    "mask_value",
    "is_mqa",
    "block_sizes",
    "residual_checkpoint_name",
    "mask_function",
    "attn_logits_soft_cap",
    "interpret",
)
