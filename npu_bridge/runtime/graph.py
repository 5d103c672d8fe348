"""A whole step as one CUDA graph or NPU graph, with a stated fall-back to eager execution.

Shapes are static and nothing in a step synchronises, so the second call is captured and later calls replay it: one
launch from the host instead of thousands. The first call runs eagerly (libraries allocate workspaces and communicators
then).

Addresses are fixed. Arguments live in persistent buffers, into which each batch is copied. A donated argument is its
own buffer, and the result that replaces it is written back inside the graph unless it is there already. Other results
are cloned, because the next replay overwrites them.

On the CPU programs run eagerly. The paths for cuda and npu follow the documented interfaces
(torch.cuda.CUDAGraph, torch.npu.NPUGraph); the CPU tests cover the bookkeeping with a stand-in for the graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from npu_bridge.kernels.attention import recording_lengths, replay_lengths
from npu_bridge.runtime.program import LoadedProgram

_NAMES = {"cuda": "one CUDA graph", "npu": "one NPU graph"}


def pair_donated(
    args: Sequence[torch.Tensor], donated: Sequence[bool], results: Sequence[torch.Tensor]
) -> dict[int, int]:
    """Map results to the donated arguments that they replace: the one whose storage it has, else the first free one of
    equal shape and dtype.
    """
    free = [i for i, d in enumerate(donated) if d]
    pairs: dict[int, int] = {}
    for j, r in enumerate(results):
        for i in free:
            if args[i].data_ptr() == r.data_ptr() and args[i].shape == r.shape and args[i].dtype == r.dtype:
                pairs[j] = i
                free.remove(i)
                break
    for j, r in enumerate(results):
        for i in free if j not in pairs else ():
            if args[i].shape == r.shape and args[i].dtype == r.dtype and args[i].stride() == r.stride():
                pairs[j] = i
                free.remove(i)
                break
    return pairs


class _DeviceGraph:
    """torch's graph of one device kind."""

    def __init__(self, kind: str):
        self.module = torch.cuda if kind == "cuda" else torch.npu
        self.graph = torch.cuda.CUDAGraph() if kind == "cuda" else torch.npu.NPUGraph()

    def capture(self, function: Callable[[], Any]) -> tuple[Any, list[tuple[torch.Tensor, int]]]:
        """Capture; return the function's results and, for each call with updatable lengths, (run lengths, positions of
        a row).
        """
        self.module.synchronize()
        if self.module is torch.cuda:
            with self.module.graph(self.graph):
                return function(), []
        with self.module.graph(self.graph, auto_dispatch_capture=True), recording_lengths() as lengths:
            made = function()
        if len(self.graph.graph_dispatch_mode.graph_dispatch_records) != len(lengths):
            raise RuntimeError("segment lengths of captured attention cannot be exchanged here; CANN 9.1 or newer can")
        return made, lengths

    def replay(self, lengths: list[dict[str, torch.Tensor]]) -> None:
        """Replay; `lengths`: keywords for each call with updated lengths, in order of the capture."""
        if lengths:
            # The update must not reach the device before the last replay has read the old lengths.
            self.graph.graph_dispatch_mode.update_stream.wait_stream(self.module.current_stream())
            self.graph.update(cpu_update_input=lengths)
        self.graph.replay()


class GraphedProgram:
    """Callable like `LoadedProgram`. Captures on the second call where the device has graphs, unless `instead` names
    another mode.
    """

    def __init__(
        self,
        program: LoadedProgram,
        kind: str,
        donated: Sequence[bool],
        *,
        instead: str = "",
        make_graph: Callable[[str], Any] | None = None,
    ):
        self.program, self.kind, self.donated = program, kind, list(donated)
        self._make_graph = make_graph or _DeviceGraph
        self._calls = 0
        self._graph: Any = None
        self._buffers: list[torch.Tensor] = []
        self._outs: list[torch.Tensor] = []
        self._pairs: dict[int, int] = {}
        self._lengths: list[
            tuple[int, int]
        ] = []  # argument and places of a row, for each captured call that is told them
        if instead:
            self.status, self._wanted = instead, False
        elif kind not in _NAMES and make_graph is None:
            self.status, self._wanted = f"eager: {kind} has no graphs", False
        else:
            self.status, self._wanted = "eager: warming up", True

    @torch.inference_mode()
    def __call__(self, args: list[torch.Tensor], host: Mapping[int, torch.Tensor] | None = None) -> list[torch.Tensor]:
        self._calls += 1
        if not self._wanted or self._calls == 1:
            return self.program(args, host)
        if self._graph is None and not self._capture(args, host or {}):
            return self.program(args, host)
        told = {key: replay_lengths(host[key[0]], key[1]) for key in dict.fromkeys(self._lengths)}
        if None in told.values():
            return self.program(args, host)
        return self._replay(args, [told[key] for key in self._lengths])

    def _capture(self, args: list[torch.Tensor], host: Mapping[int, torch.Tensor]) -> bool:
        self._buffers = [a if d else a.clone() for a, d in zip(args, self.donated)]

        def step() -> tuple[list[torch.Tensor], dict[int, int]]:
            results = self.program(list(self._buffers), host)
            pairs = pair_donated(self._buffers, self.donated, results)
            # Clone results in donated buffers before the copies below overwrite them.
            buffers = {b.untyped_storage().data_ptr() for b, d in zip(self._buffers, self.donated) if d}
            stays = {j for j, i in pairs.items() if results[j].data_ptr() == self._buffers[i].data_ptr()}
            results = [
                r.clone() if j not in stays and r.untyped_storage().data_ptr() in buffers else r
                for j, r in enumerate(results)
            ]
            for j, i in pairs.items():
                if results[j].data_ptr() != self._buffers[i].data_ptr():
                    self._buffers[i].copy_(results[j])
            return results, pairs

        try:
            graph = self._make_graph(self.kind)
            (self._outs, self._pairs), lengths = graph.capture(step)
        except RuntimeError as error:
            # Nothing runs during a capture, so the arguments are unchanged.
            self._wanted, self.status = False, f"eager: capture failed ({str(error).splitlines()[0]})"
            warnings.warn(f"npu_bridge: {self.status}; steps run operator by operator", stacklevel=3)
            self._buffers = []
            return False
        number = {id(tensor): n for n, tensor in host.items()}
        self._lengths = [(number[id(tensor)], places) for tensor, places in lengths]
        self._graph, self.status = graph, _NAMES.get(self.kind, "one graph")
        return True

    def _replay(self, args: list[torch.Tensor], lengths: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        for buffer, given in zip(self._buffers, args):
            if buffer.data_ptr() != given.data_ptr():
                buffer.copy_(given)
        args.clear()
        self._graph.replay(lengths)
        return [self._buffers[self._pairs[j]] if j in self._pairs else out.clone() for j, out in enumerate(self._outs)]
