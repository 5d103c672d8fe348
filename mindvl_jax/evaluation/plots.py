"""Pictures of a run and of a search, as data URIs to put into a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

PALETTE = ("#2457a6", "#c0532c", "#1c7f4d", "#7a4fa3", "#b58a00", "#1f8a99", "#a3476b", "#5c6878")
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa5b1", "axes.labelcolor": "#5c6878",
         "xtick.color": "#5c6878", "ytick.color": "#5c6878", "axes.grid": True, "grid.color": "#e8ecf0", "axes.titlesize": 10, "axes.titleweight": "bold",
         "axes.titlelocation": "left", "legend.frameon": False, "legend.fontsize": 8}


def data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Centred running mean that ignores gaps; as long as the input."""
    values = np.asarray(values, np.float64)
    known = np.isfinite(values)
    kernel = np.ones(max(1, window))
    total = np.convolve(np.where(known, values, 0), kernel, "same")
    count = np.convolve(known.astype(float), kernel, "same")
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def training_curves(steps, phases: Sequence[str], series: dict[str, Sequence[float]], tasks: dict[str, Sequence[float]]) -> Figure:
    """Loss (and loss by task where known), gradient norm, learning rate, tokens a second over the steps; phases shaded.

    Args:
      steps: (n,) step numbers. phases: name of the phase of each step. series: (n,) values named loss, grad_norm, learning_rate,
        tokens_per_second; absent ones are left out. tasks: (n,) loss of each task, NaN where a step had none of it.
    """
    with matplotlib.rc_context(STYLE):
        return _training_curves(np.asarray(steps), list(phases), series, tasks)


def _training_curves(steps: np.ndarray, phases: list[str], series, tasks) -> Figure:
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(3, 2))
    window = max(1, len(steps) // 60)
    loss = figure.add_subplot(grid[0, :])
    values = np.asarray(series["loss"], np.float64)
    loss.plot(steps, values, color="#b9c7de", linewidth=0.7)
    loss.plot(steps, smooth(values, window), color=PALETTE[0], linewidth=1.8, label="loss")
    for colour, (name, task_values) in zip(PALETTE[1:], tasks.items()):
        loss.plot(steps, smooth(task_values, 2 * window), color=colour, linewidth=1.1, label=name)
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0 and finite.max() / finite.min() > 20:
        loss.set_yscale("log")
    loss.set(title="Loss", xlabel="step")
    if tasks:
        loss.legend(ncols=4, loc="upper right")
    small = [("learning_rate", "Learning rate"), ("grad_norm", "Gradient norm"), ("tokens_per_second", "Tokens a second")]
    axes = [loss]
    for column, (key, title) in enumerate((key, title) for key, title in small if key in series):
        axis = figure.add_subplot(grid[1, column])
        values = np.asarray(series[key], np.float64)
        axis.plot(steps, smooth(values, 1 if key == "learning_rate" else window), color=PALETTE[0], linewidth=1.3)
        if key == "grad_norm" and np.nanmin(np.where(values > 0, values, np.nan)) > 0:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set(title=title, xlabel="step")
        axes.append(axis)
    borders = [0] + [index for index in range(1, len(phases)) if phases[index] != phases[index - 1]] + [len(phases)]
    for axis in axes:
        for number, (start, end) in enumerate(zip(borders, borders[1:])):
            left, right = steps[start] - 0.5, steps[end - 1] + 0.5
            if number % 2:
                axis.axvspan(left, right, color="#f0f3f7", zorder=0, linewidth=0)
            if axis is loss:
                axis.text((left + right) / 2, 1.0, phases[start], transform=axis.get_xaxis_transform(), ha="center", va="bottom", fontsize=8, color="#5c6878")
        axis.margins(x=0.01)
    return figure
