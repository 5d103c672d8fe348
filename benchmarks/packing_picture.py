"""Draw docs/packing.svg: the same waiting samples packed by first fit and by `plan_rows`.

python -m benchmarks.packing_picture docs/packing.svg
"""

from __future__ import annotations

import sys

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks.packing import document_like, in_order_first_fit, table
from mindvl_jax.data.packing.rows import plan_rows
from mindvl_jax.models.vision_language.collate import visual_budgets
from mindvl_jax.models.vision_language.work import LANGUAGE, PATCHES, TOKENS

ROWS, T = 8, 8192


def main(path: str) -> None:
    rng = np.random.default_rng(5)
    samples = [document_like(rng) for _ in range(256)]
    sizes, loads = table(samples)
    ratio = sizes[:, PATCHES].sum() / sizes[:, TOKENS].sum()
    budgets = visual_budgets(T, int(T * ratio * 1.03), 10**6, 10**6, 10**6)
    plans = {
        "first fit": in_order_first_fit(sizes, loads, budgets, ROWS),
        "best fit under both budgets, with even work": plan_rows(sizes, loads, budgets, ROWS),
    }
    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", width_ratios=(3, 1))
    colours = matplotlib.colormaps["tab20c"].colors
    for (name, plan), (bars, work) in zip(plans.items(), axes, strict=True):
        for row, members in enumerate(plan):
            for offset, column, cap in ((-0.2, TOKENS, budgets.tokens), (0.2, PATCHES, budgets.patches)):
                left = 0.0
                for index in members:
                    width = sizes[index, column] / cap
                    bars.barh(
                        row + offset,
                        width,
                        0.36,
                        left=left,
                        color=colours[index % 20],
                        edgecolor="white",
                        linewidth=0.4,
                        alpha=1.0 if column == TOKENS else 0.55,
                    )
                    left += width
        load = np.array([loads[members, LANGUAGE].sum() for members in plan])
        work.barh(range(ROWS), load / load.mean(), 0.7, color="#4a7aa5")
        work.axvline(1, color="#1d2733", linewidth=0.8)
        work.set_yticks([])
        bars.axvline(1, color="#1d2733", linewidth=0.8)
        bars.set_yticks(range(ROWS), [f"row {k}" for k in range(ROWS)], fontsize=7)
        bars.invert_yaxis()
        work.invert_yaxis()
        filled = np.mean([sizes[members, TOKENS].sum() / T for members in plan])
        bars.set_title(f"{name}: {filled:.1%} of the token places", fontsize=9, loc="left")
        work.set_title(f"work max/mean {load.max() / load.mean():.3f}", fontsize=9, loc="left")
        for each in (bars, work):
            each.spines[["top", "right"]].set_visible(False)
            each.tick_params(labelsize=7)
    axes[1, 0].set_xlabel(
        "share of the row's places; upper bar tokens, lower bar patches, one colour a sample", fontsize=8
    )
    axes[1, 1].set_xlabel("language work of the row", fontsize=8)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "packing"}):
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1])
