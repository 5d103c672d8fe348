"""Where the pure programs of a run are compiled and executed: XLA, or torch programs through npu_bridge.

With npu_bridge JAX still holds the host side of a run: parameters are made, restored and saved as JAX arrays, whose
shards lie where the bridge's do, because process r of the job is device r of the mesh in both. A state changes hands
without a copy over the
network: into torch at the first step of a phase, back into JAX for a checkpoint, the next phase or an evaluation.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
from jax.sharding import Mesh

from mindvl_jax.config.schema import Config, ModelConfig
from mindvl_jax.core import processor
from mindvl_jax.core.compiled import cache_folder
from mindvl_jax.core.errors import UserError
from mindvl_jax.parallel import distributed
from mindvl_jax.parallel.activations import Placement, tracing

Tree = TypeVar("Tree")


class Backend(Protocol):
    """What the trainer asks of a back end.

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
        """Arrays of this back end as JAX arrays of these shardings, which later steps do not overwrite."""

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
    from mindvl_jax.training.bridge_backend import Bridge

    return Bridge(config)


class Xla:
    """jax.jit."""

    in_flight = 1

    def __init__(self, config: Config):
        self._config = config

    def join(self) -> None:
        distributed.initialize(self._config.distributed)

    def devices(self) -> Sequence[jax.Device] | None:
        return None

    def compile(
        self,
        function: Callable,
        *,
        mesh: Mesh,
        in_shardings: Any,
        out_shardings: Any,
        donate_argnums: tuple[int, ...] = (),
    ) -> Callable:
        options = compiler_options(self._config.model, mesh)
        return compile_xla(
            function, in_shardings=in_shardings, out_shardings=out_shardings, donate_argnums=donate_argnums, options=options, attention=self._config.model.attention
        )  # fmt: skip

    def as_jax(self, tree: Tree, shardings: Any) -> Tree:
        return tree

    def precision(self) -> contextlib.AbstractContextManager:
        name = matmul_precision(self._config.model)
        return contextlib.nullcontext() if name == "default" else jax.default_matmul_precision(name)

    def device_kind(self, mesh: Mesh) -> str:
        return mesh.devices.flat[0].device_kind


def compile_xla(
    function: Callable,
    *,
    in_shardings: Any,
    out_shardings: Any,
    donate_argnums: tuple[int, ...] = (),
    options: Mapping[str, str] | None = None,
    attention: str = "auto",
) -> Callable:
    """jax.jit of a function whose activations are placed on the mesh of its shardings.

    Args:
      options: of XLA, for this program alone (see `compiler_options`).
      attention: its form (`model.attention`).
    """
    mesh = getattr(jax.tree.leaves(out_shardings)[0], "mesh", None)
    if mesh is not None:  # arrays of a single device have nothing to place
        function = tracing(function, Placement(mesh, attention=attention))
    return jax.jit(
        function,
        in_shardings=in_shardings,
        out_shardings=out_shardings,
        donate_argnums=donate_argnums,
        compiler_options=dict(options or {}) or None,
    )


def matmul_precision(model: ModelConfig) -> str:
    """`model.matmul_precision` with `auto` decided: on a CPU that emulates bfloat16 products they are made in float32.

    Measured on an AVX2 processor (processor time, side by side): products in bfloat16 take 1.53 times as long as in
    float32 forward and backward of one 2,048 x 192 x 512 layer, 1.29 times in the quickstart's whole multitask step.
    """
    if model.matmul_precision != "auto":
        return model.matmul_precision
    emulated = jax.default_backend() == "cpu" and processor.bfloat16_unit() is None
    return "default" if emulated else "bfloat16"


def compiler_options(model: ModelConfig, mesh: Mesh) -> dict[str, str]:
    """XLA's options for a training step on a CPU; {} elsewhere, and where this jaxlib does not know them.

    Float32 products are Eigen's: jaxlib 0.10 hands them to YNNPACK, which takes a third longer for those of a layer. It
    keeps the sums along rows, which without it are made in windows one after another, and products of bfloat16, for
    which it knows the processor's matrix units. Who recomputes wants memory, so operations then run in the order that
    needs least of it, not in the widest one (figures: benchmarks/LOG.md).
    """
    options = {}
    if mesh.devices.flat[0].platform == "cpu":
        if model.compute_dtype == "float32" and matmul_precision(model) == "default":
            options["xla_cpu_experimental_ynn_fusion_type"] = "LIBRARY_FUSION_TYPE_REDUCE"
        if model.remat != "none":
            options["xla_cpu_scheduler_type"] = "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    return {name: value for name, value in options.items() if _known(name, value)}


@functools.cache
def _known(name: str, value: str) -> bool:
    """Whether this jaxlib has the option: it refuses to compile anything with one that it does not know."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except Exception:  # jaxlib's own error, of a class that is not public
        return False
    return True


def launched_processes() -> int:
    """Processes of this job by the launcher's word (`npu_bridge.launch` and torchrun set WORLD_SIZE); 1 without a
    launcher.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit() or int(text) < 1:
        raise UserError(
            f"WORLD_SIZE={text!r} in the environment; expected the number of processes, as npu_bridge.launch "
            "and torchrun set it"
        )
    return int(text)


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that a resumed run starts in seconds.

    JAX's own setting (JAX_COMPILATION_CACHE_DIR) wins where it is given; its key covers program, compiler, flags and
    device.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
