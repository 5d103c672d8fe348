"""Unsupported programs are refused before anything runs, with all problems and the user's source lines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import npu_bridge
from npu_bridge import jaxcompat
from npu_bridge.errors import BridgeError, PlacementError, UnsupportedError, VersionError

X = np.ones((4, 8), np.float32)


def _refused(fn, *args, **options) -> str:
    with pytest.raises(UnsupportedError) as caught:
        npu_bridge.jit(fn, **options).lower(*args)
    return str(caught.value)


def test_all_problems_of_a_program_come_in_one_error_with_their_lines():
    def step(x):
        jax.debug.print("{}", x.sum())
        y = jax.pure_callback(lambda v: v, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return jax.lax.linalg.hessenberg(y @ y.T)

    text = _refused(step, X, device="npu")
    for word in ("debug", "pure_callback", "hessenberg"):
        assert word in text, text
    assert text.count("test_refusals.py:") >= 3, text
    assert "problems found" in text.splitlines()[0]


def test_uses_that_torch_has_no_form_for_are_refused_with_everything_else():
    def step(x, key):
        factors = jax.lax.linalg.hessenberg(x @ x.T)
        _, bits = jax.lax.rng_bit_generator(key, (4,), algorithm=jax.lax.RandomAlgorithm.RNG_THREE_FRY)
        space = x.reshape(1, 1, 4, 2, 2, 2)
        return jax.lax.conv_general_dilated(
            space, space[:, :, :2], (1,) * 4, "SAME", dimension_numbers=("NCABDE", "OIABDE", "NCABDE")
        ), (bits, factors)

    text = _refused(step, X, np.arange(4, dtype=np.uint32))
    for words in (
        "3 problems found",
        "4 spatial dimensions; torch has convolutions over up to 3",
        "algorithm THREE_FRY has no torch form",
    ):
        assert words in text, text
    assert text.count("test_refusals.py:") == 3, text


def test_what_torch_npu_has_no_operators_for_is_refused_there():
    def step(x):
        return jnp.linalg.cholesky(jnp.fft.fft(x).real @ x.T)

    text = _refused(step, X, device="npu")
    assert all(word in text for word in ("fft", "cholesky", "torch_npu has no such operator", "complex numbers")), text
    npu_bridge.jit(step).lower(X)


def test_a_problem_inside_a_scan_is_found():
    def step(x):
        def body(c, _):
            jax.debug.callback(lambda v: None, c)
            return c, None

        return jax.lax.scan(body, x, None, length=3)[0]

    assert "debug_callback" in _refused(step, X, device="cuda")


def test_64_bit_arguments_are_taken_as_32_bits_as_in_jax_without_x64():
    fn = npu_bridge.jit(lambda d, i: d["a"][i] * 2)
    for dtype, narrow in ((np.float64, np.float32), (np.int64, np.int32), (np.uint64, np.uint32)):
        made = fn({"a": np.arange(4, dtype=dtype)}, np.int64(3))
        assert made.dtype == narrow and made.item() == 6, made


def test_several_bad_arguments_are_named_together():
    text = _refused(lambda d, n: n, {"a": np.array(["x"]), "b": "text", "c": object()}, 3)
    assert "3 problems found" in text and "['b']: str is no array" in text and "static_argnums" in text


def test_dynamic_shapes_are_refused():
    from jax import export

    (n,) = export.symbolic_shape("n")
    text = _refused(lambda x: x * 2, jax.ShapeDtypeStruct((n, 4), np.float32))
    assert "dynamic shape" in text


def test_an_uneven_shard_is_refused_with_its_argument():
    text = _refused(lambda x: x * 2, np.ones((5, 4), np.float32), mesh={"x": 2}, in_shardings=(P("x"),))
    assert "argument 0: dimension 0 of (5, 4) cannot be split evenly over ('x',), 2 shards; pad it" in text


def test_an_axis_that_is_not_in_the_mesh_is_refused():
    assert "axes ['tensor'] are not in the mesh" in _refused(lambda x: x, X, mesh={"x": 2}, in_shardings=(P("tensor"),))


def test_an_unknown_custom_call_is_refused_by_name():
    def step(x):
        return jax.ffi.ffi_call("somebody_elses_kernel", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    assert "custom call 'somebody_elses_kernel'" in _refused(step, X)


def test_a_loop_that_depends_on_data_is_refused_unless_synchronisation_is_allowed():
    def step(x):
        return jax.lax.while_loop(lambda c: c.sum() < 100, lambda c: c * 2, x)

    text = _refused(step, X)
    assert "depends on data on the device" in text and "allow_host_sync=True" in text
    assert float(np.asarray(npu_bridge.jit(step, allow_host_sync=True)(X)).sum()) == 128.0


def test_a_mesh_larger_than_the_processes_is_refused_with_the_command_to_use(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(BridgeError, match="the mesh has 4 places, 1 process was started.*--nproc 4"):
        npu_bridge.jit(lambda x: x * 2, mesh={"x": 4}, in_shardings=(P("x"),))(X)


def test_a_donated_array_used_again_is_refused():
    double = npu_bridge.jit(lambda x: x * 2, donate_argnums=0)
    first = double(X)
    second = double(first)
    assert float(np.asarray(second)[0, 0]) == 4.0
    with pytest.raises(PlacementError, match="was donated to"):
        double(first)
    assert X[0, 0] == 1.0, "a donated numpy array must not be overwritten: it was copied in"


def test_donating_a_jax_array_leaves_the_jax_array_alone():
    x = jnp.ones((4, 8))
    npu_bridge.jit(lambda x: x + 1, donate_argnums=0)(x)
    assert float(x.sum()) == 32.0


def test_another_jax_version_is_refused_by_name():
    with pytest.raises(VersionError, match=r"jax 0\.12\.1 found, tested with 0\.10\.2 and looked up in 0\.11\.2"):
        jaxcompat.require_tested_version("0.12.1")
    with pytest.raises(VersionError, match=r"0\.11\.1 found"):
        jaxcompat.require_tested_version("0.11.1")


def test_a_jax_version_that_was_only_looked_up_is_accepted_with_a_word():
    jaxcompat.require_tested_version.cache_clear()
    with pytest.warns(UserWarning, match=r"jax 0.11.2 found. .* the tests ran with 0.10.2 only"):
        jaxcompat.require_tested_version("0.11.2")


def test_a_missing_device_is_refused():
    with pytest.raises(BridgeError, match="device 'tpu' unknown"):
        npu_bridge.jit(lambda x: x, device="tpu")(X)


def test_reading_a_split_array_on_one_rank_says_how_to_gather_it():
    import torch

    from npu_bridge.compiler.ir import MeshShape
    from npu_bridge.runtime.array import Array
    from npu_bridge.runtime.mesh import Runtime

    runtime = Runtime(MeshShape())
    runtime.mesh = MeshShape((("x", 2),))
    with pytest.raises(PlacementError, match="call .gather"):
        np.asarray(Array(torch.ones(2), (4,), np.float32, (("x",),), runtime))


def test_importing_the_package_and_its_operators_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import npu_bridge, npu_bridge.ops, npu_bridge.jaxcompat, sys; assert 'torch' not in sys.modules, 'torch "
        "was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
