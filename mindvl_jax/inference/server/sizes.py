"""The prompt sizes that a server compiles before it answers, so that no request waits for a compilation."""

from __future__ import annotations

from mindvl_jax.inference.buckets import Bucket

TEXT_FROM = 64
PATCHES_FROM = 256


def prompt_sizes(*, context: int, patches: int, images: int, rows: int) -> list[tuple[Bucket, int]]:
    """Sizes (bucket, rows) that hold every prompt within the limits.

    Text sizes double from 64 tokens up to the context. Image sizes grow fourfold from 256 patches up to `patches`, each
    in a row just long enough for its visual tokens and in one of the whole context: padding is cheap beside a
    compilation of the tower.

    Args:
      context: longest prompt in tokens. patches: most patches of a prompt, 0 for a language model alone.
      images: most images of a prompt. rows: that are read together (device groups of the mesh).
    """
    ladder = _powers(TEXT_FROM, context, 2)
    buckets = [Bucket(patches=0, tokens=tokens, images=0) for tokens in ladder]
    for size in _powers(PATCHES_FROM, patches, 4) if patches else ():
        smallest = next((tokens for tokens in ladder if tokens >= size // 4 + TEXT_FROM), context)
        buckets += [Bucket(patches=size, tokens=tokens, images=images) for tokens in dict.fromkeys((smallest, context))]
    return [(bucket, rows) for bucket in buckets]


def _powers(start: int, end: int, factor: int) -> list[int]:
    """start, start * factor, ... below end, then end."""
    sizes = []
    while start < end:
        sizes.append(start)
        start *= factor
    return [*sizes, end]
