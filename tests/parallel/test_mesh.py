"""Mesh shapes, axis rules and row shares."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mindvl_jax.config.schema import DistributedConfig, MeshConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.parallel import distributed
from mindvl_jax.parallel.mesh import AXES, default_mesh, describe_mesh, make_mesh, mesh_shape
from mindvl_jax.parallel.rules import parameter_shardings, partition_spec, row_sharding, row_share


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def sizes(**axes):
    return dict.fromkeys(AXES, 1) | axes


def test_one_open_axis_takes_the_devices_that_are_left():
    assert mesh_shape(MeshConfig(data=-1, fsdp=2, tensor=2), 8) == sizes(data=2, fsdp=2, tensor=2)
    assert mesh_shape(MeshConfig(data=1, fsdp=-1, tensor=1), 8) == sizes(fsdp=8)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 3, "fsdp": -1}, "mesh.fsdp=-1 cannot be filled.*3 devices.*8 devices"),
        ({"data": 16}, "needs 16 devices, found 8"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(axes, message):
    with pytest.raises(UserError, match=message):
        mesh_shape(MeshConfig(**axes), 8)


GIB = 2**30


@pytest.mark.parametrize(
    ("devices", "rows", "state", "memory", "axes", "said"),
    [
        (8, [16, 8], GIB, 80 * GIB, {"data": 8}, "fit on each device"),
        (8, [16, 8], 100 * GIB, 80 * GIB, {"fsdp": 8}, "spread"),
        (8, [16], GIB, None, {"fsdp": 8}, "spread"),  # memory unknown
        (8, [12, 4], GIB, 80 * GIB, {"data": 4}, r"4 of 8 devices stay idle: rows \(4, 12\) must divide"),
        (1, [3], GIB, GIB, {"data": 1}, "one device"),
    ],
)
def test_without_a_mesh_all_devices_that_the_rows_divide_over_are_taken(devices, rows, state, memory, axes, said):
    mesh, why = default_mesh(devices, rows, state_bytes=state, device_bytes=memory)
    assert mesh == MeshConfig(**axes)
    assert re.search(said, why)


def test_several_processes_leave_no_device_out():
    """Rows that do not divide are refused with their key (`row_share`)."""
    assert default_mesh(4, [6], state_bytes=1, device_bytes=GIB, processes=2)[0] == MeshConfig(data=4)


def test_one_axis_that_is_set_makes_the_mesh_explicit():
    assert MeshConfig().is_open and not MeshConfig(data=1).is_open
    assert mesh_shape(MeshConfig(data=1), 8) == sizes()
    assert mesh_shape(MeshConfig(tensor=2), 8) == sizes(tensor=2)
    assert MeshConfig.model_validate(MeshConfig().model_dump()).is_open, "a run's config.yaml keeps the choice open"


def test_tensor_neighbours_are_neighbouring_devices(mesh):
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert (ids[..., 1] - ids[..., 0] == 1).all()
    assert "data 2 x fsdp 2 x tensor 2 (8 of 8 devices" in describe_mesh(mesh)


@pytest.mark.parametrize(
    ("names", "shape", "spec"),
    [
        (("embed", "mlp"), (32, 64), P("fsdp", "tensor")),
        (("layers", "mlp", "embed"), (4, 64, 32), P(None, "tensor", "fsdp")),
        (("vocab", "embed"), (264, 32), P("tensor", "fsdp")),
        (("embed", "kv_heads"), (32, 3), P("fsdp", None)),  # 3 does not divide: whole on every device
        (("mlp", "heads"), (64, 64), P("tensor", None)),  # one mesh axis serves one dim
        (("layers", "embed"), (4, 32), P(None, None)),  # a stack of vectors is not worth gathering
        (("layers", "heads"), (4, 32), P(None, "tensor")),
        (("patch", "unheard_of"), (8, 8), P(None, None)),
        (None, (8, 8), P()),
    ],
)
def test_parameters_spread_by_the_names_of_their_dims(mesh, names, shape, spec):
    assert partition_spec(names, shape, mesh) == spec


def test_names_that_do_not_fit_the_shape_are_refused(mesh):
    with pytest.raises(ValueError, match="2 axis names"):
        parameter_shardings({"a/kernel": ("embed", "mlp")}, {"a/kernel": (1, 2, 3)}, mesh)


def test_rows_spread_over_data_and_fsdp_and_a_lone_process_feeds_all(mesh):
    assert row_share(mesh, 8, "rows").__dict__ == {"index": 0, "count": 1, "rows": 8}
    placed = jax.device_put(np.arange(8), row_sharding(mesh))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2,)}


def test_rows_that_cannot_be_spread_are_refused_with_the_config_key(mesh):
    with pytest.raises(
        UserError, match=r"training.phases\[0\].rows=6 rows cannot be spread over mesh.data x mesh.fsdp = 4"
    ):
        row_share(mesh, 6, "training.phases[0].rows")


def test_an_incomplete_distributed_section_is_refused_before_any_connection():
    with pytest.raises(UserError, match="also needs distributed.processes and distributed.process_id"):
        distributed.initialize(DistributedConfig(coordinator="localhost:1"))
    with pytest.raises(ValueError, match="process_id 2 of 2 processes"):
        DistributedConfig(coordinator="localhost:1", processes=2, process_id=2)


@pytest.mark.parametrize("environment, expected", [
    ({"MASTER_ADDR": "a", "MASTER_PORT": "4000", "RANK": "1", "WORLD_SIZE": "4"}, ("a:4001", 4, 1)),
    ({"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_JOB_ID": "4001", "SLURM_STEP_NODELIST": "gpu[003-005,9],login"},
    ("gpu003:61001", 3, 2)),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "one,two"}, ("one:61000", 1, 0)),
    ({"JOB_COMPLETION_INDEX": "1", "MINDVL_PROCESSES": "2", "MINDVL_COORDINATOR": "mindvl-0.mindvl:62000"},
    ("mindvl-0.mindvl:62000", 2, 1)),
])  # fmt: skip
def test_a_process_learns_from_its_launcher_who_it_is(environment, expected):
    found = distributed.discovered(DistributedConfig(coordinator="auto"), environment)
    assert (found.coordinator, found.processes, found.process_id) == expected


def test_without_a_launcher_auto_is_refused_with_the_variables_that_are_looked_for():
    with pytest.raises(UserError, match=r"torchrun \(MASTER_ADDR, RANK, WORLD_SIZE\), Slurm"):
        distributed.discovered(DistributedConfig(coordinator="auto"), {})
