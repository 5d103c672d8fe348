"""`mindvl imagine`: pictures from prompts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mindvl_jax.cli import common
from mindvl_jax.core.errors import UserError

EPILOG = common.examples(
    'mindvl imagine --weights FLUX.1-dev --prompt "a red fox in snow" --out fox',
    'mindvl imagine --weights FLUX.1-schnell --prompt "fox" --steps 4 --text-length 256 --size 512x768 --out fox',
    'mindvl imagine --weights FLUX.1-dev --prompt "a harbour" --negative blur --cfg 3 --images 4 --seed 7 --out boats',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", required=True, metavar="DIR", help="pipeline folder in the layout of diffusers (Flux.1, SD3)"
    )
    parser.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="what to draw; may be repeated"
    )
    parser.add_argument("--negative", metavar="TEXT", help="what to keep away from; needs --cfg above 1")
    parser.add_argument("--steps", type=int, default=28, metavar="N", help="of the solver; 4 for schnell")
    parser.add_argument(
        "--guidance", type=float, default=3.5, metavar="X", help="scale that a distilled model is told (dev)"
    )
    parser.add_argument(
        "--cfg",
        type=float,
        metavar="X",
        help="scale of classifier-free guidance against --negative, or the empty prompt; doubles the time; 1 is off "
        "(default: 1 for Flux, 7 for SD3)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="image k follows from the seed and k alone")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="of each prompt")
    parser.add_argument("--size", metavar="HxW", help="pixels, such as 768x1024; default: the pipeline's own")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="images at one time")
    parser.add_argument(
        "--text-length",
        type=int,
        metavar="N",
        help="tokens of T5, padding included (default: 512 for Flux, 256 for SD3; schnell was trained with 256)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights; default: float32 on a CPU, else bfloat16"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must be empty or absent")


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise UserError(f"--size {text!r}: expected height x width in pixels, such as 768x1024")
    return int(height), int(width)


def run(args: argparse.Namespace) -> int:
    out = Path(args.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and is not an empty folder; nothing is overwritten, name another")
    for option in ("steps", "images", "batch", "text_length"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)}: expected at least 1")
    height, width = _size(args.size)
    common.load_slow("mindvl_jax.inference.diffusion.systems")
    import jax
    import numpy as np
    from PIL import Image

    from mindvl_jax.core.progress import LogConsole, counting
    from mindvl_jax.inference.diffusion.pipeline import Wish
    from mindvl_jax.inference.diffusion.systems import open_folder

    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    pipeline = open_folder(Path(args.weights).expanduser(), dtype)
    if args.negative is not None and not (pipeline.cfg if args.cfg is None else args.cfg) > 1:
        raise UserError("--negative needs --cfg above 1: without classifier-free guidance nothing is kept away from")
    wish = Wish(
        prompts=tuple(args.prompt),
        images=args.images,
        negative=args.negative or "",
        steps=args.steps,
        guidance=args.guidance,
        cfg=args.cfg,
        seed=args.seed,
        height=height,
        width=width,
        text_length=args.text_length,
        batch=args.batch,
    )
    console = LogConsole(stderr=True)
    with counting(console, first="compiling") as show:
        pictures = pipeline.draw(wish, show=show)
    for warning in pipeline.warnings:
        console.print(warning)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for number, picture in enumerate(pictures):
        file = out / f"{number:04}.png"
        Image.fromarray(np.rint(picture * 255).astype(np.uint8)).save(file)
        written.append({"file": file.name, "prompt": args.prompt[number // args.images], "number": number})
    shared = {name: getattr(args, name) for name in ("weights", "negative", "steps", "guidance", "cfg", "seed", "size")}
    record = {**shared, "text_length": args.text_length, "dtype": dtype, "images": written}
    (out / "imagine.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{out}: {len(written)} picture{'s' if len(written) > 1 else ''} (settings in imagine.json)")
    return 0
