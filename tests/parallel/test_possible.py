"""What cannot run on a mesh is refused with its reason and the nearest mesh that can."""

import pytest

from mindvl_jax.core.errors import UserError
from mindvl_jax.parallel.mesh import AXES, describe_sizes
from mindvl_jax.parallel.possible import nearest, problems, require_possible
from tests.parallel.meshes import configuration

GATHER = "parallel.context_attention=all_gather"


def sizes(**axes):
    return dict.fromkeys(AXES, 1) | axes


@pytest.mark.parametrize(
    ("settings", "axes", "reason"),
    [
        ((), {"context": 8}, "mesh.context x mesh.tensor = 8 does not divide model.text.num_heads=4"),
        ((), {"context": 2, "tensor": 4}, "parallel.context_attention=all_gather works with any number of heads"),
        ((GATHER,), {"context": 16}, r"mesh.context=16 does not divide training.phases\[0\].sequence_length=104"),
        ((GATHER,), {"context": 8}, r"28 merged tokens of training.phases\[0\].patches_per_row=112"),
        ((), {"expert": 2}, "mesh.expert=2: the model has no routed experts"),
    ],
)  # fmt: skip
def test_a_mesh_that_cannot_work_is_refused_with_the_reason(settings, axes, reason):
    with pytest.raises(UserError, match=reason):
        require_possible(configuration({}, *settings), sizes(**axes))


def test_the_nearest_mesh_has_as_many_devices_and_works():
    config = configuration({})
    near = nearest(config, sizes(context=8))
    assert near == sizes(context=4, fsdp=2), describe_sizes(near)
    assert not problems(config, near)
    with pytest.raises(UserError, match="the nearest mesh that can: data 1 x fsdp 2 x context 4 x tensor 1"):
        require_possible(config, sizes(context=8))
