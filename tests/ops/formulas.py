"""The operators written out by hand in torch float64: the independent witness, differentiated by torch's autograd.

Nothing here is blocked, chunked or sorted: loops and full matrices, so that a reader can check each line against its
paper.
"""

import math

import torch


def linear(x, w, bias=None):
    y = torch.einsum("...d,df->...f", x, w)
    return y if bias is None else y + bias


def rms_norm(x, scale, eps):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * scale


def layer_norm(x, scale, bias, eps):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + eps) * scale + bias


def rotary(x, cos, sin, mode):
    width = cos.shape[-1]
    columns = []
    for j in range(x.shape[-1]):
        if j >= width:
            columns.append(x[..., j])
            continue
        if mode == "half":
            partner, sign = (j + width // 2, -1) if j < width // 2 else (j - width // 2, 1)
        else:
            partner, sign = (j + 1, -1) if j % 2 == 0 else (j - 1, 1)
        columns.append(x[..., j] * cos[:, :, None, j] + sign * x[..., partner] * sin[:, :, None, j])
    return torch.stack(columns, -1)


def swiglu(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


def gelu(x, approximate):
    if approximate:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(q, k, v, ids_q, ids_kv, causal, window, scale):
    """One query at a time, over the keys it may attend."""
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    rows = []
    for b in range(B):
        for t in range(T):
            level = t + S - T
            keys = [s for s in range(S)
                    if (ids_q is None or (ids_q[b, t] != 0 and ids_q[b, t] == ids_kv[b, s]))
                    and (not causal or s <= level)
                    and (window is None or (level - s < window and (causal or s - level < window)))]  # fmt: skip
            for n in range(N):
                if not keys:
                    rows.append(torch.zeros(v.shape[-1], dtype=q.dtype))
                    continue
                logits = k[b, keys, n // (N // K)] @ q[b, t, n] * scale
                weights = torch.exp(logits - logits.max().detach())
                rows.append((weights / weights.sum()) @ v[b, keys, n // (N // K)])
    return torch.stack(rows).reshape(B, T, N, -1)


def cross_entropy(hidden, head, targets, weights):
    logits = torch.einsum("btd,dv->btv", hidden, head)
    nll = torch.logsumexp(logits, -1) - logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(weights != 0, nll * weights, 0)


def embedding(table, ids):
    return torch.stack(
        [table[i] if 0 <= i < table.shape[0] else torch.zeros_like(table[0]) for i in ids.flatten().tolist()]
    ).reshape(*ids.shape, -1)


def grouped_matmul(x, w, sizes):
    owner = [e for e, n in enumerate(sizes) for _ in range(n)]
    return torch.stack([x[i] @ w[owner[i]] if i < len(owner) else torch.zeros_like(w[0, 0]) for i in range(x.shape[0])])


def moe_gating(logits, k, scoring, bias, groups, groups_kept, renormalize, scale):
    weights, experts = [], []
    for row in logits:
        scores = torch.exp(row) / torch.exp(row).sum() if scoring == "softmax" else 1 / (1 + torch.exp(-row))
        choice = (scores if bias is None else scores + bias).tolist()
        width = len(choice) // groups
        strength = [sum(sorted(choice[g * width : (g + 1) * width])[-2:]) for g in range(groups)]
        kept = sorted(range(groups), key=lambda g: -strength[g])[:groups_kept]
        chosen = sorted((e for e in range(len(choice)) if groups == 1 or e // width in kept), key=lambda e: -choice[e])[
            :k
        ]
        w = scores[chosen]
        weights.append((w / w.sum() if renormalize else w) * scale)
        experts.append(chosen)
    return torch.stack(weights), experts


def adamw(p, g, m, v, step, lr, b1, b2, eps, weight_decay):
    """Loshchilov & Hutter 2019, algorithm 2, with the schedule in lr."""
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    return p - lr * (m / (1 - b1**step) / (torch.sqrt(v / (1 - b2**step)) + eps) + weight_decay * p), m, v
