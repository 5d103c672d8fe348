"""`mindvl init`: a configuration whose sizes fit a model folder and a data file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import numpy as np

from mindvl_jax.cli import common
from mindvl_jax.config import families, loader
from mindvl_jax.config.schema import ModelConfig, SourceConfig, TokenizerConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import write_text
from mindvl_jax.data.questions import accepted_lines
from mindvl_jax.weights.described import described

EPILOG = common.examples(
    "mindvl init --model Qwen2.5-VL-7B-Instruct --data my.json --out my.yaml",
    "mindvl init --model runs/mine --data answers.csv --media-root images --epochs 2 > my.yaml",
)
SAMPLED = 2000  # samples that are read to choose the sizes
ROWS = 8  # of the global batch: divides over 1, 2, 4 and 8 devices
LONGEST_ROW = 8192
_LARGEST_PIXELS = 1003520


@dataclasses.dataclass(frozen=True)
class Request:
    """The values that `init` is given."""

    model: str
    data: str
    media_root: str | None = None
    format: str = "auto"
    run_dir: str | None = None
    epochs: float = 3.0
    max_pixels: int | None = None
    columns: tuple[tuple[str, str], ...] = ()
    lora: int | None = None


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a phase, and the measurements that they come from."""

    sequence_length: int
    patches_per_row: int
    max_samples_per_row: int
    gradient_accumulation: int
    longest: int
    samples_per_row: float
    measured: int
    unusable: int
    reasons: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="model to start from: a Hugging Face folder or one of our runs"
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="samples in any format that training reads: a file, a folder or a glob",
    )
    parser.add_argument(
        "--media-root", metavar="DIR", help="folder that media paths start from; default: the folder of the file"
    )
    parser.add_argument("--format", default="auto", help="as data.sources.*.format; default: by the file")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="NAME=COLUMN",
        help="names of the file's columns, such as question=text answer=label image=path",
    )
    parser.add_argument("--run", dest="run_dir", metavar="DIR", help="run folder; default: runs/ and the data's name")
    parser.add_argument("--epochs", type=float, default=3.0, help="passes over the data (default: %(default)s)")
    parser.add_argument(
        "--max-pixels", type=int, help=f"largest image area; default: the model's own, at most {_LARGEST_PIXELS}"
    )
    parser.add_argument(
        "--lora",
        type=int,
        nargs="?",
        const=8,
        metavar="RANK",
        help="train LoRA adapters on the language model in place of its weights (rank: 8)",
    )
    parser.add_argument("--out", metavar="YAML", help="file to write; default: standard output")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")


def run(args: argparse.Namespace) -> int:
    if args.out is not None and Path(args.out).exists() and not args.overwrite:
        raise UserError(f"--out {args.out} exists; name another file, or add --overwrite")
    if args.lora is not None and args.lora < 1:
        raise UserError(f"--lora {args.lora}: expected a rank of at least 1")
    if not args.epochs > 0:
        raise UserError(f"--epochs is {args.epochs}, expected a positive number")
    request = Request(
        args.model,
        args.data,
        args.media_root,
        args.format,
        args.run_dir,
        args.epochs,
        args.max_pixels,
        tuple(common.columns_of(args).model_dump(exclude_unset=True).items()),
        args.lora,
    )
    if args.out is None:
        print(text_of(request), end="")
    else:
        write(request, Path(args.out))
    return 0


def write(request: Request, out: Path) -> None:
    """Write the configuration to `out` and say what to do next."""
    write_text(out, text_of(request))
    print(f"wrote {out}; next: mindvl train --config {out}", file=sys.stderr)


def text_of(request: Request) -> str:
    """Return the YAML of a request, after it has been checked like any configuration."""
    sections = described(request.model)
    model = families.config_class(families.family_of(sections["model"])).model_validate(sections["model"])
    if "tokenizer" not in sections:
        raise UserError(f"{request.model} has no tokenizer.json; save the tokenizer there")
    low, high = _pixels(Path(request.model).expanduser())
    high = request.max_pixels or min(high, _LARGEST_PIXELS)
    source = {
        "path": request.data,
        "format": request.format,
        "media_root": request.media_root,
        "columns": dict(request.columns),
    }
    source = {key: value for key, value in source.items() if value not in (None, "auto", {})}
    with common.busy(f"reading up to {SAMPLED} samples of {request.data}"):
        sizes = measure(request, source, model, TokenizerConfig.model_validate(sections["tokenizer"]), low, high)
    text = _yaml(request, source, model, sizes, low, high)
    loader.from_text(text, describe=described)
    return text


def measure(
    request: Request, source: dict, model: ModelConfig, tokenizer: TokenizerConfig, low: int, high: int
) -> Sizes:
    """Read some samples and choose sizes with which each of them fits a row.

    Raises:
      UserError: no sample can be used; names the reasons.
    """
    from mindvl_jax.data.sources.readers import Source
    from mindvl_jax.models.vision_language.check import check_source
    from mindvl_jax.models.vision_language.example import EncodeLimits, ExampleEncoder
    from mindvl_jax.models.vision_language.processor import cached_tokenizer

    opened = Source("data", SourceConfig(**source, max_samples=SAMPLED))
    encoder = ExampleEncoder(model, cached_tokenizer(tokenizer), EncodeLimits(min_pixels=low, max_pixels=high))
    found = check_source(opened, request.data, encoder, model.vision, decode=False)
    reasons = ", ".join(f"{reason} ({count})" for reason, count in found.reasons.most_common(3))
    if not found.kept:
        raise UserError(
            f"{request.data}: none of {found.records} samples can be used: {reasons}. First: {found.skipped[0][3]}"
            + (accepted_lines() if "malformed" in found.reasons else "")
        )
    tokens, patches = np.array(found.tokens), np.array(found.patches)
    longest = int(tokens.max())
    # About a twentieth of the data a step, so that a small file still gives some steps; at most 64 samples.
    wanted = min(max(found.kept / 20, ROWS), 64.0)
    length = _up(max(min(longest, LONGEST_ROW), min(wanted / ROWS * tokens.mean(), LONGEST_ROW)), 64)
    length = min(length, model.text.max_position_embeddings)
    per_row = max(length / tokens.mean(), 1.0)
    unit = model.vision.merge_unit
    budget = _up(max(1.03 * patches.sum() / tokens.sum() * length, patches.max(), unit), unit)
    return Sizes(
        length,
        budget,
        max(8, math.ceil(length / tokens.min())) if tokens.min() * 64 < length else 64,
        max(1, round(wanted / (per_row * ROWS))),
        longest,
        per_row,
        found.kept,
        sum(found.reasons.values()),
        reasons,
    )


def _up(value: float, unit: int) -> int:
    return math.ceil(value / unit) * unit


def _pixels(folder: Path) -> tuple[int, int]:
    """Image areas that the folder's preprocessor names."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        content = content.get("image_processor", content)
        size = content.get("size") or {}
        low, high = (
            content.get("min_pixels") or size.get("shortest_edge"),
            content.get("max_pixels") or size.get("longest_edge"),
        )
        if low and high:
            return int(low), int(high)
    return 3136, _LARGEST_PIXELS


def _yaml(request: Request, source: dict, model: ModelConfig, sizes: Sizes, low: int, high: int) -> str:
    def quoted(value):
        return json.dumps(str(value), ensure_ascii=False)  # JSON strings are YAML strings

    run_dir = request.run_dir or f"runs/{Path(request.data).stem or 'mine'}"
    listed = ", ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in source.items())
    large = model.text.hidden_size >= 1024
    unusable = (
        f"\n# {sizes.unusable} samples cannot be used: {sizes.reasons}. `mindvl data check` lists them."
        if sizes.unusable
        else ""
    )
    cut = (
        f"\n# Longer samples lose turns: the longest has {sizes.longest} tokens."
        if sizes.longest > sizes.sequence_length
        else ""
    )
    adapters, train = "", "      train: [projector/**, language/**]     # the vision tower stays as it is\n"
    if request.lora is not None:
        targets = "[language/layers/attention/*, language/layers/mlp/*]"
        adapters, train = f"adapters: {{targets: {targets}, rank: {request.lora}, alpha: {2 * request.lora}}}\n\n", ""
    return f"""\
# Written by `mindvl init` from {sizes.measured} samples of {request.data}.{unusable}{cut}
run:
  dir: {quoted(run_dir)}
  init_from: {quoted(request.model)}          # sizes, token ids and tokenizer come from there too

model: {{remat: {"full" if large else "none"}}}

{adapters}mesh: {{data: 1, fsdp: -1}}                    # all devices; parameters are spread over them

data:
  sources:
    mine: {{{listed}}}
  workers: {min(8, os.cpu_count() or 1) if large else 0}

training:
  phases:
    - name: sft
      epochs: {request.epochs:g}
{train}      mixture: [{{source: mine}}]
      rows: {ROWS}                                # about {sizes.samples_per_row:.1f} samples in each
      gradient_accumulation: {sizes.gradient_accumulation}
      sequence_length: {sizes.sequence_length}                # the longest sample has {sizes.longest} tokens
      patches_per_row: {sizes.patches_per_row}
      max_samples_per_row: {sizes.max_samples_per_row}
      min_pixels: {low}
      max_pixels: {high}
      learning_rate: {"1.0e-5" if request.lora is None else "1.0e-4"}
      schedule: cosine
      warmup_ratio: 0.03

checkpoint: {{every_steps: 500, keep: 2}}
"""
