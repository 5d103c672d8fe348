"""A step that is not finite: what is kept of it, and what `mindvl replay` says."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindvl_jax.cli.main import main
from mindvl_jax.training.replay import first_bad
from mindvl_jax.training.trainer import TrainingDiverged, train


def test_the_search_names_the_layer_of_a_stack_and_the_pass():
    def model(stack, x):
        def layer(x, weight):
            with jax.named_scope("attention"):
                x = x * weight
            with jax.named_scope("norm"):
                return jnp.sqrt(x), None

        with jax.named_scope("language"):
            return jnp.sum(jax.lax.scan(layer, x, stack)[0])

    ones, x = jnp.ones(5), jnp.ones(3)
    assert first_bad(model, ones, x) is None
    forward = first_bad(model, ones.at[3].set(-1.0), x)
    assert forward.scope == "language/layer 3/norm" and forward.operation == "sqrt" and not forward.backward
    backward = first_bad(model, ones.at[2].set(0.0), x)  # the root of 0 is finite, its derivative is not
    assert backward.backward and "layer 2" in backward.scope

    def masked(x):
        return jax.nn.softmax(jnp.where(jnp.arange(3) < 2, x, -jnp.inf)).sum()

    assert first_bad(masked, x) is None, "a mask's -inf is no sign"


@pytest.fixture(scope="module")
def diverged(assets, tmp_path_factory):
    """A run whose second step overflows, with the norms by part that it wrote down."""
    from mindvl_jax.config.loader import from_mapping

    folder = tmp_path_factory.mktemp("diverged")
    mapping = configuration(
        assets,
        folder / "run",
        {"steps": 6, "train": ["projector/**"], "learning_rate": 1e30},
        training={"max_bad_steps": 2},
        checkpoint={"every_steps": 100},
    )
    config = from_mapping(mapping)
    with pytest.raises(TrainingDiverged) as raised:
        train(config)
    return Path(config.run.dir), str(raised.value)


def configuration(*arguments, **sections):
    import importlib.util

    spec = importlib.util.spec_from_file_location("training_fixtures", Path(__file__).parent / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.configuration(*arguments, **sections)


def test_a_diverged_run_says_rate_and_command_and_names_no_checkpoint_that_is_not_there(diverged):
    _, message = diverged
    assert "it was 1e+30" in message and "there is no checkpoint yet" in message and "mindvl replay" in message


def test_replay_builds_the_batch_again_and_names_the_first_operation(diverged, capsys):
    run, _ = diverged
    kept = json.loads((run / "bad_step.json").read_text())
    assert main(["replay", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == kept["step"] and found["sample_ids"] == kept["sample_ids"]
    assert found["finding"] is not None and found["finding"]["scope"] and ".py:" in found["finding"]["source"], found
    assert main(["replay", str(run)]) == 0
    assert "first result that is not finite:" in capsys.readouterr().out


def test_replay_needs_no_data_and_says_what_is_damaged(diverged, capsys, tmp_path):
    run, _ = diverged
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("squares.parquet", "gone.parquet"))
    assert main(["replay", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["finding"] is not None
    for name, content in (
        ("bad_step.npz", b"PK\x03\x04cut"), ("bad_step_batch.npz", b""), ("bad_step_batch.npz", b"\x80\x04cos\nsystem"),
        ("bad_step.json", b"[]"), ("bad_step.json", b"{"), ("bad_step.json", b'{"phase_index": 99}'),
    ):  # fmt: skip
        kept = (copy / name).read_bytes()
        (copy / name).write_bytes(content)
        assert main(["replay", str(copy)]) == 2
        assert f"{name} is damaged" in capsys.readouterr().err
        (copy / name).write_bytes(kept)


def test_the_norms_of_the_parts_make_up_the_whole(run_config, read_metrics):
    config = run_config({"steps": 2})
    train(config)
    for row in read_metrics(config):
        parts = {name: value for name, value in row.items() if name.startswith("grad_norm/")}
        assert set(parts) == {"grad_norm/vision", "grad_norm/projector", "grad_norm/language"}
        assert np.sqrt(sum(value**2 for value in parts.values())) == pytest.approx(row["grad_norm"], rel=1e-5)
