"""Host memory of a written program: ``rt.memory``. Values of `jax.memory.Space.Host` lie in pinned memory of the host.

On a device the copies run on two side streams, one for each direction, beside the computation: a copy to the host keeps
its source alive until the computation has waited for it (at most `UNDER_WAY` of them), and a loop fetches what its next
round reads while it computes this one. The host never waits in a step. On a CPU device and host share one memory; the
copies are made all the same, so that a program that relies on them is the same everywhere.
"""

from __future__ import annotations

import collections
from typing import Any

import torch

from npu_bridge.compiler.memory import UNDER_WAY


class HostMemory:
    """Copies between the device's memory and the host's. Written statements call its methods in program order."""

    def __init__(self, device: torch.device):
        self.device = device
        self.backend: Any = None if device.type == "cpu" else getattr(torch, device.type)
        self._out = self._in = None  # the side streams, made at the first copy
        self._held: collections.deque[tuple[Any, torch.Tensor]] = collections.deque()
        self._fetched: dict[tuple, tuple[torch.Tensor, Any]] = {}  # ahead of its reader, by place in host memory
        self._written: dict[int, Any] = {}  # storage in host memory -> event of the last copy into it

    # -- what statements call -----------------------------------------------------------------------------------------

    def full(self, shape: tuple[int, ...], value: Any, dtype: torch.dtype) -> torch.Tensor:
        """Return an array of one number in host memory."""
        return self._empty(shape, dtype).fill_(value)

    def to_host(self, x: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy in host memory; on a device it is there once the side stream has run."""
        target = self._empty(x.shape, x.dtype)
        self._copy_out(target, x)
        return target

    def write(self, base: torch.Tensor, view: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """Copy `update` from the device into `view`, a view of `base` in host memory, and return `base`."""
        if self.backend is not None and not view.is_contiguous():  # such a copy would pass through pageable memory
            update = self.to_host(update)
            self.ready()
            view.copy_(update)
        else:
            self._copy_out(view, update)
        return base

    def to_device(self, x: torch.Tensor, ahead: torch.Tensor | None = None) -> torch.Tensor:
        """Return a copy of `x` on the device. `ahead`: the part of host memory that the loop's next round asks for; its
        copy starts now.
        """
        found = self._fetched.pop(_place(x), None) or self._start_in(x)
        if ahead is not None:
            self._fetched[_place(ahead)] = self._start_in(ahead)
        made, event = found
        if event is not None:
            self.backend.current_stream().wait_event(event)
        return made

    def clone(self, x: torch.Tensor) -> torch.Tensor:
        """Copy within host memory. The host waits for copies that are under way."""
        self.ready()
        return self._empty(x.shape, x.dtype).copy_(x)

    def reshape(self, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Reshape an array in host memory: a view where strides allow it."""
        try:
            return x.view(shape)
        except RuntimeError:
            return self.clone(x).view(shape)

    # -- around a step ------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Let the computation wait for all copies, at the end of a step."""
        if self._out is not None:
            current = self.backend.current_stream()
            current.wait_stream(self._out)
            current.wait_stream(self._in)
        for kept in (self._held, self._fetched, self._written):
            kept.clear()

    def ready(self) -> None:
        """Let the host wait until copies to host memory have arrived, before it reads there."""
        if self._out is not None:
            self._out.synchronize()

    # -- copies -------------------------------------------------------------------------------------------------------

    def _empty(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=self.backend is not None)

    def _copy(self, stream: Any, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Copy on a side stream, behind what the computation has been given so far; return the event of its end."""
        stream.wait_stream(self.backend.current_stream())
        with self.backend.stream(stream):
            target.copy_(source, non_blocking=True)
        return stream.record_event()

    def _streams(self) -> tuple[Any, Any]:
        if self._out is None:
            self._out, self._in = self.backend.Stream(), self.backend.Stream()
        return self._out, self._in

    def _copy_out(self, target: torch.Tensor, x: torch.Tensor) -> None:
        if self.backend is None:
            target.copy_(x)
            return
        out, _ = self._streams()
        x = x.contiguous()
        # Behind the computation, which has waited for what it read from there.
        event = self._written[target.untyped_storage().data_ptr()] = self._copy(out, target, x)
        self._held.append((event, x))
        if len(self._held) > UNDER_WAY:  # from here on the computation may overwrite the oldest source
            self.backend.current_stream().wait_event(self._held.popleft()[0])

    def _start_in(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        target = torch.empty(x.shape, dtype=x.dtype, device=self.device)
        if self.backend is None:
            return target.copy_(x), None
        _, into = self._streams()
        if not x.is_contiguous():
            x = self.clone(x)
        memory = x.untyped_storage().data_ptr()
        if memory in self._written:
            into.wait_event(self._written[memory])
        return target, self._copy(into, target, x)


def _place(x: torch.Tensor) -> tuple:
    return x.data_ptr(), tuple(x.shape), tuple(x.stride()), x.dtype
