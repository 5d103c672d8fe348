"""`mindvl score`: how well a model predicts the answers of a data file, sample by sample."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from mindvl_jax.cli import common
from mindvl_jax.core.errors import UserError, at_least_one
from mindvl_jax.core.progress import LogConsole, counting
from mindvl_jax.data.sample import Message, Sample

EPILOG = common.examples("mindvl score --weights runs/mine --data held_out.jsonl --out nll.jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", required=True, metavar="DIR", help="one of our runs or checkpoints, or a Hugging Face folder"
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="samples in any format that training reads")
    parser.add_argument("--format", default="auto", help="as data.sources.*.format; default: by the file")
    parser.add_argument(
        "--train-on", choices=("answers", "last_answer", "all"), default="answers", help="which tokens are scored"
    )
    parser.add_argument("--batch", type=int, default=16, help="samples scored together")
    parser.add_argument("--max-samples", type=int)
    parser.add_argument("--min-pixels", type=int, help="default: the model's own setting")
    parser.add_argument("--max-pixels", type=int, help="default: the model's own setting")
    parser.add_argument("--out", metavar="JSONL", help="default: standard output")


def run(args: argparse.Namespace) -> int:
    at_least_one(args, "batch", "max_samples", "min_pixels", "max_pixels")
    from mindvl_jax.config.schema import SourceConfig
    from mindvl_jax.data.sources.readers import Source, find_files

    settings = SourceConfig(path=args.data, format=args.format, max_samples=args.max_samples)
    find_files(settings, "--data")
    common.load_slow("mindvl_jax.weights.resolve")
    from mindvl_jax.weights.resolve import open_model

    with common.busy(f"reading {args.weights}"):
        opened = open_model(args.weights)
    source = Source("data", settings)
    failed, nll, tokens = 0, 0.0, 0
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(open(args.out, "w", encoding="utf-8")) if args.out else sys.stdout
        show = stack.enter_context(
            counting(LogConsole(stderr=True, stamp=False), first="programs that are new are compiled")
        )
        show(0, len(source), "samples")
        lines = score(
            opened,
            [with_answer(source[i]) for i in range(len(source))],
            batch=args.batch,
            train_on=args.train_on,
            min_pixels=args.min_pixels,
            max_pixels=args.max_pixels,
        )
        for number, line in enumerate(lines, 1):
            show(number, len(source), "samples")
            failed += "error" in line
            nll, tokens = nll + line.get("nll", 0.0), tokens + line.get("tokens", 0)
            print(json.dumps(line, ensure_ascii=False), file=sink, flush=True)
    if tokens:
        where = f"; a line for each in {args.out}" if args.out else ""
        said = f"{len(source) - failed} samples, {tokens} answer tokens: {nll / tokens:.4f} nats a token{where}"
        print(said, file=sys.stderr)
    if failed:
        print(f"{failed} of {len(source)} samples could not be scored; their lines say why", file=sys.stderr)
    return 1 if failed else 0


def with_answer(sample: Sample) -> Sample:
    """Return the sample with its first accepted answer as the last turn, if it ends with the question (as evaluation
    files do).
    """
    if sample.answers and sample.messages and sample.messages[-1].role == "user":
        return dataclasses.replace(sample, messages=(*sample.messages, Message("assistant", sample.answers[0])))
    return sample


def _encoded(opened, samples: Sequence, limits: Any, vision: Any) -> tuple[dict, dict[int, dict]]:
    """Encode the samples. Returns examples, and records of the samples that cannot be encoded, both by index."""
    from mindvl_jax.data.sample import SampleError
    from mindvl_jax.inference.prompts import prompt_config
    from mindvl_jax.models.vision_language.example import ExampleEncoder

    encoder = ExampleEncoder(prompt_config(opened.model, opened.tokenizer), opened.tokenizer, limits)
    sees = vision is getattr(opened.model.config, "vision", None)
    examples, failed = {}, {}
    for index, sample in enumerate(samples):
        try:
            if not sees and (sample.images or sample.videos):
                raise SampleError("media", "the sample has images or videos, but this model reads text only")
            examples[index] = encoder.encode(sample)
        except SampleError as error:
            failed[index] = {"id": sample.id, "error": str(error)}
    return examples, failed


def score(
    opened,
    samples: Sequence,
    *,
    batch: int = 16,
    train_on: str = "answers",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Iterator[dict]:
    """One mapping a sample, in their order: id, nll (summed negative log-likelihood of the answer tokens, in nats),
    tokens.

    A sample that cannot be encoded yields id and error instead. Samples of like size share a batch; sizes are rounded
    up so that few programs are compiled.
    """
    import jax
    from flax import nnx

    from mindvl_jax.data.sample import SampleError
    from mindvl_jax.inference.buckets import next_size
    from mindvl_jax.inference.prompts import vision_of
    from mindvl_jax.models.vision_language.collate import collate, shape_for
    from mindvl_jax.models.vision_language.example import EncodeLimits

    if opened.tokenizer is None:
        raise UserError(
            f"{opened.folder}: has no tokenizer.json, so samples cannot be encoded; save the tokenizer there"
        )
    vision = vision_of(opened.model)
    limits = EncodeLimits(
        min_pixels=min_pixels or opened.min_pixels, max_pixels=max_pixels or opened.max_pixels, train_on=train_on
    )
    examples, results = _encoded(opened, samples, limits, vision)
    graph, state = nnx.split(opened.model)

    @jax.jit
    def losses(state, packed):
        return nnx.merge(graph, state).token_losses(packed, chunk=1024)

    def size(index):
        return (
            next_size(examples[index].length, 32),
            next_size(max(examples[index].patches, vision.merge_unit), 4 * vision.merge_unit),
        )

    order = sorted(examples, key=size, reverse=True)
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        tokens, patches = (max(size(index)[axis] for index in group) for axis in (0, 1))
        rows = []
        for index in group:
            try:
                rows.append((index, examples[index].with_pixels(vision, "bicubic")))
            except SampleError as error:
                results[index] = {"id": samples[index].id, "error": str(error)}
        shape = shape_for(vision, rows=batch, tokens=tokens, patches=patches, samples=1)
        packed = collate(
            [[example] for _, example in rows] + [[]] * (batch - len(rows)),
            shape,
            pad_id=opened.tokenizer.pad_id,
            vision=vision,
        ).batch
        sums = jax.device_get(losses(state, packed).sum(-1))
        for row, (index, example) in enumerate(rows):
            results[index] = {
                "id": samples[index].id,
                "nll": float(sums[row]),
                "tokens": int((example.loss_weights > 0).sum()),
            }
    yield from (results[index] for index in range(len(samples)))
