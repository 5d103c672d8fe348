"""XLA as a back end of the trainer: `jax.jit` with activations placed on the mesh, and the compiler's options."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from mindvl_jax.config.schema import Config, ModelConfig, ParallelConfig
from mindvl_jax.core import processor
from mindvl_jax.core.errors import UserError
from mindvl_jax.parallel import distributed
from mindvl_jax.parallel.activations import DEFAULT, Placement, tracing

Tree = TypeVar("Tree")
Flag = str | bool | int | float


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
        options = compiler_options(self._config.model, mesh, self._config.compiler_flags)
        return compile_xla(
            function,
            in_shardings=in_shardings,
            out_shardings=out_shardings,
            donate_argnums=donate_argnums,
            options=options,
            **placement_options(self._config),
        )

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
    options: Mapping[str, Flag] | None = None,
    attention: str = "auto",
    parallel: ParallelConfig = DEFAULT,
) -> Callable:
    """jax.jit of a function whose activations are placed on the mesh of its shardings.

    Args:
      options: of XLA, for this program alone (see `compiler_options`).
      attention: its form (`model.attention`). parallel: how the axes of the mesh are used.
    """
    mesh = getattr(jax.tree.leaves(out_shardings)[0], "mesh", None)
    if mesh is not None:  # arrays of a single device have nothing to place
        function = tracing(function, Placement(mesh, attention=attention, parallel=parallel))
    return jax.jit(
        function,
        in_shardings=in_shardings,
        out_shardings=out_shardings,
        donate_argnums=donate_argnums,
        compiler_options=dict(options or {}) or None,
    )


def placement_options(config: Config) -> dict[str, Any]:
    """What of the configuration says how `compile_xla` places activations."""
    return {"attention": config.model.attention, "parallel": config.parallel}


def matmul_precision(model: ModelConfig) -> str:
    """`model.matmul_precision` with `auto` decided: on a CPU that emulates bfloat16 products they are made in float32.

    Measured on an AVX2 processor (processor time, side by side): products in bfloat16 take 1.53 times as long as in
    float32 forward and backward of one 2,048 x 192 x 512 layer, 1.29 times in the quickstart's whole multitask step.
    """
    if model.matmul_precision != "auto":
        return model.matmul_precision
    emulated = jax.default_backend() == "cpu" and processor.bfloat16_unit() is None
    return "default" if emulated else "bfloat16"


# The platform's own defaults wait for each gather where it stands; with these a gather runs beside the product before
# it.
_FLAGS = {
    "tpu": {
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
        "xla_enable_async_all_gather": "true",
    },
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
}


def compiler_options(model: ModelConfig, mesh: Mesh, flags: Mapping[str, Flag] | None = None) -> dict[str, Flag]:
    """XLA's options for a training step on the platform of the mesh; ours that its compiler does not know are left out.

    On a CPU float32 products are Eigen's: jaxlib 0.10 hands them to YNNPACK, which takes a third longer for those of a
    layer. YNNPACK keeps sums along rows, which XLA otherwise computes in sequential windows, and bfloat16 products, for
    which it uses the processor's matrix units. With remat, operations run in the order that needs the least memory
    (figures: benchmarks/LOG.md).

    Args:
      flags: of the configuration (`compiler_flags`), over ours.

    Raises:
      UserError: the compiler does not know one of `flags`.
    """
    own = (device for device in mesh.devices.flat if device.process_index == jax.process_index())
    device = next(own, mesh.devices.flat[0])
    options = dict(_FLAGS.get({"cuda": "gpu"}.get(device.platform, device.platform), {}))
    if device.platform == "cpu":
        if model.compute_dtype == "float32" and matmul_precision(model) == "default":
            options["xla_cpu_experimental_ynn_fusion_type"] = "LIBRARY_FUSION_TYPE_REDUCE"
        if model.remat != "none":
            options["xla_cpu_scheduler_type"] = "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    options = {name: value for name, value in options.items() if name in (flags or {}) or _known(name, value, device)}
    for name, value in (flags or {}).items():
        if not _known(name, value, device):
            raise UserError(
                f"compiler_flags.{name}={value}: XLA for {device.platform} knows no such option or not this value; "
                "options are written as in XLA_FLAGS, without the dashes"
            )
    return options | dict(flags or {})


@functools.cache
def _known(name: str, value: Flag, device: jax.Device) -> bool:
    """Whether the device's compiler has the option: it refuses to compile anything with one that it does not know."""
    nothing = jax.ShapeDtypeStruct((), "float32", sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(nothing).compile()
    except Exception:  # jaxlib's own error, of a class that is not public
        return False
    return True
