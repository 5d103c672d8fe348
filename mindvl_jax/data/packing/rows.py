"""Which samples share a row: best fit under two budgets with equal work in every row of the global batch.

Deterministic and from lengths alone, so every process of a run plans the same rows without exchanging anything.
`docs/packing.md` explains the method with a picture and compares it with others.

R rows of the batch, N samples waiting, C budgets.
"""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np

from mindvl_jax.config.schema import ModelConfig

# Columns of the size table, one budget each.
TOKENS, PATCHES, SAMPLES, IMAGES, WINDOWS = range(5)
# Columns of the load table.
LANGUAGE, VISION = range(2)

# Candidates that one row looks at: more hardly fills better and makes each choice slower.
CANDIDATES = 512
# How much each distance counts beside the budget that binds: the other budget, and the work of either part.
LOOSE, BALANCE = 0.5, 0.5
# Candidates of the first filling, in samples of the batch: see docs/packing.md, "Why not the whole buffer".
SLACK = 0.6
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
    reached = np.zeros((rows, len(points)))
    chosen: list[list[int]] = [[] for _ in range(rows)]

    def put(row: int, sample: int) -> None:
        chosen[row].append(sample)
        free[sample] = False
        filled[row] += sizes[sample]
        reached[row] += points[:, sample]

    for row in range(min(rows, count)):
        put(row, row)
    _grow(sizes, points, target, caps, free, filled, reached, put, max(16, int(SLACK * rows * caps[TOKENS] / max(sizes[:, TOKENS].mean(), 1))))
    _exchange(sizes, points, target, caps, free, filled, reached, chosen)
    _grow(sizes, points, target, caps, free, filled, reached, put, CANDIDATES)
    _level(sizes, points, caps, filled, reached, chosen)
    order = balanced_order(reached[:, 2] + reached[:, 3])
    return [sorted(chosen[row]) for row in order]


def plan_units(units: Sequence[Sequence[int]], sizes: np.ndarray, loads: np.ndarray, budgets: Budgets, rows: int) -> list[list[int]]:
    """`plan_rows` for samples that must share a row: the two answers of a preference pair, whose losses are compared there.

    A unit is packed as one step of the sum of its samples, so every property of `plan_rows` holds for units.

    Args:
      units: indices of the samples of each unit, oldest unit first; every sample in one unit. A whole unit fits a row alone.
    Returns:
      For each row the indices of its samples; those of a unit are neighbours, in the unit's order.

    Raises ValueError for a unit that no row holds, or a sample in two units or in none.
    """
    members = [list(unit) for unit in units]
    if sorted(index for unit in members for index in unit) != list(range(len(sizes))):
        raise ValueError(f"{len(members)} units do not hold each of the {len(sizes)} samples once")
    summed = np.array([sizes[unit].sum(0) for unit in members], np.int64).reshape(-1, len(budgets.array()))
    if len(large := np.flatnonzero((summed > budgets.array()).any(1))):
        raise ValueError(f"unit {large[0]} needs {summed[large[0]].tolist()} (tokens, patches, samples, images, windows) in one row, the budgets are {budgets.array().tolist()}")
    work = np.array([loads[unit].sum(0) for unit in members]).reshape(-1, 2)
    return [[index for unit in row for index in members[unit]] for row in plan_rows(summed, work, budgets, rows)]


def _points(sizes: np.ndarray, loads: np.ndarray, caps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each sample as a step (tokens, patches, language work, vision work), scaled to a row; and the target of a row.

    The target is the mean of what waits, as large as the budgets allow: with it, rows keep the mixture of the data and
    hard samples are not put off. The budget that binds counts most.
    """
    tokens, patches = sizes[:, TOKENS].sum(), sizes[:, PATCHES].sum()
    full = np.concatenate([sizes[:, [TOKENS, PATCHES]], loads], 1).astype(np.float64)
    mean = full.sum(0)
    by_tokens, by_patches = caps[TOKENS] / max(tokens, 1), caps[PATCHES] / max(patches, 1)
    share = min(by_tokens, by_patches)
    scale = np.where(mean > 0, mean * share, 1.0)
    scale[TOKENS], scale[PATCHES] = caps[TOKENS], max(caps[PATCHES], 1)
    weights = np.array([1.0, LOOSE, BALANCE, BALANCE] if by_tokens <= by_patches else [LOOSE, 1.0, BALANCE, BALANCE])
    factor = weights / scale
    # (4, N): one row a quantity, so that scans over samples read neighbouring numbers.
    return np.ascontiguousarray((full * factor).T), mean * share * factor


def _grow(sizes, points, target, caps, free, filled, reached, put, limit) -> None:
    """Gives samples to the emptiest rows until none gets nearer to the target."""
    rows = len(filled)
    window = np.flatnonzero(free)
    first = min(CANDIDATES, limit)
    later = window[first:]
    window = window[:first]
    # |gap - p|^2 = |gap|^2 - 2 gap.p + |p|^2, written out: a matrix product may round differently on another machine,
    # and every process must choose the same.
    near = points[:, window].copy()
    squares = (near * near).sum(0)
    room = sizes[window].T.copy()
    largest = room.max(1, initial=0)
    emptiness = reached[:, 0] + reached[:, 1]
    while len(window):
        row = int(np.argmin(emptiness))
        if emptiness[row] == np.inf:
            break
        gap = target - reached[row]
        gain = squares - 2.0 * (near[0] * gap[0] + near[1] * gap[1] + near[2] * gap[2] + near[3] * gap[3])
        left = caps - filled[row]
        for budget in np.flatnonzero(largest > left).tolist():
            gain[room[budget] > left[budget]] = np.inf
        best = int(np.argmin(gain))
        if not gain[best] < 0.0:
            emptiness[row] = np.inf
            continue
        sample = int(window[best])
        put(row, sample)
        emptiness[row] = reached[row, 0] + reached[row, 1]
        if len(later):  # the next oldest takes the place
            window[best], later = later[0], later[1:]
            near[:, best] = points[:, window[best]]
            squares[best] = float((near[:, best] ** 2).sum())
            room[:, best] = sizes[window[best]]
            largest = np.maximum(largest, room[:, best])
        else:
            squares[best] = np.inf


def _exchange(sizes, points, target, caps, free, filled, reached, chosen) -> None:
    """Swaps a sample of a row with a waiting one where the row gets nearer to its target. The oldest (first) stays."""
    window = np.flatnonzero(free)[:CANDIDATES]
    if not len(window):
        return
    near = points[:, window].copy()
    squares = (near * near).sum(0)
    room = sizes[window].T.copy()
    for row, members in enumerate(chosen):
        for _ in range(EXCHANGES):
            gap = target - reached[row]
            now = float((gap**2).sum())
            if now <= GOOD or len(members) < 2:
                break
            inside = np.array(members[1:])
            # (inside, waiting): the row without one and with the other.
            away = gap[:, None] + points[:, inside]
            distance = (away * away).sum(0)[:, None] + squares
            for axis in range(len(gap)):
                distance -= (2.0 * away[axis])[:, None] * near[axis]
            left = (caps - filled[row])[:, None] + sizes[inside].T
            for budget in range(len(caps)):
                if left[budget].min() < room[budget].max():
                    distance[left[budget][:, None] < room[budget]] = np.inf
            best = int(np.argmin(distance))
            out, enter = divmod(best, len(window))
            if not distance[out, enter] < now * 0.98:
                break
            old, new = int(inside[out]), int(window[enter])
            members[members.index(old)] = new
            free[old], free[new] = True, False
            filled[row] += sizes[new] - sizes[old]
            reached[row] += points[:, new] - points[:, old]
            window[enter], near[:, enter], room[:, enter] = old, points[:, old], sizes[old]
            squares[enter] = float((points[:, old] ** 2).sum())


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
            moved = points[:, a].T[:, None] - points[:, b].T[None]
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
            reached[heavy] += points[:, y] - points[:, x]
            reached[light] -= points[:, y] - points[:, x]


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
