"""AdamW. `keep` is a bool scalar on the device: False leaves parameter and moments unchanged, bit for bit."""

from __future__ import annotations

import torch

from npu_bridge.kernels.registry import register

LARGEST_PIECE = 2**26
"""Elements per call of torch_npu, which makes several temporaries of that size. Token tables have ten times as many."""


def _npu_adamw(param, grad, mu, nu, step, learning_rate, keep, *, b1, b2, eps, weight_decay, inplace=False):
    if not (param.dtype == mu.dtype == nu.dtype == torch.float32):
        return adamw(
            param,
            grad,
            mu,
            nu,
            step,
            learning_rate,
            keep,
            b1=b1,
            b2=b2,
            eps=eps,
            weight_decay=weight_decay,
            inplace=inplace,
        )
    if not inplace:
        param, mu, nu = param.clone(), mu.clone(), nu.clone()
    rate = torch.where(keep, learning_rate, 0.0)
    whole = param, grad.to(param.dtype), mu, nu
    pieces = [whole]
    if param.numel() > LARGEST_PIECE and all(x.is_contiguous() for x in (param, mu, nu)):
        pieces = zip(*(x.reshape(-1).split(LARGEST_PIECE) for x in whole))
    for piece in pieces:
        _update_piece(*piece, step, rate, keep, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return param, mu, nu


def _update_piece(param, grad, mu, nu, step, rate, keep, *, b1, b2, eps, weight_decay):
    # The kernel takes the learning rate from the host, ours is on the device. Let it write the plain update (rate 1, no
    # decay) into zeros and apply rate and decay afterwards: reading the rate back would synchronise at every parameter.
    update, new_mu, new_nu = torch.zeros_like(param), mu.clone(), nu.clone()
    torch._fused_adamw_(
        [update],
        [grad],
        [new_mu],
        [new_nu],
        [],
        [step.reshape(()).clone()],
        lr=1.0,
        beta1=b1,
        beta2=b2,
        weight_decay=0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    update = torch.where(keep, update, 0.0)  # a skipped update may be infinite, and 0 * inf is not 0
    param.mul_(1 - rate * weight_decay).addcmul_(update, rate.expand_as(update))
    mu.copy_(torch.where(keep, new_mu, mu))
    nu.copy_(torch.where(keep, new_nu, nu))


def _cpu_adamw(param, grad, mu, nu, step, learning_rate, keep, *, b1, b2, eps, weight_decay, inplace=False):
    if not (
        param.dtype == mu.dtype == nu.dtype == torch.float32
        and param.is_contiguous()
        and mu.is_contiguous()
        and nu.is_contiguous()
    ):
        return adamw(
            param,
            grad,
            mu,
            nu,
            step,
            learning_rate,
            keep,
            b1=b1,
            b2=b2,
            eps=eps,
            weight_decay=weight_decay,
            inplace=inplace,
        )
    if not inplace:
        param, mu, nu = param.clone(), mu.clone(), nu.clone()
    torch._fused_adamw_(
        [param],
        [grad.to(param.dtype).contiguous()],
        [mu],
        [nu],
        [],
        [step.reshape(())],
        lr=learning_rate.reshape(()),
        beta1=b1,
        beta2=b2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        found_inf=(~keep).to(torch.float32),  # the kernel does nothing where this is 1
    )
    return param, mu, nu


@register(
    "adamw",
    family="adamw",
    call="torch._fused_adamw_([update], [grad], [mu], [nu], [], [step], lr=1.0, ...); param.mul_(...).addcmul_(...)",
    npu=_npu_adamw,
    cpu=_cpu_adamw,
    note="aclnnApplyAdamWV2 on 910B (npu_apply_adam_w is a legacy operator there); float32 state, else the "
    "equivalent; in place when donated",
)
def adamw(param, grad, mu, nu, step, learning_rate, keep, *, b1, b2, eps, weight_decay, inplace=False):
    g, m, v = grad.float(), mu.float(), nu.float()
    m = m * b1 + g * (1 - b1)
    v = v * b2 + g * g * (1 - b2)
    p = param.float() * (1 - learning_rate * weight_decay)
    p = p - learning_rate / (1 - b1**step) * m / (v.sqrt() / (1 - b2**step).sqrt() + eps)
    p, m, v = (torch.where(keep, new.to(old.dtype), old) for new, old in ((p, param), (m, mu), (v, nu)))
    return (param.copy_(p), mu.copy_(m), nu.copy_(v)) if inplace else (p, m, v)
