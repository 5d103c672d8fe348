"""`mindvl evaluate`: score a model on benchmarks, on its own held-out tasks, or search the best image sizes for it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindvl_jax.cli import common
from mindvl_jax.cli.backend import add_backend_arguments, chosen_programs
from mindvl_jax.core.errors import UserError, at_least_one

if TYPE_CHECKING:
    from mindvl_jax.core.progress import LogConsole

EPILOG = common.examples(
    "mindvl evaluate --weights runs/mine",
    "mindvl evaluate --weights runs/mine Qwen2.5-VL-3B-Instruct --data benchmarks --tasks docvqa_val,mme "
    "--max-samples 200",
    "mindvl evaluate --weights runs/mine --tasks own=answers.csv:anls --columns question=text answer=label image=path",
    "mindvl evaluate --weights runs/mine --tasks own=answers.jsonl:my_metrics.py:score --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        required=True,
        nargs="+",
        metavar="DIR",
        help="one of our runs or checkpoints, or a Hugging Face folder; several are compared in one table",
    )
    parser.add_argument("--adapter", metavar="DIR", help="PEFT folder (LoRA, DoRA) to use on top of the weights")
    _task_arguments(parser)
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of results; default: evaluation/ in the weights' folder. Finished samples in it are not "
        "asked again",
    )
    parser.add_argument(
        "--max-samples", "--limit", dest="limit", type=int, metavar="N", help="only the first N samples of each task"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the results as JSON; everything else goes to standard error"
    )
    parser.add_argument("--batch", type=int, default=16, help="answers that decode together")
    parser.add_argument("--mesh", metavar="AXES", help="devices, such as data=2,tensor=4; default: one")
    add_backend_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, help="longest answer; default: each benchmark's own")
    parser.add_argument(
        "--min-pixels", type=int, help="smallest image area after resizing; default: the model's own setting"
    )
    parser.add_argument("--max-pixels", type=int, help="largest image area after resizing")
    parser.add_argument(
        "--no-language-only", action="store_true", help="leave out the baseline with the images taken away"
    )
    _search_arguments(parser)


def _task_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks",
        metavar="NAMES",
        help="comma list: benchmarks (docvqa_val, chartqa_test, ...) found in --data, or NAME=FILE[:METRIC] of "
        "one's own samples in any format "
        "that training reads; METRIC is exact_match (default), exact_match_any_case, contains, anls, "
        "relaxed_accuracy, vqa_accuracy, yes_no, or FILE.py:FUNCTION, "
        "which is called with (prediction, answers); default: the run's own tasks",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="NAME=COLUMN",
        help="columns of one's own files, such as question=text answer=label image=path",
    )
    parser.add_argument(
        "--media-root",
        metavar="DIR",
        help="folder that media paths of one's own files start from; default: the folder of the file",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        default=".",
        help="folder with the benchmarks' files (VLMEvalKit .tsv or lmms-eval .parquet)",
    )
    parser.add_argument(
        "--prompts",
        choices=("published", "question"),
        default="published",
        help="how a benchmark asks: with its published instruction, or the question and its options "
        "alone, for a model whose vocabulary lacks the instruction's words",
    )


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    search = parser.add_argument_group("resolution search")
    search.add_argument(
        "--search",
        metavar="GRID",
        help="for example min_pixels=784:3136:12544,max_pixels=50176:200704; chosen on one half of each task, "
        "judged on the other",
    )
    search.add_argument("--method", choices=("halving", "grid"), default="halving")
    search.add_argument(
        "--no-save",
        action="store_true",
        help="do not write the best setting into the weights' folder, where generate and evaluate find it",
    )


def run(args: argparse.Namespace) -> int:
    from mindvl_jax.core.progress import LogConsole
    from mindvl_jax.evaluation.tables import leaderboard, results_table

    at_least_one(args, "batch", "limit", "max_new_tokens", "min_pixels", "max_pixels")
    if len(set(args.weights)) < len(args.weights):
        raise UserError("--weights names a model twice")
    if args.search and (len(args.weights) > 1 or args.json):
        raise UserError("--search is for one model at a time, and has no --json: it writes search.json")
    common.load_slow("mindvl_jax.inference", "mindvl_jax.evaluation.evaluate")
    programs = chosen_programs(args)
    wanted = named_tasks(args)  # before the weights are opened: a typo should not cost minutes
    console = LogConsole(stderr=args.json, stamp=False, highlight=False)
    if args.search:
        from mindvl_jax.cli.pixel_search import PixelSearch

        return PixelSearch(args, console, _Scored(args, args.weights[0], wanted, programs, console)).run()
    models = {}
    for name in args.weights:
        if len(args.weights) > 1:
            console.print(name, style="bold", markup=False)
        models[name] = _Scored(args, name, wanted, programs, console).score()
        if not args.json:
            console.print(results_table(models[name], name))
    if len(models) > 1:
        console.print(leaderboard(models))
    if args.json:
        print(json.dumps(models, indent=2, ensure_ascii=False))
    return 0


class _Scored:
    """One model with its tasks and its folder of results."""

    def __init__(self, args: argparse.Namespace, name: str, wanted: list | None, programs: Any, console: LogConsole):
        from mindvl_jax.checkpoints.names import EMA, named_folder, run_folder, variant
        from mindvl_jax.core.progress import working
        from mindvl_jax.evaluation.evaluate import weights_identity
        from mindvl_jax.inference import Generator
        from mindvl_jax.inference.loading import open_for_inference

        self.args, self.console = args, console
        with working(console, f"reading {name}"):
            self.opened = open_for_inference(name, mesh=args.mesh, adapter=args.adapter)
        tasks = wanted if wanted is not None else _own_tasks(self.opened)
        self.tasks = [(task, benchmark, items[: args.limit]) for task, benchmark, items in tasks]
        self.folder, ema = named_folder(name)
        # Results of the best checkpoint stay in the run: checkpoints come and go.
        self.out = (run_folder(name) if variant(name) else self.folder) / f"evaluation{variant(name)}"
        if args.out:
            self.out = (
                Path(args.out) / name.strip("/").replace("/", "-").replace(":", "-")
                if len(args.weights) > 1
                else Path(args.out)
            )
        self.generator = Generator(self.opened, slots=args.batch, programs=programs)
        # Answers of another adapter are not this model's.
        self.weights = (
            weights_identity(self.folder) + EMA * ema + (f"+{weights_identity(args.adapter)}" if args.adapter else "")
        )

    def settings(self, benchmark: Any) -> Any:
        """Return the settings in force for a task."""
        from mindvl_jax.evaluation.evaluate import Settings

        args, opened = self.args, self.opened
        return Settings(
            max_new_tokens=args.max_new_tokens or benchmark.max_new_tokens,
            min_pixels=args.min_pixels or opened.min_pixels,
            max_pixels=args.max_pixels or opened.max_pixels,
            prompts=args.prompts,
        )

    def score(self) -> dict[str, dict]:
        """Score every task and write its files; return the results of these tasks."""
        from mindvl_jax.core.files import write_json
        from mindvl_jax.core.progress import counting
        from mindvl_jax.evaluation.browse import write_index, write_task_page
        from mindvl_jax.evaluation.evaluate import evaluate_task

        results = {}
        for name, benchmark, items in self.tasks:
            with counting(self.console, first="programs that are new are compiled") as show:
                result, rows, blind = evaluate_task(
                    self.generator,
                    name,
                    benchmark,
                    items,
                    self.out,
                    weights=self.weights,
                    settings=self.settings(benchmark),
                    language_only=not self.args.no_language_only,
                    on_progress=show,
                )
            write_task_page(self.out, name, benchmark, items, rows, blind, result)
            reused = result.pop("reused")
            results[name] = result
            self.console.print(
                _summary_line(name, result) + (f"; {reused} of {len(items)} answers reused" if reused else ""),
                soft_wrap=True,
                markup=False,
            )
        merged, others = merge(self.out / "scores.json", results, self.weights)
        if len(results) > 1:
            self.console.print(
                f"mean of {len(results)} tasks: "
                f"{sum(result['score'] for result in results.values()) / len(results):.4f}"
            )
        write_json(self.out / "scores.json", merged)
        if others:
            self.console.print(
                f"left out of scores.json: {', '.join(others)}, scored with other weights", markup=False, soft_wrap=True
            )
        self.console.print(
            f"predictions and scores: {self.out}, page: {write_index(self.out, merged)}", soft_wrap=True, markup=False
        )
        refresh_report(self.out.parent)
        return results


def refresh_report(run_dir: Path) -> None:
    """Write a run's report again, if it has one, so that it links to the pages beside it."""
    if (run_dir / "report.html").is_file() and (run_dir / "metrics.jsonl").is_file():
        from mindvl_jax.evaluation.report import write_report

        write_report(run_dir)


def merge(path: Path, results: dict[str, dict], weights: str) -> tuple[dict[str, dict], list[str]]:
    """Return (results with those of other tasks that the file holds for the same weights, names of tasks of other
    weights).
    """
    from mindvl_jax.core.files import read_json

    try:
        known = read_json(path, {})
    except ValueError:
        known = None
    if not isinstance(known, dict):  # what was scored now must not be lost with it
        path.replace(path.with_name(path.name + ".damaged"))
        print(f"{path} is damaged; it was moved to {path.name}.damaged", file=sys.stderr)
        known = {}
    same = {
        name: result for name, result in known.items() if isinstance(result, dict) and result.get("weights") == weights
    }
    return {**same, **results}, [name for name in known if name not in same and name not in results]


def _summary_line(name: str, result: dict) -> str:
    blind = "" if result.get("language_only") is None else f", language only {result['language_only']:.3f}"
    errors = f", {result['errors']} unreadable" if result["errors"] else ""
    low, high = result["ci95"]
    further = "".join(
        f", {key.replace('_', ' ')} {result[key]}"
        for key in ("relaxed_accuracy_swapped", "circular_accuracy", "mme_points")
        if key in result
    )
    standin = " (stand-in)" if result["title"].endswith("(stand-in)") else ""
    return (
        f"{name}{standin}: {result['metric'].replace('_', ' ')} {result['score']:.3f} (95 % interval {low:.3f} "
        f"to {high:.3f}, n {result['n']}){blind}{further}{errors}"
    )


def named_tasks(args):
    if args.tasks is None:
        return None
    from mindvl_jax.evaluation.benchmarks import find_benchmark, open_task, question_alone

    folder = Path(args.data)
    if not folder.is_dir():
        raise UserError(f"--data {folder}: no such folder")
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks is empty")
    for name in names:
        if "=" not in name:
            find_benchmark(name)
    shorten = question_alone if getattr(args, "prompts", None) == "question" else lambda item: item

    def published(name):
        benchmark, items = open_task(name, folder)
        return name, benchmark, [shorten(item) for item in items]

    return [_samples_task(args, name) if "=" in name else published(name) for name in names]


def _samples_task(args: argparse.Namespace, text: str):
    from mindvl_jax.config.schema import SourceConfig
    from mindvl_jax.evaluation.metrics import parse_task

    name, path, metric = parse_task(text)
    columns = common.columns_of(args)
    return _own_task(
        name, SourceConfig(path=path, media_root=getattr(args, "media_root", None), columns=columns), None, 32, metric
    )


def _own_tasks(opened) -> list:
    tasks = getattr(getattr(opened.config, "evaluation", None), "tasks", ())
    if not tasks:
        raise UserError("these weights bring no held-out tasks of their own; name some with --tasks (and --data)")
    return [_own_task(task.name, task.source, task.max_samples, task.max_new_tokens, task.metric) for task in tasks]


def _own_task(name: str, source, most: int | None, max_new_tokens: int, metric: str):
    from mindvl_jax.evaluation.benchmarks import Benchmark
    from mindvl_jax.evaluation.metrics import rule_of
    from mindvl_jax.evaluation.run import sample_items

    main, rule = rule_of(metric)
    benchmark = Benchmark(name, main, (), (), read=None, rule=rule, max_new_tokens=max_new_tokens)
    return name, benchmark, sample_items(name, source, most)
