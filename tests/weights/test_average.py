import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindvl_jax.core.errors import UserError
from mindvl_jax.weights import average


def _models(count, dtype=np.float32, seed=0):
    generator = np.random.default_rng(seed)
    return {
        f"m{index}": {
            "a/kernel": jnp.asarray(generator.normal(size=(6, 4)), dtype),
            "b/scale": jnp.asarray(generator.normal(size=5), dtype),
        }
        for index in range(count)
    }


def _expected(models, weights):
    weights = np.array(weights, np.float64) / np.sum(weights)
    return {
        path: sum(weight * np.asarray(model[path], np.float64) for weight, model in zip(weights, models.values()))
        for path in next(iter(models.values()))
    }


@pytest.mark.parametrize("weights", [[1, 1, 1], [3, 1, 0.5], [0, 1, 0]])
def test_weighted_mean_equals_the_formula(weights):
    models = _models(3)
    ours = average.weighted(list(models), models.__getitem__, weights)
    for path, wanted in _expected(models, weights).items():
        difference = np.abs(np.asarray(ours[path]) - wanted).max()
        assert difference < 1e-6, f"{path}: max difference {difference}"  # three float32 products and sums


def test_bfloat16_models_are_summed_in_float32():
    models = _models(8, jnp.bfloat16)
    ours = average.weighted(list(models), models.__getitem__, [1.0] * 8)
    for path, wanted in _expected(models, [1.0] * 8).items():
        assert ours[path].dtype == jnp.bfloat16
        rounded = np.asarray(jnp.asarray(wanted, jnp.bfloat16), np.float32)
        difference = np.abs(np.asarray(ours[path], np.float32) - rounded)
        # One rounding at the end; a tie may round the other way by one unit of bfloat16's 8 bits.
        assert (difference <= np.abs(rounded) * 2**-7 + 1e-8).all() and (difference == 0).mean() > 0.9, difference.max()


def test_ema_weights_are_those_of_the_recursion():
    values = [3.0, -1.0, 4.0, 10.0]
    running = values[0]
    for value in values[1:]:
        running = 0.8 * running + 0.2 * value
    weights = average.ema_weights(4, 0.8)
    assert sum(weights) == pytest.approx(1)
    assert sum(weight * value for weight, value in zip(weights, values)) == pytest.approx(running)


def test_greedy_soup_keeps_only_what_helps():
    target = 1.0
    models = {"good": {"x": jnp.array([1.2])}, "other side": {"x": jnp.array([0.7])}, "far": {"x": jnp.array([9.0])}}

    def score(parameters, _):
        return -abs(float(parameters["x"][0]) - target)

    soup, steps = average.greedy_soup(list(models), models.__getitem__, score)
    assert float(soup["x"][0]) == pytest.approx((1.2 + 0.7) / 2)
    assert {step["model"]: step["kept"] for step in steps} == {"good": True, "other side": True, "far": False}


def test_a_soup_is_never_worse_than_its_best_part():
    generator = np.random.default_rng(2)
    models = {f"m{index}": {"x": jnp.asarray(generator.normal(size=3), jnp.float32)} for index in range(6)}
    target = generator.normal(size=3)

    def score(parameters, _):
        return -float(np.sum((np.asarray(parameters["x"]) - target) ** 2))

    soup, _ = average.greedy_soup(list(models), models.__getitem__, score)
    assert score(soup, "") >= max(score(model, "") for model in models.values())


def test_models_of_another_shape_are_refused_by_parameter():
    models = _models(2) | {"odd": {"a/kernel": jnp.zeros((6, 5)), "c": jnp.zeros(1)}}
    with pytest.raises(
        UserError,
        match=r"odd is not of the same architecture .*b/scale is missing; c is new; a/kernel is \(6, 5\), not \(6, 4\)",
    ):
        average.weighted(list(models), models.__getitem__, [1, 1, 1])


@pytest.mark.parametrize(
    "weights, message",
    [
        ([1], "1 weights for 2 models"),
        ([1, -1], "from 0 upwards"),
        ([0, 0], "positive weight"),
        ([1, float("nan")], "from 0 upwards"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights, message):
    models = _models(2)
    with pytest.raises(UserError, match=message):
        average.weighted(list(models), models.__getitem__, weights)


def test_parameters_on_different_meshes_average_onto_the_first_ones():
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    first = {"x": jax.device_put(jnp.arange(8.0), spread)}
    second = {"x": jnp.ones(8)}
    result = average.weighted(["1", "2"], {"1": first, "2": second}.__getitem__, [1, 1])["x"]
    assert result.sharding.is_equivalent_to(spread, 1)
    assert (np.asarray(result) == (np.arange(8) + 1) / 2).all()
