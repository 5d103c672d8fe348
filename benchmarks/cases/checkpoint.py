"""Saving and reading a training state, and what a save costs the steps beside it."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import CLOCKS, Comparison, Side
from benchmarks.registry import Settings, case


@case("checkpoint")
def checkpoint_case(settings: Settings) -> Iterator[Comparison]:
    """A whole training state (parameters and moments) to disk and back in MB/s, beside safetensors with the same arrays; the stall of an asynchronous save."""
    import jax
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from benchmarks import ours, twin, workloads
    from mindvl_jax import config_loader
    from mindvl_jax.config import CheckpointConfig, MeshConfig
    from mindvl_jax.parallel.mesh import make_mesh
    from mindvl_jax.training.checkpoint import CheckpointReader, CheckpointWriter, Progress
    from mindvl_jax.training.params import outline_of
    from mindvl_jax.training.state import abstract_state, start_phase

    name = "dry" if settings.dry else "small"
    config = workloads.MODELS[name]("float32")
    outline = outline_of(config)
    mesh = make_mesh(MeshConfig())
    state = start_phase(ours.initial(config), list(outline.shapes), [], mesh)
    arrays = {f"{part}/{path}": value for part in ("trained", "mu", "nu") for path, value in getattr(state, part).items()}
    megabytes = sum(value.nbytes for value in arrays.values()) / 1e6
    work = {"MB": megabytes}
    run = config_loader.from_mapping(_run_mapping(config))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        numbers = itertools.count(1)
        plain = folder / "plain.safetensors"

        def progress(step: int) -> Progress:
            return Progress(step=step, phase=0, phase_name="benchmark", phase_step=step, trained=tuple(outline.shapes), loader=None, totals={})

        with CheckpointWriter(folder / "run", CheckpointConfig(keep=1, asynchronous=False)) as writer:
            def save():
                writer.save(state, progress(next(numbers)), run)
                writer.wait()

            def save_plain():
                save_file({path: np.asarray(value) for path, value in arrays.items()}, plain)

            yield Comparison("save", [Side("ours (Orbax, with fingerprints)", save, work), Side("safetensors", save_plain, work)], unit="MB",
                             note=f"{megabytes:.0f} MB: parameters and two moments of the {name} model; into the page cache.")
            step = writer.steps()[-1]
        reader = CheckpointReader(folder / "run")
        fingerprints = reader.progress(step)[1]
        target = abstract_state(outline, list(outline.shapes), [], mesh)

        def restore():
            restored = reader.state(step, target, fingerprints)
            jax.block_until_ready(restored)
            return restored

        restored = restore()
        different = [path for path, value in restored.trained.items() if not np.array_equal(value, state.trained[path])]
        if different:
            raise AssertionError(f"restored parameters differ from the saved ones: {different[:3]}")
        yield Comparison("restore", [Side("ours (Orbax, fingerprints checked)", restore, work), Side("safetensors", lambda: jax.block_until_ready(jax.device_put(load_file(plain))), work)], unit="MB",
                         checked={"arrays that differ": float(len(different))})
        yield _stall(settings, folder, config, twin, workloads, ours, run, progress)


def _stall(settings: Settings, folder: Path, config, twin, workloads, ours, run, progress) -> Comparison:
    """A block of steps with one asynchronous save in it, against the same block without."""
    from mindvl_jax.config import CheckpointConfig
    from mindvl_jax.training.checkpoint import CheckpointWriter

    # Few rows: steps of 0.7 s beside 700 MB to write are a harder case than a run's.
    workload = workloads.DRY if settings.dry else dataclasses.replace(workloads.QUICKSTART, rows=2)
    parameters = ours.initial(config)
    packed = workloads.build(workload, config, twin.make(config, parameters))
    step = ours.Step(config, workload, packed.batch, parameters)
    steps = 2 if settings.dry else 4
    writer = CheckpointWriter(folder / "stall", CheckpointConfig(keep=1, asynchronous=True))
    numbers = itertools.count(1)
    clock = CLOCKS[settings.clock]
    seconds: dict[str, list[float]] = {"with": [], "without": [], "call": []}
    facts: dict[str, float | str] = {}

    def with_save():
        start = clock()
        writer.save(step.state, progress(next(numbers)), run)
        seconds["call"].append(clock() - start)
        run_steps()
        writer.wait()  # in a run hundreds of steps hide this; it is counted here, so that writing is never free
        seconds["with"].append(clock() - start)
        if seconds["without"]:
            each = statistics.median(seconds["without"]) / steps
            lost = max(0.0, statistics.median(seconds["with"]) - each * steps)
            every = CheckpointConfig().every_steps
            facts.update({"the step loop waits s": statistics.median(seconds["call"]), "a save costs s": lost, f"lost at a save every {every} steps": lost / (lost + every * each),
                          "steps between saves for 5 % lost": lost / each * 19})

    def without_save():
        start = clock()
        run_steps()
        seconds["without"].append(clock() - start)

    def run_steps():
        for _ in range(steps):
            step()

    work = {"steps": float(steps)}
    return Comparison("steps with an asynchronous save", [Side(f"{steps} steps and one save, until it is on disk", with_save, work, facts), Side(f"{steps} steps", without_save, work)], unit="steps",
                      note="On a CPU the writing threads take cores from the step; on an accelerator only the copy to the host does.")


def _run_mapping(config) -> dict:
    """A run's configuration around a model: a checkpoint carries one."""
    phase = dict(name="benchmark", steps=1, mixture=[{"source": "none"}], rows=1, sequence_length=128, patches_per_row=64, learning_rate=1e-3)
    return dict(run={"dir": "run"}, model=config.model_dump(mode="json"), data={"sources": {"none": {"path": "none.parquet"}}}, training={"phases": [phase]})
