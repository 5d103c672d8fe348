"""Attention written out in numpy float64, one sequence at a time: what the emulated kernels are compared with.

No kernel of torch is used.
"""

import numpy as np
import torch

TRIANGLE = torch.triu(torch.ones(2048, 2048, dtype=torch.bool), 1)  # compressed mask of sparse modes 2, 3, 4, 7, 8
WITH_PREFIX = torch.cat((TRIANGLE, (torch.arange(2048) >= 1024).expand(1024, 2048)))  # of mode 6


def banned(queries, keys, low=-np.inf, high=np.inf):
    """True where key - query lies outside [low, high]; both counted from the upper left corner."""
    ahead = np.arange(keys)[None] - np.arange(queries)[:, None]
    return (ahead < low) | (ahead > high)


def attention(q, k, v, mask, scale, pse=0.0):
    """q (S, N, D), k (T, K, D), v (T, K, D); mask (S, T), true where nothing is attended.

    Returns output (S, N, D), probabilities (N, S, T) and log of the sums (S, N, 1).
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    logits = np.where(mask[None], -np.inf, np.einsum("snd,tnd->nst", q, k) * scale + pse)
    peak = logits.max(-1, keepdims=True)
    weights = np.exp(logits - peak)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("nst,tnd->snd", weights / total, v), weights / total, (np.log(total) + peak).transpose(1, 0, 2)


def gradients(q, k, v, g, mask, scale):
    """Output and gradients of q, k, v for the output's gradient g (S, N, D)."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    out, p, _ = attention(q, k, v, mask, scale)
    dp = np.einsum("snd,tnd->nst", g, np.repeat(v, group, 1))
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale

    def of_groups(x):
        return x.reshape(x.shape[0], heads, group, x.shape[2]).sum(2)

    return (
        out,
        np.einsum("nst,tnd->snd", ds, np.repeat(k, group, 1)),
        of_groups(np.einsum("nst,snd->tnd", ds, q)),
        of_groups(np.einsum("nst,snd->tnd", p, g)),
    )
