"""`mindvl merge`: a PEFT adapter folded into a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from mindvl_jax.cli import common
from mindvl_jax.core.errors import UserError

EPILOG = common.examples("mindvl merge --base Qwen2.5-VL-7B-Instruct --adapter runs/mine-lora --out merged")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", required=True, metavar="DIR", help="Hugging Face folder that the adapter was trained on"
    )
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="PEFT folder (LoRA, rank-stabilised LoRA, DoRA)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must be empty or absent")
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not compare the logits of both afterwards, which loads each model once",
    )


def run(args: argparse.Namespace) -> int:
    base, adapter, out = (Path(folder).expanduser() for folder in (args.base, args.adapter, args.out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and is not an empty folder; nothing is overwritten, name another")
    from mindvl_jax.weights.merge import check_merged, merge_folder

    with common.busy(f"merging {adapter} into {base}"):
        count = merge_folder(base, adapter, out)
    print(f"{out}: {count} matrices merged")
    if args.no_check:
        return 0
    with common.busy("comparing the logits of both"):
        check = check_merged(base, adapter, out)
    print(
        f"logits with adapter and merged differ by at most {check.difference:.2e} (largest logit "
        f"{check.largest:.2e}, {check.dtype} files)"
    )
    if not check.equal:
        raise UserError(f"that is more than {check.limit:g} of the largest logit: do not use {out}")
    return 0
