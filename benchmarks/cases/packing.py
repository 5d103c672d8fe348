"""Packing of published length mixes: time for each row, with efficiency and imbalance as facts."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.measure import Comparison, Side
from benchmarks.registry import Settings, case


@case("packing")
def packing_case(settings: Settings) -> Iterator[Comparison]:
    """Rows packed per second on three mixes, beside first fit and greedy packers, with fill and imbalance as facts."""
    from benchmarks import packing

    ranks, batches, buffer = (8, 2, 32) if settings.dry else (64, 8, 256)
    for mix in list(packing.MIXES)[:1] if settings.dry else packing.MIXES:
        sides = []
        for name, method in list(packing.METHODS.items())[: 2 if settings.dry else None]:
            # Quality is deterministic and measured once; the clock runs on a plan of one batch.
            found = packing.measure(method, mix, ranks, batches, buffer)
            facts = {
                fact: float(found[key])
                for fact, key in (
                    ("tokens filled", "tokens"),
                    ("patches filled", "patches"),
                    ("language max/mean", "language"),
                    ("vision max/mean", "vision"),
                )
            }
            sizes, loads, budgets = _waiting(mix, ranks)
            sides.append(
                Side(
                    name,
                    lambda method=method, sizes=sizes, loads=loads, budgets=budgets: method(
                        sizes, loads, budgets, ranks
                    ),
                    {"rows": float(ranks)},
                    facts,
                )
            )
        yield Comparison(
            mix,
            sides,
            unit="rows",
            clock="cpu",
            note=f"{ranks} ranks, one row each; a look-ahead of {buffer} samples or more; filled places and "
            f"max/mean work are averages over {batches} batches.",
        )


def _waiting(mix: str, ranks: int):
    import numpy as np

    from benchmarks import packing
    from mindvl_jax.data.packing.planner import AHEAD
    from mindvl_jax.models.vision_language.collate import visual_budgets
    from mindvl_jax.models.vision_language.work import PATCHES, TOKENS

    draw, tokens = packing.MIXES[mix]
    rng = np.random.default_rng(0)
    samples = []
    while sum(sample[0] for sample in samples) < AHEAD * ranks * tokens:
        sample = draw(rng)
        if sample[0] <= tokens:
            samples.append(sample)
    sizes, loads = packing.table(samples)
    patches = int(tokens * sizes[:, PATCHES].sum() / sizes[:, TOKENS].sum() * packing.ROOM) // 4 * 4
    fits = sizes[:, PATCHES] <= patches
    return sizes[fits], loads[fits], visual_budgets(tokens, patches, 10**6, 10**6, 10**6)
