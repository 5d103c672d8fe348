"""The device mesh. Its axes are data: `AXIS_TABLE` says what each splits; nothing else knows their number or order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from mindvl_jax.config.schema import MeshConfig
from mindvl_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of the mesh.

    Attributes:
      rows: whether rows of the batch are spread over it. always_shown: named in messages even where it has one device.
    """

    name: str
    rows: bool = False
    always_shown: bool = False


AXIS_TABLE = (
    Axis("stage", rows=True),  # layers of the decoder; rows wherever no pipeline runs
    Axis("data", rows=True, always_shown=True),  # copies of the parameters
    Axis("expert", rows=True),  # experts of a routed layer; all else is copied
    Axis("fsdp", rows=True, always_shown=True),  # parameters, gathered layer by layer
    Axis("context"),  # token and patch places of a row
    Axis("tensor", always_shown=True),  # heads, feed-forward columns, vocabulary
)
"""From the outermost to the fastest. The fastest exchanges most often, so its devices are neighbours of one host."""
AXES = tuple(axis.name for axis in AXIS_TABLE)
ROW_AXES = tuple(axis.name for axis in AXIS_TABLE if axis.rows)
FSDP = "fsdp"


def mesh_shape(config: MeshConfig, device_count: int) -> dict[str, int]:
    """Size of each axis with -1 filled in from `device_count`; an axis that is not set is 1.

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
        raise UserError(
            f"mesh {describe_sizes(sizes)} needs {fixed} devices, found {device_count}; lower an axis, set one to -1, "
            "or start more processes (distributed.*)"
        )
    return sizes


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
    """Mesh over as many of the devices as the product of its axes, in the order of `AXIS_TABLE`.

    Raises:
      UserError: as `mesh_shape`; or several processes run and the mesh leaves some of their devices out.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_shape(config, len(devices))
    used = devices[: math.prod(sizes.values())]
    if jax.process_count() > 1 and len(used) < len(devices):
        raise UserError(
            f"mesh {describe_sizes(sizes)} uses {len(used)} of the {len(devices)} devices of "
            f"{jax.process_count()} processes; "
            "every process takes part with all its devices: set one axis to -1"
        )
    return mesh_of(used, sizes)


def mesh_of(devices: Sequence[jax.Device], sizes: Mapping[str, int]) -> Mesh:
    """Mesh of these devices; axes that `sizes` leaves out have one device."""
    shape = [sizes.get(axis, 1) for axis in AXES]
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def describe_sizes(sizes: Mapping[str, int]) -> str:
    """`data 2 x fsdp 2 x context 2 x tensor 1`: the axes that are always shown, and those with several devices."""
    shown = [axis.name for axis in AXIS_TABLE if axis.always_shown or sizes.get(axis.name, 1) > 1]
    return " x ".join(f"{axis} {sizes.get(axis, 1)}" for axis in shown)


def describe_mesh(mesh: Mesh) -> str:
    """`data 2 x fsdp 2 x tensor 2 (8 of 8 devices, cpu)`."""
    device = mesh.devices.flat[0]
    return f"{describe_sizes(mesh.shape)} ({mesh.devices.size} of {len(jax.devices())} devices, {device.device_kind})"
