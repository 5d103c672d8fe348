"""What training changes: parameters, optimizer moments, counters. A plain pytree of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mindvl_jax.core.errors import UserError
from mindvl_jax.parallel.rules import parameter_shardings, replicated
from mindvl_jax.training.optimizer import zero_moments
from mindvl_jax.core.params import Outline, Params, matches_any, require_matches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State between two optimizer steps.

    Attributes:
      trained: parameters that learn, by path (the masters, in `model.param_dtype`).
      frozen: the other parameters; no gradient and no moments exist for them.
      mu, nu: float32 moments of the trained parameters.
      updates: int32, updates that these moments have seen (skipped steps do not count).
      step: int32, optimizer steps since the start of the run, over all phases, skipped ones included.
      phase_step: int32, the same within the phase; drives the schedule.
      bad_steps: int32, consecutive steps whose loss or gradient was not finite.
      skipped: int32, all such steps of the run.
    """

    trained: Params
    frozen: Params
    mu: Params
    nu: Params
    updates: jax.Array
    step: jax.Array
    phase_step: jax.Array
    bad_steps: jax.Array
    skipped: jax.Array

    @property
    def params(self) -> Params:
        return {**self.trained, **self.frozen}


COUNTERS = ("updates", "step", "phase_step", "bad_steps", "skipped")


def split_trained(paths: Sequence[str], globs: Sequence[str], where: str) -> tuple[list[str], list[str]]:
    """(trained, frozen) paths.

    Raises:
      UserError: a glob matches nothing, or nothing at all is trained.
    """
    require_matches(paths, globs, where)
    trained = [path for path in paths if matches_any(path, globs)]
    if not trained:
        raise UserError(f"{where} is empty: nothing would learn; give at least one glob such as projector/**")
    return trained, [path for path in paths if path not in set(trained)]


def state_of(build: Callable[[str], object], trained: Sequence[str], frozen: Sequence[str], counter: object) -> TrainState:
    """A TrainState with `build(path)` in the place of every array and `counter` for every counter."""
    leaves = {path: build(path) for path in (*trained, *frozen)}
    own = {path: leaves[path] for path in trained}
    return TrainState(trained=own, frozen={path: leaves[path] for path in frozen}, mu=dict(own), nu=dict(own), **dict.fromkeys(COUNTERS, counter))


def state_shardings(outline: Outline, trained: Sequence[str], frozen: Sequence[str], mesh: Mesh) -> TrainState:
    """The sharding of every array of the state; moments lie where their parameters lie."""
    shardings = parameter_shardings(outline.axis_names, {path: s.shape for path, s in outline.shapes.items()}, mesh)
    return state_of(shardings.__getitem__, trained, frozen, replicated(mesh))


def abstract_state(outline: Outline, trained: Sequence[str], frozen: Sequence[str], mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, as a checkpoint is restored into."""
    shardings = state_shardings(outline, trained, frozen, mesh)

    def like(tree: Mapping[str, NamedSharding], dtype=None) -> dict[str, jax.ShapeDtypeStruct]:
        return {p: jax.ShapeDtypeStruct(outline.shapes[p].shape, dtype or outline.shapes[p].dtype, sharding=s) for p, s in tree.items()}

    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return TrainState(
        trained=like(shardings.trained),
        frozen=like(shardings.frozen),
        mu=like(shardings.mu, jnp.float32),
        nu=like(shardings.nu, jnp.float32),
        **dict.fromkeys(COUNTERS, counter),
    )


def initial_params(outline: Outline, mesh: Mesh, seed: int) -> Params:
    """Fresh parameters, created in their places; the values do not depend on the mesh."""
    shardings = parameter_shardings(outline.axis_names, {path: s.shape for path, s in outline.shapes.items()}, mesh)
    return jax.jit(outline.initial, out_shardings=shardings)(jax.random.key(seed))


def start_phase(
    params: Params, trained: Sequence[str], frozen: Sequence[str], mesh: Mesh, *, before: TrainState | None = None, keep_optimizer: bool = False
) -> TrainState:
    """The state at the first step of a phase: counters of the run go on, those of the phase start at 0, moments too unless kept.

    Args:
      before: state at the end of the phase before; its counters are read (a host synchronisation).
      keep_optimizer: carry the moments; the trained parts must be those of `before`.

    Raises:
      UserError: moments shall be kept, but the trained parts differ.
    """
    counter = lambda value: jax.device_put(np.int32(value), replicated(mesh))
    own = {path: params[path] for path in trained}
    counts = {name: 0 if before is None else int(getattr(before, name)) for name in ("step", "skipped", "bad_steps")}
    if keep_optimizer and before is not None:
        if set(before.trained) != set(trained):
            changed = sorted(set(before.trained) ^ set(trained))
            raise UserError(
                f"keep_optimizer: the phase before trained other parts ({len(changed)} parameters differ, such as {changed[0]}); "
                "give both phases the same `train` globs, or leave keep_optimizer out"
            )
        mu, nu, updates = before.mu, before.nu, before.updates
    else:
        # Two calls: mu and nu must not share buffers, both are donated.
        mu, nu, updates = zero_moments(own), zero_moments(own), counter(0)
    return TrainState(
        trained=own,
        frozen={path: params[path] for path in frozen},
        mu=mu,
        nu=nu,
        updates=updates,
        step=counter(counts["step"]),
        phase_step=counter(0),
        bad_steps=counter(counts["bad_steps"]),
        skipped=counter(counts["skipped"]),
    )
