"""Muon against `optax.contrib.muon`: values, meshes, what AdamW keeps, checkpoints and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from mindvl_jax.config import loader as config_loader
from mindvl_jax.config.schema import MeshConfig, OptimizerConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.training.muon import muon, optimizer_init, require_matrices
from mindvl_jax.training.optimizer import ParameterRule, apply_update
from mindvl_jax.training.trainer import train
from tests.training.conftest import configuration

SHAPES = {
    "language/layers/mlp/up/kernel": (3, 16, 24),
    "projector/linear1/kernel": (16, 8),
    "language/embed/embedding": (32, 16),
    "language/layers/norm1/scale": (3, 16),
}
CONFIG = OptimizerConfig(name="muon", b2=0.95)
RULES = {path: ParameterRule(1.0, 0.1 if path.endswith("kernel") else 0.0) for path in SHAPES}


def witness(params, gradients):
    """Update by optax: Muon on the matrices with the consistent scale, AdamW on the rest (its Muon would give these
    Nesterov's form).
    """
    dims = {
        path: optax.contrib.MuonDimensionNumbers(len(shape) - 2, len(shape) - 1)
        for path, shape in SHAPES.items()
        if path.endswith("kernel")
    }
    optimizers = (
        optax.contrib.muon(0.01, weight_decay=0.1, consistent_rms=0.2, muon_weight_dimension_numbers=dims),
        optax.adamw(0.01, 0.9, 0.95, weight_decay=0.0),
    )
    found = {}
    for optimizer, paths in zip(optimizers, (list(dims), [path for path in SHAPES if path not in dims]), strict=True):
        own = {path: params[path] for path in paths}
        state = optimizer.init(own)
        for gradient in gradients:
            updates, state = optimizer.update({path: gradient[path] for path in paths}, state, own)
            own = optax.apply_updates(own, updates)
        found |= own
    return found


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    draw = lambda: {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()}  # noqa: E731
    params, gradients = draw(), [draw() for _ in range(5)]
    with jax.default_matmul_precision("highest"):
        return params, gradients, witness(params, gradients)


@pytest.mark.parametrize("axes", [{}, {"fsdp": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_updates_agree_with_optax_on_every_mesh(case, axes):
    params, gradients, expected = case
    mesh = make_mesh(MeshConfig(**axes))
    names = {3: PartitionSpec(None, "fsdp", "tensor"), 2: PartitionSpec("fsdp", "tensor")}

    def place(tree):
        return {
            path: jax.device_put(
                value, NamedSharding(mesh, names[value.ndim] if path.endswith("kernel") else PartitionSpec())
            )
            for path, value in tree.items()
        }

    ours, state = muon(CONFIG, RULES), optimizer_init(CONFIG)(place(params))
    assert set(state.nu) == {path for path in SHAPES if not path.endswith("kernel")}, "Muon keeps no second moment"
    step = jax.jit(lambda p, g, s: apply_update(ours, g, s, p, learning_rate=0.01, keep=jnp.bool_(True)))
    found = place(params)
    with jax.default_matmul_precision("highest"):
        for gradient in gradients:
            found, state = step(found, place(gradient), state)
    worst = max(float(jnp.abs(jax.device_get(found[path]) - expected[path]).max()) for path in SHAPES)
    assert worst < 1e-5, f"largest difference {worst:.1e}"


def test_a_skipped_step_keeps_every_bit(case):
    params, (gradient, *_), _ = case
    state = optimizer_init(CONFIG)(params)
    after = apply_update(muon(CONFIG, RULES), gradient, state, params, learning_rate=0.1, keep=jnp.bool_(False))
    for got, want in zip(jax.tree.leaves(after), jax.tree.leaves((params, state)), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_a_run_without_a_matrix_for_muon_is_refused():
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()}
    with pytest.raises(UserError, match="none of the trained parameters is one of training.optimizer.muon"):
        require_matrices(
            {"language/embed/embedding": shapes["language/embed/embedding"]}, CONFIG, "training.phases[0].train"
        )
    with pytest.raises(UserError, match="selects language/norm/scale of shape"):
        require_matrices(
            {"language/norm/scale": jax.ShapeDtypeStruct((16,), jnp.float32)},
            OptimizerConfig(name="muon", muon=("**",)),
            "x",
        )


def test_a_run_with_muon_learns_and_its_state_is_its_own(assets, tmp_path, read_metrics, monkeypatch):
    """That a state without second moments continues to the bit is `tests/training/test_adamw8bit.py`'s way too."""
    monkeypatch.setattr("mindvl_jax.evaluation.report.write_report", lambda run_dir: f"{run_dir}/report.html")
    mapping = configuration(
        assets, tmp_path / "run", {"steps": 3, "learning_rate": 5e-3}, training={"optimizer": {"name": "muon"}}
    )
    train(config_loader.from_mapping(mapping), console=Console(quiet=True))
    losses = [line["loss"] for line in read_metrics(config_loader.from_mapping(mapping))]
    assert losses[-1] < losses[0], losses
    again = {"dir": str(tmp_path / "again"), "resume": str(tmp_path / "run")}
    other = {**mapping, "run": {**mapping["run"], **again}, "training": {**mapping["training"], "optimizer": {}}}
    with pytest.raises(UserError, match="its state cannot be continued"):
        train(config_loader.from_mapping(other), console=Console(quiet=True))
