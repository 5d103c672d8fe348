"""The device mesh: axes `data`, `fsdp`, `tensor`.

Rows of the batch are spread over (data, fsdp); parameters over fsdp and tensor; data replicates parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from mindvl_jax.config.schema import MeshConfig
from mindvl_jax.core.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")
FSDP = "fsdp"


def mesh_shape(config: MeshConfig, device_count: int) -> tuple[int, int, int]:
    """Sizes of (data, fsdp, tensor) with -1 filled in from `device_count`; an axis that is not set is 1.

    Raises:
      UserError: two axes are -1, an axis is 0 or below -1, or the product does not fit the devices.
    """
    sizes = {axis: getattr(config.filled, axis) for axis in AXES}
    wrong = [f"mesh.{axis}={size}" for axis, size in sizes.items() if size == 0 or size < -1]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: an axis has at least one device, or -1 to take what is left")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise UserError(f"mesh.{' and mesh.'.join(open_axes)} are both -1; at most one axis can take what is left")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        if device_count % fixed:
            raise UserError(
                f"mesh.{open_axes[0]}=-1 cannot be filled: the other axes take {fixed} devices, which does "
                f"not divide the {device_count} devices found"
            )
        sizes[open_axes[0]] = device_count // fixed
    elif fixed > device_count:
        shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise UserError(
            f"mesh {shape} needs {fixed} devices, found {device_count}; lower an axis, set one to -1, or "
            "start more processes (distributed.*)"
        )
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def default_mesh(
    device_count: int, rows: Sequence[int], *, state_bytes: int, device_bytes: int | None, processes: int = 1
) -> tuple[MeshConfig, str]:
    """Choose the mesh of a configuration that sets no axis: all devices that every phase's rows divide over.

    A small state is copied (`data`): no parameter is gathered. A state that would take more than a quarter of a device
    is spread (`fsdp`), and so is one on devices of unknown memory.

    Args:
      rows: of each phase. state_bytes: parameters, gradients and optimizer on one device. device_bytes: its memory.
      processes: several take part with all their devices, so that none is left out; rows that do not divide are then
        refused where the rows are spread.

    Returns:
      The mesh, and the reason in words.
    """
    count = device_count
    while processes == 1 and any(number % count for number in rows):
        count -= 1
    state = f"{state_bytes / 2**30:.2f} GiB of parameters, gradients and optimizer"
    if count == 1:
        axis, why = "data", "one device" if device_count == 1 else "no other number of devices divides the rows"
    elif device_bytes is not None and state_bytes * 4 <= device_bytes:
        axis, why = "data", f"{state} fit on each device"
    else:
        axis, why = "fsdp", f"{state} are spread over the devices"
    if count < device_count:
        listed = ", ".join(map(str, sorted(set(rows))))
        why += f"; {device_count - count} of {device_count} devices stay idle: rows ({listed}) must divide over all"
    return MeshConfig(**{axis: count}), why


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over the first data * fsdp * tensor devices.

    `tensor` is the fastest axis, so that its exchanges, the most frequent ones, stay between neighbours of one host.

    Raises:
      UserError: as `mesh_shape`; or several processes run and the mesh leaves some of their devices out.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(config, len(devices))
    used = devices[: math.prod(shape)]
    if jax.process_count() > 1 and len(used) < len(devices):
        raise UserError(
            f"mesh {dict(zip(AXES, shape, strict=True))} uses {len(used)} of the {len(devices)} devices of "
            f"{jax.process_count()} processes; "
            "every process takes part with all its devices: set one axis to -1"
        )
    return Mesh(np.asarray(used).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def describe_mesh(mesh: Mesh) -> str:
    """`data 2 x fsdp 2 x tensor 2 (8 of 8 devices, cpu)`."""
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    device = mesh.devices.flat[0]
    return f"{shape} ({mesh.devices.size} of {len(jax.devices())} devices, {device.device_kind})"
