"""Files that an export keeps of its base, and its README.md."""

import json

import pytest

from mindvl_jax.config import loader
from mindvl_jax.weights.card import base_dtype, base_of, keep_generation_settings, write_card


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "Base-VL"
    folder.mkdir()
    (folder / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    settings = {"temperature": 0.1, "repetition_penalty": 1.05, "eos_token_id": [1, 2], "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("described", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "int4"}, None),
        ({}, None),
    ],
)
def test_the_dtype_is_the_one_that_the_base_names(tmp_path, described, dtype):
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert base_dtype(tmp_path) == dtype


def test_sampling_settings_stay_the_bases_and_token_ids_those_of_training(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "generation_config.json").write_text('{"eos_token_id": [7], "pad_token_id": 8, "do_sample": false}')
    keep_generation_settings(out, base)
    assert json.loads((out / "generation_config.json").read_text()) == {
        "temperature": 0.1,
        "repetition_penalty": 1.05,
        "do_sample": True,
        "eos_token_id": [7],
        "pad_token_id": 8,
    }


def test_the_card_names_base_phases_and_scores(base, tmp_path):
    config = loader.load("smoke", [f"run.init_from={base}"])
    run = tmp_path / "my-run"
    run.mkdir()
    (run / "scores.json").write_text(
        json.dumps({"tasks": {"digits": {"exact_match": 0.84, "ci95": [0.8, 0.87], "n": 900}}})
    )
    assert base_of(config) == base and base_of(loader.load("smoke")) is None
    write_card(tmp_path, config, run, kind="mindvl", dtype="bfloat16", in_transformers=False)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith('---\nbase_model: "Base-VL"\n') and "# my-run" in card
    assert "| digits | 0.840 | 0.800 to 0.870 | 900 |" in card and "| warmup | 6 | `projector/**` | captions |" in card
    assert "transformers" not in card, "nothing else opens this pairing"
