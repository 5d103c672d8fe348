"""Softmax cross entropy from hidden states, without materializing the (B, T, V) logits, forward or backward.

B rows, T tokens, D model width, V vocabulary, C token positions of a row in one chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from npu_bridge.jaxcompat import single_device_function
from npu_bridge.ops._common import accumulator, einsum, require, require_float, sum_over_rows, zero_cotangent
from npu_bridge.ops._labelled import labelled_backward, labelled_forward


def cross_entropy(hidden, head, targets, weights, *, chunk: int):
    """Weighted negative log-likelihood of each target token.

    Args:
      hidden: (B, T, D) states of the last layer. head: (D, V) output matrix, cast to hidden's dtype for the products.
      targets: (B, T) integers. weights: (B, T) float; positions of weight 0 give exactly 0 and no gradient, even if
      their hidden state is NaN or their target an ignore index.
      chunk: static; token positions of each row whose logits exist at a time, so the peak is B * chunk * V float32.

    Returns:
      (B, T) float32 `weight * (logsumexp(logits) - logits[target])`, differentiable in hidden, head and weights.
      A target outside [0, V) at a position of non-zero weight yields NaN there: bad data must not train silently.
    """
    hidden, head, targets, weights = jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(targets), jnp.asarray(weights)
    require_float("cross_entropy", hidden=hidden, head=head, weights=weights)
    require(
        hidden.ndim == 3 and head.ndim == 2 and hidden.shape[-1] == head.shape[0],
        "cross_entropy",
        f"hidden has shape {hidden.shape} and head {head.shape}; expected (B, T, D) and (D, V)",
    )
    require(
        targets.shape == weights.shape == hidden.shape[:2],
        "cross_entropy",
        f"targets have shape {targets.shape} and weights {weights.shape}; expected {hidden.shape[:2]}",
    )
    require(
        jnp.issubdtype(targets.dtype, jnp.integer),
        "cross_entropy",
        f"targets have dtype {targets.dtype}; integers are expected",
    )
    require(chunk >= 1, "cross_entropy", f"chunk is {chunk}; expected at least 1")
    return _cross_entropy(hidden, head, targets, weights, int(chunk))


def split_chunks(x, chunk):
    """(B, T, ..) -> (n, B, C, ..) with position c * n + i of a row in chunk i, T padded with zeros to a multiple of n.

    Strided on purpose: the chunk index is the minor part of T, so a T that is sharded over a mesh axis stays sharded
    inside every chunk and the loop over chunks slices nothing across devices.
    """
    count = -(-x.shape[1] // chunk)
    width = -(-x.shape[1] // count)
    pad = [(0, 0)] * x.ndim
    pad[1] = (0, width * count - x.shape[1])
    x = jnp.pad(x, pad).reshape(x.shape[0], width, count, *x.shape[2:])
    return jnp.moveaxis(x, 2, 0)


def join_chunks(x, length):
    """Inverse of `split_chunks`."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def chunk_logits(hidden, head, weights):
    """-> hidden with dead positions zeroed, logits (B, C, V) in float32.

    Zeroing keeps a NaN in padding out of the head's gradient.
    """
    hidden = jnp.where((weights != 0)[..., None], hidden, 0)
    return hidden, einsum("bcd,dv->bcv", hidden, head)


def hit(targets, vocabulary):
    """(B, C, V) bool, True at the target: a comparison, not a gather, so a sharded V needs no exchange but one sum."""
    return targets[..., None] == lax.broadcasted_iota(targets.dtype, (1, 1, vocabulary), 2)


def cross_entropy_forward(hidden, head, targets, weights, *, chunk):
    """-> nll (B, T) unweighted and 0 at dead positions, lse (B, T) undefined there, both float32."""
    head = head.astype(hidden.dtype)
    vocabulary = head.shape[1]

    def one(args):
        hidden, targets, weights = args
        _, logits = chunk_logits(hidden, head, weights)
        peak = lax.stop_gradient(jnp.max(logits, -1))
        lse = peak + jnp.log(jnp.sum(jnp.exp(logits - peak[..., None]), -1))
        picked = jnp.sum(jnp.where(hit(targets, vocabulary), logits, 0), -1)
        picked = jnp.where((targets >= 0) & (targets < vocabulary), picked, jnp.nan)
        return jnp.where(weights != 0, lse - picked, 0), lse

    parts = tuple(split_chunks(x, chunk) for x in (hidden, targets, weights))
    return tuple(join_chunks(x, hidden.shape[1]) for x in lax.map(one, parts))


def cross_entropy_backward(g, hidden, head, targets, weights, lse, *, chunk):
    """-> dhidden in hidden's dtype, dhead (D, V) in float32. Logits are computed again, chunk by chunk."""
    narrow_head = head.astype(hidden.dtype)
    slope = jnp.where(weights != 0, g * weights, 0).astype(lse.dtype)

    def one(dhead, args):
        hidden, targets, weights, lse, slope = args
        hidden, logits = chunk_logits(hidden, narrow_head, weights)
        dlogits = (jnp.exp(logits - lse[..., None]) - hit(targets, head.shape[1])) * slope[..., None]
        dlogits = dlogits.astype(hidden.dtype)
        dhidden = einsum("bcv,dv->bcd", dlogits, narrow_head).astype(hidden.dtype)
        return dhead + sum_over_rows(hidden, dlogits, apart=True), dhidden

    parts = tuple(split_chunks(x, chunk) for x in (hidden, targets, weights, lse, slope))
    dhead, dhidden = lax.scan(one, jnp.zeros(head.shape, accumulator(hidden.dtype)), parts)
    return join_chunks(dhidden, hidden.shape[1]), dhead


# Over several devices rows would have to move between them, and the NPU's host would wait for their number.
_forward = single_device_function(
    "npu_bridge.cross_entropy_forward",
    cross_entropy_forward,
    labelled_forward,
    results=lambda hidden, head, targets, weights, chunk: (
        [jax.ShapeDtypeStruct(targets.shape, accumulator(hidden.dtype))] * 2
    ),
)
_backward = single_device_function(
    "npu_bridge.cross_entropy_backward",
    cross_entropy_backward,
    labelled_backward,
    results=lambda g, hidden, head, *others, chunk: [
        hidden,
        jax.ShapeDtypeStruct(head.shape, accumulator(hidden.dtype)),
    ],
)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden, head, targets, weights, chunk):
    nll, _ = _forward(hidden, head, targets, weights, chunk=chunk)
    return nll * weights.astype(nll.dtype)


def _cross_entropy_fwd(hidden, head, targets, weights, chunk):
    nll, lse = _forward(hidden, head, targets, weights, chunk=chunk)
    return nll * weights.astype(nll.dtype), (hidden, head, targets, weights, nll, lse)


def _cross_entropy_bwd(chunk, res, g):
    hidden, head, targets, weights, nll, lse = res
    dhidden, dhead = _backward(g, hidden, head, targets, weights, lse, chunk=chunk)
    return dhidden, dhead.astype(head.dtype), zero_cotangent(targets), (g * nll).astype(weights.dtype)


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
