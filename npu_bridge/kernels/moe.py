"""Mixture of experts. T tokens, D width, E experts, k experts a token, F output width."""

from __future__ import annotations

import torch

from npu_bridge.kernels.registry import register, torch_npu

# ---- grouped matrix product
# -------------------------------------------------------------------------------------------


def _groups(sizes):
    """Bounds of each expert's rows, on the host (the equivalents synchronise; the fused calls do not)."""
    ends = sizes.cumsum(0).tolist()
    return list(zip([0, *ends[:-1]], ends))


def _npu_grouped(x, w, group_sizes):
    y = torch_npu().npu_grouped_matmul(
        [x], [w], bias=None, group_list=group_sizes.long(), split_item=2, group_type=0, group_list_type=1
    )[0]
    # Rows past the last group belong to no expert; the kernel leaves them undefined.
    owned = torch.arange(x.shape[0], device=x.device) < group_sizes.sum()
    return (y.masked_fill(~owned[:, None], 0),)


def _npu_grouped_transposed(x, w, group_sizes):
    return _npu_grouped(x, w.transpose(1, 2), group_sizes)


def _npu_weight_gradient(x, g, group_sizes):
    y = torch_npu().npu_grouped_matmul(
        [x.transpose(0, 1)],
        [g],
        bias=None,
        group_list=group_sizes.long(),
        split_item=3,
        group_type=2,
        group_list_type=1,
    )[0]
    return (y.float(),)


_GROUPED = "torch_npu.npu_grouped_matmul([x], [w], group_list=sizes, split_item=2, group_type=0, group_list_type=1)"


@register(
    "grouped_matmul",
    family="grouped_matmul",
    call=_GROUPED,
    npu=_npu_grouped,
    note="counts, not cumulative ends (group_list_type 1), on the device",
)
def grouped_matmul(x, w, group_sizes):
    y = x.new_zeros(x.shape[0], w.shape[2])
    for expert, (start, end) in enumerate(_groups(group_sizes)):
        y[start:end] = (x[start:end].float() @ w[expert].float()).to(x.dtype)
    return (y,)


@register(
    "grouped_matmul_transposed",
    family="grouped_matmul",
    call=_GROUPED.replace("[w]", "[w.transpose(1, 2)]"),
    npu=_npu_grouped_transposed,
    note="a transposed view: the kernel reads it without a copy",
)
def grouped_matmul_transposed(x, w, group_sizes):
    return grouped_matmul(x, w.transpose(1, 2), group_sizes)


@register("grouped_matmul_weight_gradient", family="grouped_matmul", npu=_npu_weight_gradient,
          call="torch_npu.npu_grouped_matmul([x.T], [g], group_list=sizes, split_item=3, group_type=2, "
              "group_list_type=1)",
          note="on Ascend rounded to the operands' dtype before it is widened")  # fmt: skip
def grouped_matmul_weight_gradient(x, g, group_sizes):
    return (torch.stack([x[start:end].float().T @ g[start:end].float() for start, end in _groups(group_sizes)]),)


# ---- routing
# ------------------------------------------------------------------------------------------------------------


def _npu_gating(logits, *bias, k, scoring, groups, groups_kept, renormalize, scale):
    arguments = dict(k=k, scoring=scoring, groups=groups, groups_kept=groups_kept, renormalize=renormalize, scale=scale)
    if scoring == "sigmoid" and renormalize and (groups == 1 or logits.shape[1] // groups > 2):
        weights, experts, _ = torch_npu().npu_moe_gating_top_k(
            logits.float(),
            k,
            bias=bias[0].float() if bias else None,
            k_group=groups_kept,
            group_count=groups,
            group_select_mode=1,
            renorm=0,
            norm_type=1,
            routed_scaling_factor=scale,
            eps=1e-20,
        )
        return weights, experts
    if scoring == "softmax" and groups == 1 and not bias:
        weights, experts, _ = torch_npu().npu_moe_gating_top_k_softmax(logits.float(), None, k)
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * scale, experts
    return moe_gating(logits, *bias, **arguments)


def moe_gating(logits, *bias, k, scoring, groups, groups_kept, renormalize, scale):
    """Return weights (T, k) float32 and experts (T, k) int32; ties go to the lower expert."""
    scores = logits.float().softmax(-1) if scoring == "softmax" else logits.float().sigmoid()
    choice = scores + bias[0].float() if bias else scores
    if groups > 1:
        grouped = choice.unflatten(1, (groups, -1))
        strength = grouped.topk(2, -1).values.sum(-1)
        kept = torch.sort(strength, dim=-1, descending=True, stable=True).indices[:, :groups_kept]
        eligible = torch.zeros_like(strength, dtype=torch.bool).scatter_(1, kept, True)
        choice = grouped.masked_fill(~eligible[..., None], float("-inf")).flatten(1)
    experts = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, experts)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if scoring == "sigmoid" else 0.0))
    return weights * scale, experts.int()


_GATING = (
    "torch_npu.npu_moe_gating_top_k(logits, k, bias=..., k_group=..., group_count=..., group_select_mode=1, "
    "renorm=0, norm_type=1, ...)"
)
register(
    "moe_gating",
    family="moe_gating",
    call="torch_npu.npu_moe_gating_top_k_softmax(logits, None, k) | npu_moe_gating_top_k(..., norm_type=1)",
    npu=_npu_gating,
    note="softmax without groups, or renormalised sigmoid; anything else runs the equivalent",
)(moe_gating)
register(
    "moe_gating_biased",
    family="moe_gating",
    call=_GATING,
    npu=_npu_gating,
    note="DeepSeek-V3: sigmoid, bias in the choice only, two best of a group",
)(moe_gating)


def _npu_permute(tokens, order, destination):
    # The kernel sorts by its indices. Passing the destinations, a permutation, sorts every copy to its row.
    permuted, _ = torch_npu().npu_moe_token_permute(tokens, destination, None, False)
    return (permuted,)


def _npu_permute_backward(g, destination):
    return (
        torch_npu().npu_moe_token_unpermute(g, destination.flatten())
        if destination.shape[1] == 1
        else torch_npu().npu_moe_token_unpermute(
            g, destination.flatten(), torch.ones(destination.shape, dtype=g.dtype, device=g.device)
        ),
    )


def _npu_unpermute(permuted, destination, weights):
    return (torch_npu().npu_moe_token_unpermute(permuted, destination.flatten(), weights.to(permuted.dtype)),)


def _npu_unpermute_backward(g, permuted, destination, weights):
    dpermuted, dweights = torch_npu().npu_moe_token_unpermute_grad(
        permuted, g, destination.flatten(), weights.to(permuted.dtype)
    )
    return dpermuted, dweights.float()


@register(
    "moe_permute",
    family="moe_permute",
    call="torch_npu.npu_moe_token_permute(tokens, destination, None, False)",
    npu=_npu_permute,
    note="sorted by destination, which is a permutation",
)
def moe_permute(tokens, order, destination):
    return (tokens.index_select(0, torch.div(order.long(), destination.shape[1], rounding_mode="floor")),)


@register(
    "moe_permute_backward",
    family="moe_permute",
    call="torch_npu.npu_moe_token_unpermute(g, destination, ones)",
    npu=_npu_permute_backward,
    note="the sum of the k copies is an unpermute with weights of one",
)
def moe_permute_backward(g, destination):
    return (g.index_select(0, destination.flatten().long()).unflatten(0, destination.shape).float().sum(1).to(g.dtype),)


@register(
    "moe_unpermute",
    family="moe_unpermute",
    call="torch_npu.npu_moe_token_unpermute(permuted, destination, weights)",
    npu=_npu_unpermute,
    note="weights in the dtype of the rows",
)
def moe_unpermute(permuted, destination, weights):
    rows = permuted.index_select(0, destination.flatten().long()).unflatten(0, destination.shape).float()
    return ((rows * weights[..., None].float()).sum(1).to(permuted.dtype),)


@register("moe_unpermute_backward", family="moe_unpermute", npu=_npu_unpermute_backward,
          call="torch_npu.npu_moe_token_unpermute_grad(permuted, g, destination, weights)")  # fmt: skip
def moe_unpermute_backward(g, permuted, destination, weights):
    flat, wide = destination.flatten().long(), g.float()
    dweights = (permuted.index_select(0, flat).unflatten(0, destination.shape).float() * wide[:, None]).sum(-1)
    rows = (wide[:, None] * weights[..., None].float()).to(permuted.dtype).flatten(0, 1)
    return torch.empty_like(permuted).index_copy_(0, flat, rows), dweights
