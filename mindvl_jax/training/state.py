"""Training state: parameters, optimizer state, counters. A plain pytree of arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import Outline, Params, in_nf4, matches_any, require_matches
from mindvl_jax.parallel.rules import over_data, parameter_shardings, replicated
from mindvl_jax.training.optimizer import adam_state

Init = Callable[[Params], Any]  # trained parameters -> fresh optimizer state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State between two optimizer steps.

    Attributes:
      trained: parameters that learn, by path (the masters, in `model.param_dtype`).
      frozen: the other parameters; no gradient and no optimizer state exist for them.
      opt_state: of the optax transformation, a pytree whose dicts are keyed by parameter path (`optimizer.AdamState`).
      step: int32, optimizer steps since the start of the run, over all phases, skipped ones included.
      phase_step: int32, the same within the phase; drives the schedule.
      bad_steps: int32, consecutive steps whose loss or gradient was not finite.
      skipped: int32, all such steps of the run.
    """

    trained: Params
    frozen: Params
    opt_state: Any
    step: jax.Array
    phase_step: jax.Array
    bad_steps: jax.Array
    skipped: jax.Array

    @property
    def params(self) -> Params:
        return {**self.trained, **self.frozen}


COUNTERS = ("step", "phase_step", "bad_steps", "skipped")


def split_trained(paths: Sequence[str], globs: Sequence[str], where: str) -> tuple[list[str], list[str]]:
    """(trained, frozen) paths.

    Raises:
      UserError: a glob matches nothing, nothing at all is trained, or base weights would learn beside their adapters
        or in four bits.
    """
    require_matches(paths, globs, where)
    trained = [path for path in paths if matches_any(path, globs)]
    if four_bits := [path for path in trained if in_nf4(path)]:
        raise UserError(
            f"{where} selects {four_bits[0]}, a matrix that adapters.base: nf4 holds in four bits, which cannot learn. "
            "Leave `train` out to train the adapters alone, name **/lora_* and parts outside the layers, or leave "
            "adapters.base out"
        )
    adapted = {path.removesuffix("/lora_b").removesuffix("_adapter") for path in paths if path.endswith("/lora_b")}
    bases = [path for path in trained if path.removesuffix("/kernel") in adapted]
    if bases:
        raise UserError(
            f"{where} selects {bases[0]}"
            + (f" and {len(bases) - 1} more" if len(bases) > 1 else "")
            + ", base weights that have adapters: both would learn. "
            "Leave `train` out to train the adapters alone, or name **/lora_* and the parts without adapters "
            "that learn too"
        )
    if not trained:
        raise UserError(f"{where} is empty: nothing would learn; give at least one glob such as projector/**")
    return trained, [path for path in paths if path not in set(trained)]


def _optimizer_like(
    init: Init, trained: Mapping[str, jax.ShapeDtypeStruct], of_parameter: Mapping[str, NamedSharding], other: Any
) -> Any:
    """A pytree shaped like the optimizer state: `of_parameter[path]` for arrays kept beside a parameter, `other` for
    the rest. What has fewer columns (one value for each block of a row) lies along the same axes where these divide it.
    """

    def choose(keys: tuple, leaf: jax.ShapeDtypeStruct) -> Any:
        path = getattr(keys[-1], "key", None)
        if path not in trained or len(leaf.shape) != len(trained[path].shape):
            return other
        own = of_parameter[path]
        return own if leaf.shape == trained[path].shape else NamedSharding(own.mesh, dividing(own, leaf.shape))

    return jax.tree_util.tree_map_with_path(choose, jax.eval_shape(init, dict(trained)))


def dividing(own: NamedSharding, shape: Sequence[int]) -> PartitionSpec:
    """The spec of `own` without the axes that do not divide their dim of `shape`."""
    sizes = [math.prod(own.mesh.shape[axis] for axis in _axes(axes)) for axes in own.spec]
    return PartitionSpec(
        *(axes if not size % n else None for axes, size, n in zip(own.spec, shape, sizes, strict=False))
    )


def _axes(entry: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def state_shardings(
    outline: Outline,
    trained: Sequence[str],
    frozen: Sequence[str],
    mesh: Mesh,
    *,
    init: Init = adam_state,
    spread: bool = False,
) -> TrainState:
    """The sharding of every array of the state; optimizer arrays lie where their parameters lie.

    Args:
      spread: split optimizer arrays over the data axis too (see `rules.over_data`).
    """
    shardings = parameter_shardings(outline.axis_names, {path: s.shape for path, s in outline.shapes.items()}, mesh)
    return TrainState(
        trained={path: shardings[path] for path in trained},
        frozen={path: shardings[path] for path in frozen},
        opt_state=_optimizer_like(
            init,
            {path: outline.shapes[path] for path in trained},
            spread_shardings(shardings, outline.shapes) if spread else shardings,
            replicated(mesh),
        ),
        **dict.fromkeys(COUNTERS, replicated(mesh)),
    )


def spread_shardings(
    shardings: Mapping[str, NamedSharding], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, NamedSharding]:
    """Where the optimizer arrays of parameters with these shardings lie when they are split over the data axis too."""
    return {
        path: NamedSharding(own.mesh, over_data(own.spec, shapes[path].shape, own.mesh))
        for path, own in shardings.items()
    }


def abstract_state(
    outline: Outline,
    trained: Sequence[str],
    frozen: Sequence[str],
    mesh: Mesh,
    *,
    init: Init = adam_state,
    spread: bool = False,
) -> TrainState:
    """Shapes, dtypes and shardings of the state, as a checkpoint is restored into. `spread`: as `state_shardings`."""
    shardings = state_shardings(outline, trained, frozen, mesh, init=init, spread=spread)

    def place(like: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)

    own = {path: outline.shapes[path] for path in trained}
    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return TrainState(
        trained=jax.tree.map(place, own, shardings.trained),
        frozen={path: place(outline.shapes[path], sharding) for path, sharding in shardings.frozen.items()},
        opt_state=jax.tree.map(place, jax.eval_shape(init, own), shardings.opt_state),
        **dict.fromkeys(COUNTERS, counter),
    )


def initial_params(outline: Outline, mesh: Mesh, seed: int) -> Params:
    """Initialise parameters with their shardings; the values do not depend on the mesh."""
    shardings = parameter_shardings(outline.axis_names, {path: s.shape for path, s in outline.shapes.items()}, mesh)
    return jax.jit(outline.initial, out_shardings=shardings)(jax.random.key(seed))


def start_phase(
    params: Params,
    trained: Sequence[str],
    frozen: Sequence[str],
    mesh: Mesh,
    *,
    before: TrainState | None = None,
    keep_optimizer: bool = False,
    init: Init = adam_state,
    spread: bool = False,
) -> TrainState:
    """The state at the first step of a phase: counters of the run go on, those of the phase start at 0, the optimizer
    too unless kept.

    Args:
      before: state at the end of the phase before; its counters are read (a host synchronisation).
      keep_optimizer: carry the optimizer state; the trained parts must be those of `before`.
      init: fresh optimizer state of the trained parameters. spread: as `state_shardings`.

    Raises:
      UserError: the optimizer state shall be kept, but the trained parts differ.
    """

    def counter(value):
        return jax.device_put(np.int32(value), replicated(mesh))

    own = {path: params[path] for path in trained}
    counts = {name: 0 if before is None else int(getattr(before, name)) for name in ("step", "skipped", "bad_steps")}
    if keep_optimizer and before is not None:
        if set(before.trained) != set(trained):
            changed = sorted(set(before.trained) ^ set(trained))
            raise UserError(
                f"keep_optimizer: the phase before trained other parts ({len(changed)} parameters differ, "
                f"such as {changed[0]}); "
                "give both phases the same `train` globs, or leave keep_optimizer out"
            )
        opt_state = before.opt_state
    elif spread:
        shapes = {path: jax.ShapeDtypeStruct(value.shape, value.dtype) for path, value in own.items()}
        places = spread_shardings({path: value.sharding for path, value in own.items()}, shapes)
        opt_state = jax.jit(init, out_shardings=_optimizer_like(init, shapes, places, replicated(mesh)))(own)
    else:
        # What stands beside no parameter (a counter) has no sharding yet. Through the host: JAX cannot move an array of
        # one device onto devices of several processes.
        opt_state = jax.tree.map(
            lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(np.asarray(x), replicated(mesh)),
            init(own),
        )
    return TrainState(
        trained=own,
        frozen={path: params[path] for path in frozen},
        opt_state=opt_state,
        step=counter(counts["step"]),
        phase_step=counter(0),
        bad_steps=counter(counts["bad_steps"]),
        skipped=counter(counts["skipped"]),
    )


# --- as checkpoints hold it ------------------------------------------------------------------------------------------


def optimizer_arrays(state: TrainState) -> dict[str, Any]:
    """Optimizer state and counters by name: `mu/<path>`, `nu/<path>`, `updates`, `step`, ..."""
    named = {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    return named | {name: getattr(state, name) for name in COUNTERS}


def state_of(target: TrainState, params: Mapping[str, jax.Array], optimizer: Mapping[str, jax.Array]) -> TrainState:
    """The state with the structure of `target` from arrays by name (see `optimizer_arrays`)."""
    names = list(optimizer_arrays(target))[: -len(COUNTERS)]
    return TrainState(
        trained={path: params[path] for path in target.trained},
        frozen={path: params[path] for path in target.frozen},
        opt_state=jax.tree.unflatten(jax.tree.structure(target.opt_state), [optimizer[name] for name in names]),
        **{name: optimizer[name] for name in COUNTERS},
    )
