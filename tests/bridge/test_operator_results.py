"""Shapes and dtypes that operators tell instead of being traced for them."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from npu_bridge.jaxcompat import CALL_PREFIX, OPERATORS, define_operator
from npu_bridge.kernels.check import CASES, inputs


def _types(results):
    return [
        (tuple(r.shape), jnp.dtype(r.dtype)) for r in (results if isinstance(results, (tuple, list)) else (results,))
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_an_operator_tells_of_its_results_is_what_its_reference_makes(dtype):
    wrong, told = {}, 0
    for name, case in CASES.items():
        tell = OPERATORS.get(CALL_PREFIX + name, {}).get("results")
        if tell is None:
            continue
        told += 1
        operands = [
            jax.ShapeDtypeStruct(tuple(t.shape), jnp.dtype(str(t.dtype).removeprefix("torch.")))
            for t in inputs(name, dtype)[1]
        ]
        said, made = (
            _types(tell(*operands, **case.params)),
            _types(jax.eval_shape(partial(case.reference, **case.params), *operands)),
        )
        if said != made:
            wrong[name] = (said, made)
    assert not wrong, f"told and made: {wrong}"
    assert told >= 16, f"{told} operators tell their results"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cross_entropy_tells_its_results_too(dtype):
    def like(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    entropy = importlib.import_module("npu_bridge.ops.cross_entropy")  # the package has the function of that name
    hidden, head, ids, weights, lse = (
        like(2, 6, 8),
        like(8, 11, dtype=jnp.float32),
        like(2, 6, dtype=jnp.int32),
        like(2, 6),
        like(2, 6, dtype=jnp.float32),
    )
    for operator, reference, operands in (
        (entropy._forward, entropy.cross_entropy_forward, (hidden, head, ids, weights)),
        (entropy._backward, entropy.cross_entropy_backward, (lse, hidden, head, ids, weights, lse)),
    ):
        said, made = (_types(jax.eval_shape(partial(f, chunk=4), *operands)) for f in (operator, reference))
        assert said == made, f"told {said}, made {made}"


def test_without_a_word_the_reference_is_traced_once_for_each_set_of_shapes():
    traced = []

    def twice(x, *, by):
        traced.append(x.shape)
        return x * by

    operator = define_operator("test_traced_once", reference=twice, rule="... -> ...")
    for shape in ((2, 3), (2, 3), (4,), (2, 3)):
        made = jax.eval_shape(partial(operator, by=2.0), jax.ShapeDtypeStruct(shape, jnp.float32))
        assert made[0].shape == shape
    assert traced == [(2, 3), (4,)], traced
    jax.eval_shape(partial(operator, by=3.0), jax.ShapeDtypeStruct((4,), jnp.float32))
    assert len(traced) == 3, "another parameter is another trace"


def test_a_parameter_that_is_no_literal_is_refused_with_its_name():
    operator = define_operator("test_literals", reference=lambda x, by: x, rule="... -> ...")
    x = jax.ShapeDtypeStruct((2,), jnp.float32)
    for value in (1, 2.5, "a", None, (1, (2, "b")), True):
        jax.eval_shape(partial(operator, by=value), x)
    for value in (float("inf"), [1], jnp.float32(1), (1, [2]), jnp.int32):
        with pytest.raises(TypeError, match="operator 'test_literals': parameter 'by' is"):
            jax.eval_shape(partial(operator, by=value), x)
