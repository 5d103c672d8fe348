"""Choose prompt rows for prefill: little padding, few compilations."""

from __future__ import annotations

import collections
import types
from collections.abc import Iterator, Sequence

import jax

from mindvl_jax.inference.buckets import Bucket, next_size, row_counts
from mindvl_jax.inference.prompts import Prompt, samples_of, vision_of
from mindvl_jax.models.vision_language.work import WorkModel

COMPILATION = {"cpu": 2e11}
"""Multiply-adds that a device does in the time of a compilation, some four seconds; an accelerator: 1e15."""

STEPS = 4
"""Sizes above the smallest possible one that are tried for tokens and for patches."""


class RowPlanner:
    """Find the cheapest rows for prompts that are prefilled together.

    Reuse a compiled size until the padding it wasted, summed over all calls that preferred a better size, exceeds the
    cost of one compilation. A small model then runs a whole evaluation at a few sizes, and a large one at the best.

    Args:
      model: its sizes give the cost of a token and of a patch.
      slots: most prompts of a call. groups: number of device groups that rows are spread over.
    """

    def __init__(self, model, slots: int, groups: int = 1):
        text = model.language.config
        work = WorkModel.of(types.SimpleNamespace(text=text, vision=vision_of(model)))
        self._token = (
            work.token - text.hidden_size * text.vocab_size
        )  # the output matrix is applied to one token of each prompt
        self._work, self._counts, self._groups = work, row_counts(slots), groups
        self._known: list[tuple[Bucket, int]] = []
        self._wasted: dict[tuple[Bucket, int], float] = collections.defaultdict(float)
        self._compilation = COMPILATION.get(jax.default_backend(), 1e15)
        self.free = True

    def __call__(self, prompts: Sequence[Prompt]) -> tuple[Bucket, int, list[list[int]]]:
        """Return the size of a row, the number of rows (some may stay empty), and the prompt indexes of each row."""
        sizes = [_size(prompt) for prompt in prompts]
        known = self._first(sizes, self._known)
        if not self.free:
            if known is None:
                raise ValueError(f"prompts of sizes {sizes} fit none of the fixed sizes {self._known}")
            return known
        best = self._first(sizes, (size for count in self._counts for size in _candidates(sizes, count)))
        if known is not None:
            self._wasted[best[:2]] += max(0.0, self._cost(*known[:2]) - self._cost(*best[:2]))
            if self._wasted[best[:2]] < self._compilation:
                return known
        self._known.append(best[:2])
        return best

    def fix(self, sizes: Sequence[tuple[Bucket, int]]) -> None:
        """Use only these sizes (bucket, rows) from now on."""
        self._known, self.free = list(sizes), False

    def holds(self, prompts: Sequence[Prompt]) -> bool:
        """Whether the prompts fit into one call. Always true unless sizes are fixed."""
        return self.free or self._first([_size(prompt) for prompt in prompts], self._known) is not None

    def _first(self, sizes, candidates) -> tuple[Bucket, int, list[list[int]]] | None:
        """Return the cheapest size that holds all prompts."""
        for bucket, count in sorted(candidates, key=lambda size: self._cost(*size)):
            rows = _arrange(sizes, bucket)
            if rows is not None and len(rows) <= count:
                return bucket, count, rows
        return None

    def _cost(self, bucket: Bucket, count: int) -> float:
        """Multiply-adds of a prefill; attention is computed for the whole square of a row."""
        row = (
            self._token * bucket.tokens
            + 2 * self._work.token_pair * bucket.tokens**2
            + self._work.patch * bucket.patches
            + self._work.patch_pair * bucket.patches**2
        )
        return count * row / (self._groups if count % self._groups == 0 else 1)


def arrange(prompts: Sequence[Prompt], bucket: Bucket) -> list[list[int]]:
    """Pack prompts into rows of the bucket's size, first fit, largest first. Returns the prompt indexes of each row.

    Raises:
      ValueError: a prompt larger than the bucket.
    """
    rows = _arrange([_size(prompt) for prompt in prompts], bucket)
    if rows is None:
        raise ValueError(f"a prompt is larger than {bucket}")
    return rows


def _size(prompt: Prompt) -> tuple[int, int, int]:
    return prompt.tokens, prompt.patches, len(prompt.example.image_lengths)


def _arrange(sizes: Sequence[tuple[int, int, int]], bucket: Bucket) -> list[list[int]] | None:
    rows: list[list[int]] = []
    left: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda index: sizes[index], reverse=True):
        tokens, patches, images = sizes[index]
        for row, (free_tokens, free_patches, free_images, free_samples) in enumerate(left):  # noqa: B007
            if tokens <= free_tokens and patches <= free_patches and images <= free_images and free_samples:
                break
        else:
            if tokens > bucket.tokens or patches > bucket.patches or images > bucket.images:
                return None
            row = len(rows)
            rows.append([])
            left.append([bucket.tokens, bucket.patches, bucket.images, samples_of(bucket)])
        rows[row].append(index)
        left[row] = [left[row][0] - tokens, left[row][1] - patches, left[row][2] - images, left[row][3] - 1]
    return rows


def _candidates(sizes: Sequence[tuple[int, int, int]], count: int) -> Iterator[tuple[Bucket, int]]:
    """Candidate sizes of `count` rows. The last count, one row for each prompt, always has a size that fits."""
    tokens, patches, images = (max(max(column), -(-sum(column) // count)) for column in zip(*sizes))
    for more_tokens in _ladder(tokens, 32):
        for more_patches in _ladder(patches, 16) if patches else (0,):
            yield (
                Bucket(tokens=more_tokens, patches=more_patches, images=next_size(2 * images, 4) if images else 0),
                count,
            )


def _ladder(value: int, smallest: int) -> Iterator[int]:
    """The first sizes from `value` on of smallest * (1, 1 1/4, 1 1/2, 1 3/4) * 2^k."""
    size = smallest
    while 2 * size <= value:
        size *= 2
    found = (size * (4 + quarter) // 4 * 2**octave for octave in range(STEPS) for quarter in range(4))
    yield from [step for step in found if step >= value][:STEPS]
