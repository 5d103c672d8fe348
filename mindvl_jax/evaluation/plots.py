"""Images of a run and of a search, as data URIs to put into a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

PALETTE = ("#2457a6", "#c0532c", "#1c7f4d", "#7a4fa3", "#b58a00", "#1f8a99", "#a3476b", "#5c6878")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": "#5c6878",
    "xtick.color": "#5c6878",
    "ytick.color": "#5c6878",
    "axes.grid": True,
    "grid.color": "#e8ecf0",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8,
}


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
