"""Join several processes by jax.distributed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import jax
from jax.experimental import multihost_utils

from mindvl_jax.config.schema import DistributedConfig
from mindvl_jax.core.errors import UserError

AUTO = "auto"


def discovered(config: DistributedConfig, environment: Mapping[str, str] = os.environ) -> DistributedConfig:
    """Return what the launcher says of this process: torchrun (and npu_bridge.launch), Slurm, or an indexed Job of
    Kubernetes.

    Raises:
      UserError: none of them started this process.
    """
    if {"MASTER_ADDR", "RANK", "WORLD_SIZE"} <= set(environment):
        port = environment.get("MASTER_PORT", "29500")
        # torchrun's own store listens on MASTER_PORT.
        found = f"{environment['MASTER_ADDR']}:{int(port) + 1}", environment["WORLD_SIZE"], environment["RANK"]
    elif {"SLURM_PROCID", "SLURM_NTASKS"} <= set(environment):
        first = first_host(
            environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "localhost"
        )
        # Jobs that share a host get ports of their own.
        found = (
            f"{first}:{61000 + int(environment.get('SLURM_JOB_ID', '0')) % 4000}",
            environment["SLURM_NTASKS"],
            environment["SLURM_PROCID"],
        )
    elif {"JOB_COMPLETION_INDEX", "MINDVL_PROCESSES", "MINDVL_COORDINATOR"} <= set(environment):
        found = environment["MINDVL_COORDINATOR"], environment["MINDVL_PROCESSES"], environment["JOB_COMPLETION_INDEX"]
    else:
        raise UserError(
            "distributed.coordinator=auto: no launcher's variables here. Known are torchrun (MASTER_ADDR, "
            "RANK, WORLD_SIZE), Slurm (SLURM_PROCID, SLURM_NTASKS) and "
            "Kubernetes (JOB_COMPLETION_INDEX, MINDVL_PROCESSES, MINDVL_COORDINATOR); see examples/launch, "
            "or set distributed.coordinator, processes and process_id"
        )
    return config.model_copy(update=dict(coordinator=found[0], processes=int(found[1]), process_id=int(found[2])))


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


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm list: `gpu[003-005,9],login` -> gpu003."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return found[1] + (found[2] or "") + (found[3] or "")


def initialize(config: DistributedConfig) -> None:
    """Join the other processes if `distributed.coordinator` is set. Call it before the first use of a device.

    On CPU, collectives run over gloo. A second call in a process that has joined does nothing.

    Raises:
      UserError: `processes` or `process_id` is missing or out of range, or the coordinator does not answer.
    """
    if config.coordinator is None:
        return
    if config.coordinator == AUTO:
        config = discovered(config)
    missing = [name for name in ("processes", "process_id") if getattr(config, name) is None]
    if missing:
        raise UserError(
            f"distributed.coordinator={config.coordinator} also needs "
            f"{' and '.join('distributed.' + name for name in missing)} "
            "(number of processes; 0 .. processes-1 for this one)"
        )
    if not 0 <= config.process_id < config.processes:
        raise UserError(
            f"distributed.process_id={config.process_id} is not in 0 .. {config.processes - 1} "
            f"(distributed.processes={config.processes})"
        )
    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator_address=config.coordinator, num_processes=config.processes, process_id=config.process_id
        )
    except RuntimeError as error:
        raise UserError(
            f"process {config.process_id} of {config.processes} could not join at "
            f"distributed.coordinator={config.coordinator}: {error}; "
            "process 0 must run at that address, and every process must be started before devices are used"
        ) from error
    # The first exchange sets up the links, and gloo gives the slowest process 30 s to turn up. Here all have just met;
    # later one may still be compiling.
    multihost_utils.sync_global_devices("joined")
