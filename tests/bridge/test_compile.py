"""Programs handed to torch.compile: refused where that cannot work, equal to XLA where it does."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import npu_bridge
from npu_bridge.errors import UnsupportedError

R = np.random.RandomState(0)


def f32(*shape):
    return R.uniform(-1, 1, shape).astype(np.float32)


def test_everything_that_stands_against_compiling_is_said_at_once():
    with pytest.raises(UnsupportedError) as raised:
        npu_bridge.jit(lambda x: x, mesh={"x": 4}, device="npu", compile=True)
    assert "captured in one NPU graph" in str(raised.value) and "a mesh of 4 devices" in str(raised.value)
    npu_bridge.jit(lambda x: x, mesh={"x": 1}, device="cuda", compile=True)


@pytest.mark.parametrize("cxx", [None, "no-such-compiler"])
def test_a_missing_compiler_is_named_before_anything_runs(monkeypatch, tmp_path, cxx):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", cxx) if cxx else monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        UnsupportedError, match=r"needs a C\+\+ compiler, none of " + (cxx or r"g\+\+, clang\+\+, c\+\+")
    ):
        npu_bridge.jit(lambda x: x, compile=True)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch's compiler writes C++ for the CPU, and there is no g++")
def test_a_compiled_step_equals_xla_and_updates_its_state_in_place(monkeypatch, tmp_path):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # Two thirds of a first compilation go into headers compiled ahead and into trying out vector instructions, once a
    # cache.
    monkeypatch.setattr(config, "cpp_cache_precompile_headers", False)
    monkeypatch.setattr(config, "compile_threads", 1)
    monkeypatch.setattr(config.cpp, "vec_isa_ok", True)

    def step(w, x):
        def loss(w):
            return (jax.nn.softmax(jnp.tanh(x @ w)) ** 2).sum()

        value, gradient = jax.value_and_grad(loss)(w)
        return w - 0.1 * gradient, value

    w, x = f32(16, 8), f32(4, 16)
    plain, fast = jax.jit(step), npu_bridge.jit(step, donate_argnums=0, compile=True)
    ours, theirs, places = w, w, set()
    for _ in range(3):
        (ours, mine), (theirs, want) = fast(ours, x), plain(theirs, x)
        places.add(ours.local.data_ptr())
        assert abs(float(mine) - float(want)) < 1e-5, f"{float(mine)} against {float(want)}"
    difference = np.abs(np.asarray(ours) - np.asarray(theirs)).max()
    assert difference < 1e-5, f"largest difference {difference:.2e} after three steps"  # float32, sums of 16 terms
    assert len(places) == 1, "the state moved to other storage"
    ((compiled, _),) = fast._compiled.values()
    assert compiled.execution == "torch.compile"
