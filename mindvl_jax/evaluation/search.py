"""Resolution search: which smallest and largest image area answers best.

Small images gain from being enlarged, until enlarging blurs them; large ones cost tokens. Settings are compared on one
part of a task's samples and the winner is judged on the other part, which had no say.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Sequence

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from mindvl_jax.core.errors import UserError
from mindvl_jax.evaluation.items import Item
from mindvl_jax.evaluation.plots import PALETTE, STYLE
from mindvl_jax.evaluation.statistics import bootstrap_interval, paired_interval


@dataclasses.dataclass(frozen=True, order=True)
class Pixels:
    """A setting under test; None leaves the model's own limit."""

    min_pixels: int | None
    max_pixels: int | None

    def __str__(self) -> str:
        def show(value):
            return "own" if value is None else f"{value:,}"

        return f"min {show(self.min_pixels)}, max {show(self.max_pixels)}"


@dataclasses.dataclass(frozen=True)
class Trial:
    """Result of one setting: scores and prompt tokens per sample."""

    pixels: Pixels
    scores: tuple[float, ...]
    prompt_tokens: tuple[int, ...]

    @property
    def score(self) -> float:
        return float(np.mean(self.scores))

    @property
    def tokens(self) -> float:
        return float(np.mean(self.prompt_tokens))


def parse_grid(text: str, own: Pixels) -> list[Pixels]:
    """`min_pixels=784:3136,max_pixels=25088:100352` -> every combination that is a range, the model's own setting
    first.

    Raises:
      UserError: unknown names, values that are no areas, or no combination left.
    """
    values: dict[str, list[int | None]] = {"min_pixels": [None], "max_pixels": [None]}
    for part in text.split(","):
        name, _, listed = part.partition("=")
        if name.strip() not in values:
            raise UserError(
                f"--search {text!r}: {name.strip()!r} cannot be searched; expected min_pixels=A:B:... and "
                "max_pixels=A:B:..."
            )
        try:
            values[name.strip()] = [int(value) for value in listed.split(":")]
        except ValueError:
            raise UserError(
                f"--search {text!r}: {listed!r} is no list of areas in pixels such as 784:3136:12544"
            ) from None
        if min(values[name.strip()]) <= 0:
            raise UserError(f"--search {text!r}: areas are positive numbers of pixels")

    def low(pixels):
        return own.min_pixels if pixels.min_pixels is None else pixels.min_pixels

    def high(pixels):
        return own.max_pixels if pixels.max_pixels is None else pixels.max_pixels

    grid = [Pixels(*pair) for pair in itertools.product(values["min_pixels"], values["max_pixels"])]
    grid = [pixels for pixels in grid if low(pixels) <= high(pixels)]
    if not grid:
        raise UserError(
            f"--search {text!r}: in every combination min_pixels is larger than max_pixels (the model's own are {own})"
        )
    return [Pixels(None, None), *(pixels for pixels in grid if pixels != Pixels(None, None))]


def split_items(items: Sequence[Item], group: Callable[[Item], str]) -> tuple[list[Item], list[Item]]:
    """(validation, held out): halves by the hash of each sample's group, so that pairs stay together and new samples do
    not move old ones.

    Raises:
      UserError: a half is empty.
    """

    def first(item):
        return hashlib.sha256(group(item).encode()).digest()[0] < 128

    halves = [item for item in items if first(item)], [item for item in items if not first(item)]
    if not all(halves):
        raise UserError(
            f"{len(items)} samples are too few to be split into a part to search on and a part to judge on; give more"
        )
    return halves


def halving(
    grid: Sequence[Pixels],
    items: Sequence[Item],
    measure: Callable[[Pixels, Sequence[Item]], Trial],
    *,
    start: int = 32,
    on_round=None,
) -> list[Trial]:
    """Successive halving: all settings on a few samples, the better half on twice as many, and so on until all samples.

    The model's own setting (first of the grid) stays in to the end, as what a gain is measured against.

    Args:
      measure: scores a setting on samples; asked again for samples it has seen, it should answer from its cache.
      start: samples of the first round.

    Returns:
      The last trial of each setting: survivors on all samples, others on as many as they got; best first.
    """
    order = np.random.default_rng(0).permutation(len(items))
    alive, last, count = list(grid), {}, min(start, len(items))
    while True:
        part = [items[index] for index in order[:count]]
        for pixels in _largest_first(alive):
            last[pixels] = measure(pixels, part)
        if on_round:
            on_round([last[pixels] for pixels in alive])
        if count == len(items):
            return sorted(
                (last[pixels] for pixels in grid), key=lambda trial: (-len(trial.scores), -trial.score, trial.tokens)
            )
        # Equal scores: the cheaper setting lives on.
        ranked = sorted(alive, key=lambda pixels: (-last[pixels].score, last[pixels].tokens))
        kept = ranked[: max(2, (len(ranked) + 1) // 2)]
        alive = [grid[0], *(pixels for pixels in kept if pixels != grid[0])]
        count = min(2 * count, len(items)) if len(alive) > 2 else len(items)


def _largest_first(settings: Sequence[Pixels]) -> list[Pixels]:
    """Compile for the largest images first: their programs serve smaller ones too."""
    return sorted(settings, key=lambda pixels: (pixels.min_pixels or 0, pixels.max_pixels or 0), reverse=True)


def full_grid(
    grid: Sequence[Pixels], items: Sequence[Item], measure: Callable[[Pixels, Sequence[Item]], Trial], *, on_round=None
) -> list[Trial]:
    """Every setting on every sample; best first, the cheaper one of equals, and the earlier one of the grid where they
    cost the same.
    """
    measured = {pixels: measure(pixels, items) for pixels in _largest_first(grid)}
    trials = [measured[pixels] for pixels in grid]
    if on_round:
        on_round(trials)
    return sorted(trials, key=lambda trial: (-trial.score, trial.tokens))


def judge(own: Trial, best: Trial) -> dict:
    """The winner against the model's own setting on the same held-out samples, with the paired interval of the gain."""
    return {
        "own": round(own.score, 4),
        "best": round(best.score, 4),
        "gain": round(best.score - own.score, 4),
        "gain_ci95": [round(bound, 4) for bound in paired_interval(own.scores, best.scores)],
        "n": len(own.scores),
        "own_prompt_tokens": round(own.tokens, 1),
        "best_prompt_tokens": round(best.tokens, 1),
    }


def picture(trials: Sequence[Trial], own: Pixels, title: str) -> Figure:
    """Score against the searched area, and against cost in prompt tokens; bars are 95 % intervals."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        varied = "min_pixels" if len({trial.pixels.min_pixels for trial in trials}) > 1 else "max_pixels"
        other = "max_pixels" if varied == "min_pixels" else "min_pixels"

        def value(trial, name):
            return getattr(trial.pixels, name) if getattr(trial.pixels, name) is not None else getattr(own, name)

        for colour, level in zip(itertools.cycle(PALETTE), sorted({value(trial, other) for trial in trials})):
            line = sorted(
                (trial for trial in trials if value(trial, other) == level), key=lambda trial: value(trial, varied)
            )
            bounds = np.array([bootstrap_interval(trial.scores) for trial in line]).T
            scores = np.array([trial.score for trial in line])
            bars = np.abs(bounds - scores)
            label = f"{other} {level:,}"
            for axis, places in (
                (left, [value(trial, varied) for trial in line]),
                (right, [trial.tokens for trial in line]),
            ):
                axis.errorbar(
                    places,
                    scores,
                    yerr=bars,
                    color=colour,
                    marker="o",
                    markersize=4,
                    linewidth=1.4 if axis is left else 0,
                    elinewidth=0.9,
                    capsize=2,
                    label=label,
                )
        baseline = next((trial for trial in trials if trial.pixels == Pixels(None, None)), None)
        if baseline:
            for axis, place in ((left, value(baseline, varied)), (right, baseline.tokens)):
                axis.plot(
                    place,
                    baseline.score,
                    marker="s",
                    markersize=9,
                    markerfacecolor="none",
                    markeredgecolor="#1c2430",
                    linewidth=0,
                    label="model's own setting",
                )
        left.set_xscale("log", base=2)
        left.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda pixels, _: f"{round(pixels**0.5)}²"))
        left.set(title=title, xlabel=f"{varied} (side of the square of that area)", ylabel="score")
        right.set(title="against cost", xlabel="prompt tokens a sample")
        left.legend(loc="best")
        return figure
