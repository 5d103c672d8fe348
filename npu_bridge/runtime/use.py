"""`npu_bridge.use`: run the `jax.jit` calls of an unchanged script through the bridge."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from npu_bridge.errors import UnsupportedError
from npu_bridge.runtime.api import jit

_FOR_XLA = frozenset({"inline", "compiler_options", "abstracted_axes"})  # options without a meaning here


class use:
    """Replace `jax.jit` by `npu_bridge.jit`, from here on or inside a ``with``. Functions jitted earlier stay on XLA.

    Results are `npu_bridge.Array`s, which jax.numpy and Python's operators read as arrays. Functions traced inside
    another jitted function, `jax.vmap` or `jax.grad` are inlined. Only the name `jax.jit` is replaced: jax's own
    functions outside of a jit run on XLA.

    Args:
      device: "npu", "cuda" or "cpu".
      options: further keywords of `npu_bridge.jit` for every function, such as ``allow_host_sync``.
    """

    def __init__(self, device: str = "cpu", **options: Any):
        self._before = jax.jit
        options |= {"device": device}

        @functools.wraps(self._before)
        def jitted(fun: Callable[..., Any] | None = None, /, **given: Any) -> Any:
            if fun is None:
                return functools.partial(jitted, **given)
            return jit(fun, **_translated(fun, given), **options)

        jax.jit = jitted

    def stop(self) -> None:
        """Restore `jax.jit`."""
        jax.jit = self._before

    def __enter__(self) -> use:
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop()


def _translated(fun: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """jax.jit's keywords as the bridge's. Raises UnsupportedError for a device or back end of XLA's."""
    given = {k: v for k, v in given.items() if v is not None and k not in _FOR_XLA}
    chosen = [k for k in ("device", "backend") if k in given]
    if chosen:
        raise UnsupportedError(
            [f"jax.jit({k}={given[k]!r}): npu_bridge.use has chosen the device" for k in chosen],
            getattr(fun, "__name__", "this function"),
        )
    meshes: list[Mesh] = [
        s.mesh
        for k in ("in_shardings", "out_shardings")
        for s in jax.tree.leaves(given.get(k))
        if isinstance(s, NamedSharding)
    ]
    if not meshes:  # shardings of one device say nothing here
        return {k: v for k, v in given.items() if k not in ("in_shardings", "out_shardings")}
    return given | {"mesh": meshes[0]}
