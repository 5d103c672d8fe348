"""The mesh of a run whose configuration sets none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from mindvl_jax.config.schema import Config, MeshConfig
from mindvl_jax.core.devices import known_memory
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.host_memory import physical_memory
from mindvl_jax.core.params import Outline, matches_any
from mindvl_jax.parallel.mesh import default_mesh, make_mesh


def chosen_mesh(
    config: Config, outline: Outline, devices: Sequence[jax.Device] | None = None
) -> tuple[Mesh, str | None]:
    """Return the mesh of a run, and why it was chosen where the configuration sets no axis of it.

    Raises:
      UserError: the mesh that is set does not fit the devices.
    """
    if not config.mesh.is_open:
        return make_mesh(config.mesh, devices), None
    found = list(jax.devices() if devices is None else devices)
    memory = _memory(found[0]) if config.backend == "xla" else None
    mesh, why = mesh_for(config, outline, len(found), memory, processes=jax.process_count())
    return make_mesh(mesh, found), why


def mesh_for(
    config: Config, outline: Outline, device_count: int, device_bytes: int | None, *, processes: int = 1
) -> tuple[MeshConfig, str]:
    """`parallel.mesh.default_mesh` for the phases and the state of a configuration."""
    rows = [phase.rows for phase in config.training.phases]
    return default_mesh(
        device_count, rows, state_bytes=_state_bytes(config, outline), device_bytes=device_bytes, processes=processes
    )


def _state_bytes(config: Config, outline: Outline) -> int:
    """Bytes on one device of the largest phase: parameters, and float32 gradient and moments of those that learn."""

    def of_phase(globs: Sequence[str]) -> int:
        return sum(
            math.prod(like.shape) * (like.dtype.itemsize + 12 * matches_any(path, globs))
            for path, like in outline.shapes.items()
        )

    return max(of_phase(phase.train) for phase in config.training.phases)


def _memory(device: jax.Device) -> int | None:
    """Memory of one device, None where neither it nor the table of devices tells."""
    if device.platform == "cpu":  # devices of one host share its memory
        return physical_memory() // max(1, jax.local_device_count())
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return int(limit)
    try:
        return known_memory(device.device_kind)
    except UserError:
        return None
