"""MindSpeed-MM's recipe of Qwen2.5-VL-3B, written out here in its form, as our configuration: every key has a fate."""

import json

import pytest

from mindvl_jax.cli.main import main
from mindvl_jax.config import loader
from mindvl_jax.config.mindspeed import import_run, options_of
from mindvl_jax.core.errors import UserError

SCRIPT = r"""#!/bin/bash
source /usr/local/Ascend/cann/set_env.sh
export HCCL_CONNECT_TIMEOUT=1200
NPUS_PER_NODE=8
NNODES=1
WORLD_SIZE=$(($NPUS_PER_NODE*$NNODES))
MM_DATA="./data_3b.json"
LOAD_PATH="ckpt/mm_path/Qwen2.5-VL-3B-Instruct"
SAVE_PATH="save_dir"
TP=1
PP=2
MBS=1
GRAD_ACC_STEP=32
DP=$(($WORLD_SIZE/$TP/$PP))
GBS=$(($MBS*$GRAD_ACC_STEP*$DP))
DISTRIBUTED_ARGS="
    --nproc_per_node $NPUS_PER_NODE \
"
# GPT_ARGS --lr 5
GPT_ARGS="
    --use-mcore-models \
    --tensor-model-parallel-size ${TP} \
    --pipeline-model-parallel-size ${PP} \
    --context-parallel-size 1 \
    --micro-batch-size ${MBS} \
    --global-batch-size ${GBS} \
    --seq-length 1024 \
    --normalization RMSNorm \
    --lr 1.0e-5 \
    --min-lr 1.0e-6 \
    --lr-decay-style cosine \
    --weight-decay 0 \
    --train-iters ${ITERS:-10000} \
    --lr-warmup-fraction 0.1 \
    --clip-grad 0.0 \
    --adam-beta1 0.9 \
    --adam-beta2 0.999 \
    --seed 42 \
    --bf16 \
    --load $LOAD_PATH \
    --use-flash-attn \
    --no-load-optim \
    --num-workers 8 EXTRA \
"
OUTPUT_ARGS="
    --log-interval 1 \
    --save-interval 10000 \
    --eval-interval 10000 \
    --save $SAVE_PATH \
"
logfile=$(date +%Y%m%d)_$(date +%H%M%S)
torchrun $DISTRIBUTED_ARGS pretrain_vlm.py \
    $GPT_ARGS \
    --mm-data $MM_DATA \
    $OUTPUT_ARGS \
    --distributed-backend nccl \
    2>&1 | tee logs/train_${logfile}.log
chmod 440 logs/train_${logfile}.log
"""
DATA = {
    "dataset_param": {
        "dataset_type": "huggingface",
        "preprocess_parameters": {
            "model_name_or_path": "./ckpt/hf_path/Qwen2.5-VL-3B-Instruct",
            "image_max_pixels": 262144,
            "image_min_pixels": 0,
            "video_max_pixels": 16384,
            "video_min_pixels": 0,
            "video_fps": 2.0,
            "video_maxlen": 64,
        },
        "basic_parameters": {
            "template": "qwen2vl",
            "dataset_dir": "./data",
            "dataset": "./data/mllm.json",
            "cache_dir": "./c",
            "train_on_prompt": False,
            "mask_history": False,
            "max_samples": None,
            "tool_format": None,
        },
        "attr": {
            "system": None,
            "images": "images",
            "videos": None,
            "messages": "messages",
            "role_tag": "from",
            "content_tag": "value",
            "user_tag": "human",
            "assistant_tag": "gpt",
            "observation_tag": None,
            "function_tag": None,
            "system_tag": None,
        },
    },
    "dataloader_param": {
        "dataloader_mode": "sampler",
        "drop_last": True,
        "sampler_type": "BaseRandomBatchSampler",
        "shuffle": True,
        "collate_param": {"model_name": "qwen2vl", "ignore_pad_token_for_loss": True},
    },
}
MODEL = {
    "model_id": "qwen2_5vl",
    "img_context_token_id": 151655,
    "image_encoder": {
        "vision_encoder": {"num_layers": 32, "freeze": True, "pipeline_num_layers": [32, 0]},
        "vision_projector": {"hidden_size": 2048, "freeze": True},
    },
    "text_decoder": {"hidden_size": 2048, "num_layers": 36, "hidden_dropout": 0.0, "rope_scaling": None},
    "video_encoder": None,
}


@pytest.fixture
def files(tmp_path):
    def write(extra="", data=DATA, model=MODEL):
        for name, content in (
            ("data.json", json.dumps(data)),
            ("model.json", json.dumps(model)),
            ("run.sh", SCRIPT.replace("EXTRA", extra)),
        ):
            (tmp_path / name).write_text(content)
        return [tmp_path / name for name in ("data.json", "model.json", "run.sh")]

    return write


def test_their_3b_recipe_becomes_a_valid_configuration_of_equal_meaning(files, tmp_path, capsys):
    data, model, script = files()
    assert (
        main(
            [
                "import",
                "mindspeed",
                "--data",
                str(data),
                "--model",
                str(model),
                "--script",
                str(script),
                "--out",
                str(tmp_path / "ours.yaml"),
            ]
        )
        == 0
    )
    told = capsys.readouterr().out
    config = loader.load(tmp_path / "ours.yaml")
    phase = config.training.phases[0]
    assert phase.rows * phase.gradient_accumulation == 128 and phase.max_samples_per_row == 1
    assert (phase.steps, phase.warmup_steps, phase.learning_rate, phase.final_learning_rate_fraction) == (
        10000,
        1000,
        1e-5,
        pytest.approx(0.1),
    )
    assert (phase.schedule, phase.weight_decay, config.training.optimizer.clip_norm) == ("cosine", 0.0, 0.0)
    assert phase.loss_reduction == "sample", "a mean over a micro-batch of one sample is the mean of that sample"
    assert (phase.train, phase.max_pixels, phase.sequence_length) == (("language/**",), 262144, 1024)
    assert config.data.sources["train"].columns.user == "human" and config.data.sources["train"].media_root == "./data"
    assert (config.data.resample, config.data.train_on, config.run.dir, config.run.seed) == (
        "nearest",
        "answers",
        "save_dir",
        42,
    )
    lost = {line.split()[2] for line in told.splitlines() if line.startswith("lost")}
    assert lost == {
        "pipeline-model-parallel-size",
        "load",
        "dataset_param.basic_parameters.template",
        "dataset_param.preprocess_parameters.video_max_pixels",
    }, told
    named = (tmp_path / "ours.yaml").read_text()
    assert all(f" {name} = " in named for name in lost)


def test_every_key_has_a_fate_and_an_unknown_one_is_lost(files):
    imported = import_run(*files("--brand-new-flag 7", model={**MODEL, "surprise": {"depth": 3}}))

    def flat(content):
        return sum(flat(value) if isinstance(value, dict) else 1 for value in content.values())

    options = options_of(SCRIPT.replace("EXTRA", "--brand-new-flag 7"), "run.sh")
    assert len({(key.file, key.name) for key in imported.keys}) == flat(DATA) + flat(MODEL) + 1 + len(options)
    lost = {key.name: key.text for key in imported.lost()}
    assert (
        "not known to this importer" in lost["brand-new-flag"]
        and "not known to this importer" in lost["surprise.depth"]
    )


def test_lora_and_the_loss_of_the_script_are_kept(files):
    config = import_run(
        *files("--lora-r 8 --lora-alpha 16 --lora-target-modules linear_qkv linear_fc2 --calculate-per-token-loss")
    ).config
    assert config["adapters"] == {
        "targets": [
            f"language/layers/{name}" for name in ("attention/query", "attention/key", "attention/value", "mlp/down")
        ],
        "rank": 8,
        "alpha": 16.0,
    }
    assert (
        "train" not in config["training"]["phases"][0] and config["training"]["phases"][0]["loss_reduction"] == "token"
    )
    assert loader.from_mapping(config).training.phases[0].train == ("**/lora_*",)


def test_scripts_that_cannot_be_read_are_refused(files):
    with pytest.raises(UserError, match="no line starts a pretrain"):
        options_of("echo hello", "run.sh")
    with pytest.raises(UserError, match=r"\$MISSING is not set"):
        options_of("torchrun pretrain_vlm.py --lr $MISSING", "run.sh")
    with pytest.raises(UserError, match="freezes every part"):
        import_run(*files(model={**MODEL, "text_decoder": {"freeze": True}}))
    with pytest.raises(UserError, match="cannot be read as a training script"):
        options_of("A=$((__import__('os').system('touch x')))\ntorchrun pretrain_vlm.py --lr $A", "run.sh")
