"""`npu_bridge.jit`: like `jax.jit`, but the step runs as a torch program on npu, cuda or cpu, one process a device."""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from npu_bridge import jaxcompat
from npu_bridge.compiler import lower, partition, passes
from npu_bridge.compiler.codegen.printer import Source, generate
from npu_bridge.compiler.importer import Importer
from npu_bridge.compiler.ir import Layout, MeshShape
from npu_bridge.compiler.lower import Traced
from npu_bridge.errors import PlacementError, UnsupportedError
from npu_bridge.runtime import cache
from npu_bridge.runtime.compiled import require_compiler

HOST = "pinned_host"
MeshLike: TypeAlias = Mesh | AbstractMesh | dict[str, int] | None


@dataclasses.dataclass(frozen=True)
class Options:
    """Options that change the written program.

    device: npu gets the forms of torch_npu's fused calls (`npu_bridge.compiler.passes.fused_calls`).
    allow_host_sync: loops whose number of rounds is known only on the device may read it every round.
    reduce_in_float32: sums of 16-bit floats across devices are exchanged in float32.
    overlap: gathers and scatters run beside the computation (`npu_bridge.compiler.passes.overlap`).
    """

    device: str = "cpu"
    allow_host_sync: bool = False
    reduce_in_float32: bool = False
    overlap: bool = True


def as_mesh(mesh: MeshLike) -> tuple[AbstractMesh | None, tuple[int, ...] | None]:
    """Return an abstract mesh for tracing, and the rank at each mesh position (None: in order)."""
    if mesh is None:
        return None, None
    if isinstance(mesh, dict):
        names, sizes, order = tuple(mesh), tuple(mesh.values()), None
    elif isinstance(mesh, AbstractMesh):
        names, sizes, order = mesh.axis_names, mesh.axis_sizes, None
    else:
        names, sizes = mesh.axis_names, mesh.devices.shape
        ids = [d.id for d in mesh.devices.ravel()]
        order = None if ids == list(range(len(ids))) else tuple(sorted(ids).index(i) for i in ids)
    return AbstractMesh(tuple(sizes), tuple(names), axis_types=(AxisType.Auto,) * len(names)), order


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, (PartitionSpec, jax.sharding.Sharding))


def _spec(x: Any) -> PartitionSpec:
    if x is None:
        return PartitionSpec()
    if isinstance(x, PartitionSpec):
        return x
    if isinstance(x, NamedSharding):
        if x.memory_kind not in (None, "device", "unpinned_host", HOST):
            raise PlacementError(f"npu_bridge: sharding {x} asks for {x.memory_kind} memory; expected device or {HOST}")
        return x.spec
    raise PlacementError(f"npu_bridge: sharding {x!r}; expected a PartitionSpec or a NamedSharding")


def _kind(x: Any) -> str | None:
    """Memory kind that a sharding asks for; None is the device's."""
    return HOST if getattr(x, "memory_kind", None) == HOST else None


def _spec_layout(spec: PartitionSpec, rank: int) -> Layout:
    axes = [() if a is None else (a,) if isinstance(a, str) else tuple(a) for a in spec]
    return tuple(axes + [()] * (rank - len(axes)))


class Lowered:
    """A step lowered to a torch program, before any process group or device is needed."""

    def __init__(
        self,
        name: str,
        source: Source,
        traced: Traced,
        layouts: dict[str, list],
        mesh: MeshShape,
        seconds: dict[str, float],
        host_sync: bool = False,
    ):
        self.name, self.source, self.traced, self.mesh, self.seconds, self.host_sync = (
            name,
            source,
            traced,
            mesh,
            seconds,
            host_sync,
        )
        self.arg_layouts: list[Layout] = [tuple(tuple(a) for a in lay) for lay in layouts["args"]]
        self.result_layouts: list[Layout] = [tuple(tuple(a) for a in lay) for lay in layouts["results"]]
        self.host_arguments: list[bool] = layouts["host_arguments"]  # lie in the host's memory
        self.host_results: list[bool] = layouts["host_results"]

    def as_text(self) -> str:
        """Return the torch program: Python source with scopes and source lines of the JAX program."""
        return self.source.text

    def collectives(self) -> list[dict[str, Any]]:
        """List the collectives: kind, axes, devices, local shape and dtype, bytes sent per device, calls per step,
        location.
        """
        return list(self.source.collectives)

    def kernels(self) -> list[dict[str, Any]]:
        """List the calls of fused operators: name, operand and result types, parameters, calls per step, location."""
        return list(self.source.kernels)

    def memory(self) -> dict[str, int]:
        """Return planned bytes on one device: arguments, peak (arguments included), in-place updates, copies."""
        return dict(self.source.memory)


class Compiled:
    """A program loaded on this rank; call it like the function."""

    def __init__(self, lowered: Lowered, device: str, *, capture: bool = True, compile: bool = False):
        from npu_bridge.runtime.graph import GraphedProgram
        from npu_bridge.runtime.mesh import Runtime
        from npu_bridge.runtime.program import LoadedProgram

        self.lowered, self.device = lowered, device
        source = lowered.source
        self.runtime = Runtime(lowered.mesh, device, source.axes_used)
        self.runtime.callbacks = lowered.traced.callbacks
        if compile and lowered.traced.callbacks:
            found = dict.fromkeys(c.name for c in lowered.traced.callbacks)
            raise UnsupportedError(
                [f"{name}: torch.compile takes no callbacks to Python" for name in found], lowered.name
            )
        kernels = list(dict.fromkeys(k["name"] for k in source.kernels))
        program = LoadedProgram(
            source.text, source.constants, kernels, self.runtime, lowered.name, source.host_arguments, compile=compile
        )
        donated = [lowered.traced.donated[i] for i in lowered.traced.kept]
        instead = "torch.compile" if compile else "" if capture else "eager: capture is off"
        if program.moves and compile:
            raise UnsupportedError(["torch.compile takes no copies to and from host memory"], lowered.name)
        if program.moves and device != "cpu":
            instead = instead or "eager: values move between the device's and the host's memory"
        if lowered.host_sync:
            instead = instead or "eager: the program reads the device inside a step (allow_host_sync)"
        self.program = GraphedProgram(program, device, donated, instead=instead)

    @property
    def execution(self) -> str:
        """Execution mode of steps: "eager: <reason>", "one CUDA graph", "one NPU graph" or "torch.compile"."""
        return self.program.status

    def __call__(self, flat: Sequence[Any]) -> list[Any]:
        """Run on flat arguments of the whole program (unused ones included) and return flat Arrays."""
        from npu_bridge.runtime.array import Array
        from npu_bridge.runtime.scopes import program_to_run

        traced, low = self.lowered.traced, self.lowered
        host = {
            n: self._on_host(flat[traced.kept[n]], traced.kept[n], low.arg_layouts[n])
            for n in low.source.host_arguments
        }
        local = [self._place(flat[i], i, low.arg_layouts[n], low.host_arguments[n]) for n, i in enumerate(traced.kept)]
        for i, donated in enumerate(traced.donated):
            if donated and isinstance(flat[i], Array) and not flat[i].is_deleted():
                flat[i].donate(low.name)  # unused arguments are donated too
        others = {_memory(x) for x, donated in zip(local, (traced.donated[i] for i in traced.kept)) if not donated}
        results = _apart(program_to_run(self)(local, host), others, self.runtime.memory, low.host_results)
        out = []
        for tensor, aval, layout, hosted in zip(results, traced.out_avals, low.result_layouts, low.host_results):
            if aval.dtype == jax.dtypes.float0:
                out.append(np.zeros(aval.shape, jax.dtypes.float0))
            elif jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
                data = Array(tensor, (*aval.shape, *tensor.shape[len(aval.shape) :]), np.uint32, layout, self.runtime)
                out.append(jax.random.wrap_key_data(np.asarray(data), impl=jaxcompat.key_implementation(aval.dtype)))
            else:
                made = Array(tensor, aval.shape, aval.dtype, layout, self.runtime, weak_type=aval.weak_type)
                made.memory_kind = HOST if hosted else "device"
                out.append(made)
        return out

    def _on_host(self, x: Any, number: int, layout: Layout) -> Any:
        """Return this rank's shard of an argument in host memory. Fetching one from the device waits for the device."""
        from npu_bridge.runtime.array import Array
        from npu_bridge.runtime.program import shard

        if isinstance(x, Array):
            return (shard(x.local, layout, self.runtime) if x.is_fully_replicated else x.local).cpu()
        return self._shard(x, number, layout).cpu()

    def _place(self, x: Any, number: int, layout: Layout, hosted: bool = False) -> Any:
        """Return this rank's shard of an argument in the memory that the program expects it in."""
        local = self._local(x, number, layout, hosted)
        if self.runtime.kind != "cpu" and (local.device.type == "cpu") != hosted:
            memory = self.runtime.memory
            local = memory.to_host(local) if hosted else memory.to_device(local)
            memory.join()
        return local

    def _local(self, x: Any, number: int, layout: Layout, hosted: bool) -> Any:
        from npu_bridge.runtime.array import Array
        from npu_bridge.runtime.program import shard

        aval, donated = self.lowered.traced.in_avals[number], self.lowered.traced.donated[number]
        key = jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key)
        if not key and tuple(np.shape(x)) != tuple(aval.shape):
            raise PlacementError(
                f"npu_bridge: argument {number} has shape {tuple(np.shape(x))}, {self.lowered.name} was "
                f"compiled for {aval.shape}"
            )
        if isinstance(x, Array):
            same = all(
                (x.runtime.size(a) == 1 and self.runtime.size(b) == 1) or tuple(a) == tuple(b)
                for a, b in zip(_full(x), _full(x, layout))
            )
            if same:
                return x.donate(self.lowered.name) if donated else x.held
            if not x.is_fully_replicated:
                raise PlacementError(
                    f"npu_bridge: argument {number} is split over {x.layout}, {self.lowered.name} wants "
                    f"{layout}; give it the sharding of "
                    "the step that made it (out_shardings), or gather it first"
                )
            local = shard(x.donate(self.lowered.name) if donated else x.local, layout, self.runtime)
            return local.contiguous()
        local = self._shard(x, number, layout)
        if hosted:
            return self.runtime.memory.clone(local)
        if local.device.type == "cpu" != self.runtime.device.type:
            # Copies from pinned memory are asynchronous; from other memory the host would wait for the queue to drain.
            return local.pin_memory().to(self.runtime.device, non_blocking=True)
        moved = local.to(self.runtime.device).contiguous()
        # Copy donated arrays: JAX or numpy may still hold their memory.
        return moved.clone() if donated and moved.data_ptr() == local.data_ptr() else moved

    def _shard(self, x: Any, number: int, layout: Layout) -> Any:
        """Return this rank's shard of a host array, without a copy."""
        from npu_bridge.runtime.array import held_shard
        from npu_bridge.runtime.conversion import to_torch
        from npu_bridge.runtime.program import shard

        dtype = self.lowered.traced.in_avals[number].dtype
        key = jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
        held = None if key or not isinstance(x, jax.Array) else held_shard(x, layout, self.runtime)
        if held is not None:
            return to_torch(held, dtype)
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            raise PlacementError(
                f"npu_bridge: argument {number} is a JAX array of sharding {x.sharding}, of which this "
                f"process holds another part than {layout} gives "
                "it; place it as in_shardings says, with process r of the job as device r of the mesh"
            )
        return shard(to_torch(x, np.uint32 if key else dtype), layout, self.runtime)


def _memory(x: Any) -> int:
    return x.untyped_storage().data_ptr()


def _apart(results: Sequence[Any], others: set[int], memory: Any, hosted: Sequence[bool]) -> list[Any]:
    """Clone results that alias kept arguments (`others`), earlier results or expanded views, so that every output can
    be donated. hosted: which lie in the host's memory, where `memory` copies them.
    """
    taken, out = set(others), []
    for x, on_host in zip(results, hosted, strict=True):
        repeats = any(step == 0 and n > 1 for step, n in zip(x.stride(), x.shape))
        own = x
        if x.numel() and (repeats or _memory(x) in taken):
            own = memory.clone(x) if on_host else x.contiguous() if repeats else x.clone()
        taken.add(_memory(own))
        out.append(own)
    return out


def _full(x: Any, layout: Layout | None = None) -> Layout:
    layout = x.layout if layout is None else layout
    return layout or ((),) * x.ndim


def _collector_paused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Pause garbage collection: lowering allocates 100,000s of objects that live on, and repeated collections cost up
    to a fifth of its time.
    """

    @functools.wraps(function)
    def paused(*args: Any, **named: Any) -> Any:
        was_on = gc.isenabled()
        gc.disable()
        try:
            return function(*args, **named)
        finally:
            if was_on:
                gc.enable()

    return paused


def _counted(numbers: Sequence[int], count: int) -> list[int]:
    """Resolve argument numbers for a call with `count` arguments: negative ones count from the end, omitted defaults
    are dropped.
    """
    return [n % count for n in numbers if -count <= n < count]


def _is_weak(x: Any) -> bool:
    """Whether `x` is weakly typed in JAX: like a Python number it takes the dtype of the other operand."""
    return bool(getattr(x, "weak_type", type(x) in (int, float)))


class Jitted:
    """The callable that `jit` returns."""

    def __init__(
        self,
        fn: Callable[..., Any],
        mesh: MeshLike,
        in_shardings: Any,
        out_shardings: Any,
        donate: tuple[int, ...],
        static: tuple[int, ...],
        state: tuple[int, ...] | None,
        device: str,
        options: Options,
        capture: bool,
        compile: bool,
        static_names: tuple[str, ...] = (),
        keep_unused: bool = False,
    ):
        functools.update_wrapper(self, fn, updated=())
        self.static_names, self.keep_unused = static_names, keep_unused
        self.fn, self.device, self.options, self.capture, self.compile = fn, device, options, capture, compile
        self.mesh, self.order = as_mesh(mesh)
        self.in_shardings, self.out_shardings = in_shardings, out_shardings
        self.donate, self.static, self.state = donate, static, donate if state is None else state
        self._compiled: dict[Any, tuple[Compiled, Any]] = {}

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind to an object when used as a method decorator."""
        return self if instance is None else functools.partial(self, instance)

    @functools.cached_property
    def _inside(self) -> Callable[..., Any]:
        """Inline the function into the surrounding JAX trace."""
        return jaxcompat.xla_jit(self.fn, static_argnums=self.static, static_argnames=self.static_names)

    # -- arguments --------------------------------------------------------------------------------------------------

    def _dynamic(self, args: Sequence[Any]) -> list[Any]:
        static = _counted(self.static, len(args))
        return [a for i, a in enumerate(args) if i not in static]

    def _specs(self, args: Sequence[Any]) -> list[Any]:
        dynamic = self._dynamic(args)
        given = self.in_shardings
        if given is None:
            return [jax.tree.map(lambda _: None, a, is_leaf=lambda x: x is None) for a in dynamic]
        if _is_spec(given):
            given = (given,) * len(dynamic)
        if len(given) != len(dynamic):
            raise PlacementError(
                f"npu_bridge: in_shardings has {len(given)} entries, {len(dynamic)} arguments were passed"
            )
        return [jax.tree.broadcast(g, a, is_leaf=_is_spec) for g, a in zip(given, dynamic)]

    def _abstract(self, args: Sequence[Any], named: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return arguments as ShapeDtypeStructs with shardings. Raises once with all problems."""
        if set(named) - set(self.static_names) and self.in_shardings is not None:
            raise PlacementError(
                f"npu_bridge: {self._name} has in_shardings and was given {', '.join(named)} by name; pass "
                "these arguments by position"
            )
        specs, static = iter(self._specs(args)), _counted(self.static, len(args))
        problems: list[str] = []

        def one(path: Any, x: Any, spec: Any, number: int | str) -> Any:
            where = f"argument {number}{jax.tree_util.keystr(path)}"
            weak = _is_weak(x)
            if isinstance(x, jax.ShapeDtypeStruct) or (hasattr(x, "shape") and hasattr(x, "dtype")):
                shape, dtype = tuple(x.shape), x.dtype
                if type(x).__module__.split(".")[0] == "torch":
                    dtype = (
                        np.dtype(str(dtype).removeprefix("torch."))
                        if "bfloat" not in str(dtype)
                        else jax.numpy.bfloat16
                    )
            elif isinstance(x, (bool, int, float, np.generic)):
                shape, dtype = (), jax.dtypes.canonicalize_dtype(np.result_type(x))
            else:
                problems.append(
                    f"{where}: {type(x).__name__} is no array; pass an array, or name the argument in static_argnums"
                )
                return jax.ShapeDtypeStruct((), np.float32)
            if not jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
                dtype = jax.dtypes.canonicalize_dtype(dtype)  # 64 bits become 32 unless jax_enable_x64 is on
            if (reason := lower.refused_dtype(dtype, jax.config.jax_enable_x64)) is not None:
                problems.append(f"{where}: {reason}")
                return jax.ShapeDtypeStruct(shape, np.float32)
            if self.mesh is None:
                if spec is not None and (any(_spec(spec)) or _kind(spec)):
                    problems.append(
                        f"{where}: sharding {_spec(spec)} without a mesh; pass mesh={{axis: size}} or a "
                        "jax.sharding.Mesh to npu_bridge.jit"
                    )
                return jax.ShapeDtypeStruct(shape, dtype, weak_type=weak)
            kind = _kind(x if spec is None else spec)
            if spec is None and getattr(x, "layout", None):
                spec = PartitionSpec(*(tuple(a) or None for a in x.layout))
            spec, found = _spec(spec), len(problems)
            sizes = dict(zip(self.mesh.axis_names, self.mesh.axis_sizes))
            for d, axes in enumerate(_spec_layout(spec, len(shape))):
                unknown = [a for a in axes if a not in sizes]
                if unknown:
                    problems.append(f"{where}: axes {unknown} are not in the mesh {sizes}")
                    continue
                shards = int(np.prod([sizes[a] for a in axes], dtype=np.int64))
                if d >= len(shape):
                    problems.append(f"{where}: sharding {spec} names dimension {d}, the array has shape {shape}")
                elif shape[d] % shards:
                    problems.append(
                        f"{where}: dimension {d} of {shape} cannot be split evenly over {axes}, {shards} shards; pad it"
                    )
            return jax.ShapeDtypeStruct(
                shape,
                dtype,
                sharding=None if len(problems) > found else NamedSharding(self.mesh, spec, memory_kind=kind),
                weak_type=weak,
            )

        made = []
        for number, a in enumerate(args):
            if number in static:
                made.append(a)
            else:
                made.append(jax.tree_util.tree_map_with_path(functools.partial(one, number=number), a, next(specs)))
        by_name = {
            name: a
            if name in self.static_names
            else jax.tree_util.tree_map_with_path(functools.partial(one, spec=None, number=name), a)
            for name, a in named.items()
        }
        if problems:
            raise UnsupportedError(problems, f"{self._name} with these arguments")
        return made, by_name

    @property
    def _name(self) -> str:
        return getattr(self.fn, "__name__", type(self.fn).__name__)

    # -- lowering ---------------------------------------------------------------------------------------------------

    @_collector_paused
    def lower(self, *args: Any, **named: Any) -> Lowered:
        """Lower for these arguments (arrays or ShapeDtypeStructs). Needs no device and no other process.

        Raises UnsupportedError listing everything the bridge refuses, VersionError, PlacementError.
        """
        import time

        begin = time.perf_counter()
        out = self.out_shardings
        if self.mesh is not None and out is not None:
            out = jax.tree.map(
                lambda s: None if s is None else NamedSharding(self.mesh, _spec(s), memory_kind=_kind(s)),
                out,
                is_leaf=_is_spec,
            )
        abstract, by_name = self._abstract(args, named)
        traced = lower.lower(
            self.fn,
            abstract,
            named=by_name,
            mesh=self.mesh,
            donate_argnums=[n + len(args) if n < 0 else n for n in self.donate],
            static_argnums=self.static,
            out_shardings=out if self.mesh is not None else None,
            name=self._name,
            device=self.device,
            static_argnames=self.static_names,
            keep_unused=self.keep_unused,
            allow_host_sync=self.options.allow_host_sync,
        )
        lowered_at = time.perf_counter()
        state = self._state_arguments(args) + [False] * len(
            jax.tree.leaves({k: v for k, v in named.items() if k not in self.static_names})
        )
        state = [state[i] for i in traced.kept]
        donated = [traced.donated[i] for i in traced.kept]
        name = found = None
        if cache.directory() is not None:
            name = cache.key(
                str(traced.module), state=state, donated=donated, order=self.order, **dataclasses.asdict(self.options)
            )
            found = cache.load(name)
        if found is None:
            try:
                found = self._write(traced, state, donated)
            except UnsupportedError as error:
                raise UnsupportedError(error.problems, self._name) from error
            if name is not None:
                cache.store(name, *found)
        source, extra = found
        mesh = MeshShape(tuple((a, n) for a, n in extra["mesh"]), tuple(extra["devices"]) if extra["devices"] else None)
        if self.mesh is not None and not mesh.axes:  # no sharding mentioned the mesh
            mesh = MeshShape(tuple(zip(self.mesh.axis_names, self.mesh.axis_sizes)))
        if self.order is not None:
            mesh = MeshShape(mesh.axes, self.order)
        seconds = {"trace_and_lower": lowered_at - begin, "write": time.perf_counter() - lowered_at}
        return Lowered(self._name, source, traced, extra, mesh, seconds, self.options.allow_host_sync)

    def _state_arguments(self, args: Sequence[Any]) -> list[bool]:
        flags: list[bool] = []
        static, state = _counted(self.static, len(args)), _counted(self.state, len(args))
        for i, a in enumerate(args):
            if i not in static:
                flags += [i in state] * len(jax.tree.leaves(a))
        return flags

    def _write(self, traced: Traced, state: list[bool], donated: list[bool]) -> tuple[Source, dict[str, Any]]:
        module = partition.partition(traced.module, state if self.mesh is not None else ())
        with module.context:
            program = Importer(module, self.device).run(donated)
        program.name = self._name
        passes.run(
            program, device=self.device, reduce_in_float32=self.options.reduce_in_float32, overlap=self.options.overlap
        )
        source = generate(program, allow_host_sync=self.options.allow_host_sync, device=self.device)
        body = program.body
        extra = {
            "args": [v.layout for v in body.params],
            "results": [v.layout for v in body.results],
            "mesh": program.mesh.axes,
            "devices": program.mesh.devices,
            "host_arguments": [v.host for v in body.params],
            "host_results": [v.host for v in body.results],
        }
        return source, extra

    # -- running ----------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **named: Any) -> Any:
        flat, tree = jax.tree.flatten(
            (self._dynamic(args), {k: v for k, v in named.items() if k not in self.static_names})
        )
        if any(isinstance(x, jax.core.Tracer) for x in flat):  # inside jax.grad, jax.vmap or another trace
            return self._inside(*args, **named)
        # Types are part of the key: 1, 1.0 and True are equal but give different programs.
        fixed: tuple[Any, ...] = tuple((type(args[i]), args[i]) for i in _counted(self.static, len(args)))
        fixed += tuple((k, type(named[k]), named[k]) for k in self.static_names if k in named)
        signature = (
            tree,
            fixed,
            tuple((np.shape(x), str(getattr(x, "dtype", type(x))), _is_weak(x), _kind(x)) for x in flat),
        )
        try:
            known = signature in self._compiled
        except TypeError as error:
            raise TypeError(
                f"npu_bridge: a static argument of {self._name} cannot be hashed ({error}); static arguments "
                "are compiled in and must be hashable"
            ) from None
        if not known:
            low = self.lower(*args, **named)
            self._compiled[signature] = (
                Compiled(low, self.device, capture=self.capture, compile=self.compile),
                low.traced.out_tree,
            )
        compiled, out_tree = self._compiled[signature]
        return jax.tree.unflatten(out_tree, compiled(flat))


def _names_and_numbers(
    fn: Callable[..., Any], numbers: tuple[int, ...], names: tuple[str, ...]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Resolve argument numbers and names in both directions, as far as the signature allows."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # a built-in
        return numbers, names
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    also = [positional.index(name) for name in names if name in positional]
    named = [positional[n] for n in numbers if -len(positional) <= n < len(positional)]
    return tuple(dict.fromkeys([*numbers, *also])), tuple(dict.fromkeys([*names, *named]))


def jit(
    fn: Callable[..., Any] | None = None,
    *,
    mesh: MeshLike = None,
    in_shardings: Any = None,
    out_shardings: Any = None,
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    donate_argnames: str | Sequence[str] = (),
    keep_unused: bool = False,
    state_argnums: int | Sequence[int] | None = None,
    device: str = "cpu",
    allow_host_sync: bool = False,
    reduce_in_float32: bool = False,
    overlap: bool = True,
    capture: bool = True,
    compile: bool = False,
) -> Any:
    """Compile a JAX function into a torch program for one device of a mesh.

    Without a function it is a decorator with these options.

    Args:
      fn: a function of pytrees of arrays, as for `jax.jit`.
      mesh: a `jax.sharding.Mesh`, an `AbstractMesh`, or ``{axis: size}``. Each process is one mesh position; no JAX
      devices are needed.
      in_shardings, out_shardings: pytree prefixes of PartitionSpec or NamedSharding; None is replicated (arguments) or
        left to propagation (results).
      donate_argnums: arguments whose storage the step may overwrite.
      static_argnums, static_argnames: hashable arguments that are compiled in, by position or by name.
      donate_argnames: as `donate_argnums`, for arguments that are passed by position.
      keep_unused: keep arguments that the function does not read among those of the program.
      state_argnums: arguments whose shardings yield to the batch's during propagation (default: the donated ones).
      device: "npu", "cuda" or "cpu".
      allow_host_sync: allow loops whose trip count is read from the device (one synchronisation a round).
      reduce_in_float32: exchange sums of 16-bit floats in float32.
      overlap: start gathers before the computation ahead of their first use, and wait for scatters after the
      computation that follows; at most two of each kind are in flight, which bounds the memory. False makes every
      collective blocking.
      capture: capture the whole step as a device graph where the device has graphs; False runs eagerly.
      compile: compile the written program by `torch.compile`, on cuda or cpu and in one process. The first step
      includes the compilation.

    Inside `jax.grad`, `jax.vmap`, `jax.checkpoint` or another trace the function is inlined: wrap the outermost
    function to run all of it on the device.

    Returns a callable; its results are `npu_bridge.Array`, its `.lower(*args)` gives `.as_text()`, `.collectives()`,
    `.kernels()` and `.memory()`.
    """
    if fn is None:
        given = {k: v for k, v in locals().items() if k != "fn"}
        return functools.partial(jit, **given)

    def as_tuple(n):
        return (n,) if isinstance(n, (int, str)) else tuple(n)

    static, names = _names_and_numbers(fn, as_tuple(static_argnums), as_tuple(static_argnames))
    donate, _ = _names_and_numbers(fn, as_tuple(donate_argnums), as_tuple(donate_argnames))
    jaxcompat.require_tested_version()
    if compile:
        abstract, _ = as_mesh(mesh)
        require_compiler(device, 1 if abstract is None else abstract.size)
    return Jitted(
        fn,
        mesh,
        in_shardings,
        out_shardings,
        donate,
        static,
        None if state_argnums is None else as_tuple(state_argnums),
        device,
        Options(device, allow_host_sync, reduce_in_float32, overlap),
        capture,
        compile,
        names,
        keep_unused,
    )
