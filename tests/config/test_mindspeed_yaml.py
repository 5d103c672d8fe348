"""A native FSDP2 run of MindSpeed-MM, written out here in its form, as our configuration: every key has a fate."""

import json

import pytest
import yaml

from mindvl_jax.cli.main import main
from mindvl_jax.config import loader
from mindvl_jax.config.mindspeed import flat
from mindvl_jax.config.mindspeed_yaml import import_yaml
from mindvl_jax.core.errors import UserError

RECIPE = """
parallel: {fully_shard_parallel_size: auto, ulysses_parallel_size: 1, recompute: true}
model:
  model_id: qwen3_vl
  model_name_or_path: ./Qwen3-VL-8B-Instruct
  trust_remote_code: false
  freeze: [model.visual]
  odd_switch: 3
data:
  dataset_param:
    dataset_type: huggingface
    preprocess_parameters: {image_max_pixels: 262144, video_fps: 2.0}
    basic_parameters: {dataset_dir: ./data, dataset: ./data/train.json, cutoff_len: 1024}
    attr: {images: images, messages: messages, role_tag: role, content_tag: content, user_tag: user,
           assistant_tag: assistant}
  dataloader_param: {num_workers: 4, shuffle: true, collate_param: {pad_to_multiple_of: 8}}
features: {loss_cfg: {loss_type: per_token_loss}, enable_chunk_loss: true, router_aux_loss_coef: 0}
training:
  lr: 1.0e-5
  lr_min: 1.0e-6
  lr_decay_style: cosine
  lr_warmup_ratio: 0.1
  weight_decay: 0.01
  micro_batch_size: 1
  gradient_accumulation_steps: 2
  train_iters: 1000
  save: out
  save_interval: 100
  optimizer: adamw
  lr_scaling_plan: [{match: visual, scale: 0.1}]
tools: {profile: {enable: false}}
"""


def test_every_key_has_a_fate_and_their_defaults_are_said(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RECIPE)
    run = import_yaml(path, devices=16)
    config = json.loads(json.dumps(run.config))
    config["model"]["preset"] = "qwen2.5-vl-7b"  # sizes in place of the folder's, which is not there
    config = loader.from_mapping(config)
    (phase,) = config.training.phases
    assert (phase.rows * phase.gradient_accumulation, phase.steps, phase.warmup_steps) == (32, 1000, 100)
    assert (phase.loss_reduction, phase.schedule, phase.sequence_length, phase.weight_decay) == (
        "token", "cosine", 1024, 0.01,
    )  # fmt: skip
    assert phase.final_learning_rate_fraction == pytest.approx(0.1) and phase.warmup_from_zero
    assert phase.train == ("language/**",), "their tower holds the projector"
    assert config.training.optimizer.clip_norm == 1.0, "their default, where Megatron's is another"
    assert (config.run.init_from, config.run.dir, config.data.workers) == ("./Qwen3-VL-8B-Instruct", "out", 4)
    given, told = set(flat(yaml.safe_load(RECIPE))), {key.name for key in run.keys}
    assert not {name for name in given if not any(name.endswith(own) for own in told)}
    assert {key.name for key in run.lost()} == {"model.odd_switch", "training.lr_scaling_plan"}
    assert any(key.name == "training.clip_grad" and "their default" in key.text for key in run.keys)


ADAPTERS = {
    "targets": [f"language/layers/attention/{name}" for name in ("query", "key", "value")],
    "rank": 4,
    "alpha": 16.0,
}


@pytest.mark.parametrize(
    ("old", "new", "found", "expected"),
    [
        ("train_iters: 1000", "train_epochs: 2", lambda c: c["training"]["phases"][0]["epochs"], 2),
        ("optimizer: adamw", "optimizer: muon", lambda c: c["training"]["optimizer"]["name"], "muon"),
        ("tools:", "  lora: {enable: true, rank: 4}\ntools:", lambda c: c["adapters"], ADAPTERS),
    ],
    ids=["epochs", "muon", "lora"],
)
def test_epochs_muon_and_adapters_are_translated(tmp_path, old, new, found, expected):
    path = tmp_path / "run.yaml"
    path.write_text(RECIPE.replace(old, new))
    run = import_yaml(path, devices=1)
    assert found(run.config) == expected
    run.config["model"]["preset"] = "qwen2.5-vl-7b"
    loader.from_mapping(run.config)


def test_what_makes_no_run_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    for text, message in (
        ("a: [", "not valid YAML"),
        ("a: 1", "expected a run of MindSpeed-MM's FSDP2"),
        (RECIPE.replace("per_token_loss", "custom"), "loss_type is 'custom'"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            import_yaml(path, devices=1)
    assert main(["import", "mindspeed", "--yaml", str(path), "--data", "x", "--out", str(tmp_path / "o.yaml")]) == 2
