"""`mindvl evaluate --search`: find the image sizes that score best on half of each task, judge them on the rest."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mindvl_jax.checkpoints.names import named_folder
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import write_json
from mindvl_jax.core.progress import LogConsole, counting
from mindvl_jax.evaluation import search
from mindvl_jax.evaluation.benchmarks import Benchmark
from mindvl_jax.evaluation.browse import write_index
from mindvl_jax.evaluation.evaluate import Predictions, predict
from mindvl_jax.evaluation.items import Item
from mindvl_jax.inference.loading import SETTINGS

OWN = search.Pixels(None, None)  # the model's own setting


class PixelSearch:
    """A search over the tasks of one model (`cli.evaluate`'s, with its generator and settings)."""

    def __init__(self, args: argparse.Namespace, console: LogConsole, model: Any):
        if args.min_pixels or args.max_pixels:
            raise UserError("--search tries image sizes itself; leave out --min-pixels and --max-pixels")
        self.args, self.console, self.model, self.out = args, console, model, model.out
        self.own = search.Pixels(model.opened.min_pixels, model.opened.max_pixels)
        self.grid = search.parse_grid(args.search, self.own)
        self.method = search.halving if args.method == "halving" else search.full_grid
        self.found: dict[str, Any] = {}
        self.figures: list = []
        self.results: dict[str, Any] = {}
        self.totals: dict[search.Pixels, list[float | None]] = {}

    def run(self) -> int:
        for name, benchmark, items in self.model.tasks:
            self._task(name, benchmark, items)
            write_json(self.out / "search.json", self.found)  # what is found outlives a search that is stopped
        chosen = self._best_over_all()
        page = write_index(
            self.out,
            self.results,
            self.figures,
            [f"Scores of the best image sizes on the halves that the search did not see. Over all tasks: {chosen}."],
            name="search",
        )
        self.console.print(
            f"over all tasks: {chosen}; search: {self.out / 'search.json'}, page: {page}", soft_wrap=True
        )
        if not self.args.no_save:
            self._save(chosen)
        return 0

    def _measure(self, name: str, benchmark: Benchmark, pixels: search.Pixels, part: Sequence[Item]) -> search.Trial:
        own = self.model.settings(benchmark)
        chosen = dataclasses.replace(
            own, min_pixels=pixels.min_pixels or own.min_pixels, max_pixels=pixels.max_pixels or own.max_pixels
        )
        path = self.out / "search" / f"{name}.jsonl"
        with (
            counting(self.console) as show,
            Predictions(path, chosen.fingerprint(self.model.weights)) as predictions,
        ):
            rows = predict(
                self.model.generator,
                part,
                chosen,
                predictions,
                language_only=False,
                on_progress=lambda done: show(done, len(part), f"{name}, {pixels}"),
            )
        scores = tuple(
            benchmark.score(item, row["prediction"])[benchmark.metric] for item, row in zip(part, rows, strict=True)
        )
        return search.Trial(pixels, scores, tuple(row["prompt_tokens"] for row in rows))

    def _task(self, name: str, benchmark: Benchmark, items: Sequence[Item]) -> None:
        validation, held_out = search.split_items(items, benchmark.group)

        def measure(pixels: search.Pixels, part: Sequence[Item]) -> search.Trial:
            return self._measure(name, benchmark, pixels, part)

        def tell(trials: Sequence[search.Trial]) -> None:
            best = max(trials, key=lambda trial: trial.score)
            self.console.print(
                f"  {name}: {len(trials)} settings on {len(best.scores)} samples, best so far "
                f"{best.score:.3f} ({best.pixels})",
                soft_wrap=True,
            )

        trials = self.method(self.grid, validation, measure, on_round=tell)
        best = trials[0].pixels
        best_trial = measure(best, held_out)
        judged = search.judge(measure(OWN, held_out), best_trial)
        for trial in trials:
            whole = len(trial.scores) == len(validation)
            self.totals.setdefault(trial.pixels, []).append(trial.score if whole else None)
        self.found[name] = {
            "best": dataclasses.asdict(best),
            "held_out": judged,
            "trials": [_trial_record(trial) for trial in trials],
        }
        self.figures.append((name, search.picture(trials, self.own, benchmark.title)))
        self.console.print(
            f"{name}: best {best}: held out {judged['own']:.3f} -> {judged['best']:.3f}, gain {judged['gain']:+.3f} "
            f"(95 % interval {judged['gain_ci95'][0]:+.3f} to {judged['gain_ci95'][1]:+.3f}, n "
            f"{judged['n']}), prompt tokens {judged['own_prompt_tokens']} -> {judged['best_prompt_tokens']}",
            soft_wrap=True,
        )
        self.results[name] = {
            "title": benchmark.title,
            "metric": benchmark.metric,
            "score": judged["best"],
            "ci95": list(search.bootstrap_interval(best_trial.scores)),
            "n": judged["n"],
            "errors": 0,
            "settings": dataclasses.asdict(best),
            "search_gain": judged["gain"],
        }

    def _best_over_all(self) -> search.Pixels:
        """Return the setting with the best mean among those measured on all tasks. Ties keep the model's own."""
        whole = {
            pixels: float(np.mean(scores))
            for pixels, scores in self.totals.items()
            if len(scores) == len(self.model.tasks) and None not in scores
        }
        chosen = max(whole, key=lambda pixels: (whole[pixels], pixels == OWN))
        self.found["all"] = {
            "best": dataclasses.asdict(chosen),
            "mean_validation_score": round(whole[chosen], 4),
        }
        write_json(self.out / "search.json", self.found)
        return chosen

    def _save(self, chosen: search.Pixels) -> None:
        if chosen == OWN:
            self.console.print("the model's own setting is the best; nothing to save")
            return
        settings_file = named_folder(self.args.weights[0])[0] / SETTINGS
        low = self.own.min_pixels if chosen.min_pixels is None else chosen.min_pixels
        high = self.own.max_pixels if chosen.max_pixels is None else chosen.max_pixels
        write_json(settings_file, {"min_pixels": low, "max_pixels": high})
        self.console.print(f"saved in {settings_file}: generate and evaluate use it from now on")


def _trial_record(trial: search.Trial) -> dict[str, Any]:
    return {
        **dataclasses.asdict(trial.pixels),
        "score": round(trial.score, 4),
        "prompt_tokens": round(trial.tokens, 1),
        "n": len(trial.scores),
    }
