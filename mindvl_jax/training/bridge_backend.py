"""npu_bridge as a back end of the trainer: every program of a phase as a torch program, one process a device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, Mesh

import npu_bridge
from mindvl_jax.config.schema import BridgeConfig, Config, ParallelConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.parallel import distributed
from mindvl_jax.parallel.activations import DEFAULT, Placement, tracing
from mindvl_jax.parallel.mesh import describe_sizes
from mindvl_jax.training.xla_backend import matmul_precision
from npu_bridge.errors import BridgeError

Tree = TypeVar("Tree")


class Bridge:
    """Mesh position r is rank r, started by `npu_bridge.launch` or torchrun. JAX has one host device per process."""

    def __init__(self, config: Config):
        self._config, self._bridge = config, config.bridge
        self._processes = distributed.launched_processes()
        self.in_flight = 0 if config.bridge.device == "cpu" else 1  # torch on a CPU computes inside the call

    def join(self) -> None:
        if self._config.distributed.coordinator is not None:
            raise UserError(
                f"distributed.coordinator={self._config.distributed.coordinator} is for backend xla; with "
                "backend npu_bridge leave it out and start "
                "the processes by `python -m npu_bridge.launch --nproc N train.py ...`, or by torchrun"
            )
        # JAX traces, makes, restores and saves on the host; the accelerator's memory is torch's alone.
        jax.config.update("jax_platforms", "cpu")
        if self._processes == 1:
            return
        from npu_bridge.runtime import mesh as places

        try:
            places.ensure_process_group(self._bridge.device, self._processes)
            address = places.share_address()
        except (BridgeError, RuntimeError, ValueError) as error:
            raise UserError(
                f"the {self._processes} processes of this job cannot meet through torch.distributed: {error}"
            ) from error
        join = self._config.distributed.model_copy(
            update=dict(coordinator=address, processes=self._processes, process_id=places.rank())
        )
        distributed.initialize(join)

    def devices(self) -> Sequence[jax.Device]:
        """Return the first device of each process. A process with several virtual devices is one mesh position all the
        same.
        """
        first: dict[int, jax.Device] = {}
        for device in jax.devices("cpu"):
            first.setdefault(device.process_index, device)
        return [first[index] for index in sorted(first)]

    def compile(
        self,
        function: Callable,
        *,
        mesh: Mesh,
        in_shardings: Any,
        out_shardings: Any,
        donate_argnums: tuple[int, ...] = (),
    ) -> Callable:
        if mesh.devices.size != self._processes:
            raise UserError(
                f"mesh {describe_sizes(mesh.shape)} has {mesh.devices.size} positions, but {self._processes} "
                f"process{'es run' if self._processes > 1 else ' runs'}: "
                "backend npu_bridge wants one process per position (python -m npu_bridge.launch --nproc N train.py ...)"
            )
        return _with_clear_errors(
            program_of(
                self._bridge,
                function,
                mesh=mesh,
                parallel=self._config.parallel,
                in_shardings=in_shardings,
                out_shardings=out_shardings,
                donate_argnums=donate_argnums,
            )
        )

    def as_jax(self, tree: Tree, shardings: Any) -> Tree:
        def give(x, sharding):
            return x.to_jax(sharding) if isinstance(x, npu_bridge.Array) else x

        return jax.tree.map(give, tree, shardings)

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """torch's own switch: float32 products read bfloat16 and sum in float32 where the device has such units (AMX,
        tensor cores).
        """
        if (
            self._bridge.device == "cpu" and matmul_precision(self._config.model) == "default"
        ) or self._config.model.matmul_precision == "default":
            yield
            return
        import torch

        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def device_kind(self, mesh: Mesh) -> str:
        from npu_bridge.runtime.mesh import device_name

        return device_name(self._bridge.device)


def program_of(
    bridge: BridgeConfig,
    function: Callable,
    *,
    mesh: Mesh | AbstractMesh,
    in_shardings: Any,
    out_shardings: Any,
    donate_argnums: tuple[int, ...] = (),
    parallel: ParallelConfig = DEFAULT,
) -> Callable:
    """`function` as the bridge's program for one place of `mesh`.

    Its `lower` needs neither devices nor other processes, so that a mesh may be abstract.
    """
    alone = mesh.size == 1  # then no sharding says anything
    function = tracing(function, Placement(mesh, parallel=parallel, manual=False))
    return npu_bridge.jit(
        function,
        mesh=None if alone else mesh,
        in_shardings=None if alone else in_shardings,
        out_shardings=None if alone else out_shardings,
        donate_argnums=donate_argnums,
        device=bridge.device,
        reduce_in_float32=bridge.reduce_gradients_in_float32,
        capture=bridge.capture,
    )


def _with_clear_errors(jitted: Callable) -> Callable:
    """Turn refusals of the bridge into a UserError without a traceback."""

    def program(*args: Any) -> Any:
        try:
            return jitted(*args)
        except (npu_bridge.UnsupportedError, npu_bridge.VersionError) as error:
            raise UserError(str(error)) from error

    program.lower = jitted.lower
    return program
