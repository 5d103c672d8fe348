"""`mindvl export`: a run, or a vision tower and a language model, as a published folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from mindvl_jax.cli import common
from mindvl_jax.config.schema import ADAPTER_PARAMETERS, Config
from mindvl_jax.core.errors import UserError

EPILOG = common.examples(
    "mindvl export --run runs/mine --out exported --dtype bfloat16",
    "mindvl export --vision Qwen2.5-VL-3B-Instruct --language Qwen3-1.7B --out joined",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("what to export (either --run, or both --vision and --language)")
    source.add_argument(
        "--weights",
        "--run",
        dest="source",
        metavar="DIR",
        help="one of our runs or checkpoints, or a Hugging Face folder",
    )
    source.add_argument("--vision", metavar="DIR", help="Qwen2.5-VL folder whose vision tower is taken")
    source.add_argument(
        "--language",
        metavar="DIR",
        help="Qwen3 or Qwen2.5 folder whose language model is taken; the projector between them is new",
    )
    source.add_argument(
        "--positions",
        choices=("mrope", "1d"),
        default="mrope",
        help="how the assembled language model counts positions",
    )
    source.add_argument("--seed", type=int, default=0, help="of the new projector")
    source.add_argument(
        "--merge",
        action="store_true",
        help="of a run with adapters: fold them into the base, in float32, and write the whole model; without it "
        "the adapters alone are written, as a PEFT folder",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must be empty or absent")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the files; default: the base's, else as stored"
    )
    parser.add_argument("--shard-gigabytes", type=float, default=5.0, help="largest weight file")


def _export_adapter(out: Path, opened, layout, parameters) -> int:
    """Write the adapters of a run as a PEFT folder."""
    from mindvl_jax.core.params import matches_any
    from mindvl_jax.models.adapters import is_adapter
    from mindvl_jax.weights.adapters import write_adapter

    learned = sorted({glob for phase in opened.config.training.phases for glob in phase.train} - {ADAPTER_PARAMETERS})
    base = [path for path in parameters if not is_adapter(path) and matches_any(path, learned)]
    if base:
        raise UserError(
            f"the run trained {len(base)} base parameters too, such as {base[0]}, which an adapter folder "
            "cannot hold; export it with --merge"
        )
    write_adapter(out, opened.model_config, layout, parameters, base=opened.config.run.init_from)
    count = sum(value.size for path, value in parameters.items() if is_adapter(path))
    if opened.config.adapters.base == "nf4":
        print(
            "trained on a base in NF4: on the weights that it was made of answers differ a little; `--merge` keeps it"
        )
    print(
        f"{out}: {count:,} adapter parameters on {len(layout)} stacked layers (opened by PEFT and `mindvl "
        "generate --adapter`)"
    )
    return 0


def _merged(opened, layout, parameters):
    """Parameters of a run with its adapters folded in; says so where the base was in four bits."""
    from mindvl_jax.models.adapters import dequantized, merge

    if opened.config.adapters.base == "nf4":
        print(
            f"merging onto the base as {opened.folder} holds it, dequantised from NF4; not onto the weights that it "
            "was made of"
        )
        parameters = dequantized(parameters, opened.model_config.param_dtype)
    return merge(parameters, layout)


def _require_possible(args: argparse.Namespace, out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and is not an empty folder; nothing is overwritten, name another")
    if bool(args.source) == bool(args.vision or args.language) or bool(args.vision) != bool(args.language):
        raise UserError("give either --run, or both --vision and --language")
    if args.shard_gigabytes <= 0:
        raise UserError(f"--shard-gigabytes is {args.shard_gigabytes}, expected a positive number")


def run(args: argparse.Namespace) -> int:
    out = Path(args.out).expanduser()
    _require_possible(args, out)
    common.load_slow("mindvl_jax.weights.resolve")
    from mindvl_jax.weights.adapter_layout import layout_of
    from mindvl_jax.weights.card import base_dtype, base_of, keep_generation_settings, write_card
    from mindvl_jax.weights.companions import write_companions
    from mindvl_jax.weights.mapping import model_type
    from mindvl_jax.weights.resolve import open_companions, open_model
    from mindvl_jax.weights.save import save_parameters

    if args.source:
        with common.busy(f"reading {args.source}"):
            opened = open_model(args.source)
        config, parameters = opened.model_config, opened.parameters()
        adapters = opened.config.adapters if isinstance(opened.config, Config) else None
        if args.merge and adapters is None:
            raise UserError(
                f"--merge: {args.source} has no adapters; for a Hugging Face folder and a PEFT folder use "
                "`mindvl merge --base DIR --adapter DIR --out DIR`"
            )
        if adapters is not None:
            layout = layout_of(adapters, config)
            if not args.merge:
                return _export_adapter(out, opened, layout, parameters)
            parameters = _merged(opened, layout, parameters)
        tokenizer, pixels = opened.tokenizer, (opened.min_pixels, opened.max_pixels)
    else:
        from mindvl_jax.weights.assemble import assemble

        config, parameters = assemble(args.vision, args.language, mrope=args.positions == "mrope", seed=args.seed)
        tokenizer, pixels = open_companions(Path(args.language))[0], open_companions(Path(args.vision))[1]
    run_config = opened.config if args.source and isinstance(opened.config, Config) else None
    base = base_of(run_config) if run_config else None
    dtype = args.dtype or (base_dtype(base) if base else None)
    ids = dict(pad_token_id=tokenizer.pad_id, eos_token_id=tokenizer.eos_id) if tokenizer else {}
    with common.busy(f"writing {out}"):
        save_parameters(out, config, parameters, dtype=dtype, shard_bytes=int(args.shard_gigabytes * 1e9), **ids)
    write_companions(out, config, tokenizer, *pixels)
    count = sum(value.size for value in parameters.values())
    kind, described = model_type(config)
    reader = (
        "transformers and MindVL"
        if described.in_transformers
        else "MindVL only; transformers has no class for this pairing"
    )
    if base is not None:
        keep_generation_settings(out, base)
    stored = dtype or str(next(iter(parameters.values())).dtype)
    if run_config is not None:
        run, public = _run_of(opened.folder), described.in_transformers
        write_card(out, run_config, run, kind=kind, dtype=stored, in_transformers=public)
    why = f" like {base.name}; --dtype float32 keeps the masters" if base and not args.dtype else ""
    print(f"{out}: {count:,} parameters in {stored}{why}, model_type {kind} (opened by {reader})")
    print(f"next: mindvl parity --weights {out}" + (f"; vllm serve {out}" if described.in_transformers else ""))
    return 0


def _run_of(folder: Path) -> Path:
    """Folder of the run that a run or one of its checkpoints lies in."""
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder
