"""Prefill bucket sizes. Every distinct size costs one compilation, every padded position is wasted work."""

from __future__ import annotations

import dataclasses


def next_size(value: int, smallest: int, *, halves: bool = False) -> int:
    """Smallest size of the ladder smallest * 2^k (with `halves` also the steps halfway between) that holds `value`."""
    size = smallest
    while size < value:
        if halves and size + size // 2 >= value:
            return size + size // 2
        size *= 2
    return size


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """Capacity of a prompt row: tokens, patches (0: the vision tower is not run), image segments."""

    patches: int
    tokens: int
    images: int

    def holds(self, other: Bucket) -> bool:
        return self.tokens >= other.tokens and self.patches >= other.patches and self.images >= other.images


def bucket_of(tokens: int, patches: int, images: int, *, halves: bool = False) -> Bucket:
    """Return the bucket of one prompt.

    Args:
      tokens: prompt tokens, visual ones included. patches: of all its images. images: image segments (a video counts
        its frame pairs).
      halves: use a finer ladder, with less padding and more compilations.
    """
    return Bucket(
        patches=next_size(patches, 16, halves=halves) if patches else 0,
        tokens=next_size(tokens, 32, halves=halves),
        images=next_size(images, 4) if images else 0,
    )


def row_counts(most: int) -> tuple[int, ...]:
    """Row counts to compile programs for: 1, a quarter, a half, or all slots (few slots: always all)."""
    return tuple(dict.fromkeys((1, -(-most // 4), -(-most // 2), most))) if most > 4 else (most,)


def rows_for(count: int, most: int) -> int:
    """The fewest of `row_counts` that hold `count`."""
    for rows in row_counts(most):
        if count <= rows:
            return rows
    raise ValueError(f"{count} prompts do not fit {most} rows")
