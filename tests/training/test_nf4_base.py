"""Adapters on a base in NF4 (QLoRA): trained as on the dequantised base, in four bits, on XLA and the bridge; what it
refuses.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from mindvl_jax.checkpoints import checkpoint
from mindvl_jax.cli.main import main
from mindvl_jax.config import loader as config_loader
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import count_weights, in_nf4
from mindvl_jax.models.adapters import dequantized, is_adapter
from mindvl_jax.models.layers.lora import adapted_linear
from mindvl_jax.models.layers.nf4 import dequantized_kernel, quantize
from mindvl_jax.models.outline import outline_of
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.training.initial import starting_params
from mindvl_jax.training.trainer import train
from mindvl_jax.weights.companions import write_companions
from mindvl_jax.weights.merge import probe
from mindvl_jax.weights.resolve import open_model
from mindvl_jax.weights.save import save_parameters
from tests.training.conftest import configuration
from tests.training.test_adapter_run import logits_of

ADAPTERS = {"targets": ["q_proj", "down_proj", "qkv"], "rank": 4, "alpha": 8, "base": "nf4"}
QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("mindvl_jax.evaluation.report.write_report", lambda run_dir: f"{run_dir}/report.html")


def losses(run_dir, read_metrics):
    config = config_loader.load(f"{run_dir}/config.yaml")
    return np.array([line["loss"] for line in read_metrics(config)])


def start(mapping):
    config = config_loader.from_mapping(mapping)
    outline = outline_of(config.model, config.adapters)
    return config, outline, starting_params(config, outline, make_mesh(config.mesh), QUIET)


def save_base(folder, config, params):
    base = {path: value for path, value in params.items() if not is_adapter(path)}
    save_parameters(folder, config.model, base)
    write_companions(folder, config.model, None, 784, 3136)


@pytest.fixture(scope="module")
def run(assets, tmp_path_factory):
    """(configuration as plain data, final parameters) of four steps on a folder's weights put into NF4."""
    folder = tmp_path_factory.mktemp("nf4")
    mapping = configuration(
        assets,
        folder / "run",
        {"steps": 4, "learning_rate": 0.01},
        adapters=ADAPTERS,
        checkpoint={"every_steps": 2, "keep": 9},
        model={"text": {"num_heads": 8, "intermediate_size": 128}},  # two blocks a row, one on each tensor rank
    )
    config, _, params = start({**mapping, "adapters": {**ADAPTERS, "base": None}})
    save_base(folder / "base", config, params)
    mapping["run"]["init_from"] = str(folder / "base")
    train(config_loader.from_mapping(mapping), console=QUIET)
    return mapping, checkpoint.load_params(mapping["run"]["dir"])[1]


def test_the_losses_are_those_of_adapters_on_the_dequantised_base(run, tmp_path, read_metrics):
    mapping, after = run
    config, _, before = start(mapping)
    save_base(tmp_path / "plain", config, dequantized(before, jnp.float32))
    plain = {
        **mapping,
        "adapters": {**ADAPTERS, "base": None},
        "run": {**mapping["run"], "dir": str(tmp_path / "run"), "init_from": str(tmp_path / "plain")},
    }
    train(config_loader.from_mapping(plain), console=QUIET)
    found, expected = (losses(folder, read_metrics) for folder in (mapping["run"]["dir"], tmp_path / "run"))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[-1] < found[0], found
    for path, value in before.items():
        assert np.array_equal(np.asarray(value), np.asarray(after[path])) != is_adapter(path), path


def test_the_stacks_are_held_in_four_bits_and_one_absmax_a_block(run):
    _, after = run
    config, outline, _ = start(run[0])
    plain = outline_of(config.model).shapes
    codes = [path for path in after if path.endswith("/nf4_codes")]
    assert len(codes) == 7 + 7, codes  # q, k, v, o, gate, up, down of both stacks
    kernels = [path for path in after if path.endswith("/kernel")]
    assert not [path for path in kernels if "/layers/" in path or "/blocks/" in path], kernels
    weights = sum(plain[path.replace("nf4_codes", "kernel")].size for path in codes)
    assert sum(after[path].nbytes for path in after if in_nf4(path)) == weights // 2 + weights // 64 * 4
    assert sum(count_weights(path, outline.shapes[path]) for path in outline.shapes if not is_adapter(path)) == sum(
        like.size for like in plain.values()
    )


def test_a_run_that_was_cut_ends_in_the_same_bits(run, tmp_path):
    mapping, after = run
    resume = f"{mapping['run']['dir']}/checkpoints/2"
    again = {**mapping, "run": {**mapping["run"], "dir": str(tmp_path / "run"), "resume": resume}}
    train(config_loader.from_mapping(again), console=QUIET)
    resumed = checkpoint.load_params(tmp_path / "run")[1]
    assert all(np.array_equal(np.asarray(after[path]), np.asarray(resumed[path])) for path in after)
    other = {**again, "adapters": {**ADAPTERS, "base": None}, "run": {**again["run"], "dir": str(tmp_path / "other")}}
    with pytest.raises(UserError, match=r"adapters.base: nf4 -> None"):
        train(config_loader.from_mapping(other), console=QUIET)


@pytest.mark.parametrize(
    "change", [dict(mesh={"fsdp": 2, "tensor": 2}), dict(backend="npu_bridge")], ids=["mesh", "bridge"]
)
def test_a_mesh_of_four_and_the_bridge_train_the_same_adapters(run, tmp_path, change):
    mapping, after = run
    other = {**mapping, **change, "run": {**mapping["run"], "dir": str(tmp_path / "run")}}
    train(config_loader.from_mapping(other), console=QUIET)
    found, before = checkpoint.load_params(tmp_path / "run")[1], start(mapping)[2]
    for path in filter(is_adapter, after):
        moved, apart = (np.linalg.norm(np.asarray(other[path]) - np.asarray(after[path])) for other in (before, found))
        assert apart < 2e-3 * moved, f"{path}: {apart:.1e} apart, {moved:.1e} moved"


def test_the_merged_export_answers_as_the_run_and_says_what_it_merged_onto(run, tmp_path, capsys):
    folder = run[0]["run"]["dir"]
    assert main(["export", "--run", folder, "--merge", "--out", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    assert "merging onto the base as" in capsys.readouterr().out
    assert main(["export", "--run", folder, "--out", str(tmp_path / "adapter")]) == 0
    assert "trained on a base in NF4" in capsys.readouterr().out
    opened = open_model(folder)
    batch = jax.tree.map(jnp.asarray, probe(opened.model_config))
    mine, merged = (
        np.asarray(logits_of(model, batch)) for model in (opened.model, open_model(tmp_path / "merged").model)
    )
    assert np.max(np.abs(mine - merged)) < 1e-5 * np.max(np.abs(mine))


@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_an_adapted_layer_and_its_gradients_are_those_on_the_dequantised_kernel(magnitude):
    keys = jax.random.split(jax.random.key(0), 6)
    x, a, b = (jax.random.normal(key, shape) for key, shape in zip(keys, [(5, 96), (96, 4), (4, 32)], strict=False))
    matrix, bias = quantize(jax.random.normal(keys[3], (96, 32))), jax.random.normal(keys[4], (32,))
    m = jnp.abs(jax.random.normal(keys[5], (32,))) + 1 if magnitude else None

    def loss(x, a, b, m, kernel):
        return jnp.sum(jnp.sin(adapted_linear(x, kernel, bias, a, b, 0.5, m)))

    learned = (0, 1, 2, 3) if magnitude else (0, 1, 2)
    found, expected = (
        jax.value_and_grad(loss, learned)(x, a, b, m, kernel)
        for kernel in (matrix, dequantized_kernel(matrix, x.dtype))
    )
    jax.tree.map(lambda mine, other: np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5), found, expected)


def test_what_a_base_in_four_bits_cannot_do_is_refused_by_name(assets, tmp_path):
    def refused(message, phase=None, **sections):
        sections = {"adapters": ADAPTERS, **sections}
        with pytest.raises(UserError, match=message):
            train(config_loader.from_mapping(configuration(assets, tmp_path, phase or {}, **sections)), console=QUIET)

    refused("would train the whole base", {"train": ["**"]})
    refused("nf4 holds in four bits, which cannot learn", {"train": ["**/lora_*", "language/layers/mlp/**"]})
    refused("training.ema_decay keeps a float32 average", training={"ema_decay": 0.9})
    refused(
        r"mesh.tensor=2 would cut blocks of 64 weights of language/layers/\S+ \(64 inputs",
        mesh={"data": 1, "tensor": 2},
    )
