"""The pipeline's timeline in a plan: who works when, how long each stage is idle, as text and as a picture.

Times are in forward passes of a stage's layers. A backward pass recomputes its chunk, so it takes three: one forward,
and two for the gradients of inputs and weights. Where weight gradients are split off (ZB-H1), both halves recompute.
Exchanges take no time; embedding, tower, head and optimizer are not in it.
"""

from __future__ import annotations

from pathlib import Path

from mindvl_jax.config.schema import Config
from mindvl_jax.parallel.pipeline import schedule_of
from mindvl_jax.parallel.pipeline_schedules import Schedule, Timeline, bubble, simulate

WHOLE, SPLIT = {"F": 1.0, "B": 3.0}, {"F": 1.0, "B": 2.0, "W": 2.0}
COLOURS = {"F": "#4c78a8", "B": "#54a24b", "W": "#eeca3b"}
NAMES = {"F": "forward", "B": "backward", "W": "weight gradients"}


def micro_batches(config: Config, rows: int) -> int:
    """Micro-batches of a micro-step of so many rows."""
    mesh = config.mesh.filled
    return config.parallel.micro_batches or rows // (mesh.data * mesh.expert * mesh.fsdp)


def timeline_of(config: Config, rows: int) -> tuple[Schedule, Timeline]:
    """Schedule and simulated timeline of one micro-step of a phase with so many rows."""
    schedule = schedule_of(config.parallel, config.mesh.filled.stage, micro_batches(config, rows))
    return schedule, simulate(schedule, SPLIT if schedule.splits_weights else WHOLE)


def describe(schedule: Schedule, timeline: Timeline) -> str:
    """One line: idle share of the stages, by simulation and by formula.

    The formula of ZB-H1 holds for equal times alone, which recomputation rules out, so it is not said.
    """
    idle, said = max(timeline.idle), ""
    if not schedule.splits_weights:
        formula = bubble(schedule, WHOLE)
        said = f" (by formula {formula / (timeline.length - idle + formula):.0%})"
    return (
        f"{schedule.name} over {schedule.stages} stages, {schedule.micro_batches} micro-batches: "
        f"{idle / timeline.length:.0%} of a stage's time is idle{said}, a stage keeps {max(timeline.in_flight)} inputs"
    )


def draw(schedule: Schedule, timeline: Timeline, path: Path) -> None:
    """Write the timeline as a picture: a line for each stage, numbers are micro-batches."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(12, 0.6 * schedule.stages + 1.4), layout="constrained")
    axes = figure.add_subplot()
    shown = set()
    for stage, spans in enumerate(timeline.spans):
        for op, begin, end in spans:
            shown.add(op.kind)
            alpha = 1.0 if schedule.chunks == 1 else 0.45 + 0.55 * (op.chunk + 1) / schedule.chunks
            axes.broken_barh(
                [(begin, end - begin)], (stage - 0.4, 0.8), facecolor=COLOURS[op.kind], alpha=alpha, edgecolor="white"
            )
            if timeline.length <= 120:
                axes.text((begin + end) / 2, stage, str(op.micro_batch), ha="center", va="center", fontsize=7)
    axes.set_ylim(schedule.stages - 0.5, -0.5)
    axes.set_xlim(0, timeline.length)
    axes.set_yticks(range(schedule.stages), [f"stage {stage}" for stage in range(schedule.stages)])
    axes.set_xlabel("time, in forward passes of a stage")
    axes.set_title(describe(schedule, timeline), fontsize=9)
    axes.legend(handles=[Patch(color=COLOURS[kind], label=NAMES[kind]) for kind in "FBW" if kind in shown], ncols=3)
    figure.savefig(path, dpi=120)
