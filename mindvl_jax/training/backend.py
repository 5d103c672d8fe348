"""Where a pure program of (state, batch) pytrees is compiled: XLA, or a torch program through npu_bridge."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
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


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that a resumed run starts in seconds.

    JAX's own setting (JAX_COMPILATION_CACHE_DIR) wins where it is given; its key covers program, compiler, flags and device.
    """
    if jax.config.jax_compilation_cache_dir is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "mindvl_jax" / "xla"))
