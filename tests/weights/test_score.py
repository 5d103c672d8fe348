"""`mindvl score` against the summed cross entropy of transformers on the same text and image."""

import io
import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mindvl_jax.cli.main import main
from mindvl_jax.data.text.tokenizer import Tokenizer


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (56, 84, 3), np.uint8))


def encoded(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    samples = []
    for number, (question, answer) in enumerate(
        [
            ("the cat", "a dog"),
            ("<image>what is this", "the"),
            ("a", "the cat sat there and there"),
            ("lost <image>", "a"),
        ]
    ):
        sample = {
            "id": f"s{number}",
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        }
        if "<image>" in question:
            (folder / f"{number}.png").write_bytes(encoded(picture(number)) if number == 1 else b"no picture")
            sample["images"] = [f"{number}.png"]
        samples.append(sample)
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path, samples


def reference(folder, tokenizer, question, answer, image=None):
    kind = transformers.AutoModelForImageTextToText if image else transformers.AutoModelForCausalLM
    try:
        model = kind.from_pretrained(folder)
    except ValueError:
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    extra, visual = {}, ""
    if image:
        values = transformers.Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056)(image, return_tensors="pt")
        extra = dict(pixel_values=values["pixel_values"], image_grid_thw=values["image_grid_thw"])
        visual = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    head = tokenizer.encode(
        f"<|im_start|>user\n{visual}{question.replace('<image>', '')}<|im_end|>\n<|im_start|>assistant\n",
        allow_special=True,
    )
    tail = tokenizer.encode(f"{answer}<|im_end|>", allow_special=True)
    ids = torch.tensor([head + tail])
    if image:
        extra["mm_token_type_ids"] = (ids == tokenizer.token_id("<|image_pad|>")).int()
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0, :-1].double()
    nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    return float(nll[len(head) - 1 :].sum()), len(tail)


def test_each_line_is_the_likelihood_that_transformers_gives_the_answer(
    speaking, tokenizer_file, data, tmp_path, capsys
):
    path, samples = data
    out = tmp_path / "scores.jsonl"
    assert (
        main(
            ["score", "--weights", str(speaking("qwen2.5-vl")), "--data", str(path), "--out", str(out), "--batch", "2"]
        )
        == 1
    )
    told = capsys.readouterr().err
    assert "1 of 4 samples could not be scored" in told
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["s0", "s1", "s2", "s3"]
    tokenizer = Tokenizer(tokenizer_file)
    for number, line in enumerate(lines[:3]):
        user, assistant = (turn["content"] for turn in samples[number]["messages"])
        want, count = reference(speaking("qwen2.5-vl"), tokenizer, user, assistant, picture(1) if number == 1 else None)
        assert line["tokens"] == count
        # Float32 over about ten tokens of some 6 nats each.
        assert abs(line["nll"] - want) < 1e-4 * want, f"{line['id']}: {line['nll']} against {want}"
    assert "error" in lines[3] and "nll" not in lines[3]
    nll, tokens = (sum(line[key] for line in lines[:3]) for key in ("nll", "tokens"))
    assert f"3 samples, {tokens} answer tokens: {nll / tokens:.4f} nats a token; a line for each in {out}" in told


def test_a_language_model_alone_scores_text_and_refuses_pictures(speaking, tokenizer_file, data, capsys):
    path, _samples = data
    assert main(["score", "--weights", str(speaking("qwen3")), "--data", str(path)]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    want, count = reference(speaking("qwen3"), Tokenizer(tokenizer_file), "the cat", "a dog")
    assert lines[0]["tokens"] == count and abs(lines[0]["nll"] - want) < 1e-4 * want
    assert "reads text only" in lines[1]["error"]


def test_a_missing_file_is_named(speaking, capsys):
    assert main(["score", "--weights", str(speaking("qwen3")), "--data", "nothing.jsonl"]) == 2
    assert "--data: nothing to read at 'nothing.jsonl'" in capsys.readouterr().err
