"""Runs of LLaMA-Factory and ms-swift, written out here in their form: every key has a fate, and the result loads."""

import json

import pytest
import yaml

from mindvl_jax.cli.main import main
from mindvl_jax.config import loader
from mindvl_jax.config.trainer_files import LLAMA_FACTORY, SWIFT, import_trainer_file
from mindvl_jax.core.errors import UserError

FACTORY = """
model_name_or_path: Qwen/Qwen2.5-VL-7B-Instruct
image_max_pixels: 262144
video_max_pixels: 16384
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: mllm_demo,identity
dataset_dir: DIR
template: qwen2_vl
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
output_dir: saves/qwen2_5vl-7b/lora/sft
logging_steps: 10
save_steps: 500
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
quantization_bit: 4
something_new: 7
"""
INFO = {
    "mllm_demo": {
        "file_name": "mllm_demo.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "identity": {"file_name": "identity.json"},
    "far": {"hf_hub_url": "a/b"},
}
SCRIPT = r"""
export MAX_PIXELS=1003520
CUDA_VISIBLE_DEVICES=0,1 NPROC_PER_NODE=2 \
swift sft \
    --model Qwen/Qwen2.5-VL-7B-Instruct \
    --dataset data/train.jsonl#500 \
    --train_type full --freeze_vit true --freeze_aligner false \
    --torch_dtype bfloat16 --num_train_epochs 1 --per_device_train_batch_size 2 \
    --learning_rate 1e-5 --max_length 4096 --packing true --deepspeed zero2 --optim adamw_8bit \
    --weight_decay 0.1 --output_dir output 2>&1 | tee log
"""


def checked(config):
    """The configuration as the loader reads it, with a preset's sizes in place of the folder's."""
    config = json.loads(json.dumps(config))
    config["model"]["preset"] = "qwen2.5-vl-7b"
    return loader.from_mapping(config)


@pytest.fixture
def factory(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    path = tmp_path / "run.yaml"
    path.write_text(FACTORY.replace("DIR", str(tmp_path)))
    return path


def test_a_lora_run_of_llama_factory(factory, tmp_path):
    run = import_trainer_file(factory, LLAMA_FACTORY, devices=4, dataset_info=None)
    config = checked(run.config)
    (phase,) = config.training.phases
    assert (phase.rows, phase.gradient_accumulation, phase.epochs, phase.learning_rate) == (4, 8, 3.0, 1e-4)
    assert (phase.schedule, phase.warmup_ratio, phase.max_pixels, phase.loss_reduction) == (
        "cosine",
        0.1,
        262144,
        "token",
    )
    # Their defaults: alpha twice the rank, the tower frozen, no weight decay, betas 0.9 and 0.999.
    assert (config.adapters.rank, config.adapters.alpha, config.adapters.base) == (8, 16, "nf4")
    assert set(config.adapters.targets) == {"language/layers/attention/*", "language/layers/mlp/*"}
    assert (phase.weight_decay, config.training.optimizer.b2) == (0, 0.999)
    source = config.data.sources["mllm_demo"]
    assert (source.path, source.max_samples) == (str(tmp_path / "mllm_demo.json"), 1000)
    assert config.data.sources["identity"].columns.question == "instruction"
    lost = {key.name for key in run.lost()}
    assert lost == {"template", "video_max_pixels", "something_new"}
    assert {*yaml.safe_load(factory.read_text())} - {"stage"} <= {key.name for key in run.keys}, "a key without a fate"


def test_a_full_run_of_swift_from_its_script(tmp_path):
    path = tmp_path / "train.sh"
    path.write_text(SCRIPT)
    run = import_trainer_file(path, SWIFT, devices=2, dataset_info=None)
    config = checked(run.config)
    (phase,) = config.training.phases
    assert config.adapters is None and set(phase.train) == {"projector/**", "language/**"}
    assert (phase.rows, phase.gradient_accumulation) == (4, 4), "a batch of 16, their default"
    assert (phase.max_pixels, phase.sequence_length, phase.max_samples_per_row) == (1003520, 4096, 64)
    assert (phase.weight_decay, phase.schedule, config.training.optimizer.b2) == (0.1, "cosine", 0.95)
    assert config.data.sources["train"].max_samples == 500
    assert config.training.optimizer.name == "adamw8bit"
    assert not run.lost(), run.lost()


def test_the_command_writes_a_file_that_says_what_is_lost(factory, tmp_path, capsys):
    out = tmp_path / "ours.yaml"
    assert main(["import", "llamafactory", "--yaml", str(factory), "--out", str(out)]) == 0
    text = out.read_text()
    assert "mindvl import llamafactory" in text and "something_new = 7: not known to this importer" in text
    assert yaml.safe_load(text)["training"]["phases"][0]["rows"] == 1
    assert "(their default)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("stage: sft", "stage: dpo"), "stage 'dpo'; only supervised fine-tuning"),
        (("dataset: mllm_demo,identity", "dataset: far"), "comes from a hub"),
        (("dataset: mllm_demo,identity", "dataset: nowhere"), "'nowhere' is not in dataset_info.json"),
        (("finetuning_type: lora", "finetuning_type: oft"), "finetuning_type 'oft'; full and lora are translated"),
        (("lora_target: all", "lora_target: c_attn"), "LoRA on c_attn"),
        (("quantization_bit: 4", "quantization_bit: 8"), "a base in 8 bits"),
        (("lora_rank: 8", "lora_rank: many"), "lora_rank = 'many'"),
        (("stage: sft", "stage: [sft"), "not valid YAML"),
    ],
)
def test_what_makes_no_run_here_is_refused(factory, change, message):
    factory.write_text(factory.read_text().replace(*change))
    with pytest.raises(UserError, match=message):
        import_trainer_file(factory, LLAMA_FACTORY, devices=1, dataset_info=None)
