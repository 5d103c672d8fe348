"""Which samples share a row: best fit under two budgets with equal work in every row of the global batch.

Deterministic and from lengths alone, so every process of a run plans the same rows without exchanging anything.
`docs/packing.md` explains the method with a picture and compares it with others.

R rows of the batch, N samples waiting, C budgets.
"""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np

from mindvl_jax.config import ModelConfig

# Columns of the size table, one budget each.
TOKENS, PATCHES, SAMPLES, IMAGES, WINDOWS = range(5)
# Columns of the load table.
LANGUAGE, VISION = range(2)

# Candidates that one row looks at: more hardly fills better and makes each choice slower.
CANDIDATES = 512
# How much each distance counts: a free token place costs work in every layer of the larger model, a free patch place
# less, unequal work only what the quadratic part adds to it.
WEIGHTS = np.array([1.0, 1.0, 0.7, 0.7])
# Exchanges tried for one row before it is left as it is.
EXCHANGES = 6
# A row this near to its target is good enough: 0.3 % of every budget.
GOOD = 4 * 0.003**2


@dataclasses.dataclass(frozen=True)
class WorkModel:
    """Multiply-adds of one sample: linear per token and patch, quadratic per attention segment. Units cancel out."""

    token: float
    token_pair: float
    patch: float
    patch_pair: float

    @classmethod
    def of(cls, model: ModelConfig) -> "WorkModel":
        """Counts matrix products of a decoder layer and a vision block (window attention is linear in patches)."""
        text, vision = model.text, model.vision
        heads = text.num_heads * text.head_dim
        kv_heads = text.num_kv_heads * text.head_dim
        layer = text.hidden_size * (2 * heads + 2 * kv_heads) + 3 * text.hidden_size * text.intermediate_size
        window = (vision.window_size // vision.patch_size) ** 2
        full = len(vision.fullatt_block_indexes)
        width = vision.hidden_size
        block = 4 * width**2 + 3 * width * vision.intermediate_size
        return cls(
            token=text.num_layers * layer + text.hidden_size * text.vocab_size,
            token_pair=text.num_layers * heads,  # two products, half of them masked by causality
            patch=vision.depth * block + (vision.depth - full) * 2 * width * window,
            patch_pair=full * 2 * width,
        )

    def loads(self, tokens: int, image_lengths: np.ndarray) -> tuple[float, float]:
        """Work of one sample in the language model and in the vision tower."""
        patches = float(image_lengths.sum())
        squares = float((image_lengths.astype(np.float64) ** 2).sum())
        return self.token * tokens + self.token_pair * float(tokens) ** 2, self.patch * patches + self.patch_pair * squares


@dataclasses.dataclass(frozen=True)
class Budgets:
    """Places of one row for each column of the size table."""

    tokens: int
    patches: int
    samples: int
    images: int
    windows: int

    def array(self) -> np.ndarray:
        return np.array([self.tokens, self.patches, self.samples, self.images, self.windows], np.int64)


def plan_rows(sizes: np.ndarray, loads: np.ndarray, budgets: Budgets, rows: int) -> list[list[int]]:
    """Chooses samples for `rows` rows.

    Every row starts with one of the oldest samples, so that none waits for ever: a sample is used after at most N / R
    batches. Then the emptiest row takes the sample that brings it nearest to its target (all token places, the patches
    and the work that a full row of this data has), until none brings a row nearer; last, single samples are exchanged
    with waiting ones and between rows where that brings rows nearer still.

    Args:
      sizes: (N, 5) int64, tokens, patches, 1, images and windows of each waiting sample, oldest first. Each fits a row alone.
      loads: (N, 2) float64, language and vision work of each.
      budgets: places of a row.
    Returns:
      For each row the indices of its samples, in order of age; rows are ordered so that neighbours carry equal work.
    """
    count = len(sizes)
    if count == 0:
        return [[] for _ in range(rows)]
    caps = budgets.array()
    points, target = _points(sizes, loads, caps)
    free = np.ones(count, bool)
    filled = np.zeros((rows, len(caps)), np.int64)
    reached = np.zeros((rows, points.shape[1]))
    chosen: list[list[int]] = [[] for _ in range(rows)]

    def put(row: int, sample: int) -> None:
        chosen[row].append(sample)
        free[sample] = False
        filled[row] += sizes[sample]
        reached[row] += points[sample]

    for row in range(min(rows, count)):
        put(row, row)
    _grow(sizes, points, target, caps, free, filled, reached, put)
    _exchange(sizes, points, target, caps, free, filled, reached, chosen)
    _grow(sizes, points, target, caps, free, filled, reached, put)
    _level(sizes, points, caps, filled, reached, chosen)
    order = balanced_order(reached[:, 2] + reached[:, 3])
    return [sorted(chosen[row]) for row in order]


def _points(sizes: np.ndarray, loads: np.ndarray, caps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each sample as a step (tokens, patches, language work, vision work), scaled to a row; and the target of a row.

    The target is the mean of what waits, as large as the budgets allow: with it, rows keep the mixture of the data and
    hard ones are not put off.
    """
    tokens, patches = sizes[:, TOKENS].sum(), sizes[:, PATCHES].sum()
    full = np.concatenate([sizes[:, [TOKENS, PATCHES]], loads], 1).astype(np.float64)
    mean = full.sum(0)
    share = min(caps[TOKENS] / max(tokens, 1), caps[PATCHES] / max(patches, 1))
    scale = np.where(mean > 0, mean * share, 1.0)
    scale[TOKENS], scale[PATCHES] = caps[TOKENS], max(caps[PATCHES], 1)
    points = full / scale * WEIGHTS
    target = mean * share / scale * WEIGHTS
    return np.ascontiguousarray(points), target


def _grow(sizes, points, target, caps, free, filled, reached, put) -> None:
    """Gives samples to the emptiest rows until none gets nearer to the target."""
    rows = len(filled)
    alive = np.ones(rows, bool)
    waiting = np.flatnonzero(free)
    emptiness = reached[:, 0] + reached[:, 1]
    while alive.any() and len(waiting):
        row = int(np.argmin(np.where(alive, emptiness, np.inf)))
        window = waiting[:CANDIDATES]
        left = caps - filled[row]
        gap = target - reached[row]
        distance = ((gap - points[window]) ** 2).sum(1)
        distance[(sizes[window] > left).any(1)] = np.inf
        best = int(np.argmin(distance))
        if distance[best] >= (gap**2).sum():
            alive[row] = False
            continue
        put(row, int(window[best]))
        waiting = np.delete(waiting, best)
        emptiness[row] = reached[row, 0] + reached[row, 1]


def _exchange(sizes, points, target, caps, free, filled, reached, chosen) -> None:
    """Swaps a sample of a row with a waiting one where the row gets nearer to its target. The oldest (first) stays."""
    for row, members in enumerate(chosen):
        for _ in range(EXCHANGES):
            gap = target - reached[row]
            now = float((gap**2).sum())
            if now <= GOOD or len(members) < 2:
                break
            window = np.flatnonzero(free)[:CANDIDATES]
            if not len(window):
                return
            inside = np.array(members[1:])
            # (inside, waiting): the row without one and with the other.
            left = (caps - filled[row]) + sizes[inside]
            away = gap + points[inside]
            distance = ((away[:, None] - points[window][None]) ** 2).sum(2)
            for budget in range(len(caps)):
                distance[left[:, None, budget] < sizes[window][None, :, budget]] = np.inf
            best = int(np.argmin(distance))
            out, enter = divmod(best, len(window))
            if distance[out, enter] >= now:
                break
            old, new = int(inside[out]), int(window[enter])
            members[members.index(old)] = new
            free[old], free[new] = True, False
            filled[row] += sizes[new] - sizes[old]
            reached[row] += points[new] - points[old]


def _level(sizes, points, caps, filled, reached, chosen) -> None:
    """Swaps samples between the rows of most and least work where that makes them more equal and both still fit."""
    rows = len(chosen)
    for axis in (2, 3):
        for _ in range(rows):
            work = reached[:, axis]
            heavy, light = int(np.argmax(work)), int(np.argmin(work))
            excess = (work[heavy] - work[light]) / 2
            if excess <= 0.005 * max(work[heavy], 1e-9):
                break
            a, b = np.array(chosen[heavy]), np.array(chosen[light])
            if not len(a) or not len(b):
                break
            moved = points[a][:, None] - points[b][None]
            # What both rows are off from their common mean after the swap, in every quantity, counted in squares.
            half = (reached[heavy] - reached[light]) / 2
            after = ((half - moved) ** 2).sum(2)
            grown = sizes[b][None] - sizes[a][:, None]
            fits = (filled[heavy] + grown <= caps).all(2) & (filled[light] - grown <= caps).all(2)
            after[~fits] = np.inf
            best = int(np.argmin(after))
            out, enter = divmod(best, len(b))
            if not after[out, enter] < (half**2).sum() * 0.999:
                break
            x, y = int(a[out]), int(b[enter])
            chosen[heavy][chosen[heavy].index(x)] = y
            chosen[light][chosen[light].index(y)] = x
            filled[heavy] += sizes[y] - sizes[x]
            filled[light] -= sizes[y] - sizes[x]
            reached[heavy] += points[y] - points[x]
            reached[light] -= points[y] - points[x]


def balanced_order(work: Sequence[float]) -> list[int]:
    """An order of rows in which neighbouring groups of any power-of-two size carry near-equal work.

    Ranks take neighbouring rows, and how many ranks there are is not known here: heavy and light rows are folded
    together again and again, as in a tournament where the strongest meets the weakest.
    """
    groups = [[row] for row in np.argsort(-np.asarray(work), kind="stable").tolist()]
    while len(groups) > 1:
        middle = None if len(groups) % 2 == 0 else groups.pop(len(groups) // 2)
        groups = [first + last for first, last in zip(groups[: len(groups) // 2], reversed(groups[len(groups) // 2 :]))]
        if middle is not None:
            groups.append(middle)
    return groups[0] if groups else []


def first_fit(sizes: np.ndarray, budgets: Budgets, rows: int) -> list[list[int]]:
    """Each sample in order of age into the first row that has room: the usual method, to compare with."""
    caps = budgets.array()
    filled = np.zeros((rows, len(caps)), np.int64)
    chosen: list[list[int]] = [[] for _ in range(rows)]
    for index, size in enumerate(sizes):
        fits = np.flatnonzero((filled + size <= caps).all(1))
        if len(fits):
            chosen[fits[0]].append(index)
            filled[fits[0]] += size
    return chosen
