"""Memory that a compiler plans for the trainer's programs on one device.

backend npu_bridge: the memory plan of the torch program that would run, statement by statement
(`npu_bridge.compiler.memory`). It is lowered for a mesh without devices, so it takes seconds for any number of them.

backend xla: XLA's buffer assignment (`memory_analysis`) of the program compiled for as many virtual CPU devices, in a
process of its own, because XLA reads their number once. It is exact for a run on CPUs. For a GPU or TPU it stands in:
their compilers fuse more and keep bfloat16 where XLA for a CPU widens some of it, so that it is usually too high.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import npu_bridge
from mindvl_jax.config import loader as config_loader
from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.parallel.mesh import AXES, make_mesh
from mindvl_jax.planning.phase import Measured, ProgramBytes, abstract_mesh, lowerings
from mindvl_jax.training.bridge_backend import program_of
from mindvl_jax.training.xla_backend import Xla, compile_xla, compiler_options, placement_options
from npu_bridge.runtime.hccl import buffer_mb

# Each communicator of HCCL holds two buffers outside torch's allocator (CANN's documentation of HCCL_BUFFSIZE).
COMMUNICATION = "HCCL's buffers"

_DEVICE_COUNT = "--xla_force_host_platform_device_count"


def measure(config: Config, indexes: Sequence[int]) -> list[Measured]:
    """Of these phases, by the configuration's own back end; its mesh has no -1.

    Raises:
      UserError: the bridge refuses the program, or XLA does not compile it.
    """
    return (
        [measure_bridge(config, index) for index in indexes]
        if config.backend == "npu_bridge"
        else measure_xla_apart(config, indexes)
    )


def measure_bridge(config: Config, index: int) -> Measured:
    mesh = abstract_mesh(config.mesh)
    programs, groups = {}, set()
    try:
        for name, lowered in lowerings(
            config, index, mesh, functools.partial(program_of, config.bridge, mesh=mesh, parallel=config.parallel)
        ):
            memory = lowered.memory()
            programs[name] = ProgramBytes(memory["argument_bytes"], memory["peak_bytes"])
            groups |= set(map(tuple, lowered.source.axes_used))
    except (npu_bridge.UnsupportedError, npu_bridge.VersionError) as error:
        raise UserError(str(error)) from error
    extra = {}
    if config.bridge.device == "npu" and groups:
        extra[COMMUNICATION] = sum(2 * buffer_mb(axes) for axes in groups) * 10**6
    return Measured(programs, extra)


def measure_xla(config: Config, index: int) -> Measured:
    """In this process, which must see as many devices as the mesh has."""
    mesh = make_mesh(config.mesh)
    programs = {}
    with Xla(config).precision():
        for name, lowered in lowerings(
            config,
            index,
            mesh,
            functools.partial(
                compile_xla,
                options=compiler_options(config.model, mesh, config.compiler_flags),
                **placement_options(config),
            ),
        ):
            # LLVM's work does not move a buffer: they are assigned before it.
            analysis = lowered.compile(
                {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
            ).memory_analysis()
            beyond = analysis.output_size_in_bytes - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes
            programs[name] = ProgramBytes(analysis.argument_size_in_bytes, analysis.argument_size_in_bytes + beyond)
    return Measured(programs)


def measure_xla_apart(config: Config, indexes: Sequence[int]) -> list[Measured]:
    """`measure_xla` in a process with as many virtual CPU devices as the mesh has devices."""
    count = math.prod(getattr(config.mesh.filled, axis) for axis in AXES)
    kept = re.sub(rf"{_DEVICE_COUNT}=\S+", "", os.environ.get("XLA_FLAGS", ""))
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = dict(
        os.environ, PYTHONPATH=path, XLA_FLAGS=f"{kept} {_DEVICE_COUNT}={count}".strip(), JAX_PLATFORMS="cpu"
    )
    request = json.dumps(dict(config=config_loader.dump(config), indexes=list(indexes)))
    done = subprocess.run(
        [sys.executable, "-m", "mindvl_jax.planning.peak"],
        input=request,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = " / ".join(done.stderr.strip().splitlines()[-3:])
        raise UserError(f"XLA could not compile the step for {count} virtual devices: {last}")
    answers = json.loads(done.stdout.splitlines()[-1])
    return [Measured({name: ProgramBytes(**sizes) for name, sizes in programs.items()}) for programs in answers]


def _answer(request: dict[str, Any]) -> list[dict[str, dict[str, int]]]:
    import yaml

    config = config_loader.from_mapping(yaml.safe_load(request["config"]))
    measured = [measure_xla(config, index) for index in request["indexes"]]
    return [{name: dataclasses.asdict(program) for name, program in one.programs.items()} for one in measured]


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))))
