"""Checkpoints: cost of writing, and compatibility when read: arrays written as they are, and those that were written
compressed.
"""

import dataclasses

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mindvl_jax.checkpoints import checkpoint
from mindvl_jax.config.schema import CheckpointConfig, MeshConfig
from mindvl_jax.models.outline import outline_of
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.training.state import abstract_state, initial_params, optimizer_arrays, start_phase, state_of


@pytest.fixture
def trained(run_config):
    """(config, state, what it is restored onto, progress); zeros in the moments can be made as small as one likes."""
    config = run_config()
    outline, mesh = outline_of(config.model), make_mesh(MeshConfig(), jax.devices()[:1])
    paths = list(outline.shapes)
    state = start_phase(initial_params(outline, mesh, seed=0), paths, [], mesh)
    progress = checkpoint.Progress(
        step=3, phase=0, phase_name="phase0", phase_step=3, trained=tuple(paths), loader=None, totals={}
    )
    return config, state, abstract_state(outline, paths, [], mesh), progress


def restored(folder, target):
    with checkpoint.CheckpointReader(folder) as reader:
        progress, prints, _ = reader.progress(3)
        return progress, state_of(target, *reader.state(3, target.params, optimizer_arrays(target), prints))


def assert_same(got, state):
    for (keys, value), other in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(got), strict=True):
        assert np.array_equal(other, value), jax.tree_util.keystr(keys)


def test_arrays_are_written_as_they_are_without_time_spent_on_compression(trained, tmp_path):
    config, state, target, progress = trained
    with checkpoint.CheckpointWriter(tmp_path, CheckpointConfig(asynchronous=True)) as writer:
        assert writer.save(state.params, optimizer_arrays(state), progress, config)
        writer.wait()
    held = sum(value.nbytes for value in jax.tree.leaves(state))
    written = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    # Two thirds are zeros, which any compressor would take away.
    assert held <= written < 1.5 * held, f"{held} bytes held, {written} written"
    again, got = restored(tmp_path, target)
    assert again == progress
    assert_same(got, state)


def test_a_compressed_checkpoint_is_opened_too(trained, tmp_path):
    """As runs wrote them before: Orbax's standard items with zstd, and moments as the two dicts `mu` and `nu` beside
    the counters.
    """
    config, state, target, progress = trained
    adam = state.opt_state
    moments = {f"{name}/{path}": value for name in ("mu", "nu") for path, value in getattr(adam, name).items()}
    record = dataclasses.asdict(progress) | {
        "fingerprints": {**checkpoint.fingerprints(state.params), **checkpoint.fingerprints(moments)}
    }
    record["seal"] = checkpoint._seal(record, config.model_dump(mode="json"))
    counters = {name: getattr(state, name) for name in ("step", "phase_step", "bad_steps", "skipped")}
    optimizer = {"mu": checkpoint._nest(adam.mu), "nu": checkpoint._nest(adam.nu), "updates": adam.updates, **counters}
    with ocp.CheckpointManager(tmp_path / checkpoint.FOLDER) as manager:
        manager.save(3, args=ocp.args.Composite(
            params=ocp.args.StandardSave(checkpoint._nest(state.params)), optimizer=ocp.args.StandardSave(optimizer),
            progress=ocp.args.JsonSave(record), config=ocp.args.JsonSave(config.model_dump(mode="json")),
        ))  # fmt: skip
        manager.wait_until_finished()
    assert_same(restored(tmp_path, target)[1], state)


def test_a_checkpoint_of_stages_context_and_fsdp_is_restored_in_equal_bits_on_tensor_and_on_one_device(
    run_config, tmp_path
):
    config = run_config()
    outline = outline_of(config.model)
    paths = list(outline.shapes)

    def mesh(**axes):
        return make_mesh(MeshConfig(**axes), jax.devices()[: int(np.prod([*axes.values()]))])

    spread = start_phase(initial_params(outline, mesh(stage=2, context=2, fsdp=2), seed=0), paths, [], mesh(data=1))
    spread = dataclasses.replace(spread, opt_state=jax.tree.map(lambda x: x + x.dtype.type(0.5), spread.opt_state))
    stacked = spread.trained["language/layers/mlp/gate/kernel"]
    assert stacked.sharding.spec[0] == "stage" and len(stacked.sharding.device_set) == 8
    progress = checkpoint.Progress(
        step=3, phase=0, phase_name="phase0", phase_step=3, trained=tuple(paths), loader=None, totals={}
    )
    with checkpoint.CheckpointWriter(tmp_path, CheckpointConfig(asynchronous=True)) as writer:
        assert writer.save(spread.params, optimizer_arrays(spread), progress, config)
    for axes in {"tensor": 4}, {"data": 1}:
        target = abstract_state(outline, paths, [], mesh(**axes))
        got = restored(tmp_path, target)[1]
        assert_same(got, spread)
        assert got.trained["language/layers/mlp/gate/kernel"].sharding.device_set == set(mesh(**axes).devices.flat)
