"""Each operator of npu_bridge.ops, forward and backward, beside the naive formula on XLA and beside torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.measure import CLOCKS, Comparison, Side
from benchmarks.registry import Settings, case


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator in three forms over the same numpy arguments.

    Attributes:
      arguments: floats are differentiated, in order; integers are not.
      flops: multiply-adds times two, forward and backward. traffic: bytes that must move at least, forward and
        backward.
      ours, naive, torch: functions of the arguments as JAX arrays (the first two) or tensors.
      differentiate: False times the function alone.
    """

    name: str
    arguments: tuple[np.ndarray, ...]
    ours: Callable
    naive: Callable
    torch: Callable
    flops: float
    traffic: float
    differentiate: bool = True


@dataclasses.dataclass(frozen=True)
class Sizes:
    """B rows, T tokens, N query and K key/value heads, H head dim, D width, F feed-forward width, V vocabulary, E
    experts.
    """

    B: int = 2
    T: int = 1024
    N: int = 8
    K: int = 4
    H: int = 64
    D: int = 512
    F: int = 1536
    V: int = 8192
    E: int = 8
    longest: int = 256  # segment


DRY = Sizes(B=1, T=32, N=2, K=1, H=8, D=16, F=24, V=64, E=4, longest=16)


def operators(s: Sizes) -> Iterator[Operator]:
    """The table.

    Bytes count each argument and result once forward; backward reads both again and writes the gradients.
    """
    import jax
    import jax.numpy as jnp
    import optax
    import torch
    import torch.nn.functional as F

    from npu_bridge import ops

    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    tokens = s.B * s.T

    def elementwise(inputs, outputs):
        return 4.0 * (inputs + outputs) + 4.0 * (2 * inputs + outputs)

    def product(m, k, n):
        return dict(flops=6.0 * m * k * n, traffic=12.0 * (m * k + k * n + m * n))

    yield Operator(
        "linear",
        (normal(s.B, s.T, s.D), normal(s.D, s.F), normal(s.F)),
        ops.linear,
        lambda x, w, b: x @ w + b,
        lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w).view(s.B, s.T, s.F),
        **product(tokens, s.D, s.F),
    )

    def norm_naive(x, g):
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * g

    yield Operator(
        "rms_norm",
        (normal(s.B, s.T, s.D), normal(s.D)),
        lambda x, g: ops.rms_norm(x, g, eps=1e-6),
        norm_naive,
        lambda x, g: F.rms_norm(x, (s.D,), g, 1e-6),
        flops=0,
        traffic=elementwise(tokens * s.D, tokens * s.D),
    )

    def layer_naive(x, g, b):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6) * g + b

    yield Operator(
        "layer_norm",
        (normal(s.B, s.T, s.D), normal(s.D), normal(s.D)),
        lambda x, g, b: ops.layer_norm(x, g, b, eps=1e-6),
        layer_naive,
        lambda x, g, b: F.layer_norm(x, (s.D,), g, b, 1e-6),
        flops=0,
        traffic=elementwise(tokens * s.D, tokens * s.D),
    )
    yield Operator(
        "swiglu",
        (normal(s.B, s.T, s.F), normal(s.B, s.T, s.F)),
        ops.swiglu,
        lambda a, b: jax.nn.silu(a) * b,
        lambda a, b: F.silu(a) * b,
        flops=0,
        traffic=elementwise(2 * tokens * s.F, tokens * s.F),
    )
    yield Operator(
        "gelu",
        (normal(s.B, s.T, s.F),),
        lambda x: ops.gelu(x, approximate=False),
        lambda x: jax.nn.gelu(x, approximate=False),
        F.gelu,
        flops=0,
        traffic=elementwise(tokens * s.F, tokens * s.F),
    )
    yield _rotary(s, normal, jnp, torch, ops, elementwise)
    yield from _attention(s, normal, jnp, torch, ops, jax)
    ids = rng.integers(0, s.V, (s.B, s.T)).astype(np.int32)
    yield Operator(
        "embedding",
        (normal(s.V, s.D), ids),
        ops.embedding,
        lambda table, i: table[i],
        lambda table, i: F.embedding(i.long(), table),
        flops=0,
        traffic=4.0 * (4 * tokens * s.D + s.V * s.D),
    )
    weights = (rng.random((s.B, s.T)) < 0.5).astype(np.int32)

    def naive_loss(hidden, head, targets, w):
        return -jnp.take_along_axis(jax.nn.log_softmax(hidden @ head), targets[..., None], -1)[..., 0] * w

    def torch_loss(hidden, head, targets, w):
        return (
            F.cross_entropy((hidden @ head).flatten(0, 1), targets.flatten().long(), reduction="none").view(s.B, s.T)
            * w
        )

    yield Operator(
        "cross_entropy",
        (normal(s.B, s.T, s.D), normal(s.D, s.V) / s.D**0.5, ids, weights),
        lambda h, k, t, w: ops.cross_entropy(h, k, t, w.astype(jnp.float32), chunk=min(512, s.T)),
        naive_loss,
        torch_loss,
        **product(tokens, s.D, s.V),
    )
    sizes = rng.multinomial(tokens, np.ones(s.E) / s.E).astype(np.int32)

    def torch_grouped(x, w, n):
        return torch.cat([part @ w[expert] for expert, part in enumerate(x.split(n.tolist()))])

    yield Operator(
        "grouped_matmul",
        (normal(tokens, s.D), normal(s.E, s.D, s.F), sizes),
        ops.grouped_matmul,
        lambda x, w, n: jax.lax.ragged_dot(x, w, n),
        torch_grouped,
        flops=6.0 * tokens * s.D * s.F,
        traffic=12.0 * (tokens * (s.D + s.F) + s.E * s.D * s.F),
    )
    yield from _routing(s, rng, normal, jax, jnp, torch, ops)
    many = s.V * s.D

    def ours_adamw(p, g, m, v):
        return jnp.stack(
            ops.fused_adamw(
                p,
                g,
                m,
                jnp.abs(v),
                step=jnp.int32(3),
                learning_rate=jnp.float32(1e-3),
                b1=0.9,
                b2=0.99,
                eps=1e-8,
                weight_decay=0.05,
            )
        )

    def naive_adamw(p, g, m, v):
        m, v = 0.9 * m + 0.1 * g, 0.99 * jnp.abs(v) + 0.01 * g**2
        return jnp.stack([p - 1e-3 * (m / (1 - 0.9**3) / (jnp.sqrt(v / (1 - 0.99**3)) + 1e-8) + 0.05 * p), m, v])

    def torch_adamw(p, g, m, v):
        p, m, v = p.clone(), m.clone(), v.abs()
        torch._fused_adamw_(
            [p],
            [g],
            [m],
            [v],
            [],
            [torch.tensor(3.0)],
            lr=1e-3,
            beta1=0.9,
            beta2=0.99,
            weight_decay=0.05,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
        return torch.stack([p, m, v])

    yield Operator(
        "fused_adamw",
        tuple(normal(many) for _ in range(4)),
        ours_adamw,
        naive_adamw,
        torch_adamw,
        flops=0,
        traffic=28.0 * many,
        differentiate=False,
    )
    yield Operator(
        "global_norm",
        (normal(s.V, s.D),),
        lambda x: ops.global_norm({"x": x}),
        lambda x: optax.global_norm({"x": x}),
        lambda x: torch.nn.utils.get_total_norm([x]),
        flops=0,
        traffic=4.0 * many,
        differentiate=False,
    )


def _rotary(s, normal, jnp, torch, ops, elementwise) -> Operator:
    angles = np.arange(s.T)[:, None] / 1e4 ** (np.arange(s.H // 2) / (s.H // 2))
    angles = np.broadcast_to(np.concatenate([angles, angles], -1), (s.B, s.T, s.H))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    tensors = torch.tensor(cos)[:, :, None], torch.tensor(sin)[:, :, None]

    def naive(x):
        half = jnp.concatenate([-x[..., s.H // 2 :], x[..., : s.H // 2]], -1)
        return x * cos[:, :, None] + half * sin[:, :, None]

    def theirs(x):
        half = torch.cat([-x[..., s.H // 2 :], x[..., : s.H // 2]], -1)
        return x * tensors[0] + half * tensors[1]

    count = s.B * s.T * s.N * s.H
    # Linear in x: the backward pass reads one gradient and writes another, and needs no input.
    return Operator(
        "rotary",
        (normal(s.B, s.T, s.N, s.H),),
        lambda x: ops.rotary(x, cos, sin),
        naive,
        theirs,
        flops=0,
        traffic=16.0 * count,
    )


def _attention(s, normal, jnp, torch, ops, jax) -> Iterator[Operator]:
    """Packed causal attention as in the decoder, and windows as in the tower."""
    for name, longest, causal, heads, kv in (
        ("attention, causal, packed", s.longest, True, s.N, s.K),
        ("attention, windows", max(4, s.longest // 4), False, s.N, s.N),
    ):
        ids = np.broadcast_to(np.arange(s.T) // longest + 1, (s.B, s.T)).astype(np.int32)
        allowed = ids[:, :, None] == ids[:, None, :]
        if causal:
            allowed = allowed & np.tri(s.T, dtype=bool)
        mask = np.ascontiguousarray(allowed[:, None])
        tensor_mask = torch.tensor(mask)

        def ours(q, k, v, ids=ids, causal=causal, longest=longest):
            return ops.attention(q, k, v, segment_ids_q=ids, causal=causal, max_segment_length=longest)

        def naive(q, k, v, mask=mask, groups=heads // kv):
            k, v = jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2)
            scores = jnp.einsum("btnh,bsnh->bnts", q, k) * s.H**-0.5
            return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(mask, scores, -1e30)), v)

        def theirs(q, k, v, mask=tensor_mask, grouped=heads != kv):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=grouped
            ).transpose(1, 2)

        pairs = float(allowed.sum()) * heads
        arguments = (normal(s.B, s.T, heads, s.H), normal(s.B, s.T, kv, s.H), normal(s.B, s.T, kv, s.H))
        # Two products forward and four backward over unmasked pairs; masked ones do not count as work.
        yield Operator(
            name,
            arguments,
            ours,
            naive,
            theirs,
            flops=2.0 * 6 * pairs * s.H,
            traffic=12.0 * sum(x.size for x in arguments),
        )


def _routing(s, rng, normal, jax, jnp, torch, ops) -> Iterator[Operator]:
    tokens, k = s.B * s.T, 2
    logits = normal(tokens, s.E)
    yield Operator(
        "moe_gating",
        (logits,),
        lambda x: ops.moe_gating(x, k=k, renormalize=True)[0],
        lambda x: (lambda top: top / top.sum(-1, keepdims=True))(jax.lax.top_k(jax.nn.softmax(x), k)[0]),
        lambda x: (lambda top: top / top.sum(-1, keepdim=True))(x.softmax(-1).topk(k).values),
        flops=0,
        traffic=16.0 * tokens * s.E,
    )
    experts = np.argsort(-logits, axis=-1)[:, :k].astype(np.int32)
    weights = rng.random((tokens, k)).astype(np.float32)

    def ours(x, w, experts):
        # The experts are the identity: only permuting and unpermuting are timed.
        permuted, _, destination = ops.moe_permute(x, experts, num_experts=s.E)
        return ops.moe_unpermute(permuted, destination, w)

    def naive(x, w, experts):
        order = jnp.argsort(experts.reshape(-1), stable=True)
        return (x[order // k][jnp.argsort(order)].reshape(tokens, k, -1) * w[..., None]).sum(1)

    def theirs(x, w, experts):
        order = experts.flatten().argsort(stable=True)
        return (x[order // k][order.argsort()].view(tokens, k, -1) * w[..., None]).sum(1)

    yield Operator(
        "moe_permute, moe_unpermute",
        (normal(tokens, s.D), weights, experts),
        ours,
        naive,
        theirs,
        flops=0,
        traffic=4.0 * tokens * s.D * (2 + 4 * k),
    )


def machine_peaks(settings: Settings) -> tuple[float, float]:
    """Measured matmul peak in FLOP/s (float32, the better of XLA and torch) and copy bandwidth in bytes/s (read and
    written).
    """
    import jax
    import jax.numpy as jnp
    import torch

    n, copied = (128, 1 << 18) if settings.dry else (1536, 1 << 26)
    clock = CLOCKS[settings.clock]
    a = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)
    x, t = jnp.asarray(a), torch.tensor(a)
    product = jax.jit(jnp.matmul)
    source = torch.zeros(copied // 4)
    target = torch.empty_like(source)

    def best(function: Callable) -> float:
        function()
        times = []
        for _ in range(2 if settings.dry else 8):
            start = clock()
            function()
            times.append(clock() - start)
        return min(times)

    flops = 2 * n**3 / min(best(lambda: product(x, x).block_until_ready()), best(lambda: t @ t))
    return flops, 2 * copied / best(lambda: target.copy_(source))


def compare(operator: Operator, peaks: tuple[float, float]) -> Comparison:
    """Compile the three forms, compare their results and gradients, and return them for timing."""
    import jax
    import jax.numpy as jnp
    import torch

    floats = [i for i, x in enumerate(operator.arguments) if x.dtype.kind == "f"] if operator.differentiate else []
    tensors = [torch.tensor(x, requires_grad=i in floats) for i, x in enumerate(operator.arguments)]
    arrays = [jnp.asarray(x) for x in operator.arguments]
    shape = jax.eval_shape(operator.naive, *arrays).shape
    cotangent = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    cotangent_tensor = torch.tensor(cotangent)

    def program(function):
        def both(cotangent, *arguments):
            def of_floats(*given):
                given = iter(given)
                return function(*(next(given) if i in floats else x for i, x in enumerate(arguments)))

            result, pull = jax.vjp(of_floats, *(arguments[i] for i in floats))
            return result, pull(cotangent)

        compiled = (
            jax.jit(both if floats else lambda _, *arguments: (function(*arguments), ()))
            .lower(cotangent, *arrays)
            .compile()
        )
        cotangent_array = jnp.asarray(cotangent)
        return lambda: jax.block_until_ready(compiled(cotangent_array, *arrays))

    def theirs():
        with torch.set_grad_enabled(bool(floats)):
            result = operator.torch(*tensors)
        return result.detach(), torch.autograd.grad(
            result, [tensors[i] for i in floats], cotangent_tensor
        ) if floats else ()

    ours, naive = program(operator.ours), program(operator.naive)
    mine = [np.asarray(x) for x in jax.tree.leaves(ours())]
    worst = 0.0
    for name, other in (("naive", jax.tree.leaves(naive())), ("torch", [theirs()[0], *theirs()[1]])):
        for number, (a, b) in enumerate(zip(mine, other, strict=True)):
            b = np.asarray(b)
            difference = float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
            worst = max(worst, difference)
            # Sums of a few thousand float32 products in another order: some 1e-6 of the largest value; 1e-4 is a
            # different result.
            if not difference < 1e-4:
                raise AssertionError(
                    f"{operator.name}: {'the result' if number == 0 else f'gradient {number}'} differs from "
                    f"{name} by {difference:.2e} of its largest value"
                )
    work = {"calls": 1.0}
    bound = max(operator.flops / peaks[0], operator.traffic / peaks[1])
    limit = "matmul peak" if operator.flops / peaks[0] > operator.traffic / peaks[1] else "copy bandwidth"
    return Comparison(
        operator.name,
        [Side("ours", ours, work), Side("naive jnp", naive, work), Side("torch", theirs, work)],
        unit="calls",
        checked={"largest relative difference": worst},
        bound=bound,
        note=f"{operator.flops / 1e9:.3g} GFLOP, {operator.traffic / 1e6:.3g} MB, float32; bounded by the {limit}.",
    )


@case("operators")
def operator_case(settings: Settings) -> Iterator[Comparison]:
    """Each operator forward and backward: ours, the naive formula on XLA, torch; and against this machine's measured
    peaks.
    """
    import torch

    torch.set_num_threads(settings.threads)
    for operator in operators(DRY if settings.dry else Sizes()):
        peaks = machine_peaks(settings)  # measured for each operator: the load of the machine changes
        comparison = compare(operator, peaks)
        comparison.note += f" Peaks just before: {peaks[0] / 1e9:.0f} GFLOP/s, {peaks[1] / 1e9:.1f} GB/s copied."
        yield comparison
