"""Measure each kernel against its formula in float64, for docs/operators.md and for `mindvl doctor`.

The formula is the operator's JAX reference in float64 on the inputs of the kernel. tests/ops compare that reference
with formulas written by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from npu_bridge.kernels.registry import KERNELS, lookup
from npu_bridge.ops import moe
from npu_bridge.ops.activations import gelu_backward, gelu_forward, swiglu_backward, swiglu_forward
from npu_bridge.ops.attention import attention_backward, attention_forward
from npu_bridge.ops.embedding import embedding_backward, embedding_forward
from npu_bridge.ops.norms import layer_norm_backward, layer_norm_forward, rms_norm_backward, rms_norm_forward
from npu_bridge.ops.optimizer import adamw_update
from npu_bridge.ops.rotary import rotary_backward, rotary_forward

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of one kernel.

    `arrays(rng, rounded)` makes them in float64; `rounded` rounds an array to the dtype under test.

    `wide` lists the operands that stay float32 whatever the dtype (statistics, the optimizer's state).
    """

    reference: Callable[..., Any]
    arrays: Callable[..., list[np.ndarray]]
    params: dict[str, Any] = dataclasses.field(default_factory=dict)
    wide: tuple[int, ...] = ()


def _normal(rng, *shape):
    return rng.standard_normal(shape)


def _rms_backward(rng, rounded):
    x, scale = rounded(_normal(rng, 3, 17, 96)), rounded(_normal(rng, 96))
    return [_normal(rng, 3, 17, 96), x, scale, 1 / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)]


def _layer_backward(rng, rounded):
    x, scale = rounded(_normal(rng, 3, 17, 96) + 1), rounded(_normal(rng, 96))
    return [_normal(rng, 3, 17, 96), x, scale, x.mean(-1, keepdims=True), 1 / np.sqrt(x.var(-1, keepdims=True) + 1e-6)]


def _tables(rng):
    angle = _normal(rng, 2, 9, 24) * 30
    return [np.cos(angle), np.sin(angle)]


_LENGTHS = np.array([[20, 31, 13], [7, 40, -1]])


def _segments():
    ids = np.zeros((2, 70), np.int32)
    for row, lengths in zip(ids, _LENGTHS):
        row[: sum(n for n in lengths if n > 0)] = np.repeat(np.arange(1, 4)[lengths > 0], lengths[lengths > 0])
    return [ids, ids]


# One round of a ring: the queries' segments 2 and 3 against keys of 1 to 3, and row 1 without a key of its segment 2.
_PARTS = np.array([[0, 40, 25], [50, 9, -1]], np.int32), np.array([[20, 31, 13], [70, 0, -1]], np.int32)


def _parts():
    made = []
    for lengths in _PARTS:
        ids = np.zeros((2, 70), np.int32)
        for row, found in zip(ids, lengths):
            found = np.maximum(found, 0)
            row[: found.sum()] = np.repeat(np.arange(1, 4), found)
        made.append(ids)
    return made


def _attention(segments, backward, params):
    def arrays(rng, rounded):
        q, k, v = (rounded(_normal(rng, 2, 70, heads, dim)) for heads, dim in ((4, 80), (2, 80), (2, 64)))
        if not backward:
            return [q, k, v, *segments]
        out, lse = attention_forward(*(np.asarray(x) for x in (q, k, v)), *segments, **params)
        return [rounded(_normal(rng, *out.shape)), q, k, v, np.asarray(out), np.asarray(lse), *segments]

    reference = attention_backward if backward else attention_forward
    return Case(reference, arrays, params, wide=(5,) if backward else ())


_CAUSAL = dict(causal=True, window=None, scale=80**-0.5, blocks=(0, 0, 0))
_PACKED = dict(causal=True, window=None, scale=80**-0.5, blocks=(16, 48, 0))
_FULL = dict(causal=False, window=None, scale=80**-0.5, blocks=(0, 0, 0))
_BAND = dict(causal=False, window=9, scale=80**-0.5, blocks=(32, 16, 16))
_SIZES = np.array([5, 0, 17, 9], np.int32)
_GATE = dict(k=3, scoring="softmax", groups=1, groups_kept=1, renormalize=True, scale=1.0)
_GATE_BIASED = dict(k=4, scoring="sigmoid", groups=4, groups_kept=2, renormalize=True, scale=2.5)
_ADAM = dict(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)


def _logits(rng, rows=13, experts=16):
    """Distinct logits, exact in bfloat16: ties between experts are broken differently by each kernel."""
    return rng.permuted(np.tile(np.arange(experts) / 4 - 2, (rows, 1)), axis=1)


def _route(rng):
    destination = rng.permutation(26).astype(np.int32)
    return np.argsort(destination).astype(np.int32), destination.reshape(13, 2)


def _ids(rng):
    return rng.integers(-2, 21, (3, 11)).astype(np.int32)


CASES: dict[str, Case] = {
    "rms_norm": Case(rms_norm_forward, lambda r, _: [_normal(r, 3, 17, 96), _normal(r, 96)], {"eps": 1e-6}),
    "rms_norm_backward": Case(rms_norm_backward, _rms_backward, wide=(3,)),
    "layer_norm": Case(
        layer_norm_forward, lambda r, _: [_normal(r, 3, 17, 96) + 1, _normal(r, 96), _normal(r, 96)], {"eps": 1e-6}
    ),
    "layer_norm_backward": Case(layer_norm_backward, _layer_backward, wide=(3, 4)),
    "rotary": Case(rotary_forward, lambda r, _: [_normal(r, 2, 9, 3, 32), *_tables(r)], {"mode": "half"}, wide=(1, 2)),
    "rotary_backward": Case(
        rotary_backward, lambda r, _: [_normal(r, 2, 9, 3, 32), *_tables(r)], {"mode": "interleaved"}, wide=(1, 2)
    ),
    "swiglu": Case(swiglu_forward, lambda r, _: [_normal(r, 5, 64) * 3, _normal(r, 5, 64)]),
    "swiglu_backward": Case(
        swiglu_backward, lambda r, _: [_normal(r, 5, 64), _normal(r, 5, 64) * 3, _normal(r, 5, 64)]
    ),
    "swiglu_concatenated": Case(
        lambda both: swiglu_forward(*jnp.split(both, 2, -1)), lambda r, _: [_normal(r, 5, 128) * 3]
    ),
    "swiglu_concatenated_backward": Case(
        lambda g, both: jnp.concatenate(swiglu_backward(g, *jnp.split(both, 2, -1)), -1),
        lambda r, _: [_normal(r, 5, 64), _normal(r, 5, 128) * 3],
    ),
    "gelu": Case(gelu_forward, lambda r, _: [_normal(r, 5, 64) * 3], {"approximate": True}),
    "gelu_backward": Case(
        gelu_backward, lambda r, _: [_normal(r, 5, 64), _normal(r, 5, 64) * 3], {"approximate": False}
    ),
    "attention": _attention([], False, _CAUSAL),
    "attention_backward": _attention([], True, _BAND),
    "attention_segments": _attention(_segments(), False, _BAND),
    "attention_segments_backward": _attention(_segments(), True, _PACKED),
    "attention_packed": _attention([*_segments(), _LENGTHS.astype(np.int32)], False, _PACKED),
    "attention_packed_backward": _attention([*_segments(), _LENGTHS.astype(np.int32)], True, _PACKED),
    "attention_ring": _attention([*_parts(), *_PARTS], False, _FULL),
    "attention_ring_backward": _attention([*_parts(), *_PARTS], True, _FULL),
    "embedding": Case(embedding_forward, lambda r, _: [_normal(r, 19, 24), _ids(r)]),
    "embedding_backward": Case(embedding_backward, lambda r, _: [_normal(r, 3, 11, 24), _ids(r)], {"rows": 19}),
    "grouped_matmul": Case(moe.grouped_forward, lambda r, _: [_normal(r, 34, 48), _normal(r, 4, 48, 40), _SIZES]),
    "grouped_matmul_transposed": Case(
        lambda *a: moe.grouped_forward(*a, transpose=True),
        lambda r, _: [_normal(r, 34, 40), _normal(r, 4, 48, 40), _SIZES],
    ),
    "grouped_matmul_weight_gradient": Case(
        moe.grouped_weight_gradient, lambda r, _: [_normal(r, 34, 48), _normal(r, 34, 40), _SIZES]
    ),
    "moe_gating": Case(moe.gating_forward, lambda r, _: [_logits(r)], _GATE),
    "moe_gating_biased": Case(moe.gating_forward, lambda r, _: [_logits(r), _normal(r, 16)], _GATE_BIASED),
    "moe_permute": Case(moe.permute_forward, lambda r, _: [_normal(r, 13, 24), *_route(r)]),
    "moe_permute_backward": Case(moe.permute_backward, lambda r, _: [_normal(r, 26, 24), _route(r)[1]]),
    "moe_unpermute": Case(moe.unpermute_forward, lambda r, _: [_normal(r, 26, 24), _route(r)[1], r.random((13, 2))]),
    "moe_unpermute_backward": Case(
        moe.unpermute_backward, lambda r, _: [_normal(r, 13, 24), _normal(r, 26, 24), _route(r)[1], r.random((13, 2))]
    ),
    "adamw": Case(
        adamw_update,
        lambda r, _: [
            _normal(r, 7, 12),
            _normal(r, 7, 12),
            _normal(r, 7, 12) * 0.1,
            r.random((7, 12)),
            np.array(3.0),
            np.array(0.01),
            np.array(True),
        ],
        _ADAM,
        wide=(0, 2, 3, 4, 5),
    ),
}


def _on_host(name: str) -> int:
    """Count a kernel's last operands that are run lengths, which it reads on the host."""
    return 2 if name.startswith("attention_ring") else int(name.startswith("attention_packed"))


def inputs(name: str, dtype: str, device: str = "cpu", seed: int = 0) -> tuple[list[np.ndarray], list[torch.Tensor]]:
    """Return the operands in float64 (after rounding to `dtype`), and the same as tensors on the device."""
    rng, case = np.random.default_rng(seed), CASES[name]

    def rounded(x):
        return torch.from_numpy(np.ascontiguousarray(x)).to(DTYPES[dtype]).double().numpy()

    with jax.enable_x64(True):
        arrays = [np.asarray(x) for x in case.arrays(rng, rounded)]
    exact, tensors = [], []
    for i, x in enumerate(arrays):
        tensor = torch.from_numpy(np.array(x))
        if x.dtype == np.float64:
            tensor = tensor.to(torch.float32 if i in case.wide else DTYPES[dtype])
            x = tensor.double().numpy()
        exact.append(x)
        tensors.append(tensor if i >= len(arrays) - _on_host(name) else tensor.to(device))
    return exact, tensors


def difference(result: torch.Tensor, exact: np.ndarray) -> float:
    """Largest difference relative to the largest value; infinity if shapes or finiteness differ."""
    value = result.detach().cpu().double().numpy()
    if value.shape != exact.shape or not np.isfinite(value).all():
        return float("inf")
    return float(np.abs(value - exact).max(initial=0) / max(np.abs(exact).max(initial=0), 1e-30))


def measure(name: str, dtype: str, device: str = "cpu", equivalents: str | None = None, seed: int = 0) -> float:
    """Worst relative error of a kernel over its results.

    On device "npu" this is the fused call unless `equivalents` says otherwise.

    Raises:
      KeyError: unknown kernel or dtype.
    """
    case = CASES[name]
    exact, tensors = inputs(name, dtype, device, seed)
    with jax.enable_x64(True):
        wanted = case.reference(*(jax.numpy.asarray(x) for x in exact), **case.params)
    wanted = [np.asarray(x) for x in (wanted if isinstance(wanted, tuple) else (wanted,))]
    results = lookup(name, device, equivalents=equivalents)(*tensors, **case.params)
    if len(results) != len(wanted):
        return float("inf")
    return max(difference(result, value) for result, value in zip(results, wanted))


def measure_all(device: str = "cpu", equivalents: str | None = None) -> dict[str, dict[str, float]]:
    """Return kernel -> dtype -> error for every kernel of the table."""
    return {name: {dtype: measure(name, dtype, device, equivalents) for dtype in DTYPES} for name in KERNELS}
