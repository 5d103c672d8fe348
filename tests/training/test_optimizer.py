"""Schedules against formulas, AdamW against optax, rules by glob."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from mindvl_jax.config.schema import OptimizerConfig, PhaseConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.training.optimizer import (
    AdamState,
    adam_state,
    apply_update,
    fused_adamw,
    learning_rates,
    parameter_rules,
    with_layer_decay,
)

SGD = optax.chain(optax.trace(0.9), optax.scale(-1.0))  # an optimizer that is not ours


def phase(**changes):
    base = {
        "name": "p",
        "steps": 20,
        "mixture": ({"source": "s"},),
        "rows": 1,
        "sequence_length": 8,
        "patches_per_row": 4,
        "learning_rate": 0.5,
    }
    return PhaseConfig(**(base | changes))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 5, 20])
def test_rates_rise_in_equal_parts_and_then_follow_the_named_schedule(schedule, warmup):
    got = learning_rates(phase(schedule=schedule, warmup_steps=warmup, final_learning_rate_fraction=0.1), "p")
    want = []
    for step in range(20):
        done = (step - warmup) / max(1, 20 - warmup)
        fall = {"cosine": 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - 0.9 * done, "constant": 1.0}[
            schedule
        ]
        want.append(0.5 * (step + 1) / warmup if step < warmup else 0.5 * fall)
    worst = np.abs(got - np.array(want)).max()
    assert got.dtype == np.float32 and worst < 1e-7, f"largest difference {worst:.2e}"


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_a_warm_up_from_zero_is_that_of_transformers(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = transformers.get_scheduler(
        "constant_with_warmup" if name == "constant" else name, optimizer, num_warmup_steps=4, num_training_steps=20
    )
    expected = []
    for _ in range(20):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    own = phase(schedule=name, warmup_steps=4, steps=20, learning_rate=1.0, warmup_from_zero=True)
    np.testing.assert_allclose(learning_rates(own, "p"), expected, atol=1e-6)


def test_a_warm_up_longer_than_its_phase_is_refused():
    with pytest.raises(ValueError, match=r"warmup_steps \(21\) is longer than the phase \(steps 20\)"):
        phase(warmup_steps=21)


def test_multipliers_take_the_first_glob_that_fits_and_decay_spares_scales_and_biases():
    rules = parameter_rules(
        ["vision/a/kernel", "vision/a/bias", "language/norm/scale", "language/embed/embedding"],
        phase(learning_rate_multipliers={"vision/a/bias": 3.0, "vision/**": 0.1}, weight_decay=0.2),
        OptimizerConfig(),
        "training.phases[0]",
    )
    assert [rules[path].learning_rate_factor for path in rules] == [0.1, 3.0, 1.0, 1.0]
    assert [rules[path].weight_decay for path in rules] == [0.2, 0.0, 0.0, 0.2]


def test_a_multiplier_that_matches_nothing_is_refused_with_the_nearest_part():
    with pytest.raises(UserError, match=r"'visoin/\*\*' matches no parameter; did you mean 'vision/\*\*'"):
        parameter_rules(
            ["vision/a/kernel"],
            phase(learning_rate_multipliers={"visoin/**": 0.1}),
            OptimizerConfig(),
            "training.phases[0]",
        )


def test_updates_agree_with_optax_over_several_steps():
    rng = np.random.default_rng(0)
    shapes = {"vision/kernel": (7, 5), "language/scale": (5,)}
    config = OptimizerConfig(b1=0.9, b2=0.95, eps=1e-8)
    rules = parameter_rules(shapes, phase(weight_decay=0.1, learning_rate_multipliers={"vision/**": 0.5}), config, "p")
    params = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}
    state = adam_state(params)

    # An independent optimizer for each parameter: its own rate and decay.
    witness = {
        path: optax.adamw(0.01 * r.learning_rate_factor, b1=0.9, b2=0.95, eps=1e-8, weight_decay=r.weight_decay)
        for path, r in rules.items()
    }
    theirs, states = dict(params), {path: witness[path].init(params[path]) for path in shapes}
    ours = fused_adamw(config, rules)
    step = jax.jit(lambda p, g, s: apply_update(ours, g, s, p, learning_rate=0.01, keep=jnp.bool_(True)))
    for _ in range(5):
        gradients = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}
        params, state = step(params, gradients, state)
        for path in shapes:
            update, states[path] = witness[path].update(gradients[path], states[path], theirs[path])
            theirs[path] = optax.apply_updates(theirs[path], update)
    worst = max(float(jnp.abs(params[path] - theirs[path]).max()) for path in shapes)
    # float32, values of order 1, five updates in another order of operations.
    assert worst < 2e-6, f"largest difference {worst:.2e}"


def test_layer_decay_is_a_rate_of_its_own_for_each_layer():
    """Against optax on each layer by itself, weight decay included."""
    rng = np.random.default_rng(0)
    value, gradient = (jnp.asarray(rng.normal(size=(3, 5, 4)), jnp.float32) for _ in range(2))
    names = {"s/kernel": ("layers", "embed", "mlp"), "head": ("embed", None, None)}
    old = {"s/kernel": value, "head": value}
    updates, _ = (adamw := optax.adamw(0.1, weight_decay=0.3)).update(gradient, adamw.init(value), value)
    new = dict.fromkeys(old, value + updates)
    found = with_layer_decay(new, old, names, 0.5)
    for layer, factor in enumerate((0.25, 0.5, 1.0)):
        own = optax.adamw(0.1 * factor, weight_decay=0.3)
        step, _ = own.update(gradient[layer], own.init(value[layer]), value[layer])
        np.testing.assert_allclose(found["s/kernel"][layer], value[layer] + step, rtol=1e-6, atol=1e-7)
    assert found["head"] is new["head"] and with_layer_decay(new, old, names, 1.0) is new


def test_an_update_that_is_not_kept_leaves_every_bit():
    path = "vision/kernel"
    before = {path: jnp.asarray([1.0, -0.0, 3.5])}
    state = AdamState({path: jnp.asarray([0.1, 0.2, 0.3])}, {path: jnp.asarray([0.1, 0.2, 0.3])}, jnp.int32(1))
    rules = parameter_rules(before, phase(), OptimizerConfig(), "p")
    gradients = {path: jnp.asarray([jnp.nan, jnp.inf, 1.0])}
    for transformation, start in ((fused_adamw(OptimizerConfig(), rules), state), (SGD, SGD.init(before))):
        after = apply_update(transformation, gradients, start, before, learning_rate=0.1, keep=jnp.bool_(False))
        for got, want in zip(jax.tree.leaves(after), jax.tree.leaves((before, start)), strict=True):
            assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_a_transformation_of_optax_is_applied_at_the_rate_of_the_step():
    params, gradients = {"w": jnp.asarray([1.0, -2.0])}, {"w": jnp.asarray([0.5, 4.0])}
    state, expected = SGD.init(params), np.array([1.0, -2.0])
    for count, rate in enumerate((0.1, 0.2)):
        params, state = apply_update(
            SGD, gradients, state, params, learning_rate=jnp.float32(rate), keep=jnp.bool_(True)
        )
        expected = expected - rate * np.array([0.5, 4.0]) * (
            1.9 if count else 1.0
        )  # momentum 0.9 of the first gradient
    np.testing.assert_allclose(params["w"], expected, rtol=1e-6)
