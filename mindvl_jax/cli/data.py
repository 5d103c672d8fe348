"""`mindvl data check`, `mindvl data convert` and `mindvl data index`."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table
from rich.text import Text

from mindvl_jax.cli import common
from mindvl_jax.config.schema import SourceConfig, TokenizerConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.progress import LogConsole, counting
from mindvl_jax.data.questions import ACCEPTED

if TYPE_CHECKING:
    from mindvl_jax.models.vision_language.check import SourceFindings

EPILOG = common.examples(
    "mindvl data check my.json",
    "mindvl data check answers.csv --columns question=text answer=label images=path --media-root images --strict",
    "mindvl data check --config my.yaml --json",
    "mindvl data convert llava.json --to parquet --out llava.parquet",
)
SHOWN_SKIPPED = 20

WRITTEN = ("mllm", "llava", "sharegpt", "jsonl", "parquet", "webdataset")
FORMATS = ("auto", *WRITTEN, "csv", "tsv", "arrow")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check", help="read all samples; write one HTML page of what is kept, skipped and why, lengths and examples"
    )
    check.add_argument("path", nargs="?", help="file, folder or glob; or use --config")
    check.add_argument(
        "--config", help="check the sources of a phase of this configuration instead, with its tokenizer and limits"
    )
    check.add_argument("--phase", type=int, default=0, help="phase of the configuration, from 0 (default: 0)")
    check.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides of the configuration"
    )
    _source_arguments(check)
    check.add_argument(
        "--preset",
        default="qwen2.5-vl-7b",
        help="model whose patches and media tokens are used without --config (default: %(default)s)",
    )
    check.add_argument("--tokenizer", default="qwen2.5", help="tokenizer without --config (default: %(default)s)")
    check.add_argument("--min-pixels", type=int, default=3136)
    check.add_argument("--max-pixels", type=int, default=1003520)
    check.add_argument("--max-tokens", type=int, default=None, help="longest sample; longer ones lose turns")
    check.add_argument(
        "--headers-only",
        action="store_true",
        help="do not decode pixels: faster, but misses files that are damaged behind their header",
    )
    check.add_argument("--strict", action="store_true", help="exit with 1 if any sample cannot be used")
    check.add_argument("--json", action="store_true", help="print the findings as JSON")
    check.add_argument("--out", default="data_check.html", help="page to write (default: %(default)s)")
    convert = actions.add_parser("convert", help="write a data set in another format")
    convert.add_argument("path", help="file, folder or glob")
    _source_arguments(convert)
    convert.add_argument("--to", required=True, choices=WRITTEN)
    convert.add_argument("--out", required=True, help="file to write")
    convert.add_argument(
        "--media-prefix",
        default="",
        help="folder put before each media path, such as train2017 for COCO's images in LLaVA-Instruct",
    )
    convert.add_argument("--overwrite", action="store_true")
    index = actions.add_parser(
        "index",
        help="write the lengths of all samples into data.length_index, so that hosts of a run need not encode "
        "each other's samples",
    )
    index.add_argument("--config", required=True, help="configuration whose data.length_index names the folder")
    index.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides of the configuration"
    )


def _source_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", default="auto", choices=FORMATS)
    parser.add_argument("--media-root", help="folder that media paths start from (default: the folder of the file)")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="NAME=COLUMN",
        help="names of the file's columns, such as question=text answer=label image=path",
    )
    parser.add_argument("--max-samples", type=int, help="read only the first N samples")


def run(args: argparse.Namespace) -> int:
    return {"check": _check, "convert": _convert, "index": _index}[args.action](args)


def _index(args: argparse.Namespace) -> int:
    from mindvl_jax.data.packing.lengths import index_phase
    from mindvl_jax.models.registry import spec_of

    config = common.load_config(args.config, args.set)
    if config.data.length_index is None:
        raise UserError(
            "data.length_index names no folder; add it to the configuration, or --set data.length_index=FOLDER"
        )
    console = LogConsole(stamp=False)
    for number, phase in enumerate(config.training.phases):
        processor = spec_of(config.model).processor(config, number)
        for name, path, kept, refused in index_phase(config, phase.sources, processor):
            console.print(
                f"{phase.name}, {name}: "
                + ("there already" if kept < 0 else f"{kept} samples, {refused} refused")
                + f" ({path})",
                soft_wrap=True,
            )
    return 0


def _source_config(args: argparse.Namespace) -> SourceConfig:
    return SourceConfig(
        path=args.path,
        format=args.format,
        media_root=args.media_root,
        max_samples=args.max_samples,
        columns=common.columns_of(args),
    )


class _Checked(NamedTuple):
    """Sources to check, by name, and how a training would read them. weights: of the mixture, if there is one."""

    sources: dict[str, SourceConfig]
    weights: dict[str, float] | None
    model: Any
    limits: Any
    tokenizer: TokenizerConfig


def _to_check(args: argparse.Namespace) -> _Checked:
    from mindvl_jax.config import families
    from mindvl_jax.models.layers.text_processor import text_limits
    from mindvl_jax.models.vision_language.example import EncodeLimits
    from mindvl_jax.models.vision_language.processor import training_limits

    if (args.config is None) == (args.path is None):
        raise UserError("give either a path or --config FILE")
    if args.config is not None:
        config = common.load_config(args.config, args.set)
        if not 0 <= args.phase < len(config.training.phases):
            raise UserError(
                f"--phase {args.phase}: the configuration has phases 0 to {len(config.training.phases) - 1}"
            )
        mixture = config.training.phases[args.phase].mixture
        names = list(dict.fromkeys(entry.source for entry in mixture))
        weights = {name: sum(entry.weight for entry in mixture if entry.source == name) for name in names}
        sources = {name: config.data.sources[name] for name in names}
        limits = (training_limits if hasattr(config.model, "vision") else text_limits)(config, args.phase)
        return _Checked(sources, weights, config.model, limits, config.tokenizer)
    if args.preset not in families.preset_names():
        raise UserError(f"--preset {args.preset!r} is not known; there are {', '.join(families.preset_names())}")
    limits = EncodeLimits(min_pixels=args.min_pixels, max_pixels=args.max_pixels, max_tokens=args.max_tokens)
    model, tokenizer = families.preset(args.preset), TokenizerConfig(path=args.tokenizer)
    return _Checked({"data": _source_config(args)}, None, model, limits, tokenizer)


def _check(args: argparse.Namespace) -> int:
    from mindvl_jax.data.sources.readers import open_sources
    from mindvl_jax.models.layers.text_processor import TextEncoder
    from mindvl_jax.models.vision_language.check import advice, check_source
    from mindvl_jax.models.vision_language.check_page import write_page
    from mindvl_jax.models.vision_language.example import ExampleEncoder
    from mindvl_jax.models.vision_language.processor import cached_tokenizer

    sources, weights, model, limits, tokenizer = _to_check(args)
    sees = hasattr(model, "vision")
    encoder = (ExampleEncoder if sees else TextEncoder)(model, cached_tokenizer(tokenizer), limits)
    findings = []
    with counting(LogConsole(stderr=True, stamp=False)) as show:
        for source in open_sources(sources, list(sources)):
            done = itertools.count(1)
            advance = functools.partial(_advance, show, done, len(source), source.name)
            findings.append(
                check_source(
                    source,
                    sources[source.name].path,
                    encoder,
                    model.vision if sees else None,
                    decode=sees and not args.headers_only,
                    resample=limits.resample,
                    progress=advance,
                )
            )
    lines = advice(findings, limits.max_tokens, weights)
    write_page(
        args.out,
        findings,
        lines,
        {
            "tokenizer": tokenizer.path,
            "min_pixels": str(limits.min_pixels),
            "max_pixels": str(limits.max_pixels),
            "max_tokens": str(limits.max_tokens),
        },
    )
    if args.json:
        print(
            json.dumps(
                {"sources": [_record(found) for found in findings], "advice": lines, "page": args.out},
                indent=2,
                ensure_ascii=False,
            )
        )
    else:
        _show(findings, lines, args.out)
    unusable = sum(sum(found.reasons.values()) for found in findings)
    return 1 if not any(found.kept for found in findings) or (args.strict and unusable) else 0


def _advance(show: Callable[[int, int, str], None], done: Iterator[int], total: int, name: str) -> None:
    show(next(done), total, name)


def _record(found: SourceFindings) -> dict[str, Any]:
    first = [
        {"id": id, "where": where, "reason": reason, "message": message}
        for id, where, reason, message in found.skipped[:SHOWN_SKIPPED]
    ]
    return {
        "name": found.name,
        "path": found.path,
        "records": found.records,
        "kept": found.kept,
        "skipped": dict(found.reasons),
        "first_skipped": first,
        "repeated": found.duplicate_count,
        "truncated": found.truncated,
        "shrunk": found.shrunk,
        "tokens": sum(found.tokens),
        "learned": sum(found.learned),
        "patches": sum(found.patches),
        "longest": max(found.tokens, default=0),
    }


def _show(findings: Sequence[SourceFindings], lines: Sequence[str], page: str) -> None:
    out = LogConsole(stamp=False)
    table = Table("source", "records", "kept", "skipped", "repeated", "tokens", "patches")
    for found in findings:
        cells = (
            found.records,
            found.kept,
            sum(found.reasons.values()),
            found.duplicate_count,
            sum(found.tokens),
            sum(found.patches),
        )
        table.add_row(Text(found.name), *map(str, cells))
    out.print(table)
    for line in lines:
        out.print(f"- {line}", markup=False, highlight=False)
    for found in findings:
        for reason, count in found.reasons.most_common():
            id, where, _, message = (
                next(entry for entry in found.skipped if entry[2] == reason)
                if any(entry[2] == reason for entry in found.skipped)
                else ("", "", "", "")
            )
            out.print(
                f"  {found.name}, {reason}: {count}" + (f"; the first is {id} ({where}): {message}" if message else ""),
                markup=False,
                highlight=False,
            )
    if any("malformed" in found.reasons for found in findings):
        out.print("Lines that are accepted:", markup=False)
        for line in ACCEPTED:
            out.print(f"  {line}", markup=False, highlight=False)
    out.print(f"Page: {page}", markup=False, highlight=False, soft_wrap=True)


def _convert(args: argparse.Namespace) -> int:
    from mindvl_jax.data.sources.convert import convert
    from mindvl_jax.data.sources.readers import Source

    source = Source("data", _source_config(args))
    with counting(LogConsole(stderr=True, stamp=False)) as show:
        number = itertools.count(1)
        done = convert(
            source,
            args.to,
            args.out,
            prefix=args.media_prefix,
            overwrite=args.overwrite,
            progress=lambda: show(next(number), len(source), args.to),
        )
    print(f"{done.written} samples written to {args.out}")
    if done.skipped:
        print(f"{done.skipped} samples could not be converted; they are listed in {done.skipped_list}")
    if done.media_root:
        print(
            f"Media paths are relative to {done.media_root}: set media_root to it in the source, or move the file there"
        )
    return 0
