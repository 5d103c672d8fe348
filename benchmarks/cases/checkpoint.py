"""Saving and reading a training state, and what a save costs the steps beside it."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import CLOCKS, Comparison, Side
from benchmarks.registry import Settings, case


@case("checkpoint")
def checkpoint_case(settings: Settings) -> Iterator[Comparison]:
    """A whole training state (parameters and moments) to disk and back in MB/s, beside safetensors with the same
    arrays; the stall of an asynchronous save.
    """
    import jax
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from benchmarks import ours, workloads
    from mindvl_jax.checkpoints.checkpoint import CheckpointReader, CheckpointWriter, Progress
    from mindvl_jax.config import loader as config_loader
    from mindvl_jax.config.schema import CheckpointConfig, MeshConfig
    from mindvl_jax.models.outline import outline_of
    from mindvl_jax.parallel.mesh import make_mesh
    from mindvl_jax.training.state import abstract_state, optimizer_arrays, start_phase, state_of

    name = "dry" if settings.dry else "small"
    config = workloads.MODELS[name]("float32")
    outline = outline_of(config)
    mesh = make_mesh(MeshConfig())
    state = start_phase(ours.initial(config), list(outline.shapes), [], mesh)
    arrays = {**state.params, **{name: value for name, value in optimizer_arrays(state).items() if value.ndim}}
    megabytes = sum(value.nbytes for value in arrays.values()) / 1e6
    work = {"MB": megabytes}
    run = config_loader.from_mapping(_run_mapping(config))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        numbers = itertools.count(1)
        plain = folder / "plain.safetensors"

        def progress(step: int) -> Progress:
            return Progress(
                step=step,
                phase=0,
                phase_name="benchmark",
                phase_step=step,
                trained=tuple(outline.shapes),
                loader=None,
                totals={},
            )

        with CheckpointWriter(folder / "run", CheckpointConfig(keep=1, asynchronous=False)) as writer:

            def save():
                writer.save(state.params, optimizer_arrays(state), progress(next(numbers)), run)
                writer.wait()

            def save_plain():
                save_file({path: np.asarray(value) for path, value in arrays.items()}, plain)

            yield Comparison(
                "save",
                [Side("ours (Orbax, with fingerprints)", save, work), Side("safetensors", save_plain, work)],
                unit="MB",
                note=f"{megabytes:.0f} MB: parameters and two moments of the {name} model; into the page cache.",
            )
            step = writer.steps()[-1]
        reader = CheckpointReader(folder / "run")
        fingerprints = reader.progress(step)[1]
        target = abstract_state(outline, list(outline.shapes), [], mesh)

        def restore():
            restored = state_of(target, *reader.state(step, target.params, optimizer_arrays(target), fingerprints))
            jax.block_until_ready(restored)
            return restored

        restored = restore()
        different = [path for path, value in restored.trained.items() if not np.array_equal(value, state.trained[path])]
        if different:
            raise AssertionError(f"restored parameters differ from the saved ones: {different[:3]}")
        yield Comparison(
            "restore",
            [
                Side("ours (Orbax, fingerprints checked)", restore, work),
                Side("safetensors", lambda: jax.block_until_ready(jax.device_put(load_file(plain))), work),
            ],
            unit="MB",
            checked={"arrays that differ": float(len(different))},
        )
        for model, workload, steps in (("dry", workloads.DRY, 2),) if settings.dry else (
            ("tiny", workloads.QUICKSTART, 8),  # what the quickstart saves, beside its own step
            # few rows: 700 MB beside short steps is harder than a real run
            ("small", dataclasses.replace(workloads.QUICKSTART, rows=2), 6),
        ):  # fmt: skip
            yield _stall(settings, folder / model, model, workload, steps, progress)


def _stall(
    settings: Settings, folder: Path, model: str, workload, steps: int, progress: Callable[[int], Any]
) -> Comparison:
    """Cost of an asynchronous save for a run that saves as often as the configuration's default.

    Blocks of `steps` steps alternate with and without a save at their start. The cost is the difference of a pair of
    blocks: the blocking call, slower steps beside the writer, and the wait for a writer that outlasts the block. Later
    steps are not affected, so a run of hundreds of steps loses no more.
    """
    import numpy as np

    from benchmarks import ours, twin, workloads
    from mindvl_jax.checkpoints.checkpoint import CheckpointWriter
    from mindvl_jax.config import loader as config_loader
    from mindvl_jax.config.schema import CheckpointConfig
    from mindvl_jax.training.state import optimizer_arrays

    config = workloads.MODELS[model]("float32")
    parameters = ours.initial(config)
    packed = workloads.build(workload, config, twin.make(config, parameters))
    step = ours.Step(config, workload, packed.batch, parameters)
    del parameters
    run = config_loader.from_mapping(_run_mapping(config))
    clock, numbers = CLOCKS[settings.clock], itertools.count(1)

    def block() -> float:
        start = clock()
        for _ in range(steps):
            step()
        return clock() - start

    def saving_block() -> tuple[float, float, float]:
        start = clock()
        writer.save(step.state.params, optimizer_arrays(step.state), progress(next(numbers)), run)
        called = clock() - start
        ran, start = block(), clock()
        writer.wait()
        return called, ran, clock() - start

    rounds = []
    with CheckpointWriter(folder, CheckpointConfig(keep=1, asynchronous=True)) as writer:
        for number in range(1 + settings.least):
            if number % 2:
                (called, ran, waited), alone = saving_block(), block()
            else:
                alone, (called, ran, waited) = block(), saving_block()
            rounds.append((called, ran - alone, waited, alone))
    # The first round compiles the fingerprints.
    called, slower, waited, alone = np.array(rounds[1:]).T
    losses = called + slower + waited
    lost, each, every = float(np.median(losses)), float(np.median(alone)) / steps, CheckpointConfig().every_steps
    facts = {
        "the loop waits in the call s": float(np.median(called)),
        "steps beside the writer take longer by s": float(np.median(slower)),
        "the writer outlasts them by s": float(np.median(waited)),
        "lost to a save s": lost,
        "largest loss s": float(losses.max()),
        "a step s": each,
        f"share lost at a save every {every} steps": lost / (every * each),
    }
    megabytes = (
        sum(
            value.nbytes
            for part in (step.state.trained, step.state.opt_state.mu, step.state.opt_state.nu)
            for value in part.values()
        )
        / 1e6
    )
    run_of = f"{every} steps"
    sides = [
        Side(f"{run_of} and an asynchronous save", size=every * each + lost, facts=facts),
        Side(run_of, size=every * each),
    ]
    return Comparison(f"lost to a save, {model}, {megabytes:.0f} MB", sides, unit="s", bars={run_of: 0.95},
                      note=f"Measured on {len(losses)} pairs of blocks of {steps} steps, told for {every}: after "
                          "its block a run goes on as without a save. "
                           "On a CPU the writing threads take cores from the step; on an accelerator only "
                               "the copy to the host does.")  # fmt: skip


def _run_mapping(config) -> dict:
    """A run's configuration around a model: a checkpoint carries one."""
    phase = dict(
        name="benchmark",
        steps=1,
        mixture=[{"source": "none"}],
        rows=1,
        sequence_length=128,
        patches_per_row=64,
        learning_rate=1e-3,
    )
    return dict(
        run={"dir": "run"},
        model=config.model_dump(mode="json"),
        data={"sources": {"none": {"path": "none.parquet"}}},
        training={"phases": [phase]},
    )
