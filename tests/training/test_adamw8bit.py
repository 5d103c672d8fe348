"""AdamW with 8-bit moments against torchao 0.18: its tables, codes and values after five updates are recorded.

Recorded by `torchao.optim.AdamW8bit(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, block_size=256)` on `case()`.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from safetensors.numpy import load_file

import npu_bridge
from mindvl_jax.checkpoints import checkpoint
from mindvl_jax.config import loader as config_loader
from mindvl_jax.config.schema import MeshConfig, OptimizerConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.training.adamw8bit import SIGNED, UNSIGNED, adam8bit_state, adamw8bit, decode, encode, in_8_bits
from mindvl_jax.training.optimizer import ParameterRule, apply_update, fused_adamw
from mindvl_jax.training.trainer import train
from tests.training.conftest import configuration

RECORDED = load_file(Path(__file__).parent / "recorded" / "adamw8bit_torchao_0_18.safetensors")
CONFIG = OptimizerConfig(name="adamw8bit", b2=0.95)
PATH = "language/layers/mlp/up/kernel"
RULES = {PATH: ParameterRule(1.0, 0.1), "language/norm/scale": ParameterRule(1.0, 0.0)}


def case():
    """(value, five gradients): rows of different sizes, no gradient so small that torchao rounds its square to 0."""
    rng = np.random.default_rng(0)
    value = rng.normal(size=(24, 512)).astype(np.float32)

    def gradient():
        signs, sizes = rng.choice([-1, 1], size=value.shape), rng.uniform(0.05, 1, size=value.shape)
        return (signs * sizes * 10.0 ** rng.integers(-2, 2, size=(24, 1))).astype(np.float32)

    return value, [gradient() for _ in range(5)]


def run(value, gradients, jit=jax.jit):
    ours, params = adamw8bit(CONFIG, RULES), {PATH: value}
    state = adam8bit_state(CONFIG, params)
    step = jit(lambda p, g, s: apply_update(ours, g, s, p, learning_rate=1e-2, keep=jnp.bool_(True)))
    for gradient in gradients:
        params, state = step(params, {PATH: gradient}, state)
    return params[PATH], state


def test_tables_are_those_of_the_paper():
    """Section 1.3 of arXiv 2110.02861, as torchao computes them."""
    np.testing.assert_allclose(SIGNED, RECORDED["signed"], rtol=2e-7)
    np.testing.assert_allclose(UNSIGNED, RECORDED["unsigned"], rtol=2e-7)


@pytest.mark.parametrize("layers", [None, 3], ids=["a matrix", "a stack, layer by layer"])
def test_five_updates_agree_with_torchao(layers):
    value, gradients = case()
    shape = value.shape if layers is None else (layers, 8, 512)
    found, state = run(jnp.asarray(value).reshape(shape), [jnp.asarray(g).reshape(shape) for g in gradients])
    np.testing.assert_allclose(np.asarray(found).reshape(value.shape), RECORDED["value"], rtol=1e-5, atol=1e-6)
    for name in ("mu", "nu"):
        absmax = np.asarray(getattr(state, f"{name}_absmax")[PATH])
        np.testing.assert_allclose(absmax.reshape(-1), RECORDED[f"{name}_absmax"], rtol=1e-6)
        codes = np.asarray(getattr(state, name)[PATH]).reshape(value.shape)
        assert codes.dtype == np.uint8
        # A rounding of the last bit may turn a value between two codes the other way, and from then on the next ones.
        assert np.mean(codes != RECORDED[name]) < 2e-3 and np.abs(codes.astype(int) - RECORDED[name]).max() <= 1


def test_every_mesh_and_the_bridge_compute_the_same_bits():
    """Widths that cut blocks among devices (300 columns over 2, 4) too."""
    rng = np.random.default_rng(1)
    shape = (2, 40, 304)
    value, gradients = rng.normal(size=shape).astype(np.float32), rng.normal(size=(3, *shape)).astype(np.float32)
    expected = run(jnp.asarray(value), [jnp.asarray(g) for g in gradients])
    for axes, spec in (
        ({"fsdp": 8}, (None, "fsdp", None)),
        ({"fsdp": 2, "tensor": 4}, (None, "fsdp", "tensor")),
        ({"fsdp": 4, "tensor": 2}, (None, "tensor", "fsdp")),
    ):
        place = NamedSharding(make_mesh(MeshConfig(**axes)), PartitionSpec(*spec))
        found = run(jax.device_put(value, place), [jax.device_put(g, place) for g in gradients])
        for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert np.asarray(got).tobytes() == np.asarray(want).tobytes(), axes
    on_bridge = run(jnp.asarray(value), [jnp.asarray(g) for g in gradients], npu_bridge.jit)
    np.testing.assert_allclose(np.asarray(on_bridge[0]), np.asarray(expected[0]), rtol=1e-5, atol=1e-6)


def test_a_small_second_moment_never_becomes_zero():
    """Its root divides the update: rounded to zero, a parameter would jump by learning_rate * mu / eps."""
    nu = jnp.asarray(np.geomspace(1e-30, 1.0, 256, dtype=np.float32)[None])
    codes, absmax = encode(nu, UNSIGNED)
    back = decode(codes, absmax, UNSIGNED)
    assert back.min() > 0
    large = nu[0] > 1e-5
    np.testing.assert_allclose(back[0][large], nu[0][large], rtol=0.35)
    zeros = encode(jnp.zeros((1, 256)), UNSIGNED)
    assert not np.asarray(decode(*zeros, UNSIGNED)).any()


def test_a_skipped_step_keeps_every_bit_and_what_is_small_keeps_float32():
    value, gradients = case()
    params = {PATH: jnp.asarray(value), "language/norm/scale": jnp.ones((28, 512))}
    gradient = {PATH: jnp.asarray(gradients[0]), "language/norm/scale": jnp.full((28, 512), 0.5)}
    assert in_8_bits(params, CONFIG) == {PATH}
    rules = {path: ParameterRule(1.0, 0.0) for path in params}
    ours = adamw8bit(CONFIG, rules)
    one = apply_update(ours, gradient, adam8bit_state(CONFIG, params), params, learning_rate=0.1, keep=jnp.bool_(True))
    two = apply_update(ours, gradient, one[1], one[0], learning_rate=0.1, keep=jnp.bool_(False))
    for got, want in zip(jax.tree.leaves(two), jax.tree.leaves(one), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
    plain = fused_adamw(CONFIG, rules)
    expected, _ = apply_update(plain, gradient, plain.init(params), params, learning_rate=0.1, keep=jnp.bool_(True))
    path = "language/norm/scale"
    assert one[1].nu[path].dtype == jnp.float32 and np.array_equal(one[0][path], expected[path])


def test_a_run_continues_to_the_bit_and_refuses_the_state_of_another_optimizer(
    assets, tmp_path, read_metrics, monkeypatch
):
    monkeypatch.setattr("mindvl_jax.evaluation.report.write_report", lambda run_dir: f"{run_dir}/report.html")
    mapping = configuration(
        assets,
        tmp_path / "run",
        {"steps": 4, "learning_rate": 5e-3},
        training={"optimizer": {"name": "adamw8bit"}},
        checkpoint={"every_steps": 2, "keep": 9},
    )
    quiet = Console(quiet=True)
    train(config_loader.from_mapping(mapping), console=quiet)
    losses = [line["loss"] for line in read_metrics(config_loader.from_mapping(mapping))]
    assert losses[-1] < losses[0], losses
    again = {
        **mapping,
        "run": {**mapping["run"], "dir": str(tmp_path / "again"), "resume": str(tmp_path / "run/checkpoints/2")},
    }
    train(config_loader.from_mapping(again), console=quiet)
    one, two = (checkpoint.load_params(tmp_path / name)[1] for name in ("run", "again"))
    assert all(np.array_equal(np.asarray(one[path]), np.asarray(two[path])) for path in one)
    other = {**again, "training": {**mapping["training"], "optimizer": {}}}
    with pytest.raises(UserError, match="its state cannot be continued"):
        train(config_loader.from_mapping({**other, "run": {**again["run"], "dir": str(tmp_path / "x")}}), console=quiet)
    split = {**mapping, "mesh": {"stage": 2}, "run": {**mapping["run"], "dir": str(tmp_path / "y")}}
    with pytest.raises(UserError, match="adamw8bit, which updates a stack layer by layer"):
        train(config_loader.from_mapping(split), console=quiet)
