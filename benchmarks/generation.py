"""Decode throughput: this engine against transformers' `generate` with padding, same tiny random Qwen2.5-VL, same
requests.

    python -m benchmarks.generation [--requests 16] [--new-tokens 64] [--repeats 3]

Both sides are warmed up, get the same images and prompts of mixed length, and answer every request to its own length
(end tokens ignored). Their tokens are checked to be equal before timing. Tokens a second counts the requested tokens
over the whole call, prefill included. Compare the ratio, measured alternately in one run. On a shared machine use the
ratio of processor times: with --one-core both sides get one core and one thread, so that no thread spins while it waits
for another. Both sides run under glibc's settings for large pages (`mindvl_jax/core/host_memory.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import torch
import transformers
from PIL import Image

from benchmarks.measure import rate_ratio
from mindvl_jax.core.host_memory import relaunch_with_large_pages
from mindvl_jax.inference import Generator, Request, Sampling
from mindvl_jax.weights import open_model

PIXELS = (28 * 28, 28 * 28 * 16)


def build(folder: Path):
    """A random Qwen2.5-VL of about 3 M parameters with the published vocabulary's control tokens, saved with a
    tokenizer.
    """
    from mindvl_jax.config.schema import TokenizerConfig
    from mindvl_jax.data.text.tokenizer import load_tokenizer

    full = load_tokenizer(TokenizerConfig(path="qwen2.5"))
    texts = [
        "user\n",
        "assistant\n",
        *WORDS.split(),
        *(f" {word}" for word in WORDS.split()),
        *(f"user\n{word}" for word in WORDS.split()),
    ]
    table = sorted(
        {token for text in texts for token in full.encode(text)} | set(range(2048)) | set(full.special.values())
    )
    (folder / "table.json").write_text(json.dumps(table))
    tokenizer = load_tokenizer(TokenizerConfig(path="qwen2.5", id_table=str(folder / "table.json")))
    ids = {
        key: tokenizer.token_id(f"<|{name}|>")
        for key, name in dict(
            image_token_id="image_pad",
            video_token_id="video_pad",
            vision_start_token_id="vision_start",
            vision_end_token_id="vision_end",
        ).items()
    }
    vision = dict(
        depth=4,
        hidden_size=128,
        intermediate_size=256,
        num_heads=4,
        out_hidden_size=192,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        in_channels=3,
        window_size=112,
        fullatt_block_indexes=[1, 3],
    )
    text = dict(
        vocab_size=tokenizer.vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6]),
    )
    torch.manual_seed(0)
    model = (
        transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
        )
        .float()
        .eval()
    )
    model.save_pretrained(folder)
    opened = open_model(folder)
    return (
        model,
        tokenizer,
        type(opened)(opened.model, opened.config, tokenizer, *PIXELS, folder),
        ids["image_token_id"],
    )


WORDS = "what is written here in the picture and which colour does the big thing on the left have ? read it aloud"


def requests_of(count: int, new_tokens: int):
    random = np.random.default_rng(0)
    pictures, requests = [], []
    for index in range(count):
        own = [
            Image.fromarray(random.integers(0, 256, (*random.integers(56, 112, 2), 3), np.uint8))
            for _ in range(index % 3)
        ]
        text = " ".join(random.choice(WORDS.split(), random.integers(3, 30)))
        pictures.append(own)
        # Mixed answer lengths, as in real use: with padding every answer waits for the longest.
        length = int(random.integers(new_tokens // 4, new_tokens + 1))
        requests.append(
            Request.from_prompt(text, own, id=str(index), sampling=Sampling(max_new_tokens=length, ignore_eos=True))
        )
    return requests, pictures


def answer_by_transformers(model, rows: list[list[int]], requests, pictures, image_token: int) -> list[list[int]]:
    """Generate the answers of one left-padded batch. It runs until the longest answer is complete."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    processor = transformers.models.qwen2_vl.Qwen2VLImageProcessorPil(
        size={"shortest_edge": PIXELS[0], "longest_edge": PIXELS[1]}
    )
    images = dict(processor(images=[picture for own in pictures for picture in own], return_tensors="pt"))
    longest = max(request.sampling.max_new_tokens for request in requests)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=(ids == image_token).int() * mask,
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **images,
        )
    return [
        row[: request.sampling.max_new_tokens] for row, request in zip(out[:, width:].tolist(), requests, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument(
        "--new-tokens", type=int, default=64, help="longest answer; lengths are spread from a quarter of it"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one-core", action="store_true", help="one core and one thread for both sides")
    args = parser.parse_args()
    if args.one_core:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before the first array: XLA sizes its pool by it
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model, _, opened, image_token = build(Path(folder))
        requests, pictures = requests_of(args.requests, args.new_tokens)
        generator = Generator(opened, slots=16)
        tokens = sum(request.sampling.max_new_tokens for request in requests)
        rows = [generator.encode(request).example.tokens.tolist() for request in requests]
        sides = {
            "ours": lambda: generator.generate(requests),
            "transformers": lambda: answer_by_transformers(model, rows, requests, pictures, image_token),
        }
        mine, their = [list(answer.tokens) for answer in generator.generate(requests)], sides["transformers"]()
        different = [index for index, pair in enumerate(zip(mine, their, strict=True)) if pair[0] != pair[1]]
        if different:
            raise AssertionError(
                f"the greedy answers {different} are not transformers': the sides do not do the same work"
            )
        wall, processor = {name: [] for name in sides}, {name: [] for name in sides}
        for _ in range(args.repeats):  # alternate, so that other load slows both
            for name, side in sides.items():
                started, used = time.perf_counter(), time.process_time()
                side()
                wall[name].append(time.perf_counter() - started)
                processor[name].append(time.process_time() - used)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()

    def compare(times):
        return rate_ratio(
            times["ours"], times["transformers"], our_work=tokens, their_work=tokens, against="transformers"
        )

    print(
        json.dumps(
            {
                "requests": args.requests,
                "generated_tokens": tokens,
                "repeats": args.repeats,
                "one_core": args.one_core,
                "tokens_per_second": {
                    name: round(tokens / statistics.median(times), 1) for name, times in wall.items()
                },
                "tokens_per_processor_second": {
                    name: round(tokens / statistics.median(times), 1) for name, times in processor.items()
                },
                "ratio": dataclasses.asdict(compare(wall)),
                "ratio_of_processor_time": dataclasses.asdict(compare(processor)),
                "load": os.getloadavg()[0],
                "cores": os.cpu_count(),
                "machine": platform.processor() or platform.machine(),
                "commit": commit,
                "date": time.strftime("%Y-%m-%d"),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    relaunch_with_large_pages()
    main()
