"""`mindvl convert`: weights of Qwen2.5-VL to and from MindSpeed-MM's layouts; four-bit weights of bitsandbytes to plain
ones; FP8 weights of DeepSeek-V3 to bfloat16 and back; folders of torch.distributed.checkpoint to Hugging Face ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindvl_jax.cli import common
from mindvl_jax.core.errors import UserError

EPILOG = common.examples(
    "mindvl convert mindspeed --from save_dir --to hf --like Qwen2.5-VL-7B-Instruct",
    "mindvl convert mindspeed --from Qwen2.5-VL-7B-Instruct --to mm --tp 1 --llm-pp-layers '[[12,16]]' "
    "--vit-pp-layers '[[32,0]]'",
    "mindvl convert mindspeed --from mm --to mm-tp2 --like Qwen2.5-VL-7B-Instruct --tp 2 --pp 1",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    mindspeed = formats.add_parser(
        "mindspeed", help="folders of MindSpeed-MM (release/mp_rank_*, iter_*)", epilog=EPILOG
    )
    mindspeed.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="DIR",
        help="Hugging Face folder, or a folder of MindSpeed-MM: its layout is found from the files",
    )
    mindspeed.add_argument("--to", required=True, metavar="DIR", help="folder to write; must be empty or absent")
    mindspeed.add_argument(
        "--like",
        metavar="DIR",
        help="Hugging Face folder of the same model: config.json, and what an exported folder looks like; "
        "default: --from, if it is one",
    )
    mindspeed.add_argument(
        "--iteration", type=int, help="iteration to read; default: the one in latest_checkpointed_iteration.txt"
    )
    mindspeed.add_argument(
        "--vit-qkv",
        choices=("rows", "heads"),
        help="how a canonical checkpoint with tensor parallelism holds the tower's qkv; its files do not tell",
    )
    target = mindspeed.add_argument_group(
        "write a MindSpeed-MM folder of this layout; without any of these a Hugging Face folder is written"
    )
    target.add_argument("--tp", type=int, help="tensor ranks")
    target.add_argument("--pp", type=int, help="pipeline ranks, with layers spread evenly and the tower in the first")
    target.add_argument("--vpp", type=int, help="virtual stages of each pipeline rank")
    target.add_argument(
        "--llm-pp-layers",
        metavar="JSON",
        help="layers of the language model in each chunk, as [[12,16]]: a list for each virtual stage",
    )
    target.add_argument("--vit-pp-layers", metavar="JSON", help="layers of the vision tower in each chunk, as [[32,0]]")
    target.add_argument(
        "--canonical", action="store_true", help="keep q, k, v, gate and up apart (their canonical_model)"
    )
    _add_quantised(formats)


def _add_quantised(formats: Any) -> None:
    dcp = formats.add_parser(
        "dcp", help="folders of torch.distributed.checkpoint, as FSDP2 runs write them, to a Hugging Face folder"
    )
    dcp.add_argument("--from", dest="source", required=True, metavar="DIR", help="folder with .metadata and *.distcp")
    dcp.add_argument("--to", required=True, metavar="DIR", help="folder to write; must be empty or absent")
    dcp.add_argument(
        "--like",
        required=True,
        metavar="DIR",
        help="Hugging Face folder of the same model: config.json, and what the written folder looks like",
    )
    dcp.add_argument(
        "--prefix",
        help="of the model's keys, as `model.`; needed only where a folder holds the model more than once",
    )
    nf4 = formats.add_parser(
        "nf4", help="four-bit weights of bitsandbytes, as QLoRA's bases are published, to a plain folder"
    )
    nf4.add_argument("--from", dest="source", required=True, metavar="DIR", help="Hugging Face folder with NF4 weights")
    nf4.add_argument("--to", required=True, metavar="DIR", help="folder to write; must be empty or absent")
    fp8 = formats.add_parser(
        "fp8",
        help="FP8 weights in blocks of 128 x 128, as DeepSeek-V3 is published, to a bfloat16 folder; with --like back",
    )
    fp8.add_argument("--from", dest="source", required=True, metavar="DIR", help="Hugging Face folder")
    fp8.add_argument("--to", required=True, metavar="DIR", help="folder to write; must be empty or absent")
    fp8.add_argument(
        "--like",
        metavar="DIR",
        help="quantise: the FP8 folder whose matrices are written in FP8, with its scales where they still hold",
    )
    fp8.add_argument(
        "--without-mtp",
        action="store_true",
        help="leave out the layers behind num_hidden_layers (multi-token prediction), which no model here has",
    )


def run(args: argparse.Namespace) -> int:
    return {"nf4": _nf4, "fp8": _fp8, "dcp": _dcp, "mindspeed": _mindspeed}[args.format](args)


def _empty(to: str) -> Path:
    out = Path(to).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--to {out} exists and is not an empty folder; nothing is overwritten, name another")
    return out


def _fp8(args: argparse.Namespace) -> int:
    from mindvl_jax.weights import fp8

    source, out = Path(args.source).expanduser(), _empty(args.to)
    if args.like:
        if args.without_mtp:
            raise UserError("--without-mtp leaves tensors of an FP8 folder out; with --like the source is a plain one")
        done = fp8.quantize_folder(source, out, Path(args.like).expanduser())
        print(
            f"{out}: {done.matrices} matrices in FP8, {done.new_scales} of {done.blocks} blocks with a new scale, "
            f"largest error {done.largest:.1e} of the block's largest value"
        )
        return 0
    beyond = _layers_behind(source) if args.without_mtp else None
    left: list[str] = []

    def left_out(name: str) -> bool:
        if beyond is None or not beyond(name):
            return False
        left.append(name)
        return True

    count = fp8.dequantize_folder(source, out, left_out=left_out)
    print(f"{out}: {count} matrices dequantised" + (f", {len(left)} tensors of MTP layers left out" if left else ""))
    return 0


def _layers_behind(source: Path) -> Callable[[str], bool]:
    """Whether a tensor belongs to a layer that config.json does not count."""
    path = source / "config.json"
    layers = json.loads(path.read_text(encoding="utf-8")).get("num_hidden_layers") if path.is_file() else None
    if not isinstance(layers, int):
        raise UserError(f"{path}: num_hidden_layers is missing, which tells which layers are behind the last")

    def behind(name: str) -> bool:
        number = name.removeprefix("model.layers.").split(".")[0]
        return name.startswith("model.layers.") and number.isdigit() and int(number) >= layers

    return behind


def _nf4(args: argparse.Namespace) -> int:
    from mindvl_jax.weights.nf4 import dequantize_folder

    out = _empty(args.to)
    print(f"{out}: {dequantize_folder(Path(args.source).expanduser(), out)} matrices dequantised")
    return 0


def _dcp(args: argparse.Namespace) -> int:
    from mindvl_jax.weights.mapping import mapping_of, read_config
    from mindvl_jax.weights.mindspeed import convert
    from mindvl_jax.weights.mindspeed.dcp import Dcp

    source, out, like = Path(args.source).expanduser(), _empty(args.to), Path(args.like).expanduser()
    config = read_config(like)
    shapes = convert.published_shapes(config)
    opened = Dcp(source, shapes, mapping_of(config), prefix=args.prefix)
    print(
        f"{source}: {len(shapes)} tensors under {opened.prefix!r}; {len(opened.left_out)} other keys are not converted"
        + (f", such as {opened.left_out[0]}" if opened.left_out else "")
    )
    convert.write_huggingface(out, opened, shapes, like, print)
    return 0


def _mindspeed(args: argparse.Namespace) -> int:
    from mindvl_jax.weights.mindspeed import convert

    source, out = Path(args.source).expanduser(), Path(args.to).expanduser()
    megatron = convert.is_megatron(source)
    like = Path(args.like).expanduser() if args.like else None if megatron else source
    if like is None:
        raise UserError(
            f"--from {source} is a folder of MindSpeed-MM, which does not say how many heads the model has; "
            "give a Hugging Face folder of the model with --like DIR"
        )
    sizes = convert.sizes_of(like)
    layout = _layout(args, sizes.depth)
    if not megatron:
        if layout is None:
            raise UserError("--from is a Hugging Face folder already; give the layout to write, such as --tp 1 --pp 2")
        with convert.HuggingFace(source) as opened:
            opened.check(sizes)
            convert.write_megatron(out, opened, sizes, layout, print)
        return 0
    opened = convert.Megatron(source, sizes, iteration=args.iteration, vit_qkv=args.vit_qkv)
    found = opened.layout
    print(
        f"{opened.folder}: tp {found.tp}, pp {found.pp}, vpp {found.vpp}, "
        f"{'canonical' if found.canonical else 'fused'}, "
        f"llm_pp_layers {json.dumps(found.text_layers)}, vit_pp_layers {json.dumps(found.vision_layers)}"
    )
    if layout is None:
        convert.write_huggingface(out, opened, sizes.shapes, like, print)
    else:
        convert.write_megatron(out, opened, sizes, layout, print)
    return 0


def _layout(args: argparse.Namespace, depth: dict[str, int]):
    """The layout to write, or None for a Hugging Face folder."""
    from mindvl_jax.weights.mindspeed.layout import MegatronLayout, even_layout

    lists = (args.llm_pp_layers, args.vit_pp_layers)
    if not any((args.tp, args.pp, args.vpp, args.canonical, *lists)):
        return None
    numbers = {name: getattr(args, name) or 1 for name in ("tp", "pp", "vpp")}
    if wrong := [f"--{name} is {value}" for name, value in numbers.items() if value < 1]:
        raise UserError(f"{wrong[0]}, expected at least 1")
    options = dict(canonical=args.canonical, **({"vit_qkv": args.vit_qkv} if args.vit_qkv else {}))
    if not any(lists):
        return even_layout(numbers["tp"], numbers["pp"], numbers["vpp"], depth, **options)
    if not all(lists) or args.pp or args.vpp:
        raise UserError(
            "give --llm-pp-layers and --vit-pp-layers together, and without --pp and --vpp: the lists say these"
        )
    return MegatronLayout(
        numbers["tp"],
        _nested(args.vit_pp_layers, "--vit-pp-layers"),
        _nested(args.llm_pp_layers, "--llm-pp-layers"),
        **options,
    )


def _nested(text: str, option: str) -> tuple[tuple[int, ...], ...]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, list) and value and all(isinstance(count, int) for count in value):
        value = [value]
    if not (
        isinstance(value, list)
        and value
        and all(
            isinstance(stage, list) and stage and all(isinstance(n, int) and n >= 0 for n in stage) for stage in value
        )
    ):
        raise UserError(f"{option} {text}: expected a list of layers for each virtual stage, such as [[12,16]]")
    return tuple(tuple(stage) for stage in value)
