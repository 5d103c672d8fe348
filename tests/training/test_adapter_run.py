"""Runs with adapters: what learns, what stays, what a checkpoint and an export hold; other meshes and the bridge give
the same.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from mindvl_jax.checkpoints import checkpoint
from mindvl_jax.cli.main import main
from mindvl_jax.config import loader as config_loader
from mindvl_jax.core.errors import UserError
from mindvl_jax.models.adapters import is_adapter
from mindvl_jax.models.outline import outline_of
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.training.initial import starting_params
from mindvl_jax.training.trainer import train
from mindvl_jax.weights.companions import write_companions
from mindvl_jax.weights.merge import probe
from mindvl_jax.weights.resolve import add_adapter, open_model
from mindvl_jax.weights.save import save_parameters
from tests.training.conftest import configuration

ADAPTERS = {"targets": ["q_proj", "down_proj", "qkv"], "rank": 4, "alpha": 8, "dora": True}


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("mindvl_jax.evaluation.report.write_report", lambda run_dir: f"{run_dir}/report.html")


@pytest.fixture(scope="module")
def run(assets, tmp_path_factory):
    """(configuration as plain data, final parameters) of four steps with DoRA, a checkpoint at each."""
    mapping = configuration(
        assets,
        tmp_path_factory.mktemp("adapters") / "run",
        {"steps": 4, "learning_rate": 0.01},
        adapters=ADAPTERS,
        checkpoint={"every_steps": 1, "keep": 9},
    )
    train(config_loader.from_mapping(mapping), console=Console(quiet=True))
    return mapping, checkpoint.load_params(mapping["run"]["dir"])[1]


def start(mapping):
    config = config_loader.from_mapping(mapping)
    return starting_params(
        config, outline_of(config.model, config.adapters), make_mesh(config.mesh), Console(quiet=True)
    )


def test_adapters_learn_and_the_base_keeps_every_bit(run, read_metrics):
    mapping, after = run
    config = config_loader.from_mapping(mapping)
    before = start(mapping)
    assert before.keys() == after.keys()
    for path in before:
        same = np.array_equal(np.asarray(before[path]), np.asarray(after[path]))
        assert same != is_adapter(path), f"{path} {'stayed' if same else 'moved'}"
    losses = [line["loss"] for line in read_metrics(config)]
    assert losses[-1] < losses[0], losses
    assert config.training.phases[0].train == ("**/lora_*",)
    with checkpoint.CheckpointReader(config.run.dir) as reader:
        progress = reader.progress(4)[0]
    assert set(progress.trained) == {path for path in after if is_adapter(path)}


def test_a_run_that_was_cut_ends_in_the_same_bits(run, tmp_path):
    mapping, after = run
    again = {
        **mapping,
        "run": {**mapping["run"], "dir": str(tmp_path / "run"), "resume": f"{mapping['run']['dir']}/checkpoints/2"},
    }
    train(config_loader.from_mapping(again), console=Console(quiet=True))
    resumed = checkpoint.load_params(tmp_path / "run")[1]
    assert all(np.array_equal(np.asarray(after[path]), np.asarray(resumed[path])) for path in after)


def test_another_rank_than_the_checkpoint_has_is_refused(run, tmp_path):
    mapping, _ = run
    other = {
        **mapping,
        "adapters": {**ADAPTERS, "rank": 8},
        "run": {**mapping["run"], "dir": str(tmp_path / "run"), "resume": mapping["run"]["dir"]},
    }
    with pytest.raises(UserError, match=r"other adapters than the configuration:\n  adapters.rank: 4 -> 8"):
        train(config_loader.from_mapping(other), console=Console(quiet=True))


def test_training_everything_beside_adapters_is_refused(assets, tmp_path):
    with pytest.raises(UserError, match="would train the whole base beside the adapters"):
        config_loader.from_mapping(configuration(assets, tmp_path, {"train": ["**"]}, adapters=ADAPTERS))
    with pytest.raises(UserError, match="unknown key"):
        config_loader.from_mapping(configuration(assets, tmp_path, adapters={**ADAPTERS, "lora_rank": 3}))


def test_exported_adapters_on_the_base_and_the_merged_export_answer_as_the_run(run, tmp_path, capsys):
    mapping, after = run
    folder = mapping["run"]["dir"]
    assert main(["export", "--run", folder, "--out", str(tmp_path / "adapter")]) == 0
    assert main(["export", "--run", folder, "--merge", "--out", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    opened = open_model(folder)
    base = {path: value for path, value in after.items() if not is_adapter(path)}
    save_parameters(tmp_path / "base", opened.model_config, base)
    write_companions(tmp_path / "base", opened.model_config, opened.tokenizer, 784, 3136)
    batch = jax.tree.map(jnp.asarray, probe(opened.model_config))
    logits = [
        np.asarray(logits_of(model, batch))
        for model in (
            opened.model,
            add_adapter(open_model(tmp_path / "base"), tmp_path / "adapter").model,
            open_model(tmp_path / "merged").model,
            open_model(tmp_path / "base").model,
        )
    ]
    for name, found in zip(("adapter on base", "merged"), logits[1:3], strict=True):
        error = np.max(np.abs(found - logits[0])) / np.max(np.abs(logits[0]))
        assert error < 1e-5, f"{name}: {error:.1e}"
    assert np.max(np.abs(logits[3] - logits[0])) > 1e-3, "the adapters change nothing: the test could not fail"


def logits_of(model, batch):
    graph, state = nnx.split(model)
    return jax.jit(lambda state: (made := nnx.merge(graph, state)).logits(made(batch)))(state)


@pytest.mark.parametrize(
    "change", [dict(mesh={"fsdp": 2, "tensor": 2}), dict(backend="npu_bridge")], ids=["mesh", "bridge"]
)
def test_a_mesh_of_four_and_the_bridge_train_the_same_adapters(run, tmp_path, change):
    mapping, after = run
    other = {**mapping, **change, "run": {**mapping["run"], "dir": str(tmp_path / "run")}}
    train(config_loader.from_mapping(other), console=Console(quiet=True))
    found = checkpoint.load_params(tmp_path / "run")[1]
    before = start(mapping)
    for path in filter(is_adapter, after):
        moved, apart = (np.linalg.norm(np.asarray(other[path]) - np.asarray(after[path])) for other in (before, found))
        assert apart < 2e-3 * moved, f"{path}: {apart:.1e} apart, {moved:.1e} moved"
