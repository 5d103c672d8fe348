"""`mindvl bench serve`: load on a server, and what its clients see."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mindvl_jax.core.errors import UserError, at_least_one

EPILOG = """examples:
  mindvl bench serve --url http://127.0.0.1:8000 --requests 200 --clients 16
  mindvl bench serve --requests 200 --rate 4 --words 200 --shared-words 150 --images 1 --output load/
"""
NAMES = {
    "first_token": "time to first token",
    "between_tokens": "time between tokens",
    "request": "whole request",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("what", choices=("serve",), help="a running server with the OpenAI interface")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default %(default)s)")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--api-key", metavar="KEY", help="where the server wants one")
    parser.add_argument("--requests", type=int, default=100, help="(default %(default)s)")
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument(
        "--clients", type=int, default=8, help="each asks again once it is answered (default %(default)s)"
    )
    loop.add_argument("--rate", type=float, help="requests a second at random moments, however many are under way")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (default %(default)s)")
    parser.add_argument("--words", type=int, default=32, help="of each prompt (default %(default)s)")
    parser.add_argument("--shared-words", type=int, default=0, help="equal at the start of all prompts (default none)")
    parser.add_argument("--images", type=int, default=0, help="of each prompt (default none)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels a side (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of words, images and moments (default %(default)s)")
    parser.add_argument("--output", metavar="DIR", help="write load.json and load.png there")


def run(args: argparse.Namespace) -> int:
    at_least_one(args, "requests", "clients", "tokens", "words", "image_size")
    if args.rate is not None and not 0 < args.rate < float("inf"):
        raise UserError(f"--rate is {args.rate}; expected more than 0 requests a second")
    if args.images < 0 or not 0 <= args.shared_words <= args.words:
        raise UserError("--images must be 0 or more, and --shared-words between 0 and --words")
    try:
        from mindvl_jax.inference.server.load import Load, measure
    except ImportError as error:
        raise UserError(f"this needs the package {error.name!r}: pip install 'mindvl-jax[serve]'") from None
    names = ("requests", "tokens", "clients", "words", "shared_words", "images", "image_size", "seed")
    load = Load(rate=args.rate or 0.0, **{name: getattr(args, name) for name in names})
    console = Console()
    with console.status("asking") as status:
        found = measure(
            args.url,
            load,
            model=args.model,
            key=args.api_key,
            told=lambda done: status.update(f"{done} of {load.requests} requests"),
        )
    console.print(_table(found))
    if args.output:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "load.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        _draw(found, folder / "load.png")
        console.print(f"written: {folder / 'load.json'}, {folder / 'load.png'}")
    return 1 if found["errors"] else 0


def _table(found: dict) -> Table:
    failed = sum(found["errors"].values())
    title = (
        f"{found['requests']} requests in {found['seconds']:.1f} s: {found['requests_per_second']:.2f} requests/s, "
        f"{found['tokens_per_second']:.1f} tokens/s, {failed} failed"
    )
    table = Table("milliseconds", *found["first_token"], title=title)
    for name, text in NAMES.items():
        table.add_row(text, *(f"{1000 * value:.1f}" for value in found[name].values()))
    for reason, count in found["errors"].items():
        table.add_row(f"failed: {reason}", str(count))
    return table


def _draw(found: dict, path: Path) -> None:
    """Bars of the percentiles, one group for each time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, (name, text) in zip(figure.subplots(1, len(NAMES)), NAMES.items(), strict=True):
        axes.bar(list(found[name]), [1000 * value for value in found[name].values()], color="#4c72b0")
        axes.set_title(text, fontsize=10)
        axes.set_ylabel("ms")
    figure.savefig(path, dpi=150)
