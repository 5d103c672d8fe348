"""`mindvl data check`, `mindvl data convert` and `mindvl data index`."""

from __future__ import annotations

import argparse
import contextlib
from typing import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mindvl_jax.cli import common
from mindvl_jax.config.schema import SourceConfig, TokenizerConfig
from mindvl_jax.core.errors import UserError

FORMATS = ("auto", "mllm", "llava", "sharegpt", "jsonl", "parquet", "webdataset")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="read all samples; write one HTML page of what is kept, skipped and why, lengths and examples")
    check.add_argument("path", nargs="?", help="file, folder or glob; or use --config")
    check.add_argument("--config", help="check the sources of a phase of this configuration instead, with its tokenizer and limits")
    check.add_argument("--phase", type=int, default=0, help="phase of the configuration, from 0 (default: 0)")
    check.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides of the configuration")
    _source_arguments(check)
    check.add_argument("--preset", default="qwen2.5-vl-7b", help="model whose patches and media tokens are used without --config (default: %(default)s)")
    check.add_argument("--tokenizer", default="qwen2.5", help="tokenizer without --config (default: %(default)s)")
    check.add_argument("--min-pixels", type=int, default=3136)
    check.add_argument("--max-pixels", type=int, default=1003520)
    check.add_argument("--max-tokens", type=int, default=None, help="longest sample; longer ones lose turns")
    check.add_argument("--headers-only", action="store_true", help="do not decode pixels: faster, but misses files that are damaged behind their header")
    check.add_argument("--out", default="data_check.html", help="page to write (default: %(default)s)")
    convert = actions.add_parser("convert", help="write a data set in another format")
    convert.add_argument("path", help="file, folder or glob")
    _source_arguments(convert)
    convert.add_argument("--to", required=True, choices=FORMATS[1:])
    convert.add_argument("--out", required=True, help="file to write")
    convert.add_argument("--media-prefix", default="", help="folder put before each media path, such as train2017 for COCO's pictures in LLaVA-Instruct")
    convert.add_argument("--overwrite", action="store_true")
    index = actions.add_parser("index", help="write the lengths of all samples into data.length_index, so that hosts of a run need not encode each other's samples")
    index.add_argument("--config", required=True, help="configuration whose data.length_index names the folder")
    index.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides of the configuration")


def _source_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", default="auto", choices=FORMATS)
    parser.add_argument("--media-root", help="folder that media paths start from (default: the folder of the file)")
    parser.add_argument("--max-samples", type=int, help="read only the first N samples")


def run(args: argparse.Namespace) -> int:
    return {"check": _check, "convert": _convert, "index": _index}[args.action](args)


def _index(args: argparse.Namespace) -> int:
    from mindvl_jax.data.packing.lengths import index_phase
    from mindvl_jax.models.registry import spec_of

    config = common.load_config(args.config, args.set)
    if config.data.length_index is None:
        raise UserError("data.length_index names no folder; add it to the configuration, or --set data.length_index=FOLDER")
    console = Console()
    for number, phase in enumerate(config.training.phases):
        processor = spec_of(config.model).processor(config, number)
        for name, path, kept, refused in index_phase(config, phase.sources, processor):
            console.print(f"{phase.name}, {name}: " + ("there already" if kept < 0 else f"{kept} samples, {refused} refused") + f" ({path})", soft_wrap=True)
    return 0


def _source_config(args: argparse.Namespace) -> SourceConfig:
    return SourceConfig(path=args.path, format=args.format, media_root=args.media_root, max_samples=args.max_samples)


def _check(args: argparse.Namespace) -> int:
    from mindvl_jax.models.vision_language.check import advice, check_source
    from mindvl_jax.models.vision_language.check_page import write_page
    from mindvl_jax.models.vision_language.example import EncodeLimits, ExampleEncoder
    from mindvl_jax.data.sources.readers import open_sources
    from mindvl_jax.models.vision_language.processor import cached_tokenizer, training_limits

    if (args.config is None) == (args.path is None):
        raise UserError("give either a path or --config FILE")
    if args.config is not None:

        config = common.load_config(args.config, args.set)
        if not 0 <= args.phase < len(config.training.phases):
            raise UserError(f"--phase {args.phase}: the configuration has phases 0 to {len(config.training.phases) - 1}")
        mixture = config.training.phases[args.phase].mixture
        names = list(dict.fromkeys(entry.source for entry in mixture))
        weights = {name: sum(entry.weight for entry in mixture if entry.source == name) for name in names}
        configs, model, limits, tokenizer = config.data.sources, config.model, training_limits(config, args.phase), config.tokenizer
    else:
        from mindvl_jax.config import families

        if args.preset not in families.preset_names():
            raise UserError(f"--preset {args.preset!r} is not known; there are {', '.join(families.preset_names())}")
        names, configs, model, tokenizer = ["data"], {"data": _source_config(args)}, families.preset(args.preset), TokenizerConfig(path=args.tokenizer)
        weights = None
        limits = EncodeLimits(min_pixels=args.min_pixels, max_pixels=args.max_pixels, max_tokens=args.max_tokens)
    encoder = ExampleEncoder(model, cached_tokenizer(tokenizer), limits)
    console = Console(stderr=True)
    findings = []
    for source in open_sources(configs, names):
        with _progress(console, source.name, len(source)) as advance:
            findings.append(check_source(source, configs[source.name].path, encoder, model.vision, decode=not args.headers_only, resample=limits.resample, progress=advance))
    lines = advice(findings, limits.max_tokens, weights)
    write_page(args.out, findings, lines, {"tokenizer": tokenizer.path, "min_pixels": str(limits.min_pixels), "max_pixels": str(limits.max_pixels), "max_tokens": str(limits.max_tokens)})
    table = Table("source", "records", "kept", "skipped", "repeated", "tokens", "patches")
    for found in findings:
        table.add_row(found.name, *(str(n) for n in (found.records, found.kept, sum(found.reasons.values()), found.duplicate_count, sum(found.tokens), sum(found.patches))))
    out = Console()
    out.print(table)
    for line in lines:
        out.print(f"- {line}", markup=False, highlight=False)
    out.print(f"Page: {args.out}", markup=False, highlight=False, soft_wrap=True)
    return 0 if any(found.kept for found in findings) else 1


def _convert(args: argparse.Namespace) -> int:
    from mindvl_jax.data.sources.convert import convert
    from mindvl_jax.data.sources.readers import Source

    source = Source("data", _source_config(args))
    with _progress(Console(stderr=True), args.to, len(source)) as advance:
        done = convert(source, args.to, args.out, prefix=args.media_prefix, overwrite=args.overwrite, progress=advance)
    print(f"{done.written} samples written to {args.out}")
    if done.skipped:
        print(f"{done.skipped} samples could not be converted; they are listed in {done.skipped_list}")
    if done.media_root:
        print(f"Media paths are relative to {done.media_root}: set media_root to it in the source, or move the file there")
    return 0


@contextlib.contextmanager
def _progress(console: Console, name: str, total: int) -> Iterator[Callable[[], None]]:
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda: bar.advance(task)
