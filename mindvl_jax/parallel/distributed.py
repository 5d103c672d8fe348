"""Join several processes by jax.distributed."""

from __future__ import annotations

import jax
from jax.experimental import multihost_utils

from mindvl_jax.config.schema import DistributedConfig
from mindvl_jax.core.errors import UserError


def initialize(config: DistributedConfig) -> None:
    """Join the other processes if `distributed.coordinator` is set. Call it before the first use of a device.

    On CPU, collectives run over gloo. A second call in a process that has joined does nothing.

    Raises:
      UserError: `processes` or `process_id` is missing or out of range, or the coordinator does not answer.
    """
    if config.coordinator is None:
        return
    missing = [name for name in ("processes", "process_id") if getattr(config, name) is None]
    if missing:
        raise UserError(
            f"distributed.coordinator={config.coordinator} also needs {' and '.join('distributed.' + name for name in missing)} "
            "(number of processes; 0 .. processes-1 for this one)"
        )
    if not 0 <= config.process_id < config.processes:
        raise UserError(f"distributed.process_id={config.process_id} is not in 0 .. {config.processes - 1} (distributed.processes={config.processes})")
    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator_address=config.coordinator, num_processes=config.processes, process_id=config.process_id
        )
    except RuntimeError as error:
        raise UserError(
            f"process {config.process_id} of {config.processes} could not join at distributed.coordinator={config.coordinator}: {error}; "
            "process 0 must run at that address, and every process must be started before devices are used"
        ) from error
    # The first exchange sets up the links, and gloo gives the slowest process 30 s to turn up. Here all have just met; later one may
    # still be compiling.
    multihost_utils.sync_global_devices("joined")
