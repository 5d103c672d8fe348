"""Judge generated digits with a classifier trained on other handwriting, and show them in the run's report.

    python -m examples.digits_flow.judge --run runs/digits-flow

The judge is a small network trained on 5,000 digits of another collection than the generator saw. It reads 1,000
generated digits (100 of each) and, as its ceiling, the 1,000 real ones that were held out. The floor is a run on `build
--shuffle-labels`: labels that say nothing.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from examples.quickstart import assets
from mindvl_jax.checkpoints.checkpoint import load_params
from mindvl_jax.core.files import write_json
from mindvl_jax.evaluation.report import write_report
from mindvl_jax.evaluation.statistics import bootstrap_interval
from mindvl_jax.inference.diffusion.images import generate, grid
from mindvl_jax.models.outline import outline_of

WIDTHS = (400, 512, 256, 10)
STEPS, BATCH, SHIFT = 1500, 128, 2
EACH = 100  # generated digits of each class


def logits(params: list[tuple[jax.Array, jax.Array]], pixels: jax.Array) -> jax.Array:
    """(n, 20, 20) pixels 0 .. 255 -> (n, 10)."""
    x = pixels.reshape(len(pixels), -1).astype(jnp.float32) / 127.5 - 1
    for weight, bias in params[:-1]:
        x = jax.nn.gelu(x @ weight + bias)
    return x @ params[-1][0] + params[-1][1]


def shifted(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Every digit moved by up to SHIFT pixels each way."""
    moved = np.zeros_like(pixels)
    for image, source, (down, right) in zip(
        moved, pixels, rng.integers(-SHIFT, SHIFT + 1, (len(pixels), 2)), strict=True
    ):
        image[...] = np.roll(source, (down, right), (0, 1))
    return moved


def train_judge(pixels: np.ndarray, labels: np.ndarray, seed: int = 0) -> list[tuple[jax.Array, jax.Array]]:
    """Parameters of a classifier of (n, 20, 20) digits."""
    rng = np.random.default_rng(seed)
    params = [
        (jnp.asarray(rng.normal(size=(a, b)) / a**0.5, jnp.float32), jnp.zeros(b))
        for a, b in itertools.pairwise(WIDTHS)
    ]
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-3, STEPS), weight_decay=0.05)

    @jax.jit
    def step(params, state, pixels, labels):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(logits(params, pixels), labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(STEPS):
        chosen = rng.integers(0, len(pixels), BATCH)
        params, state = step(params, state, shifted(rng, pixels[chosen]), labels[chosen])
    return params


def read(params: list[tuple[jax.Array, jax.Array]], pixels: np.ndarray) -> np.ndarray:
    """(n,) digits that the judge sees."""
    return np.asarray(jax.jit(logits)(params, pixels)).argmax(-1)


def nearest(pixels: np.ndarray, others: np.ndarray) -> float:
    """Median distance of an image to the nearest of the others, root mean square of pixels 0 .. 255."""
    flat, known = (x.reshape(len(x), -1).astype(np.float32) for x in (pixels, others))
    squares = (flat**2).sum(1)[:, None] + (known**2).sum(1)[None] - 2 * flat @ known.T
    return float(np.median(np.sqrt(np.maximum(squares.min(1), 0) / flat.shape[1])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/digits-flow"))
    parser.add_argument("--steps", type=int, default=15, help="Euler steps (default: %(default)s)")
    parser.add_argument(
        "--guidance", type=float, default=3.0, help="classifier-free guidance; 1 is none (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config, params = load_params(args.run, ema=config_keeps_average(args.run))
    model = outline_of(config.model).merge(params)
    labels = np.repeat(np.arange(10), EACH)
    made = generate(
        model,
        labels.tolist(),
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        shift=config.training.flow_matching.shift,
    )[..., 0]
    known, answers = assets.digit_cells("train")
    more, more_labels = assets.digit_cells("train", more=True)
    judge = train_judge(more[len(known) :], more_labels[len(answers) :])
    real, real_labels = assets.digit_cells("test")
    found = {"generated digits": read(judge, made) == labels, "real digits, held out": read(judge, real) == real_labels}
    tasks = {
        name: {
            "metric": "exact_match",
            "score": float(right.mean()),
            "ci95": list(bootstrap_interval(right.astype(float))),
            "n": len(right),
            "by_phase": {},
        }
        for name, right in found.items()
    }
    write_json(args.run / "scores.json", {"tasks": tasks})
    (args.run / "images").mkdir(exist_ok=True)
    columns = [digit * EACH + number for digit in range(10) for number in range(20)]
    Image.fromarray(grid(made[columns][..., None], 20)[..., 0]).resize((840, 420), Image.Resampling.NEAREST).save(
        args.run / "images" / "generated digits.png"
    )
    page = write_report(args.run)
    for name, task in tasks.items():
        low, high = task["ci95"]
        print(f"{name}: {task['score']:.3f} recognised ({low:.3f} to {high:.3f}), n {task['n']}")
    print(
        f"nearest training digit: generated {nearest(made, known):.1f}, real held-out "
        f"{nearest(real, known):.1f} (median distance of pixels)"
    )
    print(page)


def config_keeps_average(run: Path) -> bool:
    """Whether the run keeps a moving average, whose parameters generate better."""
    import yaml

    return yaml.safe_load((run / "config.yaml").read_text())["training"].get("ema_decay") is not None


if __name__ == "__main__":
    main()
