"""Answers do not depend on the devices of the model."""

import types

import jax
import pytest
from flax import nnx

from mindvl_jax.config.schema import MeshConfig
from mindvl_jax.inference import Generator, Request, Sampling
from mindvl_jax.models.outline import outline_of
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.parallel.rules import parameter_shardings


@pytest.fixture(scope="module")
def requests(draw_pictures):
    drawn = draw_pictures(4, seed=2, largest=84)
    return [
        Request.from_prompt(
            "tell " * (1 + index % 3),
            drawn[index : index + 1] if index < 4 else [],
            id=str(index),
            sampling=Sampling(max_new_tokens=6),
        )
        for index in range(8)
    ]


@pytest.fixture(scope="module")
def on_one_device(opened, requests):
    return Generator(opened, slots=8, context=128).generate(requests)


@pytest.mark.parametrize("axes", [dict(data=2), dict(data=2, fsdp=2, tensor=2)], ids=["2 devices", "8 devices"])
def test_answers_do_not_depend_on_the_mesh(opened, requests, on_one_device, axes):
    mesh = make_mesh(MeshConfig(**axes))
    config = opened.model.config
    outline = outline_of(config)
    shardings = parameter_shardings(
        outline.axis_names, {path: like.shape for path, like in outline.shapes.items()}, mesh
    )
    values = {
        "/".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state(opened.model, nnx.Param))
    }
    spread = types.SimpleNamespace(
        **{
            **vars(opened),
            "model": outline.merge({path: jax.device_put(value, shardings[path]) for path, value in values.items()}),
        }
    )
    generator = Generator(spread, slots=8, context=128)
    answers = generator.generate(requests)
    assert len(generator._engine._state.cache.keys[0].sharding.device_set) == mesh.size
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in on_one_device]
    difference = max(
        abs(a - b) for one, other in zip(answers, on_one_device) for a, b in zip(one.logprobs, other.logprobs)
    )
    assert difference < 1e-3, (
        f"max difference of log-probabilities {difference}"
    )  # float32 sums in another order over devices
