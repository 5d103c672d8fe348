"""Configuration: what is read, what is refused, and how the refusal reads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mindvl_jax.cli import main as cli
from mindvl_jax.config import loader as config_loader
from mindvl_jax.config.loader import ConfigError

MINIMAL = """
run: {dir: runs/x}
model:
  vision: {depth: 2, hidden_size: 32, intermediate_size: 48, num_heads: 2, fullatt_block_indexes: [1]}
  text: {family: qwen3, vocab_size: 64, hidden_size: 32, intermediate_size: 48, num_layers: 2, num_heads: 2,
         num_kv_heads: 1, head_dim: 16, tie_word_embeddings: true, rope: mrope, mrope_section: [2, 3, 3]}
  image_token_id: 1
  video_token_id: 2
  vision_start_token_id: 3
  vision_end_token_id: 4
data:
  sources: {words: {path: words.parquet}}
training:
  phases:
    - {name: warmup, steps: 10, mixture: [{source: words}], rows: 2, sequence_length: 32, patches_per_row: 16, learning_rate: 1e-3}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_numbers_in_scientific_notation_are_numbers(write):
    assert config_loader.load(write(MINIMAL)).training.phases[0].learning_rate == 0.001


def test_dump_and_load_give_the_same_configuration(write):
    config = config_loader.load(write(MINIMAL))
    assert config_loader.load(write(config_loader.dump(config), "again.yaml")) == config


def test_extends_merges_mappings_and_replaces_lists(write):
    write(MINIMAL, "base.yaml")
    config = config_loader.load(
        write("extends: base.yaml\nrun: {seed: 7}\nmodel: {text: {num_layers: 5}}\n", "child.yaml")
    )
    assert (config.run.dir, config.run.seed, config.model.text.num_layers, config.model.text.hidden_size) == (
        "runs/x",
        7,
        5,
        32,
    )


def test_overrides_reach_mappings_and_list_elements(write):
    config = config_loader.load(
        write(MINIMAL),
        ["run.seed=3", "training.phases[0].steps=50", "mesh.fsdp=2", "data.sources.extra.path=a b.jsonl"],
    )
    assert (config.run.seed, config.training.phases[0].steps, config.mesh.fsdp, config.data.sources["extra"].path) == (
        3,
        50,
        2,
        "a b.jsonl",
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "training.phases[0].step=5",
            "`training.phases[0].step`: unknown key; did you mean `training.phases[0].steps`?",
        ),
        ("learning_rate=1", "did you mean `training.phases[0].learning_rate`?"),
        ("trainig.loss_chunk=5", "did you mean `training`?"),
        ("run.seed=many", "`run.seed`: Input should be a valid integer"),
        ("model.text.num_kv_heads=3", "num_heads (2) must be a multiple of num_kv_heads (3)"),
        ("model.text.mrope_section=[1,1,1]", "must sum to head_dim / 2 = 8"),
        ("training.phases[0].mixture[0].source=word", "names source 'word', which data.sources does not have (words)"),
        ("training.phases[0].patches_per_row=10", "must be a multiple of 4"),
        ("training.phases[3].steps=5", "is a list of 1"),
        ("run.dir.x=5", "`run.dir` is a single value"),
        ("nonsense", "expected key=value"),
    ],
)
def test_a_bad_override_is_refused_with_its_place_and_a_fix(write, override, expected):
    with pytest.raises(ConfigError) as error:
        config_loader.load(write(MINIMAL), [override])
    assert expected in str(error.value)
    assert "--set " + override in str(error.value) or "configuration" in str(error.value)


def test_all_problems_are_listed_at_once_with_file_and_line(write):
    path = write(MINIMAL.replace("depth: 2,", "dept: 2,") + "checkpoint: {keeep: 2}\n")
    with pytest.raises(ConfigError) as error:
        config_loader.load(path)
    message = str(error.value)
    assert "3 problems" in message  # depth missing, dept unknown, keeep unknown
    assert f"{path}:4: `model.vision.dept`: unknown key; did you mean `model.vision.depth`?" in message
    last_line = len(path.read_text().splitlines())
    assert f"{path}:{last_line}: `checkpoint.keeep`: unknown key; did you mean `checkpoint.keep`?" in message


def test_a_key_written_twice_is_refused(write):
    with pytest.raises(ConfigError, match="`run.seed` is written twice"):
        config_loader.load(write("run:\n  seed: 1\n  seed: 2\n"))


def test_extends_in_a_circle_is_refused(write):
    write("extends: b.yaml\n", "a.yaml")
    with pytest.raises(ConfigError, match="circle"):
        config_loader.load(write("extends: a.yaml\n", "b.yaml"))


@pytest.mark.parametrize(
    ("content", "expected"), [("", "an empty file"), ("- 1\n", "found list"), ("a: [1\n", "not valid YAML")]
)
def test_a_file_that_is_no_configuration_is_refused(write, content, expected):
    with pytest.raises(ConfigError, match=expected):
        config_loader.load(write(content))


def test_an_absent_file_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml: cannot read"):
        config_loader.load(tmp_path / "nowhere.yaml")


def test_the_schema_describes_every_section(capsys):
    assert cli.main(["config", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"extends", "run", "model", "training", "mesh"} <= set(schema["properties"])


def test_the_command_prints_the_resolved_configuration(write, capsys):
    assert cli.main(["config", str(write(MINIMAL)), "--set", "run.seed=9", "mesh.tensor=2"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["run"]["seed"] == 9 and printed["mesh"]["tensor"] == 2


def test_the_command_answers_a_typo_without_a_traceback(write, capsys):
    assert cli.main(["config", str(write(MINIMAL)), "--set", "run.sed=9"]) == 2
    assert "did you mean `run.seed`?" in capsys.readouterr().err


def test_reading_a_configuration_does_not_import_jax():
    code = "import sys, mindvl_jax.config.loader; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("configs/*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_loads(path):
    config_loader.load(path)


def test_a_model_section_without_a_family_is_mindvl(write):
    assert config_loader.load(write(MINIMAL)).model.family == "mindvl"


def test_an_unknown_family_is_refused_with_its_line_and_the_nearest_name(write):
    path = write(MINIMAL.replace("model:\n", "model:\n  family: minvdl\n"))
    with pytest.raises(
        ConfigError, match=r"config.yaml:4: `model.family`: no model family is called 'minvdl'; did you mean 'mindvl'\?"
    ):
        config_loader.load(path)


def test_a_preset_of_another_family_is_refused(write):
    with pytest.raises(ConfigError, match="`model.family` is 'other', but preset 'mindvl-tiny' belongs to 'mindvl'"):
        config_loader.load(write(MINIMAL), ["model.family=other", "model.preset=mindvl-tiny"])
