"""Machines that programs can be compiled for without a device: TPUs by libtpu, H100s by jax's CUDA plugin.

A topology is named as `v5p:4x4x4`, `v6e:16x16` (chip, chips along each axis) or `h100:1x1x8` (slices, hosts, devices a
host).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.parallel.mesh import AXES, mesh_of
from mindvl_jax.planning.phase import lowerings, planned_mesh
from mindvl_jax.training.xla_backend import compile_xla, compiler_options, placement_options

# Sizes as CUDA reports them for an H100 SXM of 80 GB: XLA:GPU compiles to machine code by them. Without a device
# nothing is tuned by measuring.
H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
KINDS = {"v4": "TPU v4", "v5p": "TPU v5p", "v5e": "TPU v5e", "v6e": "TPU v6e", "h100": "NVIDIA H100"}


_CUBES = {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
_CUBES |= {512: "8x8x8", 1024: "8x8x16"}
_SQUARES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


def topology_of(kind: str, devices: int) -> str:
    """The usual topology of so many devices of a kind, as people write it.

    Raises:
      UserError: no such kind, or no machine of that size.
    """
    chips = {chip for chip, known in KINDS.items() if kind.lower().startswith(known.lower())}
    chips |= {"v5e"} if kind.lower().startswith("tpu v5 lite") else set()
    chips |= {"v6e"} if kind.lower().startswith("tpu v6 lite") else set()
    if not chips:
        raise UserError(
            f"--device-kind {kind!r}: its compiler is not one of ours; known are {', '.join(KINDS.values())}"
        )
    (chip,) = chips
    if chip == "h100":
        return f"h100:1x{max(1, devices // 8)}x{min(devices, 8)}"
    shapes = _SQUARES if chip in ("v5e", "v6e") else _CUBES
    if devices not in shapes:
        raise UserError(
            f"--devices {devices}: name the shape of {kind}, such as --compile {chip}:4x4x4; known sizes are "
            f"{', '.join(map(str, shapes))}"
        )
    return f"{chip}:{shapes[devices]}"


def device_kind(topology: str) -> str:
    """The kind of a topology's devices, as `--device-kind` takes it.

    Raises:
      UserError: none that we know.
    """
    chip = topology.split(":")[0]
    if chip not in KINDS:
        raise UserError(
            f"topology {topology!r}: no chip {chip!r} among {', '.join(KINDS)}; write v5p:4x4x4 or h100:1x1x8"
        )
    return KINDS[chip]


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """Devices that can be compiled for and nothing else.

    Raises:
      UserError: the compiler is not installed, or knows no such topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    chip, _, shape = topology.partition(":")
    try:
        if chip == "h100":
            return topologies.get_topology_desc(chip, platform="cuda", target_config=H100, topology=shape).devices
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except Exception as error:  # classes of the plugins' errors are not public
        needs = (
            "XLA:GPU needs jax-cuda12-plugin[with-cuda] of jax's own version (`make setup-gpu`, 5 GB)"
            if chip == "h100"
            else "it needs libtpu (`make aot` installs it)"
        )
        raise UserError(
            f"XLA cannot describe {topology!r}: {(str(error).splitlines() or [type(error).__name__])[0]}; {needs} and "
            "a name such as v5p:4x4x4 or h100:1x1x8"
        ) from error


def topology_mesh(config: Config, topology: str) -> Mesh:
    """The mesh of the configuration over all devices of a topology."""
    devices = topology_devices(topology)
    sizes = planned_mesh(config.mesh, len(devices))
    return mesh_of(devices, {axis: getattr(sizes, axis) for axis in AXES})


def compiled_programs(config: Config, index: int, topology: str) -> Iterator[tuple[str, Any, float]]:
    """Compile each program of a phase as the trainer would on that machine.

    Yields:
      name, the compiled program or the compiler's words where it refuses, seconds that it took.
    """
    mesh = topology_mesh(config, topology)
    options = compiler_options(config.model, mesh, config.compiler_flags)
    compile = functools.partial(compile_xla, options=options, **placement_options(config))
    for name, lowered in lowerings(config, index, mesh, compile):
        begin = time.monotonic()
        try:
            compiled: Any = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            compiled = str(error).splitlines()[0]
        yield name, compiled, time.monotonic() - begin


def beyond_arguments(memory: Any) -> int:
    """Bytes that a compiled program needs beside its arguments, from its `memory_analysis()`."""
    return memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
