"""`mindvl parity`: is our mathematics transformers' own, on this folder? Table, verdict and an image of the error by
layer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mindvl_jax.cli import common
from mindvl_jax.core.errors import UserError

EPILOG = common.examples(
    "mindvl parity --weights Qwen2.5-VL-3B-Instruct", "mindvl parity --weights exported --samples 8 --tolerance 1e-4"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        required=True,
        metavar="DIR",
        help="Hugging Face folder of any family that has a reference, or MindVL's own layout",
    )
    parser.add_argument("--out", default="parity", metavar="DIR", help="folder for parity.json and parity.png")
    parser.add_argument("--json", action="store_true", help="print parity.json; everything else goes to standard error")
    parser.add_argument("--samples", type=int, default=4, help="random samples: images, a video, text")
    parser.add_argument("--text-tokens", type=int, default=32, help="text tokens of each sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        help="largest logit difference that passes, relative to the largest logit",
    )


def run(args: argparse.Namespace) -> int:
    if args.samples < 1 or args.text_tokens < 1:
        raise UserError("--samples and --text-tokens are at least 1")
    folder = Path(args.weights).expanduser()
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"parity compares with transformers, and {error.name} is not installed here; install it: pip "
            "install torch transformers"
        ) from error
    common.load_slow("mindvl_jax.parity.check")
    from rich.console import Console

    from mindvl_jax.parity.check import check, draw, table

    with common.busy("running both models"):
        outcome = check(
            folder, samples=args.samples, text_tokens=args.text_tokens, seed=args.seed, tolerance=args.tolerance
        )
    console = Console(stderr=args.json)
    console.print(table(outcome))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "parity.json").write_text(json.dumps(outcome.as_dict(), indent=2) + "\n")
    draw(outcome, out / "parity.png")
    logits = outcome.logits
    console.print(
        f"logits: max abs difference {logits.difference:.2e} (largest logit {logits.scale:.1f}), mean KL "
        f"{logits.kl:.2e}, "
        f"top-1 agreement {logits.top1:.2%}, top-5 agreement {logits.top5:.2%} over {logits.places} places"
    )
    console.print(
        ("[green]same mathematics[/]" if outcome.passed else "[red]differs[/]")
        + f" (tolerance {args.tolerance:g}); {out / 'parity.json'}, {out / 'parity.png'}"
    )
    if args.json:
        print(json.dumps(outcome.as_dict(), indent=2))
    return 0 if outcome.passed else 1
