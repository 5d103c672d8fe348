"""Our side of training benchmarks: the step of `mindvl_jax.training` on one device."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.workloads import Workload
from mindvl_jax.config.schema import MeshConfig, OptimizerConfig, PhaseConfig
from mindvl_jax.core.params import Params
from mindvl_jax.models.mindvl.config import MindVLConfig
from mindvl_jax.models.outline import outline_of
from mindvl_jax.models.vision_language.batch import Batch, BatchShape
from mindvl_jax.objectives.registry import make_objective
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.parallel.rules import row_sharding
from mindvl_jax.training.state import initial_params, start_phase
from mindvl_jax.training.step import make_programs
from mindvl_jax.training.xla_backend import compile_xla, compiler_options

LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.05
OPTIMIZER = OptimizerConfig(b1=0.9, b2=0.99, clip_norm=1.0)


class Step:
    """The compiled training step with its state, on XLA or through the bridge on torch's device `bridge`.

    Attributes:
      compile_seconds: of tracing, lowering and XLA.
      state: after the last step; donated by the next.
      program: the compiled step. batch: on the device.
      planned_bytes: arguments, results and temporaries of the program by the compiler's own plan. planned_temporaries:
        of these, what lies beyond the arguments.
    """

    def __init__(
        self,
        config: MindVLConfig,
        workload: Workload,
        batch: Batch,
        parameters: Params | None = None,
        *,
        bridge: str | None = None,
    ):
        mesh = make_mesh(MeshConfig())
        self.outline = outline_of(config)
        self._on_xla = bridge is None
        parameters = initial_params(self.outline, mesh, seed=0) if parameters is None else parameters
        # Copy: the step donates its state, and the twin uses `parameters` too.
        self.state = start_phase(jax.tree.map(lambda x: x.copy(), parameters), list(self.outline.shapes), [], mesh)
        shape = BatchShape(
            rows=batch.tokens.shape[0],
            tokens=batch.tokens.shape[1],
            patches=batch.patches.shape[1],
            samples=batch.segment_lengths.shape[1],
            images=batch.image_lengths.shape[1],
            windows=batch.window_lengths.shape[1],
            patch_dim=batch.patches.shape[2],
        )
        phase = PhaseConfig(
            name="benchmark",
            steps=1,
            mixture=({"source": "none"},),
            rows=shape.rows,
            sequence_length=shape.tokens,
            patches_per_row=shape.patches,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            max_sample_length=workload.longest_sample,
            max_image_patches=workload.longest_image,
        )
        programs = make_programs(
            self.outline,
            phase=phase,
            objective=make_objective(config, phase, loss_chunk=workload.loss_chunk),
            optimizer=OPTIMIZER,
            spec=shape.spec(),
            trained=list(self.outline.shapes),
            frozen=[],
            mesh=mesh,
            compile=functools.partial(compile_xla, options=compiler_options(config, mesh))
            if bridge is None
            else functools.partial(_through_bridge, device=bridge),
        )
        self.batch = jax.device_put(batch, row_sharding(mesh))
        start = time.perf_counter()
        if bridge is None:
            self.program = programs.train_step.lower(self.state, self.batch, np.float32(LEARNING_RATE)).compile()
            plan = self.program.memory_analysis()
            self.planned_temporaries = plan.output_size_in_bytes + plan.temp_size_in_bytes - plan.alias_size_in_bytes
            self.planned_bytes = plan.argument_size_in_bytes + self.planned_temporaries
        else:
            self.program = programs.train_step
            plan = self.program.lower(self.state, self.batch, np.float32(LEARNING_RATE)).memory()
            self.planned_bytes, self.planned_temporaries = (
                plan["peak_bytes"],
                plan["peak_bytes"] - plan["argument_bytes"],
            )
        self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> tuple[float, float]:
        """Run one step. Returns (loss before the update, gradient norm)."""
        self.state, metrics = self.program(self.state, self.batch, np.float32(LEARNING_RATE))
        if self._on_xla:
            jax.block_until_ready(self.state)
        # Reading a number also waits for the bridge: its programs run in order.
        return float(metrics["loss"]), float(metrics["grad_norm"])


def _through_bridge(
    function: Callable, *, in_shardings, out_shardings, donate_argnums: tuple[int, ...] = (), device: str
) -> Callable:
    """Compile function for `make_programs` on one device; shardings are ignored."""
    import npu_bridge

    return npu_bridge.jit(function, donate_argnums=donate_argnums, device=device)


def initial(config: MindVLConfig) -> Params:
    return initial_params(outline_of(config), make_mesh(MeshConfig()), seed=0)


def agree(
    ours: Callable[[], tuple[float, float]],
    others: dict[str, Callable[[], tuple[float, float]]],
    *,
    tolerance: float,
    steps: int = 2,
) -> dict[str, float]:
    """Run the first steps of every side and raise unless they agree.

    Compares loss and gradient norm, and the loss after the update, which depends on the whole backward pass and AdamW.

    Returns:
      Largest relative difference of losses and of gradient norms.
    Raises:
      AssertionError: names the side, the quantity and the difference.
    """
    mine = [ours() for _ in range(steps)]
    worst = {"loss difference": 0.0, "gradient norm difference": 0.0}
    for name, other in others.items():
        for number, (own, their) in enumerate(zip(mine, [other() for _ in range(steps)], strict=True), 1):
            for what, a, b in (("loss difference", own[0], their[0]), ("gradient norm difference", own[1], their[1])):
                relative = abs(a - b) / abs(b)
                worst[what] = max(worst[what], relative)
                # The norm of the gradient sums many more roundings than the loss: ten times its tolerance.
                allowed = tolerance * (10 if "norm" in what else 1)
                if not relative <= allowed:
                    raise AssertionError(
                        f"step {number}: {what} to {name} is {relative:.2e} ({a:.6f} against {b:.6f}), "
                        f"allowed {allowed:.0e}: the sides do not do the same work"
                    )
    return worst
