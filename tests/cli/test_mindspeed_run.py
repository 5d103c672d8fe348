"""A run of MindSpeed-MM, imported and trained, against a torch loop that has its semantics written out.

Its recipe of Qwen2.5-VL-3B with the sizes of a tiny model, in float32: micro-batches of one sample whose loss is the
mean over its own answer, gradients averaged over them, clipping, AdamW without decay of vectors, and Megatron's
schedule, whose first step has rate 0. The tower and the projector are frozen.
"""

import json
import math

import numpy as np
import pytest
import torch
import transformers

from mindvl_jax.training.feed import Feed

STEPS, BATCH, PEAK, LEAST, WARM, DECAY, CLIP = 20, 4, 2e-3, 2e-4, 4, 0.1, 0.5
SCRIPT = f"""
torchrun pretrain_vlm.py --use-mcore-models --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 \\
    --micro-batch-size 1 --global-batch-size {BATCH} --seq-length 64 --lr {PEAK} --min-lr {LEAST} \\
    --lr-decay-style cosine --lr-warmup-fraction {WARM / STEPS} --weight-decay {DECAY} --clip-grad {CLIP} \\
    --adam-beta1 0.9 --adam-beta2 0.95 --train-iters {STEPS} --seed 3 --save SAVE --mm-data data.json
"""
MODEL = {
    "model_id": "qwen2_5vl",
    "image_encoder": {"vision_encoder": {"freeze": True}, "vision_projector": {"freeze": True}},
    "text_decoder": {"hidden_size": 64},
}


@pytest.fixture
def imported(published, squares, tmp_path, mindvl):
    """The configuration that `mindvl import mindspeed` wrote."""
    rows = [
        {"messages": row["conversations"], "images": [row["image"]]}
        for row in json.loads((squares / "squares.json").read_text())
    ]
    (squares / "theirs.json").write_text(json.dumps(rows))
    data = {
        "dataset_param": {
            "dataset_type": "huggingface",
            "preprocess_parameters": {"model_name_or_path": str(published), "image_max_pixels": 3136},
            "basic_parameters": {"template": "qwen2vl", "dataset_dir": str(squares),
                                 "dataset": str(squares / "theirs.json")},
            "attr": {"images": "images", "messages": "messages", "role_tag": "from", "content_tag": "value",
                     "user_tag": "human", "assistant_tag": "gpt"},
        }
    }  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(data))
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    (tmp_path / "run.sh").write_text(SCRIPT.replace("SAVE", str(tmp_path / "run")))
    files = [f"--{name}={tmp_path / name}.{end}" for name, end in (("data", "json"), ("model", "json"))]
    out = tmp_path / "ours.yaml"
    code, _, told = mindvl("import", "mindspeed", *files, "--script", tmp_path / "run.sh", "--out", out)
    assert code == 0, told
    return out


def rate(step):
    """Megatron's OptimizerParamScheduler: `step` updates are done."""
    if step <= WARM:
        return PEAK * step / WARM
    return LEAST + (PEAK - LEAST) * (math.cos(math.pi * (step - WARM) / (STEPS - WARM)) + 1) / 2


def torch_losses(folder, batches):
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).train()
    config = model.config
    trained = [
        (name, value) for name, value in model.named_parameters() if "language_model" in name or "lm_head" in name
    ]
    for name, value in model.named_parameters():
        value.requires_grad_(name in dict(trained))
    groups = [
        {"params": [value for _, value in trained if value.ndim > 1], "weight_decay": DECAY},
        {"params": [value for _, value in trained if value.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    mean, std = (torch.tensor(values) for values in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))  # fmt: skip
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
        total = 0.0
        for row in range(BATCH):
            length = int((batch.segment_ids[row] > 0).sum())
            visual = batch.visual_index[row, :length] >= 0
            ids = torch.tensor(np.where(visual, config.image_token_id, batch.tokens[row, :length])).long()[None]
            pixels = torch.tensor(batch.patches[row][batch.patch_segment_ids[row] > 0]).float() / 255
            pixels = pixels.reshape(len(pixels), 3, -1)  # channel, then two equal frames of 14 x 14
            pixels = ((pixels - mean[:, None]) / std[:, None]).reshape(len(pixels), -1)
            out = model(
                input_ids=ids, pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 4]]),
                mm_token_type_ids=(ids == config.image_token_id).int(),
            )  # fmt: skip
            learned = torch.tensor(batch.loss_weights[row, : length - 1] > 0)
            nll = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:], reduction="none")
            loss = nll[learned].mean() / BATCH
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_([value for _, value in trained], CLIP)
        optimizer.step()
        losses.append(total)
    return losses


def test_losses_of_twenty_steps_are_those_of_their_semantics_in_torch(imported, published, mindvl, monkeypatch):
    batches, placed = [], Feed.next

    def kept(feed):
        taken = placed(feed)
        batches.append(taken.host)
        return taken

    monkeypatch.setattr(Feed, "next", kept)
    precise = ("--set", "mesh.fsdp=1")
    code, _, told = mindvl("train", "--config", imported, *precise)
    assert code == 0, told
    lines = [json.loads(line) for line in (imported.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    ours = [line["loss"] for line in lines if "loss" in line]
    assert len(ours) == len(batches) == STEPS
    theirs = torch_losses(published, batches)
    assert ours[-1] < 0.7 * ours[0], "nothing was learned: the comparison would prove little"
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
