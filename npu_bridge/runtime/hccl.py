"""Sizes of HCCL's buffers by process group.

Each communicator holds two buffers of HCCL_BUFFSIZE MB (CANN's variable, 200 if unset). ``NPU_BRIDGE_HCCL_BUFFSIZE``
gives groups their own: ``tensor=400,data+fsdp=64`` in MB, by the mesh axes that a group spans, in any order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from npu_bridge.errors import BridgeError

DEFAULT_MB = 200
VARIABLE = "NPU_BRIDGE_HCCL_BUFFSIZE"


def own_sizes() -> dict[frozenset[str], int]:
    """Return the sizes that the variable gives, by axes. Raises BridgeError if it cannot be read."""
    sizes: dict[frozenset[str], int] = {}
    for item in filter(None, (part.strip() for part in os.environ.get(VARIABLE, "").split(","))):
        axes, _, size = item.partition("=")
        names = frozenset(name.strip() for name in axes.split("+"))
        if not size.strip().isdigit() or int(size) < 1 or "" in names:
            raise BridgeError(f"npu_bridge: {VARIABLE}: {item!r}; expected axes and MB, like tensor=400,data+fsdp=64")
        if names in sizes:
            raise BridgeError(f"npu_bridge: {VARIABLE} gives {'+'.join(sorted(names))} two sizes")
        sizes[names] = int(size)
    return sizes


def own_size(axes: Sequence[str]) -> int | None:
    """Return the size that the variable gives to groups along these axes, in MB."""
    return own_sizes().get(frozenset(axis.partition(":")[0] for axis in axes))


def buffer_mb(axes: Sequence[str]) -> int:
    """Return the size of one buffer of groups along these axes, in MB."""
    return own_size(axes) or int(os.environ.get("HCCL_BUFFSIZE", DEFAULT_MB))


def group_options(device: str, axes: Sequence[str]) -> Any:
    """Return `pg_options` of a new group, None where nothing is asked for."""
    size = own_size(axes) if device == "npu" else None
    if size is None:
        return None
    import torch_npu

    options = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()
    options.hccl_config = {"hccl_buffer_size": size}
    return options
