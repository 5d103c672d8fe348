"""This rank's mesh position, its process groups, and the collectives that written programs call on ``rt``."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from npu_bridge.compiler import callbacks
from npu_bridge.compiler.host_numbers import HostNumbers
from npu_bridge.compiler.ir import MeshShape
from npu_bridge.errors import BridgeError, CollectiveError
from npu_bridge.runtime import hccl
from npu_bridge.runtime.conversion import to_numpy, to_torch
from npu_bridge.runtime.host_memory import HostMemory
from npu_bridge.runtime.kernel_table import KernelTable
from npu_bridge.runtime.ragged import exchange_runs, place_runs

_BACKEND = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
_SUM = {"add": "SUM", "multiply": "PRODUCT", "maximum": "MAX", "minimum": "MIN", "or": "MAX", "and": "MIN"}
# Names since torch 2.13, which warns at every call of the older ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_groups: dict[tuple[int, ...], Any] = {}  # process groups by members: torch's groups are never collected, so share them


def timeout_seconds() -> float:
    """Time after which a collective counts as hung (NPU_BRIDGE_TIMEOUT, default 300 s)."""
    return float(os.environ.get("NPU_BRIDGE_TIMEOUT", "300"))


def ensure_process_group(device: str, count: int) -> None:
    """Join the processes that torchrun or npu_bridge.launch started. One process needs none.

    Raises BridgeError when fewer processes were started than the mesh has positions.
    """
    if count == 1:
        return
    if not dist.is_initialized():
        default_device(
            device
        )  # before the group: the device's package registers the transport, which uses the current device
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world != count:
            raise BridgeError(
                f"npu_bridge: the mesh has {count} places, {world} "
                f"process{'es were' if world != 1 else ' was'} started; start one process a "
                f"device with `python -m npu_bridge.launch --nproc {count} script.py` or torchrun "
                f"--nproc-per-node {count}"
            )
        dist.init_process_group(_BACKEND[device], timeout=datetime.timedelta(seconds=timeout_seconds()))
        atexit.register(leave_process_group)
    if dist.get_world_size() != count:
        raise BridgeError(
            f"npu_bridge: the mesh has {count} places, the process group has {dist.get_world_size()} processes"
        )


def leave_process_group() -> None:
    """Leave the job together with the other ranks; runs by itself when the interpreter ends.

    gloo's threads abort a rank (SIGABRT after all its work was done) when a peer closes its connections while they
    still run, so ranks on the CPU meet once more first. A rank that ends by an exception does not wait: closing its
    connections ends the wait of the others at once. A peer that works on alone is waited for no longer than
    `timeout_seconds`.
    """
    if not dist.is_initialized():
        return
    failed = getattr(sys, "last_value", None) is not None
    if dist.get_backend() == "gloo" and not failed:
        with contextlib.suppress(RuntimeError):
            dist.barrier()
    dist.destroy_process_group()
    _groups.clear()


def default_device(kind: str) -> torch.device:
    """The torch device of this process. Raises BridgeError when its backend is missing."""
    if kind == "cpu":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise BridgeError(
                "npu_bridge: device 'cuda' asked for, torch sees none; use device='cpu' or install a CUDA "
                "build of torch"
            )
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    if kind == "npu":
        try:
            import torch_npu  # noqa: F401  (registers the device; never in the default environment)
        except ImportError as error:
            raise BridgeError(
                f"npu_bridge: device 'npu' needs torch_npu and CANN ({error}); see docs/bridge.md"
            ) from error
        torch.npu.set_device(local)
        return torch.device("npu", local)
    raise BridgeError(f"npu_bridge: device {kind!r} unknown; expected 'cpu', 'cuda' or 'npu'")


def device_name(kind: str) -> str:
    """Return the vendor's name of this process's device; "cpu" for the CPU."""
    device = default_device(kind)
    return "cpu" if kind == "cpu" else getattr(torch, kind).get_device_name(device)


def rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def share_address() -> str:
    """Return a free ``host:port`` of rank 0's machine, the same on every rank. This is a collective."""
    address: list[str | None] = [None]
    if rank() == 0:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        with socket.socket() as probe:
            probe.bind(("", 0))
            address[0] = f"{host}:{probe.getsockname()[1]}"
    dist.broadcast_object_list(address, src=0)
    return address[0]


class _Requests:
    """Several requests that are waited for as one."""

    def __init__(self, requests: Sequence[Any]):
        self._requests = list(requests)

    def wait(self) -> None:
        for request in self._requests:
            request.wait()


class InFlight:
    """A collective in flight.

    On a device it runs on its own stream, and `wait` blocks the compute stream, not the host, so that a captured graph
    holds both. On the CPU gloo's threads run it.
    """

    def __init__(
        self, work: Any, named: Callable[[], Any], finish: Callable[[], torch.Tensor], held: tuple[torch.Tensor, ...]
    ):
        # `held` keeps the buffers alive while the collective runs.
        self._work, self._named, self._finish, self._held = work, named, finish, held

    def wait(self) -> torch.Tensor:
        if self._work is not None:  # None: it was blocking
            with self._named():
                self._work.wait()
        self._held = ()
        return self._finish()


class Runtime(HostNumbers):
    """`rt` of a written program."""

    def __init__(self, mesh: MeshShape, device: str = "cpu", axes_used: Sequence[tuple[str, ...]] = ()):
        ensure_process_group(device, mesh.count)
        self.kind, self.device = device, default_device(device)
        self.rank = dist.get_rank() if mesh.count > 1 else 0
        order = list(mesh.devices) if mesh.devices else list(range(mesh.count))
        if sorted(order) != list(range(mesh.count)):
            raise BridgeError(f"npu_bridge: mesh places {order} are not the ranks 0..{mesh.count - 1}")
        self.order = order
        super().__init__(mesh, order.index(self.rank))
        self._members: dict[tuple[str, ...], tuple[Any, list[int]]] = {}
        self._calls = 0
        self._host_tensors: dict[Any, torch.Tensor] = {}
        self.host: Mapping[
            int, torch.Tensor
        ] = {}  # the running program's arguments that kernels read on the host, by number
        self.callbacks: Sequence[Any] = ()  # of the program, by number
        for axes in axes_used:
            self._join(tuple(axes))
        self.kernel = KernelTable(device)
        self.memory = HostMemory(self.device)

    def callback(self, number: int, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Call a Python callback with copies of the arrays, because later statements may overwrite them."""
        known = self.callbacks[number]
        if known.first_only and self.place != 0:
            return []
        given = [to_numpy(x, dtype).copy() for x, dtype in zip(arrays, known.operands, strict=True)]
        with torch.inference_mode(False):
            made = callbacks.run(known, given)
        return [to_torch(x, dtype).to(self.device) for x, (_, dtype) in zip(made, known.results)]

    # -- places -------------------------------------------------------------------------------------------------------

    def size(self, axes: Sequence[str]) -> int:
        return self.mesh.size(tuple(axes))

    def host_tensor(
        self, values: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, unsigned: bool = False
    ) -> torch.Tensor:
        """Return a host table as a device tensor.

        Host values are equal in every call, so tensors are cached.
        """
        key = values, shape, dtype
        if key not in self._host_tensors:
            bits = 8 * dtype.itemsize
            stored = [self.wrap(v, bits, False) for v in values] if unsigned else list(values)
            self._host_tensors[key] = torch.tensor(stored, dtype=dtype).reshape(shape).to(self.device)
        return self._host_tensors[key]

    # -- groups -------------------------------------------------------------------------------------------------------

    def _join(self, axes: tuple[str, ...]) -> None:
        if self.mesh.count == 1 or axes in self._members:
            return
        for places in self.groups(axes):
            row = [self.order[place] for place in places]
            key = tuple(sorted(row))
            if key not in _groups:  # every rank creates every group, in the same order
                everyone, options = len(key) == dist.get_world_size(), hccl.group_options(self.kind, axes)
                _groups[key] = dist.group.WORLD if everyone and options is None else dist.new_group(
                    list(key), timeout=datetime.timedelta(seconds=timeout_seconds()), pg_options=options
                )  # fmt: skip
            if self.rank in row:
                self._members[axes] = (_groups[key], row)

    @contextlib.contextmanager
    def _named(self, what: str, number: int, x: torch.Tensor, axes: Sequence[str]):
        """Turn a failure or time-out of a collective into an error that names it."""
        try:
            yield
        except RuntimeError as error:
            raise CollectiveError(
                f"rank {self.rank}: {what} number {number} over {tuple(axes)} of {tuple(x.shape)} {x.dtype} "
                "failed or timed out after "
                f"{timeout_seconds():.0f} s (NPU_BRIDGE_TIMEOUT); a peer died, hangs or runs another program: {error}"
            ) from error

    def _counted(self, what: str, x: torch.Tensor, axes: Sequence[str]):
        """`_named` for a blocking collective."""
        self._calls += 1
        return self._named(what, self._calls, x, axes)

    def _carried(self, x: torch.Tensor) -> torch.Tensor:
        """View `x` as a dtype that the transport supports: bool and 8-bit floats as uint8, complex numbers as int64."""
        if x.is_complex():
            return x.contiguous().view(torch.int64)
        return (
            x.contiguous().view(torch.uint8)
            if x.dtype == torch.bool or (x.dtype.itemsize == 1 and x.is_floating_point())
            else x.contiguous()
        )

    # -- collectives
    # ----------------------------------------------------------------------------------------------------

    def all_reduce(self, x: torch.Tensor, axes: tuple[str, ...], kind: str) -> torch.Tensor:
        """Reduce `x` over the group; may overwrite `x`."""
        group, members = self._members[axes]
        if len(members) == 1:
            return x
        if x.is_complex():
            self.all_reduce(torch.view_as_real(x), axes, kind)
            return x
        y = self._carried(x)
        with self._counted("all_reduce", x, axes):
            dist.all_reduce(y, getattr(dist.ReduceOp, _SUM[kind]), group=group)
        return y.view(x.dtype)

    def _gather(self, x: torch.Tensor, d: int, axes: tuple[str, ...], beside: bool) -> InFlight:
        """Start gathering the shards of dimension `d`; `beside`: on a separate stream."""
        group, members = self._members[axes]
        y = self._carried(x)
        out = torch.empty((len(members), *y.shape), dtype=y.dtype, device=y.device)
        ranks = sorted(members)

        def finish() -> torch.Tensor:
            shards = out if members == ranks else out[[ranks.index(m) for m in members]]
            shards = shards.view(x.dtype)
            return shards.flatten(0, 1) if d == 0 and x.dim() else shards.movedim(0, d).flatten(d, d + 1)

        target = out.view(len(members) * y.shape[0], *y.shape[1:]) if y.dim() else out

        def begin():
            return _all_gather(target, y, group=group, async_op=beside)

        return self._start("all_gather", x, axes, begin, finish, (y, out))

    def _one_dim(self, dims: Sequence[tuple[str, ...]]) -> tuple[int, tuple[str, ...]]:
        ((d, axes),) = ((d, tuple(axes)) for d, axes in enumerate(dims) if axes and self.size(axes) > 1)
        return d, axes

    def all_gather(self, x: torch.Tensor, dims: Sequence[tuple[str, ...]]) -> torch.Tensor:
        for d, axes in enumerate(dims):
            if axes and self.size(axes) > 1:
                x = self._gather(x, d, tuple(axes), False).wait()
        return x

    def start_all_gather(self, x: torch.Tensor, dims: Sequence[tuple[str, ...]]) -> InFlight:
        """Gather one dimension. `x` must not change until the result is waited for."""
        return self._gather(x, *self._one_dim(dims), True)

    def reduce_scatter(self, x: torch.Tensor, dims: Sequence[tuple[str, ...]], kind: str) -> torch.Tensor:
        for d, axes in enumerate(dims):
            if axes and self.size(axes) > 1:
                x = self._scatter(x, d, tuple(axes), kind, False).wait()
        return x

    def start_reduce_scatter(self, x: torch.Tensor, dims: Sequence[tuple[str, ...]], kind: str) -> InFlight:
        """Scatter one dimension. `x` must not change until the result is waited for."""
        return self._scatter(x, *self._one_dim(dims), kind, True)

    def _scatter(self, x: torch.Tensor, d: int, axes: tuple[str, ...], kind: str, beside: bool) -> InFlight:
        group, members = self._members[axes]
        n = len(members)
        y = x.unflatten(d, (n, x.shape[d] // n)).movedim(d, 0)
        ranks = sorted(members)
        if members != ranks:
            y = y[[members.index(r) for r in ranks]]
        y = y.contiguous()
        out = torch.empty(y.shape[1:], dtype=x.dtype, device=x.device)
        source, how = y.view(n * y.shape[1], *y.shape[2:]) if y.dim() > 1 else y, getattr(dist.ReduceOp, _SUM[kind])

        def begin():
            return _reduce_scatter(out, source, how, group=group, async_op=beside)

        return self._start("reduce_scatter", x, axes, begin, lambda: out, (y, out))

    def _start(
        self,
        what: str,
        x: torch.Tensor,
        axes: tuple[str, ...],
        begin: Callable[[], Any],
        finish: Callable[[], torch.Tensor],
        held: tuple[torch.Tensor, ...],
    ) -> InFlight:
        self._calls += 1
        number = self._calls
        with self._named(what, number, x, axes):
            work = begin()
        return InFlight(work, lambda: self._named(what, number, x, axes), finish, held)

    def all_to_all(self, x: torch.Tensor, axes: tuple[str, ...], source: int, target: int) -> torch.Tensor:
        """Move the sharding over `axes` from dimension `source` to dimension `target`."""
        return self._all_to_all(x, axes, source, target, False).wait()

    def start_all_to_all(self, x: torch.Tensor, axes: tuple[str, ...], source: int, target: int) -> InFlight:
        """`all_to_all` beside the computation. `x` must stay as it is until the result is waited for."""
        return self._all_to_all(x, axes, source, target, True)

    def _all_to_all(self, x: torch.Tensor, axes: tuple[str, ...], source: int, target: int, beside: bool) -> InFlight:
        group, members = self._members[axes]
        n = len(members)
        y = x.unflatten(target, (n, x.shape[target] // n)).movedim(target, 0)
        ranks = sorted(members)
        if members != ranks:
            y = y[[members.index(r) for r in ranks]]
        y = self._carried(y)
        out = torch.empty_like(y)

        def finish() -> torch.Tensor:
            parts = out.view(x.dtype)
            if members != ranks:
                parts = parts[[ranks.index(m) for m in members]]
            return parts.movedim(0, source).flatten(source, source + 1)

        def begin():
            return dist.all_to_all_single(out, y, group=group, async_op=beside)

        return self._start("all_to_all", x, axes, begin, finish, (y, out))

    def ragged_all_to_all(
        self,
        x: torch.Tensor,
        output: torch.Tensor,
        runs: Sequence[torch.Tensor],
        axes: tuple[str, ...],
        exact: bool,
    ) -> torch.Tensor:
        """Exchange runs of rows (`npu_bridge.runtime.ragged`); `exact`: the host reads their lengths. May overwrite
        `output`.
        """
        n = self.size(axes)
        begins, sent, targets, received = runs
        if exact and n > 1:
            group, members = self._members[axes]
            order = [members.index(r) for r in sorted(members)]

            def exchange(rows: torch.Tensor, give: list[int], take: list[int]) -> torch.Tensor:
                y = self._carried(rows)
                got = torch.empty((sum(take), *y.shape[1:]), dtype=y.dtype, device=y.device)
                with self._counted("ragged_all_to_all", x, axes):
                    dist.all_to_all_single(got, y, take, give, group=group)
                return got.view(x.dtype)

            return exchange_runs(x, output, (begins, sent, received), order, self.all_to_all(targets, axes, 0, 0),
                                 exchange)  # fmt: skip
        table = torch.stack([begins, sent, targets])
        if n == 1:
            return place_runs(x[None], table[None], output)
        wide = [axes, *[()] * x.dim()]
        tables = self.all_gather(table[None], [axes, (), ()]).unflatten(2, (n, -1))
        return place_runs(self.all_gather(x[None], wide), tables[:, :, self.index(axes)], output)

    def permute(self, x: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Send to the target position, receive from the source position; zeros without a sender."""
        return self.start_permute(x, pairs).wait()

    def start_permute(self, x: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> InFlight:
        """`permute` beside the computation. `x` must stay as it is until the result is waited for."""
        y = self._carried(x)
        out, work = torch.zeros_like(y), []
        for source, target in pairs:
            if source == target == self.place:
                out.copy_(y)
            elif source == self.place:
                work.append(dist.P2POp(dist.isend, y, self.order[target]))
            elif target == self.place:
                work.append(dist.P2POp(dist.irecv, out, self.order[source]))

        def begin():
            return _Requests(dist.batch_isend_irecv(work)) if work else None

        return self._start("permute", x, tuple(self.sizes), begin, lambda: out.view(x.dtype), (y, out))
