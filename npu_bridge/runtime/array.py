"""Arrays on the bridge's devices: a local shard and the sharding of the global array."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch

from npu_bridge.compiler.ir import Layout
from npu_bridge.errors import PlacementError
from npu_bridge.runtime.conversion import to_numpy
from npu_bridge.runtime.mesh import Runtime


def shard_begins(layout: Layout, local: tuple[int, ...], runtime: Runtime) -> tuple[int, ...]:
    """Return the global index of the first element of this rank's shard in each dimension."""
    axes = layout or ((),) * len(local)
    return tuple(runtime.index(a) * n if a else 0 for a, n in zip(axes, local))


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape))


def held_shard(x: jax.Array, layout: Layout, runtime: Runtime) -> jax.Array | None:
    """Return this rank's shard of a JAX array by `layout` if it is exactly what this process holds, else None."""
    local = tuple(n // runtime.size(a) for n, a in zip(x.shape, layout or ((),) * x.ndim))
    wanted = tuple((b, b + n) for b, n in zip(shard_begins(layout, local, runtime), local))
    return next((s.data for s in x.addressable_shards if _bounds(s.index, x.shape) == wanted), None)


class Array:
    """A global array of a bridge program: this device's shard and the sharding.

    shape, dtype: of the whole array. local: the shard, a torch tensor on the device. layout: mesh axes of each
    dimension.
    weak_type: as JAX has it for the same result.
    """

    def __init__(
        self,
        local: torch.Tensor,
        shape: tuple[int, ...],
        dtype: Any,
        layout: Layout,
        runtime: Runtime,
        *,
        weak_type: bool = False,
    ):
        self._local: torch.Tensor | None = local
        self.weak_type = weak_type
        self.shape, self.dtype, self.layout, self.runtime = tuple(shape), np.dtype(dtype), layout, runtime
        self.donated_to = ""
        self.memory_kind = "device"

    @property
    def local(self) -> torch.Tensor:
        """This device's shard; one in host memory has arrived. Raises PlacementError after the array was donated."""
        if self.memory_kind != "device":
            self.runtime.memory.ready()
        return self.held

    @property
    def held(self) -> torch.Tensor:
        """This device's shard, for the statements of a program; copies to host memory may be under way."""
        if self._local is None:
            raise PlacementError(
                f"npu_bridge: array {self.dtype}{list(self.shape)} was donated to "
                f"{self.donated_to or 'a step'} and is gone; "
                "use the step's result, or leave it out of donate_argnums"
            )
        return self._local

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def is_fully_replicated(self) -> bool:
        return all(self.runtime.size(axes) == 1 for axes in self.layout)

    def is_deleted(self) -> bool:
        return self._local is None

    def donate(self, to: str) -> torch.Tensor:
        """Donate the storage; the array is deleted afterwards."""
        local, self._local, self.donated_to = self.held, None, to
        return local

    def gather(self) -> np.ndarray:
        """Return the global array on the host. A collective when it is sharded: call it on every rank."""
        whole = self.local
        dims = [tuple(a) for a in self.layout] or [()] * self.ndim
        for axes in dims:
            if axes:
                self.runtime._join(tuple(axes))
        return to_numpy(self.runtime.all_gather(whole, dims), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if not self.is_fully_replicated:
            raise PlacementError(
                f"npu_bridge: array {self.dtype}{list(self.shape)} is split over {self.layout}; call "
                ".gather() on every rank, or read .local"
            )
        host = to_numpy(self.local, self.dtype)
        # Copy: `local` may be donated and overwritten later.
        return np.array(host, dtype=dtype or host.dtype)

    def to_jax(self, sharding: jax.sharding.Sharding) -> jax.Array:
        """Copy this process's shard to its host device as part of a JAX array with this sharding. No communication.

        Raises PlacementError when the sharding gives this process another shard than it holds.
        """
        held = tuple(
            (b, b + n) for b, n in zip(shard_begins(self.layout, self.local.shape, self.runtime), self.local.shape)
        )
        mine = sharding.addressable_devices_indices_map(self.shape)
        wrong = {str(d): i for d, i in mine.items() if _bounds(i, self.shape) != held}
        if wrong:
            raise PlacementError(
                f"npu_bridge: this process holds {held} of {self.dtype}{list(self.shape)}, the sharding asks "
                f"for {wrong}"
            )
        host = np.array(to_numpy(self.local, self.dtype))
        return jax.make_array_from_single_device_arrays(self.shape, sharding, [jax.device_put(host, d) for d in mine])

    def __jax_array__(self) -> jax.Array:
        """Copy to a JAX array, for jax.numpy outside of the bridge's programs."""
        return jax.numpy.asarray(self.__array__())

    def __dlpack__(self, **options: Any):
        """Export the shard's memory without a copy: a step that donates the array overwrites it."""
        # Unsigned integers are stored as signed bits; the consumer must see the array's own dtype.
        own = getattr(torch, self.dtype.name) if self.dtype.kind == "u" else self.local.dtype
        return self.local.view(own).__dlpack__(**options)

    def __dlpack_device__(self):
        return self.local.__dlpack_device__()

    def block_until_ready(self) -> Array:
        if self.runtime.kind != "cpu":
            getattr(torch, self.runtime.kind).synchronize()
        return self

    def item(self) -> Any:
        return self.__array__().item()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def __repr__(self) -> str:
        state = "donated" if self._local is None else f"local {tuple(self._local.shape)} on {self._local.device}"
        return f"npu_bridge.Array({self.dtype}{list(self.shape)}, layout={self.layout}, {state})"


def _delegate(name: str) -> None:
    def method(self: Array, *args: Any, **options: Any) -> Any:
        return getattr(self.__jax_array__(), name)(*args, **options)

    setattr(Array, name, method)


# Python's operators and common methods, on a JAX copy: for scripts that use results between steps.
for _operator in ["add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod",
    "rmod", "pow", "rpow", "matmul", "rmatmul", "and", "rand", "or", "ror", "xor", "rxor", "neg", "pos", "abs",
    "invert", "lt", "le", "gt", "ge", "eq", "ne", "getitem", "len", "iter", "index", "format"]:  # fmt: skip
    _delegate(f"__{_operator}__")
Array.__hash__ = object.__hash__
for _method in ["all", "any", "argmax", "argmin", "argsort", "astype", "clip", "copy", "cumsum", "dot", "flatten",
    "max", "mean", "min", "prod", "ravel", "repeat", "reshape", "round", "sort", "squeeze", "std", "sum", "swapaxes",
    "take", "tolist", "transpose", "var"]:  # fmt: skip
    _delegate(_method)
Array.T = property(lambda self: self.__jax_array__().T)
Array.at = property(lambda self: self.__jax_array__().at)
