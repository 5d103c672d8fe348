"""AdamW."""

from __future__ import annotations

import torch

from npu_bridge.kernels.registry import register


def _npu_adamw(param, grad, mu, nu, step, learning_rate, *, b1, b2, eps, weight_decay, inplace=False):
    if not (param.dtype == mu.dtype == nu.dtype == torch.float32):
        return adamw(param, grad, mu, nu, step, learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, inplace=inplace)
    if not inplace:
        param, mu, nu = param.clone(), mu.clone(), nu.clone()
    # The kernel takes its learning rate from the host, ours lies on the device: let it write the plain update (rate 1, no decay)
    # into zeros and apply rate and decay afterwards. Reading the rate back would stop the queue at every parameter.
    update = torch.zeros_like(param)
    torch._fused_adamw_(
        [update],
        [grad.to(param.dtype)],
        [mu],
        [nu],
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
    param.mul_(1 - learning_rate * weight_decay).addcmul_(update, learning_rate.expand_as(update))
    return param, mu, nu


@register(
    "adamw",
    family="adamw",
    call="torch._fused_adamw_([update], [grad], [mu], [nu], [], [step], lr=1.0, ...); param.mul_(...).addcmul_(...)",
    npu=_npu_adamw,
    note="aclnnApplyAdamWV2 on 910B (npu_apply_adam_w is a legacy operator there); float32 state, else the equivalent; in place when donated",
)
def adamw(param, grad, mu, nu, step, learning_rate, *, b1, b2, eps, weight_decay, inplace=False):
    g, m, v = grad.float(), mu.float(), nu.float()
    m = m * b1 + g * (1 - b1)
    v = v * b2 + g * g * (1 - b2)
    p = param.float() * (1 - learning_rate * weight_decay)
    p = p - learning_rate / (1 - b1**step) * m / (v.sqrt() / (1 - b2**step).sqrt() + eps)
    if inplace:
        return param.copy_(p), mu.copy_(m), nu.copy_(v)
    return p.to(param.dtype), m.to(mu.dtype), v.to(nu.dtype)
