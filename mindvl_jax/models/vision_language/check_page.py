"""The findings of `mindvl data check` as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from PIL import Image

from mindvl_jax.core.templates import TEMPLATES
from mindvl_jax.data.media.image import load_image
from mindvl_jax.data.sample import Media, SampleError
from mindvl_jax.models.vision_language.check import SourceFindings

THUMBNAIL = 160


def write_page(path: str, findings: Sequence[SourceFindings], advice: Sequence[str], settings: dict[str, str]) -> None:
    """Write the page. Text of the data is escaped: it may hold anything."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).parent, TEMPLATES]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sources = [
        {
            "found": found,
            "skipped_count": sum(found.reasons.values()),
            "histograms": [
                ("tokens a sample", _histogram(found.tokens)),
                ("learned tokens a sample", _histogram(found.learned)),
                ("patches a sample", _histogram(found.patches)),
            ],
            "shown": [
                {
                    "id": sample.id,
                    "pictures": [_thumbnail(media) for media in sample.images[:4]],
                    "turns": sample.messages[:6],
                    "tokens": example.length,
                    "patches": example.patches,
                }
                for sample, example in found.shown
            ],
        }
        for found in findings
    ]
    page = environment.get_template("check_page.html").render(sources=sources, advice=advice, settings=settings)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page, encoding="utf-8")


def _histogram(values: Sequence[int]) -> str:
    """An SVG histogram, in logarithmic bins where the values span more than two decades."""
    if not values:
        return ""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state
    from matplotlib.ticker import MaxNLocator

    data = np.array(values)
    figure = Figure(figsize=(3.6, 1.9), layout="constrained")
    axes = figure.subplots()
    wide = data.max() > 100 * max(data[data > 0].min(initial=data.max()), 1)
    bins = (
        np.geomspace(max(data.min(), 1), data.max() + 1, 40) if wide else _whole_bins(int(data.min()), int(data.max()))
    )
    axes.hist(data, bins=bins, color="#4a7aa5")
    if wide:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color("#8a96a3")  # seen on light and on dark paper
    axes.tick_params(labelsize=7, color="#8a96a3")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True)
    text = file.getvalue()
    return text[text.index("<svg") :]


def _whole_bins(low: int, high: int) -> np.ndarray:
    """At most 40 bins of equal whole width around whole numbers."""
    width = max(1, -(-(high - low + 1) // 40))
    return np.arange(low, high + width + 1, width) - 0.5


def _thumbnail(media: Media) -> str | None:
    """A small image as a data address, or None when it does not decode."""
    try:
        picture = load_image(media)
    except SampleError:
        return None
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
