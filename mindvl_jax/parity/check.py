"""A folder checked as a whole: every submodule, then the logits of packed samples; both models in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.models.outline import outline_of
from mindvl_jax.parity.probe import Part, compare_parts
from mindvl_jax.parity.reference import load_reference, to_numpy
from mindvl_jax.parity.samples import ParitySample, pack, random_sample, reference_inputs
from mindvl_jax.weights.load import load_parameters
from mindvl_jax.weights.mapping import read_config


@dataclasses.dataclass(frozen=True)
class LogitsOutcome:
    """difference and scale as `Part`; kl: mean over positions, in nats; top1, top5: share of positions with the same
    best
    token, and mean overlap of the five best.
    """

    difference: float
    scale: float
    kl: float
    top1: float
    top5: float
    places: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    folder: str
    parts: tuple[Part, ...]
    logits: LogitsOutcome
    tolerance: float

    @property
    def passed(self) -> bool:
        """Logits within the tolerance; parts only say where a difference arises."""
        return bool(self.logits.difference <= self.tolerance * self.logits.scale)  # False for NaN too

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"passed": self.passed}


def check(folder: Path, *, samples: int, text_tokens: int, seed: int = 0, tolerance: float = 1e-3) -> Outcome:
    """Load both models of a folder and compare them.

    Raises:
      WeightsError: as `load_parameters`, or a family without a reference.
    """
    config = read_config(folder)
    config = config.model_copy(update=dict(compute_dtype="float32", param_dtype="float32"))
    model = outline_of(config).merge(load_parameters(folder, config, dtype=jnp.float32))
    reference = load_reference(folder, torch.float32)
    made = parity_samples(config, samples, text_tokens, seed)
    with jax.default_matmul_precision("highest"):
        parts = compare_parts(model, reference, made[:2])
        logits = compare_logits(model, reference, made)
    return Outcome(str(folder), tuple(parts), logits, tolerance)


def parity_samples(config: ModelConfig, count: int, text_tokens: int, seed: int) -> list[ParitySample]:
    """Random samples: one image, several, a video with its own clock, text; in turn."""
    rng = np.random.default_rng(seed)
    head = max(1, text_tokens // 2)
    shapes = [
        (head, ("image", (1, 16, 20)), head),
        (head, ("image", (1, 4, 6)), 1, ("image", (1, 10, 26)), head),
        (head, ("video", (3, 8, 12), 1.5), head),
        (2 * head,),
    ]
    if hasattr(config, "vision") and config.vision.image_side is not None:
        side = config.vision.image_side // config.vision.patch_size
        tiles = min(3, config.vision.max_tiles)
        shapes = [
            (head, ("image", (1, side, side)), head),
            (head, ("image", (tiles, side, side)), 1, ("image", (1, side, side)), head),
            (2 * head,),
        ]
    if not hasattr(config, "vision"):
        shapes = [(text_tokens,), (1,), (3 * text_tokens,), (head,)]
    return [random_sample(config, rng, *shapes[number % len(shapes)]) for number in range(count)]


def compare_logits(model, reference, samples: Sequence[ParitySample]) -> LogitsOutcome:
    """All samples packed in one row of ours, against each alone in the reference."""
    tokens = sum(len(sample.tokens) for sample in samples)
    patches = sum(len(visual.pixels) for sample in samples for visual in sample.visuals)
    batch = jax.tree.map(jnp.asarray, pack([list(samples)], model.config, reference, tokens=tokens, patches=patches))
    graph, state = nnx.split(model, nnx.Param)

    @jax.jit
    def logits(state, batch):
        model = nnx.merge(graph, state)
        return model.logits(model(batch))

    ours = np.asarray(logits(state, batch))[0]
    with torch.no_grad():
        theirs = np.concatenate(
            [to_numpy(reference(**reference_inputs(sample, model.config)).logits[0]) for sample in samples]
        )

    def best(values, k):
        return np.argpartition(values, -k, -1)[:, -k:]

    overlap = [len(set(a) & set(b)) / 5 for a, b in zip(best(ours, 5), best(theirs, 5), strict=True)]
    return LogitsOutcome(
        difference=float(np.abs(ours - theirs).max()),
        scale=float(np.abs(theirs).max()),
        kl=mean_kl(ours, theirs),
        top1=float(np.mean(ours.argmax(-1) == theirs.argmax(-1))),
        top5=float(np.mean(overlap)),
        places=len(ours),
    )


def mean_kl(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean KL(theirs || ours) over positions, float64."""

    def log_softmax(x):
        x = x.astype(np.float64)
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(theirs), log_softmax(ours)
    return float(np.mean(np.sum(np.exp(p) * (p - q), -1)))


def table(outcome: Outcome):
    """A rich table: one line a kind of part, with the layer where it is worst."""
    from rich.table import Table

    shown = Table(title=f"parity of {outcome.folder} with transformers, float32")
    for title in ("part", "worst in layer", "max abs difference", "largest output", "relative"):
        shown.add_column(title, justify="left" if title == "part" else "right")
    kinds: dict[str, Part] = {}
    for part in outcome.parts:
        kind = " ".join(word for word in part.name.split() if not word.isdigit())
        kinds[kind] = max(kinds.get(kind, part), part, key=lambda p: p.difference)
    for kind, part in sorted(kinds.items()):
        shown.add_row(
            kind,
            "" if part.layer is None else str(part.layer),
            f"{part.difference:.2e}",
            f"{part.scale:.3g}",
            f"{part.difference / max(part.scale, 1e-30):.1e}",
        )
    return shown


def draw(outcome: Outcome, path: Path) -> None:
    """Relative error of each kind of part over layers, logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    series: dict[str, list[tuple[int, float]]] = {}
    for part in outcome.parts:
        if part.layer is not None:
            kind = " ".join(word for word in part.name.split() if not word.isdigit())
            series.setdefault(kind, []).append((part.layer, part.difference / max(part.scale, 1e-30)))
    figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for kind, points in sorted(series.items()):
        layers, errors = zip(*sorted(points))
        axis.plot(layers, np.maximum(errors, 1e-12), marker="o", markersize=3, linewidth=1.2, label=kind)
    axis.axhline(np.finfo(np.float32).eps, color="grey", linewidth=0.8, linestyle=":", label="float32 resolution")
    axis.set(
        yscale="log",
        xlabel="layer",
        ylabel="max abs difference / largest output",
        title=f"Error of each part on the reference's own input: {Path(outcome.folder).name}",
    )
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)
