"""Back ends that compile and execute a run's programs: XLA, or torch through npu_bridge.

With npu_bridge JAX still holds the host side of a run: parameters are made, restored and saved as JAX arrays, whose
shards lie where the bridge's do, because process r of the job is device r of the mesh in both. The state moves without
network copies: to torch at the first step of a phase, back to JAX for a checkpoint, the next phase or an evaluation.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import jax
from jax.sharding import Mesh

from mindvl_jax.config.schema import Config
from mindvl_jax.core.compiled import cache_folder
from mindvl_jax.core.errors import UserError
from mindvl_jax.training.bridge_backend import Bridge
from mindvl_jax.training.xla_backend import Xla

Tree = TypeVar("Tree")


class Backend(Protocol):
    """Interface of a back end for the trainer.

    Attributes:
      in_flight: steps that may be dispatched and not fetched yet while the next is prepared; 0 where a call returns
        when it is done.
    """

    in_flight: int

    def join(self) -> None:
        """Join the other processes of the run; before the first use of a device. UserError when that cannot be."""

    def devices(self) -> Sequence[jax.Device] | None:
        """Devices that the mesh is made of, in order; None: all that JAX sees."""

    def compile(
        self,
        function: Callable,
        *,
        mesh: Mesh,
        in_shardings: Any,
        out_shardings: Any,
        donate_argnums: tuple[int, ...] = (),
    ) -> Callable:
        """Compile a pure function of pytrees; what it returns is taken by every other program of the back end."""

    def as_jax(self, tree: Tree, shardings: Any) -> Tree:
        """Copy this back end's arrays into JAX arrays of these shardings, which later steps do not overwrite."""

    def precision(self) -> contextlib.AbstractContextManager:
        """In force while programs are traced and run: the precision of products (`model.matmul_precision`)."""

    def device_kind(self, mesh: Mesh) -> str:
        """Name of the device that computes, as its maker writes it."""


def make_backend(config: Config) -> Backend:
    if config.backend == "xla":
        return Xla(config)
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            "backend=npu_bridge runs torch programs, and torch is not installed here; install it: pip "
            "install 'mindvl-jax[bridge]' (on NPUs 'mindvl-jax[npu]'), or set backend=xla"
        )
    return Bridge(config)


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that a resumed run starts in seconds.

    JAX's own setting (JAX_COMPILATION_CACHE_DIR) wins where it is given; its key covers program, compiler, flags and
    device.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
