"""`mindvl average`: one model out of several checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from mindvl_jax.cli import common
from mindvl_jax.core.errors import UserError

EPILOG = common.examples(
    "mindvl average --weights runs/short runs/long --out runs/average",
    "mindvl average --weights runs/mine:all --method ema --out runs/mine-ema",
    "mindvl average --weights runs/a runs/b --method soup --tasks docvqa_val --data benchmarks --out runs/soup",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        nargs="+",
        required=True,
        metavar="DIR",
        help="runs, checkpoints or Hugging Face folders, in order of training for ema; RUN:all is every "
        "checkpoint of a run, RUN:ema its moving average",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="Hugging Face folder to write; must be empty or absent"
    )
    parser.add_argument(
        "--method",
        choices=("uniform", "weighted", "ema", "soup"),
        default="uniform",
        help="uniform mean; weighted mean (--by); exponential moving average (--decay); soup keeps only what "
        "helps on --tasks",
    )
    parser.add_argument("--by", nargs="+", type=float, metavar="W", help="weight of each model, normalised")
    parser.add_argument("--decay", type=float, default=0.9, help="of the moving average")
    parser.add_argument("--tasks", metavar="NAMES", help="validation tasks of the soup, as in `mindvl evaluate`")
    parser.add_argument("--data", metavar="DIR", default=".", help="folder with the benchmarks' files")
    parser.add_argument(
        "--max-samples",
        "--limit",
        dest="limit",
        type=int,
        metavar="N",
        help="only the first N samples of each validation task",
    )
    parser.add_argument("--batch", type=int, default=16, help="answers that decode together while scoring")
    parser.add_argument("--mesh", metavar="AXES", help="devices, such as fsdp=8; default: one")


def run(args: argparse.Namespace) -> int:
    common.load_slow("mindvl_jax.weights", "mindvl_jax.inference.loading")
    from mindvl_jax.inference.loading import parse_mesh
    from mindvl_jax.weights import average, open_model, save_parameters
    from mindvl_jax.weights.companions import write_companions

    out = Path(args.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and is not an empty folder; nothing is overwritten, name another")
    names = list(average.expand(args.weights))
    if len(names) < 2:
        raise UserError(f"{len(names)} model: an average needs two at least (RUN:all takes every checkpoint of a run)")
    if (args.method == "weighted") != (args.by is not None):
        raise UserError("--method weighted and --by belong together: one weight for each model")
    if (args.method == "soup") != (args.tasks is not None):
        raise UserError("--method soup and --tasks belong together: the soup keeps what helps on them")
    mesh = parse_mesh(args.mesh) if args.mesh else None
    with common.busy(f"reading {names[0]}"):
        first = open_model(names[0], mesh=mesh)

    def load(name):
        if name == names[0]:
            return first.parameters()
        with common.busy(f"reading {name} ({names.index(name) + 1} of {len(names)})"):
            return open_model(name, mesh=mesh).parameters()

    if args.method == "soup":
        parameters, steps = average.greedy_soup(names, load, _scorer(args, first))
        for step in steps:
            print(
                f"{step['model']}: alone {step['alone']:.4f}, soup with it {step['with']:.4f}: "
                f"{'kept' if step['kept'] else 'left out'}"
            )
        recipe = {"method": "soup", "steps": steps}
    else:
        weights = {
            "uniform": [1.0] * len(names),
            "weighted": args.by,
            "ema": average.ema_weights(len(names), args.decay),
        }[args.method]
        with common.busy(f"averaging {len(names)} models"):
            parameters = average.weighted(names, load, weights)
        recipe = {
            "method": args.method,
            "models": [
                {"model": name, "weight": round(weight / sum(weights), 6)}
                for name, weight in zip(names, weights, strict=True)
            ],
        }
    tokenizer = first.tokenizer
    ids = dict(pad_token_id=tokenizer.pad_id, eos_token_id=tokenizer.eos_id) if tokenizer else {}
    with common.busy(f"writing {out}"):
        save_parameters(out, first.model_config, parameters, **ids)
    write_companions(out, first.model_config, tokenizer, first.min_pixels, first.max_pixels)
    (out / "average.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    print(f"{out}: {args.method} average of {len(names)} models (recipe in average.json)")
    return 0


def _scorer(args: argparse.Namespace, opened):
    """Mean of the validation tasks' main scores, for parameters of `opened`'s architecture."""
    from mindvl_jax.cli.evaluate import named_tasks
    from mindvl_jax.evaluation.evaluate import summarise
    from mindvl_jax.inference import Generator, Sampling
    from mindvl_jax.models.outline import outline_of

    if opened.tokenizer is None:
        raise UserError(
            f"{args.weights[0]} has no tokenizer.json, so a soup cannot be scored; save the tokenizer beside "
            "the weights"
        )
    tasks = [(benchmark, items[: args.limit]) for _, benchmark, items in named_tasks(args)]

    def score(parameters, label: str) -> float:
        model = outline_of(opened.model_config).merge(parameters)
        generator = Generator(dataclasses.replace(opened, model=model), slots=args.batch)
        scores = []
        for benchmark, items in tasks:
            sampling = Sampling(max_new_tokens=benchmark.max_new_tokens)
            answers = generator.generate([item.request(sampling) for item in items], skip_errors=True)
            scores.append(
                summarise(benchmark, items, [{"prediction": answer.text} for answer in answers], None)["score"]
            )
        mean = sum(scores) / len(scores)
        print(f"  {label}: {mean:.4f}")
        return mean

    return score
