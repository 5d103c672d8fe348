"""Where a pure program of (state, batch) pytrees is compiled: XLA, or a torch program through npu_bridge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from mindvl_jax.config import Config
from mindvl_jax.errors import UserError


def compiler(config: Config) -> Callable[..., Callable]:
    """The function `compile(function, in_shardings=, out_shardings=, donate_argnums=)` of the configured backend.

    Raises:
      UserError: the backend cannot run a training step.
    """
    if config.backend == "xla":
        return compile_xla
    raise UserError(
        f"backend: {config.backend} (bridge.device={config.bridge.device}) cannot run the training step yet; "
        "use `backend: xla`, or npu_bridge directly for a program of your own"
    )


def compile_xla(function: Callable, *, in_shardings: Any, out_shardings: Any, donate_argnums: tuple[int, ...] = ()) -> Callable:
    return jax.jit(function, in_shardings=in_shardings, out_shardings=out_shardings, donate_argnums=donate_argnums)
