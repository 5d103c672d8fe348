"""`mindvl import mindspeed`: a training recipe of MindSpeed-MM as our configuration."""

from __future__ import annotations

import argparse
from pathlib import Path

from mindvl_jax.cli import common
from mindvl_jax.core.errors import UserError

EPILOG = common.examples(
    "mindvl import mindspeed --data data_3b.json --model model_3b.json --script finetune_qwen2_5_vl_3b.sh "
    "--out mine.yaml"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    mindspeed = formats.add_parser(
        "mindspeed", help="data.json, model.json and the shell script of MindSpeed-MM", epilog=EPILOG
    )
    mindspeed.add_argument("--data", required=True, metavar="JSON", help="their data.json")
    mindspeed.add_argument("--model", required=True, metavar="JSON", help="their model.json")
    mindspeed.add_argument("--script", required=True, metavar="SH", help="their shell script; it is read, not run")
    mindspeed.add_argument("--out", required=True, metavar="YAML", help="configuration to write")


def run(args: argparse.Namespace) -> int:
    from mindvl_jax.config import loader
    from mindvl_jax.config.mindspeed import import_run
    from mindvl_jax.core.files import write_text
    from mindvl_jax.weights.described import described

    out = Path(args.out)
    if out.exists():
        raise UserError(f"--out {out} exists; name another file")
    imported = import_run(Path(args.data), Path(args.model), Path(args.script))
    text = imported.yaml()
    weights = imported.config["run"]["init_from"]
    checked = "preset" in imported.config["model"] or Path(weights).is_dir()
    if checked:
        loader.from_text(text, describe=described)
    write_text(out, text)
    for key in sorted(imported.keys, key=lambda key: ("translated", "same", "lost").index(key.fate)):
        print(f"{key.fate:<10} {key.file} {key.name} = {key.value}: {key.text}")
    print(f"wrote {out}" + ("" if checked else f"; not checked, because there is no folder {weights}"))
    return 0
