"""The moving average of the parameters: its formula, its place in checkpoints, and what is evaluated and exported of
it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindvl_jax.checkpoints import checkpoint
from mindvl_jax.cli.run_hooks import train
from mindvl_jax.core.errors import UserError
from mindvl_jax.models.outline import outline_of
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.training import ema
from mindvl_jax.training.state import initial_params
from mindvl_jax.weights import open_model

DECAY = 0.75


def test_the_average_follows_the_formula_and_a_skipped_step_leaves_it_alone():
    values = [np.float32([1.0, -2.0]), np.float32([3.0, 0.5]), np.float32([-1.0, 4.0])]
    average = ema.MovingAverage({"w": jnp.asarray(values[0])}, DECAY)
    expected = values[0]
    for value, applied in ((values[1], True), (values[2], False), (values[2], True)):
        average.update({"w": jnp.asarray(value)}, jnp.asarray(applied))
        expected = DECAY * expected + (1 - DECAY) * value if applied else expected
        difference = np.abs(np.asarray(average.params["w"]) - expected).max()
        assert difference < 1e-6, f"differs by {difference} from the sum by hand"  # two float32 roundings


def test_the_average_is_kept_in_float32_whatever_the_parameters_are():
    average = ema.MovingAverage({"w": jnp.ones(3, jnp.bfloat16)}, 0.999)
    average.update({"w": jnp.full(3, 2, jnp.bfloat16)}, jnp.asarray(True))
    assert average.params["w"].dtype == jnp.float32
    assert float(average.params["w"][0]) == pytest.approx(1.001, abs=1e-6)  # bfloat16 would round it back to 1


@pytest.fixture(scope="module")
def steps():
    return ({"steps": 3, "train": ["projector/**"]},)  # what a phase freezes stays in the average too


def _saved(run_dir, step):
    return {
        which: checkpoint.load_params(f"{run_dir}/checkpoints/{step}", ema=which == "ema")[1]
        for which in ("params", "ema")
    }


def _difference(ours, theirs):
    return max(float(np.abs(np.asarray(ours[path], np.float64) - theirs[path]).max()) for path in theirs)


def test_checkpoints_carry_the_average_of_all_steps_and_a_resumed_run_continues_it_bitwise(run_config, steps):
    sections = dict(training={"ema_decay": DECAY}, checkpoint={"every_steps": 1, "keep": 9})
    config = run_config(*steps, **sections)
    train(config)
    fresh = initial_params(outline_of(config.model), make_mesh(config.mesh), config.run.seed)
    expected = {path: np.asarray(value, np.float64) for path, value in fresh.items()}
    for step in range(1, 4):
        saved = _saved(config.run.dir, step)
        expected = {
            path: DECAY * value + (1 - DECAY) * np.asarray(saved["params"][path], np.float64)
            for path, value in expected.items()
        }
        difference = _difference(saved["ema"], expected)
        assert difference < 1e-6, f"step {step}: differs by {difference} from the sum by hand in float64"
    assert _difference(saved["ema"], {path: np.asarray(value) for path, value in saved["params"].items()}) > 1e-4, (
        "the parameters hardly moved"
    )

    broken = run_config(*steps, name="broken", **sections)
    train(broken, stop_after=1)
    train(broken)
    resumed = _saved(broken.run.dir, 3)["ema"]
    assert all(jax.numpy.array_equal(resumed[path], saved["ema"][path]) for path in resumed)

    opened = open_model(f"{config.run.dir}:ema")
    assert _difference(opened.parameters(), {path: np.asarray(value) for path, value in saved["ema"].items()}) == 0


def test_a_run_without_an_average_says_so_when_asked_for_it(run_config):
    config = run_config({"steps": 3, "train": ["projector/**"]})
    train(config, stop_after=1)
    with pytest.raises(UserError, match="holds no moving average"):
        open_model(f"{config.run.dir}:ema")


def test_an_average_that_is_scored_but_not_kept_is_refused_before_training(run_config):
    with pytest.raises(UserError, match="training.ema_decay is not set"):
        ema.require_possible(run_config({"steps": 1}, evaluation={"ema": True}))
