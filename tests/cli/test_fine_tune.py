"""The way of docs/fine_tune.md on a tiny model: check, LoRA, scores before and after, export, merge, transformers and
PEFT open both.
"""

import json

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file


@pytest.fixture(scope="module")
def run(published, squares, tmp_path_factory):
    """A run of 30 steps with LoRA from the configuration that `init --lora` wrote."""
    from mindvl_jax.cli.main import main

    folder = tmp_path_factory.mktemp("lora")
    file = folder / "my.yaml"
    assert (
        main(
            [
                "init",
                "--model",
                str(published),
                "--data",
                str(squares / "squares.json"),
                "--lora",
                "4",
                "--run",
                str(folder / "run"),
                "--out",
                str(file),
            ]
        )
        == 0
    )
    steps = ["training.phases[0].steps=30", "training.phases[0].epochs=null", "training.phases[0].learning_rate=0.02"]
    assert main(["train", "--config", str(file), "--set", "mesh.fsdp=1", *steps]) == 0
    return folder / "run"


def test_the_data_check_keeps_every_row(run, tmp_path, mindvl):
    code, out, told = mindvl("data", "check", "--config", run.parent / "my.yaml", "--out", tmp_path / "page.html")
    assert code == 0, told
    assert "24" in out and (tmp_path / "page.html").is_file()


def test_scores_rise_and_merged_folders_are_opened_by_transformers_and_peft(run, squares, published, tmp_path, mindvl):
    scores = {}
    for name, weights in (("before", published), ("after", run)):
        code, _, told = mindvl(
            "evaluate",
            "--weights",
            weights,
            "--tasks",
            f"mine={squares / 'squares.json'}",
            "--limit",
            "9",
            "--max-new-tokens",
            "6",
            "--no-language-only",
            "--out",
            tmp_path / name,
        )
        assert code == 0, told
        scores[name] = json.loads((tmp_path / name / "scores.json").read_text())["mine"]["score"]
    assert scores["before"] == 0 and scores["after"] > 0.3, scores
    assert mindvl("export", "--run", run, "--out", tmp_path / "adapter")[0] == 0
    assert mindvl("export", "--run", run, "--merge", "--out", tmp_path / "merged")[0] == 0
    asked = ("--prompt", "What colour?", "--max-new-tokens", "6", "--json")
    code, out, told = mindvl("generate", "--weights", published, "--adapter", f"mine={tmp_path / 'adapter'}", *asked)
    assert code == 0, told
    rows = [json.loads(line) for line in out.splitlines()]
    alone = [json.loads(mindvl("generate", "--weights", weights, *asked)[1]) for weights in (published, run)]
    assert [row["id"] for row in rows] == ["weights", "mine"]
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in alone]
    assert (
        mindvl("merge", "--base", published, "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged2")[0] == 0
    )

    base = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(published)
    with torch.no_grad():
        before = base(torch.arange(20)[None]).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(torch.arange(20)[None]).logits
        for name in ("merged", "merged2"):
            merged = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / name)(
                torch.arange(20)[None]
            ).logits
            assert torch.max(torch.abs(merged - adapted)) < 1e-4 * torch.max(torch.abs(adapted)), name
    assert torch.max(torch.abs(before - adapted)) > 1e-2
    stems = {
        name.rsplit(".", 2)[0].rsplit(".", 1)[-1]
        for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    }
    assert stems == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    # vLLM takes A and B of each layer of its own fused groups, with rank and alpha from the configuration.
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"], settings["modules_to_save"]) == (
        4,
        8,
        "LORA",
        None,
    )


def test_training_base_weights_beside_their_adapters_is_refused(run, mindvl):
    code, _, told = mindvl(
        "train",
        "--config",
        run.parent / "my.yaml",
        "--set",
        "training.phases[0].train=[language/**]",
        f"run.dir={run.parent / 'other'}",
    )
    assert code == 2 and "base weights that have adapters: both would learn" in told


def test_the_recipe_of_the_7b_model_trains_the_adapters_of_the_decoder_alone(monkeypatch):
    from mindvl_jax.config import loader
    from mindvl_jax.models.outline import outline_of

    config = loader.load("configs/qwen2.5-vl-7b-lora.yaml")
    shapes = outline_of(config.model, config.adapters).shapes
    adapters = {path: like for path, like in shapes.items() if "/lora_" in path}
    # r (in + out) for q, k, v, o, gate, up, down of 28 layers.
    pairs = ((3584, 3584), (3584, 512), (3584, 512), (3584, 3584), (3584, 18944), (3584, 18944), (18944, 3584))
    assert sum(np.prod(like.shape) for like in adapters.values()) == 28 * 8 * sum(a + b for a, b in pairs)
    assert all(path.startswith("language/layers/") for path in adapters)
    assert {str(like.dtype) for like in adapters.values()} == {"float32"} and str(
        shapes["language/layers/mlp/up/kernel"].dtype
    ) == "bfloat16"
    assert config.training.phases[0].train == ("**/lora_*",)
