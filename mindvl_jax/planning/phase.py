"""Memory of one device in one phase: the state by exact arithmetic, the rest from a compiler's plan of the trainer's
own step.

Nothing is allocated: parameters are shapes and the mesh is abstract.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from mindvl_jax.config.schema import Config, MeshConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import count_weights
from mindvl_jax.data.processor import BatchSpec
from mindvl_jax.models.loading import batch_spec
from mindvl_jax.models.outline import outline_of
from mindvl_jax.objectives.base import Objective
from mindvl_jax.objectives.registry import make_objective
from mindvl_jax.parallel.mesh import AXES, mesh_shape
from mindvl_jax.parallel.possible import require_possible
from mindvl_jax.parallel.rules import batch_sharding, require_rows
from mindvl_jax.training import ema, nf4_base
from mindvl_jax.training import state as states
from mindvl_jax.training.muon import optimizer_init, require_matrices
from mindvl_jax.training.optimizer import learning_rates, parameter_rules
from mindvl_jax.training.state import TrainState
from mindvl_jax.training.step import StepPrograms, make_programs, program_key

AnyMesh = Mesh | AbstractMesh


@dataclasses.dataclass(frozen=True)
class ProgramBytes:
    """A compiler's plan for one program on one device: `peak` counts the `arguments` too."""

    arguments: int
    peak: int

    @property
    def temporaries(self) -> int:
        return self.peak - self.arguments


@dataclasses.dataclass(frozen=True)
class Measured:
    """Programs of one step by name, and memory that the runtime takes beside them (`extra`, by name)."""

    programs: Mapping[str, ProgramBytes]
    extra: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PhasePlan:
    """Bytes on one device at the highest point of a phase.

    Attributes:
      parameters, trained: counts for the whole model.
      rows: name -> bytes, in display order; they add up to `total`.
      fixed: the part of them that follows from the configuration by arithmetic, without a compiler.
      highest: when the peak occurs: a program's name or "hand-over".
      programs: the compiler's plans.
    """

    name: str
    parameters: int
    trained: int
    rows: Mapping[str, int]
    fixed: int
    highest: str
    programs: Mapping[str, ProgramBytes]

    @property
    def total(self) -> int:
        return sum(self.rows.values())


PARAMETERS, FROZEN, MOMENTS, GRADIENTS = (
    "parameters, trained",
    "parameters, frozen",
    "optimizer moments",
    "gradients (float32)",
)
EMA, BATCH, ACTIVATIONS, OLD_MOMENTS = (
    "moving average (float32)",
    "batches",
    "activations, temporaries",
    "moments of the phase before",
)


def planned_mesh(config: MeshConfig, devices: int | None) -> MeshConfig:
    """Replace -1 in the mesh by numbers.

    Raises:
      UserError: an axis is -1 and the number of devices is not given, or they do not fit.
    """
    sizes = [getattr(config.filled, axis) for axis in AXES]
    if devices is None:
        if -1 in sizes:
            axis = AXES[sizes.index(-1)]
            raise UserError(
                f"mesh.{axis}=-1 takes what is left of the devices: say how many there will be by --devices "
                f"N, or --set mesh.{axis}=N"
            )
        devices = math.prod(sizes)
    return MeshConfig(**mesh_shape(config, devices))


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """Mesh of the run without devices; no axis may be -1."""
    return AbstractMesh(
        tuple(getattr(config.filled, axis) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def abstract_batch(spec: BatchSpec, mesh: AnyMesh) -> Any:
    """Shapes, dtypes and shardings of a global batch."""
    return spec.map(
        lambda field: jax.ShapeDtypeStruct(
            field.shape, jnp.dtype(field.dtype), sharding=batch_sharding(field.dims, field.shape, mesh)
        )
    )


def local_bytes(tree: Any) -> int:
    """Bytes on one device of ShapeDtypeStructs or arrays with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Parts:
    """State and batch of a phase, for its programs."""

    state: TrainState
    batch: Any
    spec: BatchSpec
    objective: Objective
    trained: list[str]
    frozen: list[str]
    key: tuple


class Planner:
    """Plan the phases of one configuration whose mesh has no -1.

    Args:
      measure: (config, indexes of phases) -> memory of the programs of each phase on one device, see `peak`.

    Raises:
      UserError: whatever the trainer would refuse when the run or a phase starts.
    """

    def __init__(self, config: Config, measure: Callable[[Config, Sequence[int]], list[Measured]]):
        self.config, self._measure = config, measure
        ema.require_possible(config)
        self.mesh = abstract_mesh(config.mesh)
        require_possible(config, self.mesh.shape)
        self.outline = outline_of(config.model, config.adapters)
        nf4_base.require_possible(config, self.outline, self.mesh)
        self.parts = [parts_of(config, index, self.mesh) for index in range(len(config.training.phases))]
        self._measured: dict[tuple, Measured] = {}

    def fixed_rows(self, index: int) -> dict[str, int]:
        """Bytes held through the whole phase, and gradients: arithmetic, no compiler."""
        parts, phase = self.parts[index], self.config.training.phases[index]
        state = parts.state
        places = {path: value.sharding for path, value in state.trained.items()}
        if self.config.training.optimizer.shard_over_data:
            places = states.spread_shardings(places, state.trained)
        gradients = local_bytes(
            {p: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=places[p]) for p, x in state.trained.items()}
        )
        rows = {
            PARAMETERS: local_bytes(state.trained),
            FROZEN: local_bytes(state.frozen),
            MOMENTS: local_bytes(state.opt_state),
        }
        # With accumulation the running sums exist beside each micro-step's gradients.
        rows[GRADIENTS] = gradients * (1 if phase.gradient_accumulation == 1 else 2)
        if self.config.training.ema_decay is not None:
            rows[EMA] = local_bytes(
                {p: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding) for p, x in state.params.items()}
            )
        # The next batch is placed while a step runs; with the bridge it waits on the host.
        rows[BATCH] = local_bytes(parts.batch) * (2 if self.config.backend == "xla" else 1)
        return rows

    def plan(self, indexes: Sequence[int] | None = None) -> list[PhasePlan]:
        """Plan these phases (default: all). Phases with equal programs are measured once."""
        indexes = range(len(self.parts)) if indexes is None else indexes
        missing = {self.parts[index].key: index for index in indexes if self.parts[index].key not in self._measured}
        if missing:
            self._measured |= zip(missing, self._measure(self.config, list(missing.values())), strict=True)
        return [self._plan(index, self._measured[self.parts[index].key]) for index in indexes]

    def _plan(self, index: int, measured: Measured) -> PhasePlan:
        parts, phase = self.parts[index], self.config.training.phases[index]
        rows = self.fixed_rows(index)
        gradients = rows[GRADIENTS]
        resident = sum(rows.values()) - gradients
        totals = gradients // 2 if phase.gradient_accumulation > 1 else 0
        # A program's arguments are resident; its temporaries come on top. Gradients are among the temporaries, or
        # (sums) arguments.
        heights = {name: resident + totals + program.temporaries for name, program in measured.programs.items()}
        highest = max(heights, key=heights.get)
        rows[ACTIVATIONS] = max(0, heights[highest] - resident - gradients)
        # Temporaries smaller than the gradients mean that the gradients never exist all at once.
        rows[GRADIENTS] = heights[highest] - resident - rows[ACTIVATIONS]
        handed = self.hand_over(index)
        if handed is not None and sum(handed.values()) > sum(rows.values()):
            rows, highest = handed, "hand-over"
        rows = rows | measured.extra

        def numbers(paths):
            return sum(count_weights(path, self.outline.shapes[path]) for path in paths)

        return PhasePlan(
            phase.name,
            numbers([*parts.trained, *parts.frozen]),
            numbers(parts.trained),
            {n: v for n, v in rows.items() if v},
            self.least(index),
            highest,
            measured.programs,
        )

    def hand_over(self, index: int) -> dict[str, int] | None:
        """Bytes while a phase replaces the one before: new moments beside the old ones.

        None if that happens on the host or not at all.
        """
        phase = self.config.training.phases[index]
        if index == 0 or phase.keep_optimizer or self.config.backend != "xla":
            return None
        before = self.parts[index - 1].state
        rows = {name: value for name, value in self.fixed_rows(index).items() if name not in (GRADIENTS, BATCH)}
        return rows | {OLD_MOMENTS: local_bytes(before.opt_state)}

    def least(self, index: int) -> int:
        """Lower bound of the total by arithmetic alone."""
        rows = self.fixed_rows(index)
        return sum(rows.values()) - rows[GRADIENTS]


def parts_of(config: Config, index: int, mesh: AnyMesh) -> Parts:
    """State and batch of a phase as shapes, after the trainer's own checks."""
    phase, where, model = (
        config.training.phases[index],
        f"training.phases[{index}]",
        outline_of(config.model, config.adapters),
    )
    trained, frozen = states.split_trained(list(model.shapes), phase.train, f"{where}.train")
    learning_rates(phase, where)
    parameter_rules(trained, phase, config.training.optimizer, where)
    require_matrices({path: model.shapes[path] for path in trained}, config.training.optimizer, f"{where}.train")
    require_rows(phase.rows, mesh, f"{where}.rows")
    spec, objective = (
        batch_spec(config, phase),
        make_objective(config.model, phase, loss_chunk=config.training.loss_chunk, flow=config.training.flow_matching),
    )
    key = (*program_key(phase, objective, spec, trained), phase.gradient_accumulation > 1)
    return Parts(
        states.abstract_state(
            model,
            trained,
            frozen,
            mesh,
            init=optimizer_init(config.training.optimizer),
            spread=config.training.optimizer.shard_over_data,
        ),
        abstract_batch(spec, mesh),
        spec,
        objective,
        trained,
        frozen,
        key,
    )


def lowerings(config: Config, index: int, mesh: AnyMesh, compile: Callable[..., Callable]) -> Iterable[tuple[str, Any]]:
    """Yield (name, lowered) of each program that a step of the phase runs, as the trainer calls it."""
    parts, phase = parts_of(config, index, mesh), config.training.phases[index]
    programs: StepPrograms = make_programs(
        outline_of(config.model, config.adapters),
        phase=phase,
        objective=parts.objective,
        optimizer=config.training.optimizer,
        spec=parts.spec,
        trained=parts.trained,
        frozen=parts.frozen,
        mesh=mesh,
        seed=config.run.seed,
        where=f"training.phases[{index}]",
        compile=compile,
    )
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    if phase.gradient_accumulation == 1:
        yield "train_step", programs.train_step.lower(parts.state, parts.batch, rate)
        return
    totals = jax.eval_shape(programs.zeros.__wrapped__)
    yield "accumulate", programs.accumulate.lower(parts.state, totals, parts.batch)
    yield "update", programs.update.lower(parts.state, totals, rate)
