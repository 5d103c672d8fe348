"""The torch equivalents against the JAX references, one test for each kernel of the table."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from npu_bridge import jaxcompat, kernels, ops
from npu_bridge.kernels import attention_cpu, check, registry


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", check.DTYPES)
@pytest.mark.parametrize("name", sorted(kernels.KERNELS))
def test_the_equivalent_is_within_its_tolerance_of_the_formula_in_float64(name, dtype):
    error, bound = check.measure(name, dtype, equivalents="all"), kernels.KERNELS[name].tolerance[dtype]
    assert error <= bound, f"{name} {dtype}: error {error:.2e}, tolerance {bound:.1e}"


@pytest.mark.parametrize("dtype", check.DTYPES)
@pytest.mark.parametrize("name", sorted(name for name, kernel in kernels.KERNELS.items() if kernel.cpu is not None))
def test_the_fused_form_of_a_cpu_is_within_its_tolerance_of_the_formula_in_float64(name, dtype):
    assert kernels.lookup(name, "cpu") is kernels.KERNELS[name].cpu
    error, bound = check.measure(name, dtype), kernels.KERNELS[name].tolerance[dtype]
    assert error <= bound, f"{name} {dtype}: error {error:.2e}, tolerance {bound:.1e}"


def test_the_fused_form_of_a_cpu_is_in_force_wherever_torch_has_it():
    # Its operators are torch's internal names: a release that drops them must show here, not as a slower step.
    q, k = torch.randn(1, 8, 4, 16), torch.randn(1, 8, 2, 16)
    assert attention_cpu._fits(q, k)
    assert not attention_cpu._fits(q, k[..., :8]), "torch wants one head dim"


def test_every_operator_has_a_kernel_and_every_kernel_an_operator_and_a_check():
    defined = {name.removeprefix("npu_bridge.") for name in jaxcompat.OPERATORS}
    # What a pass writes in place of operators, for npu alone; tests/bridge/test_fused_calls.py sees it called.
    of_passes = {"swiglu_concatenated", "swiglu_concatenated_backward"}
    assert set(kernels.KERNELS) - of_passes <= defined, (
        f"kernels nobody calls: {sorted(set(kernels.KERNELS) - of_passes - defined)}"
    )
    assert set(kernels.KERNELS) == set(check.CASES), (
        f"checks and kernels differ: {sorted(set(kernels.KERNELS) ^ set(check.CASES))}"
    )
    called = set()
    for program in programs_of_every_operator():
        called |= {
            line.split("@npu_bridge.")[1].split("(")[0]
            for line in program.splitlines()
            if "custom_call @npu_bridge." in line
        }
    called = {name for name in called if not name.startswith("math.")}
    of_operators = set(kernels.KERNELS) - of_passes
    assert called == of_operators, f"operators without kernel or the reverse: {sorted(called ^ of_operators)}"


def programs_of_every_operator():
    """StableHLO for platform npu of the value and gradient of everything in npu_bridge.ops."""
    r = np.random.default_rng(0)

    def f(*shape):
        return jnp.asarray(r.standard_normal(shape), jnp.bfloat16)

    ids, lengths, q, kv = jnp.ones((2, 6), jnp.int32), jnp.full((2, 3), -1, jnp.int32), f(2, 6, 4, 8), f(2, 6, 2, 8)

    def mixture(x, w):
        weights, experts = ops.moe_gating(x, k=2, renormalize=True)
        rows, sizes, destination = ops.moe_permute(x, experts, num_experts=4)
        return ops.moe_unpermute(ops.grouped_matmul(rows, w, sizes), destination, weights)

    def adamw(p):
        return ops.fused_adamw(p, p, p, p, step=1, learning_rate=1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)

    for function, *arrays in (
        (lambda x, s: ops.rms_norm(x, s, eps=1e-6), f(2, 6, 8), f(8)),
        (lambda x, s, b: ops.layer_norm(x, s, b, eps=1e-6), f(2, 6, 8), f(8), f(8)),
        (ops.rotary, q, f(2, 6, 8), f(2, 6, 8)),
        (ops.swiglu, f(3, 8), f(3, 8)),
        (lambda x: ops.gelu(x, approximate=True), f(3, 8)),
        (lambda q, k: ops.attention(q, k, k, causal=True), q, kv),
        (lambda q, k: ops.attention(q, k, k, causal=True, segment_ids_q=ids), q, kv),
        (lambda q, k: ops.attention(q, k, k, causal=True, segment_ids_q=ids, lengths=lengths), q, kv),
        (
            lambda q, k: ops.attention(q, k, k, causal=False, segment_ids_q=ids, lengths=lengths, lengths_kv=lengths),
            q,
            kv,
        ),
        (lambda t: ops.embedding(t, ids), f(5, 8)),
        (mixture, f(6, 4), f(4, 4, 8)),
        (lambda x, b: ops.moe_gating(x, k=2, bias=b, renormalize=True)[0], f(6, 4), f(4)),
    ):

        def value_and_gradient(*arrays, function=function):
            return jax.vjp(function, *arrays)[1](function(*arrays))

        yield jax.jit(value_and_gradient).trace(*arrays).lower(lowering_platforms=("npu",)).as_text()
    yield jax.jit(adamw).trace(jnp.ones((3, 4))).lower(lowering_platforms=("npu",)).as_text()


def test_on_npu_a_bfloat16_layer_asks_for_a_bfloat16_product_and_leaves_no_branch():
    x, w = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5), jnp.bfloat16)
    for platform, wanted in (("npu", "tensor<2x3x5xbf16>"), ("cpu", "tensor<2x3x5xf32>")):
        text = jax.jit(ops.linear).trace(x, w).lower(lowering_platforms=(platform,)).as_text()
        product = next(line for line in text.splitlines() if "dot_general" in line)
        assert product.endswith(wanted) and "case" not in text, text


@pytest.mark.parametrize("device", ["cpu", "npu:0"])
def test_the_switch_sends_a_family_to_its_equivalents(device, monkeypatch):
    monkeypatch.setattr(registry, "torch_npu", lambda: None)
    fused, equivalent = kernels.KERNELS["rms_norm"].npu, kernels.KERNELS["rms_norm"].equivalent
    assert kernels.lookup("npu_bridge.rms_norm", device) is (equivalent if device == "cpu" else fused)
    monkeypatch.setenv(registry.SWITCH, "swiglu, rms_norm")
    assert kernels.lookup("npu_bridge.rms_norm", device) is equivalent
    assert kernels.lookup("npu_bridge.rms_norm", "npu", equivalents="swiglu") is fused
    assert kernels.lookup("npu_bridge.rms_norm", "npu", equivalents="all") is equivalent


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(KeyError, match="no kernel 'npu_bridge.rms_nrm'; registered: adamw, attention"):
        kernels.lookup("npu_bridge.rms_nrm", "cpu")
    with pytest.raises(ValueError, match="names swigloo; known families: all, adamw, attention"):
        kernels.lookup("rms_norm", "npu", equivalents="swigloo")


def test_device_npu_without_torch_npu_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(ImportError, match="choose device 'cpu' or 'cuda'"):
        kernels.lookup("rms_norm", "npu")


def test_the_operators_import_no_torch():
    code = (
        "import sys, npu_bridge, npu_bridge.ops; sys.exit(any(m.split('.')[0] in ('torch', 'torch_npu') for m in "
        "sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0, "npu_bridge.ops pulled torch in"


def test_a_shard_of_the_vocabulary_answers_for_its_own_rows_and_the_shards_add_up():
    whole, numbers = check.inputs("embedding", "float32")[1]
    kernel, backward = kernels.KERNELS["embedding"].equivalent, kernels.KERNELS["embedding_backward"].equivalent
    parts = sum(kernel(whole[a:b], numbers, first=a)[0] for a, b in ((0, 8), (8, 19)))
    assert torch.equal(parts, kernel(whole, numbers)[0])
    g = torch.randn(*numbers.shape, 24, generator=torch.Generator().manual_seed(0))
    stacked = torch.cat([backward(g, numbers, rows=b - a, first=a)[0] for a, b in ((0, 8), (8, 19))])
    assert torch.equal(stacked, backward(g, numbers, rows=19)[0])


ADAMW = [kernels.KERNELS["adamw"].equivalent, kernels.KERNELS["adamw"].cpu, kernels.KERNELS["adamw"].npu]


@pytest.mark.parametrize("function", ADAMW, ids=["equivalent", "cpu", "npu"])
def test_an_adamw_update_that_is_not_kept_changes_no_bit_whatever_the_gradient(function):
    _, (param, grad, mu, nu, step, rate, _) = check.inputs("adamw", "float32")
    grad = torch.full_like(grad, float("nan"))
    grad[0] = float("inf")
    before = [x.clone() for x in (param, mu, nu)]
    for inplace in (False, True):
        after = function(
            param, grad, mu, nu, step, rate, torch.tensor(False), **check.CASES["adamw"].params, inplace=inplace
        )
        assert all(torch.equal(a, b) for a, b in zip(after, before))


@pytest.mark.parametrize("function", ADAMW, ids=["equivalent", "cpu", "npu"])
def test_adamw_in_place_writes_the_tensors_it_was_given(function):
    _, tensors = check.inputs("adamw", "float32")
    params = check.CASES["adamw"].params
    fresh = function(*tensors, **params)
    param, _, mu, nu = tensors[:4]
    written = function(*tensors, **params, inplace=True)
    assert [w.data_ptr() for w in written] == [x.data_ptr() for x in (param, mu, nu)]
    assert all(torch.equal(a, b) for a, b in zip(fresh, written))


def test_a_large_parameter_is_updated_piece_by_piece_on_npu(monkeypatch):
    _, tensors = check.inputs("adamw", "float32")
    params = check.CASES["adamw"].params
    want = kernels.KERNELS["adamw"].equivalent(*tensors, **params)
    calls, update = [], torch._fused_adamw_
    monkeypatch.setattr(
        torch,
        "_fused_adamw_",
        lambda parameters, *rest, **options: (
            calls.append(parameters[0].numel()) or update(parameters, *rest, **options)
        ),
    )
    size = tensors[0].numel()
    monkeypatch.setattr("npu_bridge.kernels.optimizer.LARGEST_PIECE", size // 3 + 1)
    got = kernels.KERNELS["adamw"].npu(*tensors, **params, inplace=True)
    assert (
        len(calls) == 3
        and sum(calls) == size
        and [x.data_ptr() for x in got] == [tensors[i].data_ptr() for i in (0, 2, 3)]
    )
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # the same formula in another order
