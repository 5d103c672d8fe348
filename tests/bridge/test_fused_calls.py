"""Programs for npu where torch_npu's fused calls differ from the bridge's operators; run here on the kernels'
equivalents.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import npu_bridge
from npu_bridge import ops
from npu_bridge.runtime.api import Compiled
from tests.bridge.harness import CALLS, fresh_arguments

R = np.random.RandomState(0)
B, T, N, H, F = 2, 12, 2, 8, 24
D = N * H


def written(fn, *args):
    """The program for npu, after its results on the CPU were found equal to XLA's."""
    lowered = npu_bridge.jit(fn, device="npu").lower(*args)
    program, theirs = Compiled(lowered, "cpu"), jax.jit(fn)
    for call in range(CALLS):
        now = fresh_arguments(args, call)
        for a, b in zip(jax.tree.leaves(theirs(*now)), program(jax.tree.leaves(now)), strict=True):
            difference = np.abs(np.asarray(a, np.float64) - np.asarray(b)).max() / max(1, np.abs(a).max())
            assert difference <= 2e-6, (
                f"call {call}: largest difference {difference:.2e}"
            )  # float32 of both sides, sums of up to some hundred terms
    return lowered.as_text()


def normal(*shape):
    return (R.standard_normal(shape) / 4).astype(np.float32)


LENGTHS = np.array([[5, 4, -1], [12, -1, -1]], np.int32)
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12], np.int32)


def layer(x, p, cos, sin, segments, lengths, mode):
    def heads(y):
        return y.reshape(B, T, N, H)

    q, k, v = (heads(ops.linear(x, p[name], p[name + "_bias"])) for name in "qkv")
    q, k = ops.rotary(q, cos, sin, mode=mode), ops.rotary(k, cos, sin, mode=mode)
    out = ops.attention(q, k, v, causal=True, segment_ids_q=segments, lengths=lengths)
    x = x + ops.linear(out.reshape(B, T, D), p["output"])
    return x + ops.linear(ops.swiglu(ops.linear(x, p["gate"]), ops.linear(x, p["up"])), p["down"])


def stack(layers):
    shapes = {"q": (D, D), "k": (D, D), "v": (D, D), "output": (D, D), "gate": (D, F), "up": (D, F), "down": (F, D)}
    return {name: normal(layers, *shape) for name, shape in shapes.items()} | {
        f"{name}_bias": normal(layers, D) for name in "qkv"
    }


def training(mode, unroll):
    def loss(p, x, cos, sin, segments, lengths):
        def step(x, p):
            return (layer(x, p, cos, sin, segments, lengths, mode), None)

        return (lax.scan(step, x, p, unroll=unroll)[0] * (segments > 0)[..., None]).sum()

    return jax.value_and_grad(loss, argnums=(0, 1))


@pytest.mark.parametrize("mode", ["half", "interleaved"])
def test_layers_share_turned_tables_and_concatenate_once_and_keep_the_kernels_statistics(mode):
    angles = normal(B, T, H) * 9
    text = written(training(mode, True), stack(2), normal(B, T, D), np.cos(angles), np.sin(angles), SEGMENTS, LENGTHS)
    assert (
        text.count("kernel.rotary(") == 8 and "rotary_backward" not in text and len(re.findall(r"\.neg_?\(", text)) == 1
    ), text
    gate_and_up = re.findall(rf"torch.cat\(.*f32\[{B},{T},{2 * F}\]", text)
    assert len(gate_and_up) == text.count("swiglu_concatenated(") == text.count("swiglu_concatenated_backward(") == 2, (
        text
    )
    assert text.count("statistics=True") == 4, "two layers, forward and backward"
    assert text.count("torch.addmm(") == 6, "three biased products a layer"


def test_layers_in_a_loop_stack_one_number_a_query_and_find_their_tables_turned():
    angles = normal(B, T, H) * 9
    text = written(
        training("half", False), stack(2), normal(B, T, D), np.cos(angles), np.sin(angles), SEGMENTS, LENGTHS
    )
    assert "for i" in text and "statistics=True" not in text, text
    (turned,) = re.findall(r"^( *)v\d+ = v\d+\.neg_?\(", text, re.MULTILINE)
    assert turned == " " * 4, "before the loop\n" + text


def test_a_loop_keeps_what_changes_and_what_would_grow():
    def fn(x, table):
        def body(i, x):
            return x * jnp.tanh(table)[i] + (table[None] * jnp.ones((5, 1, 1))).sum() + jnp.tanh(x)

        return lax.fori_loop(0, 3, body, x)

    text = written(fn, normal(4), normal(3, 4))
    before, _, inside = text.partition("for i")
    assert before.count(".tanh") == inside.count(".tanh") == 1 and "expand((5, 3, 4))" in inside, text


def test_only_a_vector_along_the_last_dim_of_a_product_that_nobody_else_reads_is_its_bias():
    square = normal(6, 6), normal(6, 6), normal(6)
    assert "torch.addmm(" in written(lambda x, w, b: b + x @ w, *square)
    assert "torch.addmm(" not in written(lambda x, w, b: b[:, None] + x @ w, *square)
    assert "torch.addmm(" not in written(lambda x, w, b: (x @ w + b, x @ w), *square)
    assert "torch.addmm(" not in written(lambda x, w, b: x @ w + w, *square)
    assert "torch.addmm(" not in written(
        lambda x, w: jnp.einsum("bij,bjk->bik", x, w) + w[0, 0], normal(3, 6, 6), normal(3, 6, 6)
    )


def test_the_cpu_keeps_the_operators_as_they_are():
    args = normal(4, 6), normal(6, 6), normal(6)
    assert "addmm" not in npu_bridge.jit(lambda x, w, b: ops.swiglu(x @ w + b, x)).lower(*args).as_text()
