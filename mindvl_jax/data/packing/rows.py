"""Assign samples to rows: best fit under two budgets, with balanced work over the rows of the global batch.

Deterministic and from lengths alone, so every process of a run plans the same rows without exchanging anything.
`docs/packing.md` explains the method with an image and compares it with others.

R rows of the batch, N samples waiting, C budgets.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

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
class Budgets:
    """Room of one row, one budget for each column of the size table.

    Attributes:
      names: of the budgets, for messages. capacities: room of a row in each.
      filled: singular names of the first budgets, which rows are meant to fill ("token" of "tokens"); the others only
        limit.
    """

    names: tuple[str, ...]
    capacities: tuple[int, ...]
    filled: tuple[str, ...]

    def array(self) -> np.ndarray:
        return np.array(self.capacities, np.int64)


def plan_rows(sizes: np.ndarray, loads: np.ndarray, budgets: Budgets, rows: int) -> list[list[int]]:
    """Choose samples for `rows` rows.

    Every row starts with one of the oldest samples, so that none waits for ever: a sample is used after at most N / R
    batches. Then the emptiest row takes the sample that brings it nearest to its target (the filled budgets and the
    work that a full row of this data has), until none brings a row nearer; last, single samples are exchanged with
    waiting ones and between rows where that brings rows nearer still.

    Args:
      sizes: (N, C) int64, what each waiting sample takes of each budget, oldest first. Each fits a row alone.
      loads: (N, W) float64, its work in each part of the model.
      budgets: room of a row.
    Returns:
      For each row the indices of its samples, in order of age; rows are ordered so that neighbours carry equal work.
    """
    count = len(sizes)
    if count == 0:
        return [[] for _ in range(rows)]
    caps = budgets.array()
    filled_budgets = len(budgets.filled)
    points, target = _points(sizes, loads, caps, filled_budgets)
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
    _grow(
        sizes,
        points,
        target,
        caps,
        free,
        filled,
        reached,
        put,
        filled_budgets,
        max(16, int(SLACK * rows * caps[0] / max(sizes[:, 0].mean(), 1))),
    )
    _exchange(sizes, points, target, caps, free, filled, reached, chosen)
    _grow(sizes, points, target, caps, free, filled, reached, put, filled_budgets, CANDIDATES)
    _level(sizes, points, caps, filled, reached, chosen, filled_budgets)
    order = balanced_order(_sum(reached.T[filled_budgets:]))
    return [sorted(chosen[row]) for row in order]


def plan_units(
    units: Sequence[Sequence[int]], sizes: np.ndarray, loads: np.ndarray, budgets: Budgets, rows: int
) -> list[list[int]]:
    """`plan_rows` for samples that must share a row: the two answers of a preference pair, whose losses are compared
    there.

    A unit is packed as one step of the sum of its samples, so every property of `plan_rows` holds for units.

    Args:
      units: indices of the samples of each unit, oldest unit first; every sample in one unit. A whole unit fits a row
        alone.
    Returns:
      For each row the indices of its samples; those of a unit are neighbours, in the unit's order.

    Raises ValueError for a unit that no row holds, or a sample in two units or in none.
    """
    members = [list(unit) for unit in units]
    if sorted(index for unit in members for index in unit) != list(range(len(sizes))):
        raise ValueError(f"{len(members)} units do not hold each of the {len(sizes)} samples once")
    summed = np.array([sizes[unit].sum(0) for unit in members], np.int64).reshape(-1, len(budgets.array()))
    if len(large := np.flatnonzero((summed > budgets.array()).any(1))):
        raise ValueError(
            f"unit {large[0]} needs {summed[large[0]].tolist()} ({', '.join(budgets.names)}) in one row, the "
            f"budgets are {budgets.array().tolist()}"
        )
    work = np.array([loads[unit].sum(0) for unit in members]).reshape(len(members), loads.shape[1])
    return [[index for unit in row for index in members[unit]] for row in plan_rows(summed, work, budgets, rows)]


def _sum(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Sum in order, written out: a library's order of summation may differ between machines, and every process must
    choose the same.
    """
    return functools.reduce(np.add, rows)


def _points(sizes: np.ndarray, loads: np.ndarray, caps: np.ndarray, filled: int) -> tuple[np.ndarray, np.ndarray]:
    """Each sample as a step (filled budgets, work of each part), scaled to a row; and the target of a row.

    The target is the mean of what waits, as large as the budgets allow: with it, rows keep the mixture of the data and
    hard samples are not put off. The budget that binds counts most.
    """
    full = np.concatenate([sizes[:, :filled], loads], 1).astype(np.float64)
    mean = full.sum(0)
    ratios = [caps[budget] / max(sizes[:, budget].sum(), 1) for budget in range(filled)]
    share = min(ratios)
    scale = np.where(mean > 0, mean * share, 1.0)
    scale[:filled] = np.maximum(caps[:filled], 1)
    weights = np.array([LOOSE] * filled + [BALANCE] * loads.shape[1])
    weights[ratios.index(share)] = 1.0
    factor = weights / scale
    # (quantities, N): one row a quantity, so that scans over samples read neighbouring numbers.
    return np.ascontiguousarray((full * factor).T), mean * share * factor


def _grow(sizes, points, target, caps, free, filled, reached, put, filled_budgets, limit) -> None:
    """Give samples to the emptiest rows until none gets nearer to the target."""
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
    emptiness = _sum(reached.T[:filled_budgets]).copy()
    while len(window):
        row = int(np.argmin(emptiness))
        if emptiness[row] == np.inf:
            break
        gap = target - reached[row]
        gain = squares - 2.0 * _sum([values * away for values, away in zip(near, gap, strict=True)])
        left = caps - filled[row]
        for budget in np.flatnonzero(largest > left).tolist():
            gain[room[budget] > left[budget]] = np.inf
        best = int(np.argmin(gain))
        if not gain[best] < 0.0:
            emptiness[row] = np.inf
            continue
        sample = int(window[best])
        put(row, sample)
        emptiness[row] = _sum(reached[row, :filled_budgets])
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


def _level(sizes, points, caps, filled, reached, chosen, filled_budgets) -> None:
    """Swaps samples between the rows of most and least work where that makes them more equal and both still fit."""
    rows = len(chosen)
    for axis in range(filled_budgets, len(points)):
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
