"""torch_npu's fused calls as their documents describe them, in plain torch float64, with the argument rules that can be
checked.

Only the wiring of our calls is under test here (which argument means what, which layout, which mask convention, what
comes back); it is written from the documents and knows nothing of npu_bridge. The real wheel runs in the conformance
tier.
"""

import itertools
import math
from types import SimpleNamespace

import torch

calls = []  # (name, keyword arguments) of every call, for assertions
UNLIMITED = 2147483647


def _note(name, **arguments):
    calls.append((name, arguments))


def npu_rms_norm(x, gamma, epsilon=1e-6):
    rstd = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + epsilon)
    return (x.double() * rstd * gamma.double()).to(x.dtype), rstd.float()


def npu_rms_norm_backward(dy, x, gamma, rstd):
    assert rstd.dtype == torch.float32 and rstd.shape == (*x.shape[:-1], 1)
    normed, dy, dim = x.double() * rstd.double(), dy.double(), x.shape[-1]
    dg = dy * gamma.double()
    dx = rstd.double() * (dg - normed * (dg * normed).sum(-1, keepdim=True) / dim)
    return dx.to(x.dtype), (dy * normed).flatten(0, -2).sum(0).float()


def npu_rotary_mul(x, r1, r2, rotary_mode="half"):
    assert (
        x.dtype == r1.dtype == r2.dtype
        and x.ndim == 4
        and r1.shape == r2.shape == (x.shape[0], x.shape[1], 1, x.shape[3])
    )
    if rotary_mode == "half":
        a, b = x.chunk(2, -1)
        turned = torch.cat((-b, a), -1)
    else:
        assert rotary_mode == "interleave"
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * r1 + turned * r2


def npu_swiglu(x, dim=-1):
    a, b = x.double().chunk(2, dim)
    return (torch.nn.functional.silu(a) * b).to(x.dtype)


def _by_autograd(function, grad, *inputs):
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, grad.double())


def npu_swiglu_backward(grad, x, dim=-1):
    return _by_autograd(lambda x: npu_swiglu(x, dim), grad, x)[0].to(x.dtype)


def npu_gelu(x, *, approximate="none"):
    return torch.nn.functional.gelu(x.double(), approximate=approximate).to(x.dtype)


def npu_gelu_backward(grad, x, *, approximate="none"):
    return _by_autograd(lambda x: npu_gelu(x, approximate=approximate), grad, x)[0].to(x.dtype)


# ---- attention
# ------------------------------------------------------------------------------------------------------------


def _masked(queries, keys, mask, sparse_mode, pre, after):
    """(.., Tq, Tk) bool, True = masked, of one sequence."""
    if mask is None:
        return torch.zeros(queries, keys, dtype=torch.bool)  # without a mask the sparse mode has no effect
    if sparse_mode == 0:
        assert pre == after == UNLIMITED
        return mask
    assert (
        mask.shape == (2048, 2048) and mask.dtype == torch.bool and torch.equal(mask, torch.ones_like(mask).triu(1))
    ), "compressed mask wanted"
    ahead = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)[None]  # level at the lower right
    if sparse_mode == 3:
        return ahead < 0
    assert sparse_mode == 4
    return (ahead > pre) | (-ahead > after)


def _sequences(q, k, layout, ends_q, ends_k, mask, sparse_mode, pre, after):
    """(index of q, index of k, (N or 1, Tq, Tk) mask) of every sequence; tensors as (T, N, D)."""
    if layout == "TND":
        assert ends_q and len(ends_q) == len(ends_k) <= 1024 and ends_q[-1] == q.shape[0] and ends_k[-1] == k.shape[0]
        assert all(isinstance(e, int) for e in ends_q), "lengths are host integers"
        assert mask is None or mask.ndim == 2
        starts_q, starts_k = [0, *ends_q[:-1]], [0, *ends_k[:-1]]
        for a, b, c, d in zip(starts_q, ends_q, starts_k, ends_k):
            yield slice(a, b), slice(c, d), _masked(b - a, d - c, mask, sparse_mode, pre, after)
        return
    assert layout == "BSND" and ends_q is None
    assert mask is None or mask.dtype == torch.bool
    for row in range(q.shape[0]):
        own = mask
        if sparse_mode == 0 and mask is not None and mask.ndim == 4:
            assert mask.shape == (q.shape[0], 1, q.shape[1], k.shape[1]), "B1SS wanted"
            own = mask[row, 0]
        yield row, row, _masked(q.shape[1], k.shape[1], own, sparse_mode, pre, after)


def _logits(q, k, masked, scale):
    group = q.shape[1] // k.shape[1]
    logits = torch.einsum("tnd,snd->nts", q.double(), k.double().repeat_interleave(group, 1)) * scale
    return logits.masked_fill(masked, -1e30)


def npu_fusion_attention(
    q,
    k,
    v,
    head_num,
    input_layout,
    *,
    atten_mask=None,
    scale=1.0,
    keep_prob=1.0,
    pre_tockens=UNLIMITED,
    next_tockens=UNLIMITED,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    sparse_mode=0,
    softmax_layout="",
):
    assert softmax_layout == ("TND" if input_layout == "TND" else ""), "statistics in the order of the input"
    assert q.dtype == k.dtype == v.dtype and head_num == q.shape[-2] and q.shape[-1] == k.shape[-1] >= v.shape[-1]
    _note(
        "npu_fusion_attention",
        layout=input_layout,
        sparse_mode=sparse_mode,
        mask=None if atten_mask is None else tuple(atten_mask.shape),
        ends=actual_seq_qlen,
    )
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    tnd = input_layout == "TND"
    stats = torch.zeros(*((q.shape[0], head_num) if tnd else (q.shape[0], head_num, q.shape[1])), 8).double()
    peaks, sums = stats.clone(), stats.clone()
    for iq, ik, masked in _sequences(
        q, k, input_layout, actual_seq_qlen, actual_seq_kvlen, atten_mask, sparse_mode, pre_tockens, next_tockens
    ):
        if not k[ik].shape[0]:  # no key: whatever was there
            for x in (out, peaks, sums):
                x[iq] = math.nan
            continue
        logits = _logits(q[iq], k[ik], masked, scale)
        peak = logits.amax(-1, keepdim=True)
        p = torch.exp(logits - peak)
        total = p.sum(-1, keepdim=True)
        out[iq] = torch.einsum(
            "nts,snd->tnd", p / total, v[ik].double().repeat_interleave(head_num // v.shape[-2], 1)
        ).to(q.dtype)
        into = (lambda x: x.transpose(0, 1).expand(-1, -1, 8)) if tnd else (lambda x: x.expand(-1, -1, 8))
        peaks[iq], sums[iq] = into(peak), into(total)
    return out, peaks.float(), sums.float(), q.new_empty(0), 0, 0, 0


def npu_fusion_attention_grad(
    q,
    k,
    v,
    dy,
    head_num,
    input_layout,
    *,
    atten_mask=None,
    softmax_max=None,
    softmax_sum=None,
    softmax_in=None,
    attention_in=None,
    scale_value=1.0,
    keep_prob=1.0,
    pre_tockens=UNLIMITED,
    next_tockens=UNLIMITED,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    sparse_mode=0,
    softmax_layout="",
):
    assert softmax_layout == ("TND" if input_layout == "TND" else ""), "statistics in the order of the input"
    assert attention_in.shape == dy.shape and softmax_max.shape == softmax_sum.shape and softmax_max.shape[-1] == 8
    _note("npu_fusion_attention_grad", layout=input_layout, sparse_mode=sparse_mode)
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v))
    tnd, group = input_layout == "TND", q.shape[-2] // k.shape[-2]
    for iq, ik, masked in _sequences(
        q, k, input_layout, actual_seq_qlen, actual_seq_kvlen, atten_mask, sparse_mode, pre_tockens, next_tockens
    ):
        if not k[ik].shape[0]:
            continue
        out_of = (lambda x: x[iq, :, 0].T[..., None].double()) if tnd else (lambda x: x[iq, :, :, :1].double())
        p = torch.exp(_logits(q[iq], k[ik], masked, scale_value) - out_of(softmax_max)) / out_of(softmax_sum)
        p = p.masked_fill(masked, 0)
        g, wide_k, wide_v = (
            dy[iq].double(),
            k[ik].double().repeat_interleave(group, 1),
            v[ik].double().repeat_interleave(group, 1),
        )
        delta = (g * attention_in[iq].double()).sum(-1).T[..., None]
        ds = p * (torch.einsum("tnd,snd->nts", g, wide_v) - delta) * scale_value
        dq[iq] = torch.einsum("nts,snd->tnd", ds, wide_k)

        def per_key_head(x):
            return x.unflatten(1, (-1, group)).sum(2)

        dk[ik] = per_key_head(torch.einsum("nts,tnd->snd", ds, q[iq].double()))
        dv[ik] = per_key_head(torch.einsum("nts,tnd->snd", p, g))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, torch.zeros(0)


# ---- mixture of experts
# -------------------------------------------------------------------------------------------------


def npu_grouped_matmul(x, weight, *, bias=None, group_list=None, split_item=0, group_type=None, group_list_type=0):
    assert (
        isinstance(x, list)
        and isinstance(weight, list)
        and bias is None
        and group_list.dtype == torch.int64
        and group_list_type == 1
    )
    x, w = x[0], weight[0]
    bounds = [0, *group_list.cumsum(0).tolist()]
    pairs = list(itertools.pairwise(bounds))
    if group_type == 0:
        assert split_item == 2 and x.shape[1] == w.shape[1]
        y = torch.full((x.shape[0], w.shape[2]), math.nan, dtype=x.dtype)  # what no group owns is left as it was
        for e, (a, b) in enumerate(pairs):
            y[a:b] = (x[a:b].double() @ w[e].double()).to(x.dtype)
        return [y]
    assert group_type == 2 and split_item == 3 and x.shape[1] == w.shape[0]
    return [torch.stack([x[:, a:b].double() @ w[a:b].double() for a, b in pairs]).to(x.dtype)]


def npu_moe_token_permute(tokens, indices, num_out_tokens=None, padded_mode=False):
    order = indices.flatten().argsort(stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel())
    return tokens[order // indices.shape[1]], position.int()


def npu_moe_token_unpermute(permuted, sorted_indices, probs=None, padded_mode=False, restore_shape=None):
    rows = permuted.double()[sorted_indices.long()]
    if probs is None:
        return rows.to(permuted.dtype)
    assert probs.dtype == permuted.dtype
    return (rows.unflatten(0, probs.shape) * probs.double()[..., None]).sum(1).to(permuted.dtype)


def npu_moe_token_unpermute_grad(permuted, grad, sorted_indices, probs=None, padded_mode=False, restore_shape=None):
    made = _by_autograd(lambda x, p: npu_moe_token_unpermute(x, sorted_indices, p), grad, permuted, probs)
    return tuple(x.to(permuted.dtype) for x in made)


def npu_moe_gating_top_k_softmax(x, finished=None, k=1):
    weights, experts = x.double().softmax(-1).topk(k, -1)
    return weights.to(x.dtype), experts.int(), experts.int()


def npu_moe_gating_top_k(
    x,
    k,
    *,
    bias=None,
    k_group=1,
    group_count=1,
    group_select_mode=0,
    renorm=0,
    norm_type=0,
    out_flag=False,
    routed_scaling_factor=1.0,
    eps=1e-20,
):
    assert renorm == 0 and norm_type == 1 and bias.dtype == x.dtype
    scores = x.double().sigmoid()
    choice = (scores + bias.double()).unflatten(1, (group_count, -1))
    assert choice.shape[2] > 2 and group_select_mode == 1
    kept = choice.topk(2, -1).values.sum(-1).topk(k_group, -1).indices
    keep = torch.zeros(choice.shape[:2], dtype=torch.bool).scatter_(1, kept, True)
    experts = choice.masked_fill(~keep[..., None], -math.inf).flatten(1).topk(k, -1).indices
    y = scores.gather(1, experts)
    y = y / (y.sum(-1, keepdim=True) + eps) * routed_scaling_factor
    return y.to(x.dtype), experts.int(), scores.float()


def _with_host_tensors(function, name):
    """The third version of a call: run lengths are int64 tensors in host memory."""

    def third(*args, actual_seq_qlen, actual_seq_kvlen, **rest):
        for ends in (actual_seq_qlen, actual_seq_kvlen):
            assert (
                isinstance(ends, torch.Tensor)
                and ends.dtype == torch.int64
                and ends.device.type == "cpu"
                and ends.ndim == 1
            )
        _note(name)
        return function(
            *args, actual_seq_qlen=actual_seq_qlen.tolist(), actual_seq_kvlen=actual_seq_kvlen.tolist(), **rest
        )

    return third


npu_fusion_attention_v3 = _with_host_tensors(npu_fusion_attention, "npu_fusion_attention_v3")
npu_fusion_attention_grad_v3 = _with_host_tensors(npu_fusion_attention_grad, "npu_fusion_attention_grad_v3")

MODULE = SimpleNamespace(**{name: value for name, value in globals().items() if name.startswith("npu_")})
