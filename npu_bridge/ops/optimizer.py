"""One fused AdamW update and the global norm of a pytree."""

import jax
import jax.numpy as jnp

from npu_bridge.jaxcompat import define_operator
from npu_bridge.ops._common import accumulator, require


def fused_adamw(param, grad, mu, nu, *, step, learning_rate, b1, b2, eps, weight_decay, keep=True):
    """One decoupled AdamW update of one array (Loshchilov & Hutter 2019), computed in float32.

    Args:
      param, grad, mu, nu: one shape; `mu` and `nu` are the running moments. step: number of this update, counted from 1
        (a traced integer is fine). learning_rate: float or traced scalar. b1, b2, eps, weight_decay: static floats.

      keep: bool or traced bool scalar; False leaves all three bitwise as they are, whatever grad holds, without asking
        the host.

    Returns:
      (param, mu, nu) updated, each in its own dtype.
    """
    require(
        param.shape == grad.shape == mu.shape == nu.shape,
        "fused_adamw",
        f"shapes differ: param {param.shape}, grad {grad.shape}, mu {mu.shape}, nu {nu.shape}",
    )
    dtype = accumulator(param.dtype)
    step = jnp.asarray(step).astype(dtype)
    learning_rate = jnp.asarray(learning_rate, dtype)
    return _adamw(
        param,
        grad,
        mu,
        nu,
        step,
        learning_rate,
        jnp.asarray(keep, bool),
        b1=float(b1),
        b2=float(b2),
        eps=float(eps),
        weight_decay=float(weight_decay),
    )


def adamw_update(param, grad, mu, nu, step, learning_rate, keep, *, b1, b2, eps, weight_decay):
    """-> param, mu, nu; `step` and `learning_rate` are float32 scalars on the device, `keep` a bool scalar there."""
    dtype = accumulator(param.dtype)
    p, g = param.astype(dtype), grad.astype(dtype)
    m = b1 * mu.astype(dtype) + (1 - b1) * g
    v = b2 * nu.astype(dtype) + (1 - b2) * g * g
    # The order of torch's fused kernel: decay first, then the bias-corrected step.
    p = p * (1 - learning_rate * weight_decay)
    denominator = jnp.sqrt(v) / jnp.sqrt(1 - b2**step) + eps
    p = p - learning_rate / (1 - b1**step) * m / denominator
    # A select, not a branch: it fuses into the update, stays in place under donation, and every back end can run it.
    return tuple(jnp.where(keep, new.astype(old.dtype), old) for new, old in ((p, param), (m, mu), (v, nu)))


_adamw = define_operator(
    "adamw",
    reference=adamw_update,
    rule="..., ..., ..., ..., , , -> ..., ..., ...",
    inplace={0: 0, 1: 2, 2: 3},
    results=lambda param, grad, mu, nu, *scalars, **settings: [param, mu, nu],
)


def global_norm(tree):
    """Return the L2 norm over all leaves of a pytree, squared and summed in float32; 0 for an empty tree."""
    squares = [
        jnp.sum(jnp.square(jnp.asarray(leaf).astype(accumulator(jnp.result_type(leaf)))))
        for leaf in jax.tree.leaves(tree)
    ]
    return jnp.sqrt(sum(squares)) if squares else jnp.zeros((), jnp.float32)
