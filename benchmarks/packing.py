"""Packing efficiency and balance over mixtures with published-like length statistics.

    python -m benchmarks.packing [--batches 40] [--ranks 8 64 512] [--out benchmarks/results/packing-DATE.md]

No data set is read: sizes are drawn from distributions that follow the data sets named in MIXES, and go through the
same `plan_rows` as training. Efficiency counts real tokens (patches) over places; imbalance is max / mean of the real
work of a rank's rows, one row a rank, averaged over batches.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
import time

import numpy as np

from mindvl_jax.data.media.resize import smart_resize
from mindvl_jax.data.packing.planner import AHEAD
from mindvl_jax.data.packing.rows import Budgets, plan_rows
from mindvl_jax.models.vision_language.collate import visual_budgets
from mindvl_jax.models.vision_language.work import PATCHES, TOKENS, WorkModel

# Multiply-adds of Qwen2.5-VL-7B (published sizes), which determine the work of a row.
WORK = WorkModel(
    token=28 * 233_046_016 / 1.0 + 3584 * 152064,
    token_pair=28 * 3584,
    patch=32 * (4 * 1280**2 + 3 * 1280 * 3420) + 28 * 2 * 1280 * 64,
    patch_pair=4 * 2 * 1280,
)

# Patch places a row over what a row of the mean mixture needs: rows that are full of tokens differ in patches.
ROOM = 1.03

# Sizes of COCO's images (width, height) and how often they occur, roughly.
COCO = [
    ((640, 480), 0.36),
    ((640, 427), 0.22),
    ((480, 640), 0.14),
    ((640, 426), 0.10),
    ((427, 640), 0.06),
    ((500, 375), 0.05),
    ((640, 360), 0.03),
    ((612, 612), 0.02),
    ((375, 500), 0.02),
]


def _pictures(rng: np.random.Generator, sizes: list, max_pixels: int, count: int) -> list[int]:
    shapes, shares = zip(*sizes)
    picked = rng.choice(len(shapes), count, p=np.array(shares) / sum(shares))
    return [int(np.prod(smart_resize(shapes[k][1], shapes[k][0], max_pixels=max_pixels)) // 196) for k in picked]


def llava_like(rng: np.random.Generator) -> tuple[int, list[int]]:
    """LLaVA-Instruct: one COCO image of at most 512 x 512 pixels, short answers or long descriptions; 6 % text only."""
    text = int(np.clip(rng.lognormal(5.6, 0.75), 30, 2500))
    if rng.random() < 0.06:
        return text + 120, []
    images = _pictures(rng, COCO, 512 * 512, 1)
    return text + sum(images) // 4 + 2, images


def document_like(rng: np.random.Generator) -> tuple[int, list[int]]:
    """DocVQA and page OCR: one to four scanned pages, each up to 1280 merged tokens; answers from a word to a page."""
    pages = int(rng.choice([1, 1, 1, 1, 2, 3, 4]))
    ratio = rng.choice([1.294, 1.414, 0.75, 1.0], p=[0.5, 0.3, 0.1, 0.1]) * rng.uniform(0.9, 1.1)
    images = []
    for _ in range(pages):
        width = int(rng.uniform(600, 2400))
        images.append(int(np.prod(smart_resize(int(width * ratio), width, max_pixels=1003520)) // 196))
    text = int(rng.choice([rng.uniform(20, 120), rng.lognormal(6.3, 0.5)], p=[0.6, 0.4]))
    return min(text, 2000) + sum(images) // 4 + 2 * pages, images


def video_like(rng: np.random.Generator) -> tuple[int, list[int]]:
    """Clips of 8 to 64 frames at about 128 merged tokens a frame pair, with images and text between."""
    kind = rng.random()
    if kind < 0.35:
        return llava_like(rng)
    if kind < 0.5:
        return int(np.clip(rng.lognormal(5.8, 0.9), 30, 4000)), []
    pairs = int(rng.choice([4, 8, 12, 16, 24, 32], p=[0.2, 0.25, 0.2, 0.15, 0.1, 0.1]))
    frame = int(np.prod(smart_resize(*((360, 640) if rng.random() < 0.7 else (640, 360)), max_pixels=100352)) // 196)
    return int(np.clip(rng.lognormal(4.6, 0.7), 20, 800)) + pairs * frame // 4 + 2, [frame] * pairs


MIXES = {"LLaVA-like": (llava_like, 8192), "document-like": (document_like, 16384), "video-like": (video_like, 16384)}


def table(samples: list[tuple[int, list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.array(
        [
            (tokens, sum(images), 1, len(images), sum(-(-image // 64) + 4 for image in images))
            for tokens, images in samples
        ],
        np.int64,
    )
    loads = np.array([WORK.loads(tokens, np.array(images, np.int64)) for tokens, images in samples])
    return sizes, loads


def measure(method, mix: str, rows: int, batches: int, buffer: int, seed: int = 0) -> dict[str, float]:
    """Pack `batches` batches of `rows` rows with a refilled look-ahead buffer, and average the figures."""
    draw, tokens = MIXES[mix]
    rng = np.random.default_rng(seed)
    probe, _ = table([draw(np.random.default_rng(10**6 + k)) for k in range(2000)])
    # Patches a row: what the data has a token, and 3 % of room.
    patches = int(tokens * probe[:, PATCHES].sum() / probe[:, TOKENS].sum() * ROOM) // 4 * 4
    budgets = visual_budgets(tokens, patches, 10**6, 10**6, 10**6)
    waiting: list[tuple[int, list[int]]] = []
    filled, balance, seconds, oldest = [], [], [], 0
    ages: list[int] = []
    for batch in range(batches):
        held = sum(sample[0] for sample in waiting)
        while len(waiting) < buffer or held < AHEAD * rows * tokens:
            sample = draw(rng)
            if sample[0] <= tokens and sum(sample[1]) <= patches:
                waiting.append(sample)
                held += sample[0]
                ages.append(batch)
        sizes, loads = table(waiting)
        start = time.process_time()
        plan = method(sizes, loads, budgets, rows)
        seconds.append(time.process_time() - start)
        used = {index for row in plan for index in row}
        oldest = max(oldest, max(batch - ages[index] for index in used))
        row_sizes = np.array([sizes[row].sum(0) for row in plan])
        assert (row_sizes <= budgets.array()).all()
        filled.append(row_sizes.sum(0)[:2] / (rows * np.array([tokens, patches])))
        work = np.array([loads[row].sum(0) for row in plan])
        balance.append(work.max(0) / work.mean(0))
        ages = [age for index, age in enumerate(ages) if index not in used]
        waiting = [sample for index, sample in enumerate(waiting) if index not in used]
    # The first batches choose from a fresh buffer; a run is in the steady state.
    steady = slice(max(1, batches // 4), None)
    token, patch = np.mean(filled[steady], axis=0)
    language, vision = np.mean(balance[steady], axis=0)
    return {
        "tokens": token,
        "patches": patch,
        "language": language,
        "vision": vision,
        "ms a row": 1e3 * float(np.median(seconds)) / rows,
        "oldest": oldest,
    }


def in_order_first_fit(sizes: np.ndarray, loads: np.ndarray, budgets: Budgets, rows: int) -> list[list[int]]:
    """First fit: put each waiting sample into the first row with room."""
    caps, filled, plan = budgets.array(), np.zeros((rows, 5), np.int64), [[] for _ in range(rows)]
    for index, size in enumerate(sizes):
        fits = np.flatnonzero((filled + size <= caps).all(1))
        if len(fits):
            plan[fits[0]].append(index)
            filled[fits[0]] += size
    return plan


def knapsack(sizes: np.ndarray, loads: np.ndarray, budgets: Budgets, rows: int) -> list[list[int]]:
    """Greedy knapsack on tokens: fill each row with the largest sample that still fits (LLaMA-Factory's method)."""
    caps, free, plan = budgets.array(), list(np.argsort(-sizes[:, TOKENS], kind="stable")), []
    for _ in range(rows):
        row, left, kept = [], caps.copy(), []
        for index in free:
            if (sizes[index] <= left).all():
                row.append(int(index))
                left -= sizes[index]
            else:
                kept.append(index)
        free = kept
        plan.append(row)
    return plan


def repair(sizes: np.ndarray, loads: np.ndarray, budgets: Budgets, rows: int) -> list[list[int]]:
    """Greedy re-pairing: samples in order fill rows by first fit, then rows are evened out on the sum of squared
    lengths by giving the longest samples to the lightest row (MindSpeed-MM's rearrangement, with our budgets).
    """
    picked = [index for row in in_order_first_fit(sizes, loads, budgets, rows) for index in row]
    caps, filled, plan, load = budgets.array(), np.zeros((rows, 5), np.int64), [[] for _ in range(rows)], np.zeros(rows)
    for index in sorted(picked, key=lambda k: -int(sizes[k, TOKENS])):
        for row in np.argsort(load, kind="stable"):
            if (filled[row] + sizes[index] <= caps).all():
                plan[row].append(index)
                filled[row] += sizes[index]
                load[row] += float(sizes[index, TOKENS]) ** 2
                break
    return plan


METHODS = {"ours": plan_rows, "first fit": in_order_first_fit, "greedy knapsack": knapsack, "greedy re-pairing": repair}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--mixes", nargs="+", default=list(MIXES))
    parser.add_argument("--buffer", type=int, default=256)
    parser.add_argument("--out")
    args = parser.parse_args()
    lines = [
        "| Mix | Ranks | Method | tokens | patches | language max/mean | vision max/mean | ms a row | longest wait |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for mix in args.mixes:
        for ranks in args.ranks:
            for name in args.methods:
                batches = max(8, min(args.batches, 4000 // ranks))
                found = measure(METHODS[name], mix, ranks, batches, args.buffer)
                line = (
                    f"| {mix} | {ranks} | {name} | {found['tokens']:.4f} | {found['patches']:.4f} | "
                    f"{found['language']:.4f} | {found['vision']:.4f} | {found['ms a row']:.2f} | "
                    f"{found['oldest']} batches |"
                )
                print(line, flush=True)
                lines.append(line)
    if args.out:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        with open(args.out, "w") as file:
            file.write(
                f"# Packing, {datetime.date.today()}\n\nCommand: `python -m benchmarks.packing --batches "
                f"{args.batches} --buffer {args.buffer}`; commit {commit}; {platform.machine()}, "
                f"{platform.python_version()}.\n\n"
            )
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
