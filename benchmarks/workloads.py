"""Samples for training benchmarks: the same ids and pixels as packed rows of ours and as inputs of transformers.

B rows, T token positions a row, P patch positions a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from benchmarks.packing import llava_like
from mindvl_jax.config import families
from mindvl_jax.data.packing.rows import plan_rows
from mindvl_jax.models.mindvl.config import MindVLConfig
from mindvl_jax.models.mindvl.vision import IMAGE_MEAN, IMAGE_STD
from mindvl_jax.models.vision_language.batch import Batch
from mindvl_jax.models.vision_language.collate import visual_budgets
from mindvl_jax.models.vision_language.work import WorkModel
from mindvl_jax.parity.samples import ParitySample, pack, random_sample

Draw = Callable[[np.random.Generator], tuple[int, int, list[tuple[int, int]]]]
"""Length of question and answer in tokens, and the grids of the pictures in patches."""


def small_pictures(rng: np.random.Generator) -> tuple[int, int, list[tuple[int, int]]]:
    """Samples like the quickstart's: images of 28 to 168 pixels, a short question, an answer of a few tokens; 1 of 8
    text only.
    """
    grid = (2 * int(rng.integers(1, 4)), 2 * int(rng.integers(1, 7)))
    return int(rng.integers(6, 24)), int(rng.integers(2, 12)), [] if rng.random() < 0.125 else [grid]


def photographs(rng: np.random.Generator) -> tuple[int, int, list[tuple[int, int]]]:
    """LLaVA-Instruct's lengths: one COCO image of at most 512 x 512 pixels and a lognormal text, half of it answer."""
    total, images = llava_like(rng)
    text = total - sum(images) // 4
    grids = [_near_grid(patches, rng) for patches in images]
    return text // 2, text - text // 2, grids


def _near_grid(patches: int, rng: np.random.Generator) -> tuple[int, int]:
    """Height and width (even) of about that many patches in COCO's two usual formats."""
    height = 2 * round((patches * float(rng.choice([0.75, 0.667, 1.333]))) ** 0.5 / 2)
    return height, 2 * (patches // height // 2)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A mix and the rows that it is packed into.

    Attributes:
      loss_chunk: tokens whose logits exist at one time, in our step.
    """

    name: str
    draw: Draw
    rows: int
    tokens: int
    patches: int
    samples: int
    longest_sample: int
    longest_image: int
    loss_chunk: int = 1024


# 112 tokens to 96 patches: both are then filled, as the quickstart fills its rows (0.97 and 0.90 in its longest phase).
QUICKSTART = Workload(
    "small pictures", small_pictures, rows=16, tokens=112, patches=96, samples=16, longest_sample=112, longest_image=96
)
LLAVA = Workload(
    "LLaVA-like", photographs, rows=1, tokens=4096, patches=8192, samples=32, longest_sample=4096, longest_image=1536
)
DRY = Workload(
    "smallest",
    small_pictures,
    rows=2,
    tokens=96,
    patches=128,
    samples=8,
    longest_sample=96,
    longest_image=96,
    loss_chunk=64,
)


def tiny_config(compute: str) -> MindVLConfig:
    """About 3 million parameters: the quickstart's model."""
    tiny = families.preset("mindvl-tiny")
    return tiny.model_copy(update=dict(text=tiny.text.model_copy(update=dict(vocab_size=2304)), compute_dtype=compute))


def small_config(compute: str) -> MindVLConfig:
    """About 60 million parameters in the proportions of the published models, with a compact vocabulary."""
    tiny = families.preset("mindvl-tiny")
    vision = tiny.vision.model_copy(
        update=dict(depth=8, hidden_size=320, intermediate_size=864, num_heads=4, fullatt_block_indexes=(3, 7))
    )
    text = tiny.text.model_copy(
        update=dict(
            vocab_size=16384,
            hidden_size=512,
            intermediate_size=1536,
            num_layers=12,
            num_heads=8,
            num_kv_heads=4,
            head_dim=64,
            mrope_section=(8, 12, 12),
        )
    )
    return tiny.model_copy(update=dict(vision=vision, text=text, compute_dtype=compute))


def dry_config(compute: str) -> MindVLConfig:
    """Two layers of width 32."""
    tiny = families.preset("mindvl-tiny")
    vision = tiny.vision.model_copy(
        update=dict(
            depth=2, hidden_size=32, intermediate_size=48, num_heads=2, window_size=56, fullatt_block_indexes=(1,)
        )
    )
    text = tiny.text.model_copy(
        update=dict(
            vocab_size=2048,
            hidden_size=32,
            intermediate_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            mrope_section=(2, 3, 3),
        )
    )
    return tiny.model_copy(update=dict(vision=vision, text=text, compute_dtype=compute))


MODELS = {"tiny": tiny_config, "small": small_config, "dry": dry_config}


@dataclasses.dataclass(frozen=True)
class Packed:
    """The samples that were packed (pixels as bytes 0..255 in float32), row by row, and the batch."""

    rows: list[list[ParitySample]]
    batch: Batch

    @property
    def samples(self) -> list[ParitySample]:
        return [sample for row in self.rows for sample in row]

    @property
    def work(self) -> dict[str, float]:
        """Work of a step on the batch: real tokens, samples and patches, without padding."""
        return {
            "tokens": float((self.batch.segment_ids > 0).sum()),
            "samples": float(len(self.samples)),
            "patches": float((self.batch.patch_segment_ids > 0).sum()),
        }


def normalised(sample: ParitySample) -> ParitySample:
    """Normalise pixels as transformers' processor does: scale to 0..1, subtract the mean and divide by the deviation of
    each channel.
    """

    def convert(visual):
        pixels = visual.pixels.reshape(len(visual.pixels), 3, -1) / 255
        pixels = (pixels - np.array(IMAGE_MEAN)[:, None]) / np.array(IMAGE_STD)[:, None]
        return dataclasses.replace(visual, pixels=pixels.reshape(len(visual.pixels), -1).astype(np.float32))

    return dataclasses.replace(sample, visuals=tuple(map(convert, sample.visuals)))


def build(workload: Workload, config: MindVLConfig, reference, seed: int = 0) -> Packed:
    """Draw samples and pack them as training does.

    Args:
      reference: transformers model that computes rotary positions.
    """
    rng = np.random.default_rng(seed)
    drawn = []
    # Twice what the rows hold, so that the packer can choose, as in a run.
    while sum(map(_length, drawn)) < 2 * workload.rows * workload.tokens:
        one = workload.draw(rng)
        if _length(one) <= min(workload.longest_sample, workload.tokens) and _patches(one) <= min(
            workload.patches, workload.longest_image
        ):
            drawn.append(one)
    sizes = np.array([(_length(one), _patches(one), 1, len(one[2]), _patches(one) // 4) for one in drawn], np.int64)
    budgets = visual_budgets(workload.tokens, workload.patches, workload.samples, 64, workload.patches)
    work = WorkModel(token=1.0, token_pair=0.0, patch=0.1, patch_pair=0.0)
    loads = np.array([work.loads(_length(one), np.array([h * w for h, w in one[2]], np.int64)) for one in drawn])
    plan = plan_rows(sizes, loads, budgets, workload.rows)
    rows = [[_sample(config, rng, drawn[index]) for index in row] for row in plan]
    batch = pack(rows, config, reference, tokens=workload.tokens, patches=workload.patches, samples=workload.samples)
    return Packed(rows, batch.replace(patches=batch.patches.astype(np.uint8)))


def _length(drawn) -> int:
    question, answer, grids = drawn
    return question + answer + sum(h * w // 4 + 2 for h, w in grids)


def _patches(drawn) -> int:
    return sum(h * w for h, w in drawn[2])


def _sample(config: MindVLConfig, rng: np.random.Generator, drawn) -> ParitySample:
    question, answer, grids = drawn
    sample = random_sample(config, rng, *(("image", (1, *grid)) for grid in grids), question, answer=answer)

    def as_bytes(visual):
        return dataclasses.replace(visual, pixels=rng.integers(0, 256, visual.pixels.shape).astype(np.float32))

    return dataclasses.replace(sample, visuals=tuple(map(as_bytes, sample.visuals)))


def share_filled(packed: Packed) -> dict[str, float]:
    batch = packed.batch
    return {
        "token places filled": float((batch.segment_ids > 0).mean()),
        "patch places filled": float((batch.patch_segment_ids > 0).mean()),
    }
