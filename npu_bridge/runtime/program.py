"""Load a written program on this rank: compile the text, place constants, look up groups and kernels."""

from __future__ import annotations

import builtins
import hashlib
import linecache
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from npu_bridge.errors import CollectiveError
from npu_bridge.runtime.compiled import compiled
from npu_bridge.runtime.conversion import to_torch
from npu_bridge.runtime.mesh import Runtime


def place_constant(array: np.ndarray, dims: list[tuple[str, ...]], runtime: Runtime) -> torch.Tensor:
    """Place this rank's shard of a constant on the device."""
    t = to_torch(np.array(array), array.dtype)
    return shard(t, dims, runtime).to(runtime.device)


def shard(x: torch.Tensor, layout: Any, runtime: Runtime) -> torch.Tensor:
    """Return this rank's shard of a global array: a view."""
    for d, axes in enumerate(layout):
        if axes:
            n = x.shape[d] // runtime.size(axes)
            x = x.narrow(d, runtime.index(axes) * n, n)
    return x


class LoadedProgram:
    """Callable on a list of local tensors (emptied on the way in); returns the list of local results."""

    def __init__(
        self,
        text: str,
        constants: list[tuple],
        kernels: list[str],
        runtime: Runtime,
        name: str,
        host_arguments: Sequence[int] = (),
        *,
        compile: bool = False,
    ):
        self.runtime, self.host_arguments = runtime, tuple(host_arguments)
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self._agree(name)
        runtime.kernel.bind(kernels)
        filename = f"<npu_bridge {name} {self.digest[:12]}>"
        self.filename, self.text = filename, text
        self.moves = "rt.memory." in text  # between the device's memory and the host's
        # Register with linecache, so that tracebacks show the program's lines.
        linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
        scope: dict[str, Any] = {}
        exec(builtins.compile(text, filename, "exec"), scope)
        self.main = compiled(scope["main"]) if compile else scope["main"]
        self.constants = [place_constant(a, dims, runtime) for a, dims in constants]

    def _agree(self, name: str) -> None:
        """Check that all ranks hold the same text, or their collectives would deadlock."""
        if self.runtime.mesh.count == 1:
            return
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, self.digest)
        if len(set(found)) > 1:
            groups = {d[:12]: [r for r, e in enumerate(found) if e == d] for d in dict.fromkeys(found)}
            raise CollectiveError(
                f"rank {self.runtime.rank}: ranks compiled different programs for {name}: "
                + "; ".join(f"{d} on ranks {ranks}" for d, ranks in groups.items())
                + (
                    ". Shapes, static arguments, jax versions or configs differ between the processes; compare "
                    "`.as_text()` of two of them"
                )
            )

    def __call__(self, args: list[torch.Tensor], host: Mapping[int, torch.Tensor] | None = None) -> list[torch.Tensor]:
        """`host`: host copies of arguments that kernels read on the host; fetched from the device if missing."""
        self.runtime.host = {n: args[n].cpu() for n in self.host_arguments} if host is None else host
        try:
            with torch.inference_mode():
                return self.main(self.runtime, self.constants, args)
        except Exception as error:
            if (place := self._place(error)) is not None:
                error.add_note(f"npu_bridge: while running {place} of the JAX program")
            raise
        finally:
            if self.moves:
                self.runtime.memory.join()

    def _place(self, error: BaseException) -> str | None:
        """Scope, file and line of the JAX program whose statement failed."""
        lines = [
            number
            for frame, number in traceback.walk_tb(error.__traceback__)
            if frame.f_code.co_filename == self.filename
        ]
        if not lines:
            return None
        comments = [line.strip()[2:] for line in self.text.splitlines()[: lines[0]] if line.strip().startswith("# ")]
        return comments[-1] if comments else None
