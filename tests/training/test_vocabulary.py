"""A run keeps the compact vocabulary that it learns: data built anew must not change what its tokens mean."""

import json

import pytest

from mindvl_jax.core.errors import UserError
from mindvl_jax.data.text.tokenizer import read_id_table
from mindvl_jax.training import trainer
from mindvl_jax.weights import open_model


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "id_table.json"
    path.write_text(json.dumps(list(range(263))))
    return path


def test_a_run_speaks_its_own_vocabulary_after_the_data_were_built_anew_and_does_not_go_on_under_another(
    run_config, table, assets
):
    sections = dict(tokenizer={"path": str(assets / "tokenizer.json"), "id_table": str(table)})
    config = run_config({"steps": 2}, **sections)
    trainer.train(config, stop_after=1)
    original = read_id_table(table)
    table.write_text(json.dumps([1, 0, *range(2, 263)]))  # as long as before: the two first tokens changed places
    assert open_model(config.run.dir).tokenizer.real_ids == original
    with pytest.raises(UserError, match="is not the vocabulary of the weights that this run goes on from"):
        trainer.train(config)
    kept = run_config(
        {"steps": 2},
        **{**sections, "tokenizer": {**sections["tokenizer"], "id_table": f"{config.run.dir}/id_table.json"}},
    )
    assert trainer.train(kept).finished


def test_weights_of_a_run_are_not_trained_on_under_another_vocabulary(run_config, table, assets, tmp_path):
    sections = dict(tokenizer={"path": str(assets / "tokenizer.json"), "id_table": str(table)})
    first = run_config({"steps": 1}, **sections)
    trainer.train(first)
    original = table.read_text()
    later = {
        key: run_config({"steps": 2}, run={"dir": str(tmp_path / key), key: first.run.dir}, **sections)
        for key in ("init_from", "resume")
    }
    table.write_text(json.dumps([1, 0, *range(2, 263)]))
    for config in later.values():
        with pytest.raises(UserError, match="is not the vocabulary of the weights that this run goes on from"):
            trainer.train(config)
    table.write_text(original)
    assert all(trainer.train(config).finished for config in later.values())
