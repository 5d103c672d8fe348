"""`jax.jit` semantics: dtypes, static and named arguments, arguments that stay unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P

import npu_bridge
from npu_bridge.errors import PlacementError

X = np.arange(8, dtype=np.float32).reshape(2, 4)


def _refused(call) -> str:
    with pytest.raises(npu_bridge.UnsupportedError) as caught:
        call()
    return str(caught.value)


def test_numbers_give_way_to_the_dtype_of_arrays_as_in_jax():
    def times(x, s):
        return x * s

    ours, x = npu_bridge.jit(times), jnp.ones(3, jnp.bfloat16)
    for s in (2.0, 3, jnp.asarray(2.0), jnp.asarray(2.0, jnp.float32), np.float32(2)):
        want, got = jax.jit(times)(x, s), ours(x, s)
        assert got.dtype == want.dtype, f"{type(s).__name__} {s}: {got.dtype}, jax has {want.dtype}"
    counted = npu_bridge.jit(lambda n: n + 1)
    first = counted(0)
    assert first.weak_type and ours(x, first).dtype == jnp.bfloat16, "a result keeps what jax knows of it"


def test_equal_static_arguments_of_different_types_are_different_programs():
    def either(x, n):
        return x * 3 if isinstance(n, bool) else x + n if isinstance(n, int) else x - n

    fn = npu_bridge.jit(either, static_argnums=1)
    for n in (1, True, 1.0, 1):
        assert np.array_equal(np.asarray(fn(X, n)), either(X, n)), f"{n!r}"
    with pytest.raises(TypeError, match="static argument of either cannot be hashed"):
        fn(X, [1])


def test_argument_numbers_count_from_the_end_as_well():
    fn = npu_bridge.jit(lambda x, shape: x.reshape(shape), static_argnums=-1)
    assert fn(X, (4, 2)).shape == (4, 2)
    fn = npu_bridge.jit(lambda x, y: (x * 2, y + 1), donate_argnums=-1)
    y = fn(X, X)[1]
    fn(X, y)
    assert y.is_deleted()


def test_arguments_may_be_given_by_name_where_no_sharding_is_asked_for():
    def scaled(x, *, scale, shift=0.0):
        return x * scale + shift

    fn = npu_bridge.jit(scaled)
    assert np.array_equal(np.asarray(fn(X, scale=np.float32(2))), X * 2)
    assert np.array_equal(np.asarray(fn(X, shift=np.float32(1), scale=np.float32(2))), X * 2 + 1)
    with pytest.raises(PlacementError, match="has in_shardings and was given scale by name"):
        npu_bridge.jit(scaled, mesh={"x": 1}, in_shardings=P()).lower(X, scale=np.float32(2))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32, np.uint32, np.uint16, np.uint8, np.bool_])
def test_results_go_to_torch_and_jax_by_dlpack_without_a_copy_in_their_own_dtype(dtype):
    x = npu_bridge.jit(lambda x: x[::-1])(np.array([[1, 0, 1]] * 2, dtype))
    for taken in (torch.from_dlpack(x), jnp.from_dlpack(x)):
        where = taken.data_ptr() if isinstance(taken, torch.Tensor) else taken.unsafe_buffer_pointer()
        assert where == x.local.data_ptr(), f"{type(taken).__name__} copied {np.dtype(dtype)}"
        assert str(taken.dtype).removeprefix("torch.") == np.dtype(dtype).name


def test_arrays_of_jax_numpy_and_torch_are_read_where_they_lie():
    fn = npu_bridge.jit(lambda x: x + 1)
    fn(X)
    ((compiled, _),) = fn._compiled.values()
    for x, where in (
        (X, X.ctypes.data),
        ((j := jnp.asarray(X)), j.unsafe_buffer_pointer()),
        ((t := torch.ones(2, 4)), t.data_ptr()),
    ):
        assert compiled._place(x, 0, ()).data_ptr() == where, f"{type(x).__name__} was copied"


def test_a_result_may_be_donated_without_touching_what_it_was_made_from():
    kept = npu_bridge.jit(lambda x: (x, x, x.reshape(-1), jnp.broadcast_to(x[0], (3, 4))))
    overwrite = npu_bridge.jit(lambda x: x * 0 - 1, donate_argnums=0)
    mine = jnp.asarray(X)
    results = kept(mine)
    for n, r in enumerate(results):
        before = [np.array(other) for other in results[n + 1 :]]
        assert float(np.asarray(overwrite(r)).max()) == -1
        assert np.array_equal(np.asarray(mine), X), f"result {n}: the array of jax that was passed changed"
        assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(before, results[n + 1 :])), (
            f"result {n} shares its memory with a later one"
        )


def test_arguments_of_dtypes_without_storage_and_shardings_without_a_mesh_are_named():
    text = _refused(
        lambda: npu_bridge.jit(lambda d: d).lower(
            {"a": np.array(["x"]), "b": np.array([object()]), "c": np.array([None])}
        )
    )
    assert "3 problems" in text and all(f"argument 0['{k}']: " in text for k in "abc"), text
    assert "('x',) without a mesh; pass mesh=" in _refused(
        lambda: npu_bridge.jit(lambda x: x, in_shardings=P("x")).lower(X)
    )
    text = _refused(lambda: npu_bridge.jit(lambda x: x, mesh={"x": 2}, in_shardings=P(None, None, "x")).lower(X))
    assert "names dimension 2, the array has shape (2, 4)" in text, text


def test_a_problem_that_only_the_lowered_program_shows_names_the_function():
    def halved(x):
        return jax.ffi.ffi_call("a_kernel_of_xla", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    text = _refused(lambda: npu_bridge.jit(halved, mesh={"x": 2}, in_shardings=P()).lower(X))
    assert "cannot lower halved" in text and "a_kernel_of_xla" in text and "test_like_jit.py:" in text, text


def test_it_decorates_functions_and_methods_with_and_without_options():
    @npu_bridge.jit
    def plain(x):
        """Twice."""
        return x * 2

    @npu_bridge.jit(static_argnames=("n", "kind"), donate_argnames="x")
    def powered(x, n, *, kind="sum"):
        return getattr(jnp, kind)(x**n)

    class Model:
        w = 3.0

        @npu_bridge.jit(static_argnums=0)
        def scaled(self, x):
            return x * self.w

    assert plain.__doc__ == "Twice." and np.array_equal(np.asarray(plain(X)), X * 2)
    for call in range(3):
        assert powered(X + call, 2).item() == float(((X + call) ** 2).sum())
        assert powered(X + call, n=3, kind="max").item() == float(((X + call) ** 3).max())
    assert np.array_equal(np.asarray(Model().scaled(X)), X * 3)


def test_under_transformations_it_is_a_part_of_what_is_traced():
    inner = npu_bridge.jit(lambda x, n: jnp.sin(x) ** n, static_argnames="n")

    def loss(x):
        return inner(x, n=2).sum()

    assert np.allclose(jax.grad(loss)(X), 2 * np.sin(X) * np.cos(X), atol=1e-6)
    assert np.allclose(jax.vmap(lambda x: inner(x, n=2))(X), np.sin(X) ** 2, atol=1e-6)
    assert np.allclose(jax.grad(jax.checkpoint(loss))(X), 2 * np.sin(X) * np.cos(X), atol=1e-6)
    outer = npu_bridge.jit(jax.value_and_grad(loss))
    text = outer.lower(X).as_text()
    assert ".sin" in text and ".cos" in text, "the inner function is a part of the outer program\n" + text
    assert np.allclose(np.asarray(outer(X)[1]), 2 * np.sin(X) * np.cos(X), atol=1e-6)


def test_unused_arguments_are_kept_when_asked_for():
    for keep in (False, True):
        fn = npu_bridge.jit(lambda x, y: x * 2, keep_unused=keep)
        assert fn.lower(X, X).traced.kept == ([0, 1] if keep else [0])
        assert np.array_equal(np.asarray(fn(X, X)), X * 2)


def test_a_script_of_jax_jit_runs_through_the_bridge_unchanged():
    real = jax.jit
    with npu_bridge.use("cpu"):

        @jax.jit
        def step(w, x):
            def loss(w):
                return ((x @ w - 1) ** 2).mean()

            value, gradient = jax.value_and_grad(loss)(w)
            return w - 0.01 * gradient, value

        predict = jax.jit(lambda w, x, scale: x @ w * scale, static_argnames="scale")
        w, losses = jnp.ones(4), []
        for _ in range(3):
            w, loss = step(w, X)
            losses.append(float(loss))
            assert isinstance(w, npu_bridge.Array)
        made = predict(w, X, scale=2)
        # What a script does with results between steps.
        assert float((made + 1).sum()) == pytest.approx(float(np.asarray(made).sum() + 2), rel=1e-6)
        assert made[0].shape == () and len(made) == 2 and jnp.stack([made, made]).shape == (2, 2) and made.mean() < 1e9
    assert jax.jit is real
    v, want = jnp.ones(4), []
    plain = real(
        lambda w, x: (lambda value, g: (w - 0.01 * g, value))(
            *jax.value_and_grad(lambda w: ((x @ w - 1) ** 2).mean())(w)
        )
    )
    for _ in range(3):
        v, loss = plain(v, X)
        want.append(float(loss))
    assert np.allclose(losses, want, rtol=1e-6), (losses, want)


def test_an_error_of_torch_names_the_line_of_the_jax_program(monkeypatch):
    from npu_bridge.runtime import tensor_ops

    def fails(*args, **options):
        raise RuntimeError("out of memory")

    fn = npu_bridge.jit(lambda x: jnp.sort(x) * 2)
    fn(X)
    monkeypatch.setattr(tensor_ops, "math_sort", fails)
    with pytest.raises(RuntimeError) as caught:
        fn(X)
    assert "test_like_jit.py:" in caught.value.__notes__[0], caught.value.__notes__
