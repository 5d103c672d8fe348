"""`mindvl init` and `mindvl train`: from a model folder and a data file to a run, and back to a folder that says the
same.
"""

import json
import re
import subprocess
import sys

import pytest

from mindvl_jax.cli import common
from mindvl_jax.config import loader
from mindvl_jax.config.loader import ConfigError
from mindvl_jax.core.files import read_jsonl


@pytest.fixture(scope="module")
def trained(published, squares, tmp_path_factory):
    """A run of one epoch that `train` made of the folder and the file alone."""
    from mindvl_jax.cli.main import main

    run = tmp_path_factory.mktemp("trained") / "run"
    assert (
        main(
            [
                "train",
                "--model",
                str(published),
                "--data",
                str(squares / "squares.json"),
                "--run",
                str(run),
                "--epochs",
                "1",
                "--set",
                "mesh.fsdp=1",
            ]
        )
        == 0
    )
    return run


def test_a_model_and_a_file_are_enough_to_train_one_epoch(trained):
    rows = read_jsonl(trained / "metrics.jsonl")
    assert rows[-1]["samples_total"] >= 24 and rows[-1]["epochs"] >= 1
    assert len(rows) == 1 or rows[-2]["epochs"] < 1, "the run stops at the step that completes the epoch"


def test_an_export_has_the_base_models_settings(trained, published, tmp_path, mindvl):
    code, _, told = mindvl("export", "--run", trained, "--out", tmp_path / "hf")
    assert code == 0, told
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (published, tmp_path / "hf"))
    assert after == before
    processors = [
        json.loads((folder / "preprocessor_config.json").read_text()) for folder in (published, tmp_path / "hf")
    ]
    assert processors[0] == processors[1]
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f'base_model: "{published.name}"' in card and "library_name: transformers" in card and "| sft |" in card


def test_init_from_alone_gives_the_sizes_of_the_folder(published, squares, tmp_path):
    text = (
        f"run: {{dir: {tmp_path}, init_from: {published}}}\ndata: {{sources: {{a: {{path: "
        f"{squares / 'squares.json'}}}}}}}\n"
        "training:\n  phases:\n    - {name: a, steps: 4, mixture: [{source: a}], rows: 8, sequence_length: "
        "64, patches_per_row: 64, learning_rate: 1.0e-3}\n"
    )
    file = tmp_path / "c.yaml"
    file.write_text(text)
    config = common.load_config(file)
    assert (
        config.model.text.max_position_embeddings,
        config.model.text.rms_norm_eps,
        config.model.vision.tokens_per_second,
    ) == (4096, 1e-5, 3)
    assert config.tokenizer.path == str(published)
    file.write_text(text.replace(f", init_from: {published}", "") + f"model: {{from: {published}, remat: full}}\n")
    again = common.load_config(file)
    assert again.model == config.model.model_copy(update=dict(remat="full"))
    file.write_text(text + f"model: {{from: {published}, preset: mindvl-tiny}}\n")
    with pytest.raises(ConfigError, match="both give the sizes"):
        common.load_config(file)
    file.write_text(text.replace(str(published), "no-such-folder"))
    with pytest.raises(ConfigError, match=r"c.yaml:1: no-such-folder: no such folder"):
        common.load_config(file)


def test_init_writes_a_configuration_in_which_every_sample_fits(published, squares, tmp_path, mindvl):
    out = tmp_path / "my.yaml"
    code, _, told = mindvl(
        "init", "--model", published, "--data", squares / "squares.json", "--out", out, "--epochs", "2"
    )
    assert code == 0 and f"mindvl train --config {out}" in told
    phase = common.load_config(out).training.phases[0]
    assert phase.epochs == 2 and phase.patches_per_row % 4 == 0 and (phase.min_pixels, phase.max_pixels) == (784, 3136)
    code, printed, told = mindvl("data", "check", "--config", out, "--out", tmp_path / "page.html")
    assert code == 0 and re.search(r"24 +│ 24 +│ 0 ", printed), printed + told
    assert mindvl("init", "--model", published, "--data", squares / "squares.json", "--out", out)[0] == 2, (
        "nothing is overwritten unasked"
    )


def test_epochs_replace_the_steps_of_a_recipe(published, squares, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        f"run: {{dir: {tmp_path}, init_from: {published}}}\ndata: {{sources: {{a: {{path: "
        f"{squares / 'squares.json'}}}}}}}\n"
        "training:\n  phases:\n    - {name: a, steps: 40, warmup_steps: 9, mixture: [{source: a}], rows: 2, "
        "sequence_length: 64, patches_per_row: 64, learning_rate: 1.0e-3}\n"
    )
    phase = common.load_config(
        file, ["training.phases[0].epochs=2", "training.phases[0].warmup_ratio=0.5"]
    ).training.phases[0]
    assert (phase.steps, phase.epochs, phase.warmup_steps, phase.warmup_ratio) == (None, 2, 0, 0.5)
    with pytest.raises(ConfigError, match=r"warmup_steps \(9\) is longer than the phase \(steps 5\)"):
        common.load_config(file, ["training.phases[0].steps=5"])


def test_packaged_configurations_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loader.load("smoke").run.dir == loader.load("configs/smoke.yaml").run.dir == "runs/smoke"
    with pytest.raises(ConfigError, match="packaged configurations are .*quickstart"):
        loader.load("smokes")


def test_an_override_of_an_unknown_section_is_blamed_on_the_override(published):
    with pytest.raises(ConfigError, match=r"--set trainig.phases=3: `trainig`: unknown key; did you mean `training`"):
        loader.load("smoke", ["trainig.phases=3"])


@pytest.mark.parametrize(
    "command", ["train", "init", "generate", "evaluate", "data", "profile", "compare", "completion"]
)
def test_a_help_text_loads_neither_jax_nor_torch(command):
    script = (
        "import sys\nfrom mindvl_jax.cli.main import "
        f"build_parser\nprint(build_parser({command!r}).format_help())\nprint('LOADED', sorted({{'jax', 'torch', "
        f"'grain'}} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.endswith("LOADED []\n")


def test_unknown_words_are_answered_by_the_commands_own_parser(mindvl):
    code, _, told = mindvl("train", "--confg", "smoke")
    assert code == 2 and "mindvl train" in told and "did you mean --config?" in told
    code, _, told = mindvl("evaluate", "--wieghts", "a", "--json")
    assert code == 2 and "required: --weights; did you mean --weights?" in told
    code, _, told = mindvl("evaluate", "--json", "--batch=3")
    assert code == 2 and "required: --weights\n" in told
    code, _, told = mindvl("trian")
    assert code == 2 and "did you mean train?" in told


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_actions_and_options(mindvl, shell):
    code, script, _ = mindvl("completion", shell)
    assert code == 0 and all(word in script for word in ("evaluate", "media-root", "check", "init"))
