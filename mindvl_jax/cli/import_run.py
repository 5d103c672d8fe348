"""`mindvl import`: a training recipe of MindSpeed-MM, LLaMA-Factory or ms-swift as our configuration."""

from __future__ import annotations

import argparse
from pathlib import Path

from mindvl_jax.cli import common
from mindvl_jax.core.errors import UserError

EPILOG = common.examples(
    "mindvl import mindspeed --data data_3b.json --model model_3b.json --script finetune_qwen2_5_vl_3b.sh "
    "--out mine.yaml",
    "mindvl import mindspeed --yaml qwen3vl_8b.yaml --devices 16 --out mine.yaml",
    "mindvl import llamafactory --yaml examples/train_lora/qwen2_5vl_lora_sft.yaml --devices 8 --out mine.yaml",
    "mindvl import swift --run train.sh --devices 4 --out mine.yaml",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    mindspeed = formats.add_parser(
        "mindspeed", help="data.json, model.json and the shell script of MindSpeed-MM, or its FSDP2 YAML", epilog=EPILOG
    )
    mindspeed.add_argument("--data", metavar="JSON", help="their data.json")
    mindspeed.add_argument("--model", metavar="JSON", help="their model.json")
    mindspeed.add_argument("--script", metavar="SH", help="their shell script; it is read, not run")
    mindspeed.add_argument("--yaml", metavar="YAML", help="in place of the three: the file of a native FSDP2 run")
    factory = formats.add_parser("llamafactory", help="the YAML of a run of LLaMA-Factory (stage sft)", epilog=EPILOG)
    factory.add_argument("--yaml", dest="recipe", required=True, metavar="YAML", help="their configuration")
    factory.add_argument(
        "--dataset-info", metavar="JSON", help="their dataset_info.json; default: the one in dataset_dir"
    )
    swift = formats.add_parser("swift", help="a script or YAML of `swift sft` (ms-swift)", epilog=EPILOG)
    swift.add_argument(
        "--run", dest="recipe", required=True, metavar="FILE", help="their script, which is read and not run, or YAML"
    )
    for parser in (mindspeed, factory, swift):
        parser.add_argument(
            "--devices",
            type=int,
            default=1,
            metavar="N",
            help="devices it ran on there, where no file tells (%(default)s)",
        )
    for parser in (mindspeed, factory, swift):
        parser.add_argument("--out", required=True, metavar="YAML", help="configuration to write")


def run(args: argparse.Namespace) -> int:
    from mindvl_jax.config import loader
    from mindvl_jax.core.files import write_text
    from mindvl_jax.weights.described import described

    out = Path(args.out)
    if out.exists():
        raise UserError(f"--out {out} exists; name another file")
    imported = _imported(args)
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


def _imported(args: argparse.Namespace):
    from mindvl_jax.config import mindspeed, mindspeed_yaml, trainer_files

    if args.devices < 1:
        raise UserError(f"--devices {args.devices}: expected at least 1")
    if args.format == "mindspeed":
        files = (args.data, args.model, args.script)
        if args.yaml and not any(files):
            return mindspeed_yaml.import_yaml(Path(args.yaml), devices=args.devices)
        if args.yaml or not all(files):
            raise UserError("give --data, --model and --script of a Megatron run, or --yaml of a native FSDP2 run")
        return mindspeed.import_run(*map(Path, files))
    dialect = trainer_files.SWIFT if args.format == "swift" else trainer_files.LLAMA_FACTORY
    info = getattr(args, "dataset_info", None)
    return trainer_files.import_trainer_file(
        Path(args.recipe), dialect, devices=args.devices, dataset_info=Path(info) if info else None
    )
