"""lmms-eval's own task code and ours on every sample of the eight stand-ins: prompts, per-sample scores and totals.

    python tests/evaluation/lmms_agreement.py [--rounds 12] [--out agreement.json] [--weights DIR]

Needs lmms-eval 0.7.3 (docs/evaluation.md says how to install it beside this project). Its published task files are
included unchanged; only the path of the data differs. Answers come from a list of ways to be right, nearly right and
wrong, so that every rule is exercised; in each round every sample gets another one. With --weights a model answers
through the plug-in instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclasses.dataclass(frozen=True)
class Published:
    """A published task: its file below lmms-eval's `tasks`, the name of the split it reads, our task, and its file's
    stem.
    """

    file: str
    split: str
    ours: str
    stem: str


TASKS = {
    "docvqa": Published("docvqa/docvqa_val.yaml", "validation", "docvqa_val", "docvqa_val"),
    "infovqa": Published("infovqa/infovqa_val.yaml", "validation", "infovqa_val", "infovqa_val"),
    "chartqa": Published("chartqa/chartqa.yaml", "test", "chartqa_test", "chartqa_test"),
    "ocrbench": Published("ocrbench/ocrbench.yaml", "test", "ocrbench", "ocrbench"),
    "ai2d": Published("ai2d/ai2d.yaml", "test", "ai2d_test", "ai2d_test"),
    "mmbench": Published("mmbench/mmbench_en_dev_static.yaml", "validation", "mmbench_dev_en", "mmbench_dev_en"),
    "mme": Published("mme/mme.yaml", "test", "mme", "mme"),
    "mmmu": Published("mmmu/mmmu_val.yaml", "validation", "mmmu_dev_val", "mmmu_val"),
}


def write_tasks(data: Path, folder: Path) -> None:
    """Task files that include the published ones and read the stand-ins of `data`."""
    import lmms_eval

    published = Path(lmms_eval.__file__).parent / "tasks"
    for name, task in TASKS.items():
        (folder / "data" / name).mkdir(parents=True)
        shutil.copy(data / f"{task.stem}.parquet", folder / "data" / name / f"{task.split}.parquet")
        (folder / f"{name}.yaml").write_text(
            f"include: {published / task.file}\ntask: standin_{name}\ntag: []\ntest_split: "
            f"{task.split}\ndataset_path: {folder / 'data' / name}\ndataset_name: null\n"
            "dataset_kwargs:\n  local_files_only: true\n"
        )


def ways(item, others: list[str], rng: random.Random) -> list[str]:
    """Answers to one item: right in several forms, nearly right, wrong, empty, and noise."""
    right = rng.choice(item.answers)
    options = item.extra.get("options")
    listed = list(options.values()) if isinstance(options, dict) else list(options or ())
    given = [
        right,
        f"The answer is {right}.",
        right.upper(),
        right.lower(),
        f" {right}. ",
        f"{right}\n",
        right[:-1],
        right + "s",
        rng.choice(others),
        "",
        "I do not know",
        f"{right} or {rng.choice(others)}",
    ]
    if right.replace(".", "", 1).isdigit():
        given += [f"{float(right) * factor:g}" for factor in (1.04, 0.96, 1.06, 1.0526)] + [
            f"{right}%",
            f"{right}.0",
            f"about {right} in all",
            f"x = {right}",
        ]
    if listed:
        letter = rng.choice("ABCD")
        given += [
            f"({right})",
            f"{right}.",
            f"{right}. {rng.choice(listed)}",
            rng.choice(listed),
            letter,
            f"({letter})",
            f"Answer: {letter}",
            f"A thing that is called {rng.choice(listed)} I think",
            f"{letter} because it is not {rng.choice('ABCD')}",
            f"the correct option is {letter}",
        ]
    if right in ("Yes", "No"):
        given += ["yes", "No, it is not", "Yes, there is", "y", "N", "Not at all", "Maybe yes", "YES.", "nope"]
    given.append("".join(rng.choice("aAbBcCdD 0123.,()%\n=") for _ in range(rng.randint(1, 24))))
    return given


def scripted_model(items: dict[str, list], turn: int):
    """An lmms-eval model that answers `standin_NAME` from `ways`, and notes the prompts that it was asked with."""
    from lmms_eval.api.model import lmms

    class Scripted(lmms):
        is_simple = True
        batch_size_per_gpu = 1

        def __init__(self):
            super().__init__()
            self.prompts: dict[tuple[str, int], str] = {}

        def generate_until(self, requests):
            answers = []
            for request in requests:
                context, _, _, number, task, _ = request.args
                self.prompts[task, number] = context
                own = items[task.removeprefix("standin_")]
                rng = random.Random(f"{task}/{number}/{turn}")
                chosen = ways(own[number], [answer for item in own for answer in item.answers], rng)
                answers.append(chosen[(number + turn) % len(chosen)])
            return answers

        def loglikelihood(self, requests):
            raise NotImplementedError("these tasks generate")

        def generate_until_multi_round(self, requests):
            raise NotImplementedError("these tasks have one round")

    return Scripted()


def their_score(name: str, sample: dict[str, Any]) -> float | None:
    """One sample's score as the task's own code gave it; None where that code scores whole questions only (MMBench)."""
    if name in ("docvqa", "infovqa"):
        return float(sample["anls"])
    if name == "chartqa":
        return float(sample["relaxed_overall"])
    if name == "ocrbench":
        return float(sample["ocrbench_accuracy"]["score"])
    if name == "ai2d":
        return float(sample["exact_match"])
    if name == "mme":
        return float((sample.get("mme_perception_score") or sample.get("mme_cognition_score"))["score"])
    if name == "mmmu":
        from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

        return evaluate_mmmu([sample["mmmu_acc"]])[1]["acc"]
    return None


def mmbench_questions(samples: list[dict[str, Any]]) -> dict[str, float]:
    """MMBench's own evaluator on each question's rotations: index of the question -> right or wrong."""
    import contextlib
    import io

    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    groups: dict[int, list[dict]] = {}
    for sample in samples:
        groups.setdefault(int(sample["gpt_eval_score"]["index"]) % 1_000_000, []).append(sample["gpt_eval_score"])
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a table at every call
        return {
            str(index): float(mmbench_evaluator.eval_result(rows, eval_method="static")[0])
            for index, rows in groups.items()
        }


def guesses(sample: dict[str, Any], item) -> bool:
    """Whether MMMU's published rule draws an option by chance: the one intended difference, where ours is wrong by
    definition.
    """
    from mindvl_jax.evaluation.choices import mmmu_option

    options = item.extra.get("options")
    return options is not None and mmmu_option(sample["resps"][0][0].strip(), options) == ""


def totals(name: str, results: dict[str, Any], summary: dict[str, Any], count: int) -> list[tuple[str, float, float]]:
    """(what, theirs, ours) of the totals that both report, on one scale."""

    def value(key):
        return float(next(results[full] for full in results if full.split(",")[0] == key))

    if name in ("docvqa", "infovqa"):
        return [("anls", value("anls"), summary["score"])]
    if name == "chartqa":
        parts = {category: entry["score"] for category, entry in summary["by_category"].items()}
        return [
            ("overall", value("relaxed_overall"), summary["score"]),
            ("human", value("relaxed_human_split"), parts["human"]),
            ("augmented", value("relaxed_augmented_split"), parts["augmented"]),
        ]
    if name == "ocrbench":
        return [
            ("accuracy", value("ocrbench_accuracy") * 1000 / count, summary["score"])
        ]  # theirs divides by the benchmark's 1,000
    if name == "ai2d":
        return [("accuracy", value("exact_match"), summary["score"])]
    if name == "mmbench":
        return [("circular accuracy", value("gpt_eval_score") / 100, summary["circular_accuracy"])]
    if name == "mme":
        return [
            ("perception", value("mme_perception_score"), summary["mme_perception"]),
            ("cognition", value("mme_cognition_score"), summary["mme_cognition"]),
        ]
    return []  # MMMU: theirs includes options drawn by chance


def compare(
    data: Path, scratch: Path, rounds: int, weights: str | None = None, only: list[str] | None = None
) -> dict[str, Any]:
    """Run both and return counts and every disagreement, by task (all of TASKS unless `only` names some)."""
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager
    from lmms_eval.tasks.ocrbench import utils as ocrbench

    from mindvl_jax.evaluation.benchmarks import BENCHMARKS, load_items
    from mindvl_jax.evaluation.evaluate import summarise

    write_tasks(data, scratch)
    manager = TaskManager(include_path=str(scratch), include_defaults=False)
    tasks = {name: TASKS[name] for name in only or TASKS}
    items = {name: load_items(task.ours, data) for name, task in tasks.items()}
    report: dict[str, Any] = {
        name: {"samples": len(items[name]), "compared": 0, "right": 0.0, "guessed_by_theirs": 0, "different": []}
        for name in tasks
    }
    for turn in range(1 if weights else rounds):
        if weights:
            from mindvl_jax.evaluation.lmms_plugin import MindVL

            model = MindVL(weights=weights)
            model.batch_size_per_gpu = 1
        else:
            model = scripted_model(items, turn)
        for name, task in tasks.items():
            ocrbench.OCRBench_score.update(
                dict.fromkeys(ocrbench.OCRBench_score, 0)
            )  # it adds up over calls in one process
            settings = argparse.Namespace(output_path=str(scratch / "out"), process_with_media=False, log_samples=True)
            result = evaluator.simple_evaluate(
                model=model,
                tasks=[f"standin_{name}"],
                task_manager=manager,
                batch_size=1,
                bootstrap_iters=0,
                log_samples=True,
                cli_args=settings,
            )
            samples = sorted(result["samples"][f"standin_{name}"], key=lambda sample: sample["doc_id"])
            benchmark, entry = BENCHMARKS[task.ours], report[name]
            answers = [sample["resps"][0][0] for sample in samples]
            ours = [
                benchmark.score(item, answer)[benchmark.metric]
                for item, answer in zip(items[name], answers, strict=True)
            ]

            def note(what, theirs, mine):
                return entry["different"].append({"round": turn, "what": what, "theirs": theirs, "ours": mine})

            for number, (sample, item, mine) in enumerate(zip(samples, items[name], ours)):
                if (
                    not weights
                    and (asked := item.messages[-1]["content"].replace("<image>", "", len(item.images)))
                    != model.prompts[f"standin_{name}", number]
                ):
                    note(f"prompt of {number}", model.prompts[f"standin_{name}", number], asked)
                theirs = their_score(name, sample)
                if theirs is None:
                    continue
                entry["compared"] += 1
                entry["right"] += theirs
                if name == "mmmu" and guesses(sample, item):
                    entry["guessed_by_theirs"] += 1
                    if mine != 0:
                        note(f"{number}: a guess must be wrong", theirs, mine)
                elif abs(theirs - mine) > 1e-9:  # both are the same fraction of whole numbers
                    note(f"{number}: {answers[number]!r} for {list(item.answers)}", theirs, mine)
            summary = summarise(benchmark, items[name], [{"prediction": answer} for answer in answers], None)
            if name == "mmbench":
                mine_by_question: dict[str, float] = {}
                for item, mine in zip(items[name], ours):
                    mine_by_question[item.extra["original"]] = min(
                        mine, mine_by_question.get(item.extra["original"], 1.0)
                    )
                singles = [
                    mmbench_questions([{**sample, "gpt_eval_score": {**sample["gpt_eval_score"], "index": 0}}])["0"]
                    for sample in samples
                ]
                for number, (theirs, mine) in enumerate(zip(singles, ours)):
                    entry["compared"] += 1
                    entry["right"] += theirs
                    if theirs != mine:
                        note(
                            f"{number}: {answers[number]!r} for {list(items[name][number].answers)} of "
                            f"{items[name][number].extra['options']}",
                            theirs,
                            mine,
                        )
                for index, theirs in mmbench_questions(samples).items():
                    if theirs != mine_by_question[index]:
                        note(f"question {index} over its rotations", theirs, mine_by_question[index])
            for what, theirs, mine in totals(name, result["results"][f"standin_{name}"], summary, len(samples)):
                if abs(theirs - mine) > 0.0051 * (
                    100 if name == "mme" else 0.02
                ):  # totals are printed to four decimals, MME's points to two
                    note(f"total {what}", theirs, mine)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", nargs="+", choices=list(TASKS), help="some of the tasks")
    parser.add_argument("--weights", help="a model's folder: it answers, through the plug-in")
    parser.add_argument("--data", type=Path, help="stand-ins that are already built; default: they are built anew")
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from examples.quickstart.standins.build import build

    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            build(Path(folder) / "standins")
        report = compare(
            options.data or Path(folder) / "standins",
            Path(folder) / "lmms",
            options.rounds,
            options.weights,
            options.only,
        )
    for name, entry in report.items():
        print(
            f"{name:9} {entry['samples']:3} samples, {entry['compared']:5} comparisons, mean "
            f"{entry['right'] / max(1, entry['compared']):.3f}, {len(entry['different'])} differ"
            + (f", {entry['guessed_by_theirs']} drawn by chance there" if entry["guessed_by_theirs"] else "")
        )
        for line in entry["different"][:8]:
            print("    ", line)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(entry["different"] for entry in report.values()))


if __name__ == "__main__":
    sys.exit(main())
