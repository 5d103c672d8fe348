"""Memory of a step as `mindvl plan` predicts it, against the growth of a process; each program in its own process."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.measure import Comparison, Side
from benchmarks.registry import Settings, case


def probe(backend: str, model: str, workload: str, threads: int, remat: str = "none", dtype: str = "float32") -> int:
    """Growth in bytes during a step, above the memory between two steps (state and batch, known by arithmetic)."""
    from benchmarks.machine import use_threads

    use_threads(threads)
    import gc

    import jax
    import torch

    from benchmarks import memory, ours

    torch.set_num_threads(threads)
    config, mix = _chosen(model, workload, dtype, remat)
    batch = _batch(config, mix)
    step = ours.Step(config, mix, batch, ours.initial(config), bridge=None if backend == "xla" else "cpu")
    step()
    gc.collect()
    jax.clear_caches()
    memory.trim()
    before = memory.anonymous_bytes()
    with memory.Peak() as peak:
        step()
        step()
    return peak.peak - before


def planned(backend: str, model: str, workload: str, remat: str = "none", dtype: str = "float32") -> int:
    """Bytes of the program beyond its arguments, from the plan that `mindvl plan` reads."""
    from benchmarks import ours

    config, mix = _chosen(model, workload, dtype, remat)
    return ours.Step(
        config, mix, _batch(config, mix), ours.initial(config), bridge=None if backend == "xla" else "cpu"
    ).planned_temporaries


def _chosen(model: str, workload: str, dtype: str, remat: str):
    from benchmarks import workloads

    return workloads.MODELS[model](dtype).model_copy(update=dict(remat=remat)), getattr(workloads, workload)


def _batch(config, mix):
    """Build full rows without a reference model: only sizes matter here."""
    from mindvl_jax.models.vision_language.collate import shape_for

    shape = shape_for(config.vision, rows=mix.rows, tokens=mix.tokens, patches=mix.patches, samples=mix.samples)
    batch = shape.empty()
    batch.loss_weights[:] = 1.0
    window = (config.vision.window_size // config.vision.patch_size) ** 2
    for ids, lengths, places, longest in (
        (batch.segment_ids, batch.segment_lengths, mix.tokens, mix.longest_sample),
        (batch.patch_segment_ids, batch.image_lengths, mix.patches, mix.longest_image),
        (batch.patch_window_ids, batch.window_lengths, mix.patches, window),
    ):
        ids[:] = np.arange(places) // longest + 1
        counts = np.bincount(ids[0])[1:]
        lengths[:, : len(counts)] = counts
    return batch


@case("plan")
def plan_case(settings: Settings) -> Iterator[Comparison]:
    """Activations and gradients that the plan predicts beside the growth of a process during a step, XLA and npu_bridge
    on torch CPU.
    """
    from benchmarks.memory import in_own_process

    chosen = (
        (("dry", "DRY", "none", "float32"),)
        if settings.dry
        else (
            ("tiny", "QUICKSTART", "none", "float32"),
            ("small", "QUICKSTART", "none", "float32"),
            ("small", "QUICKSTART", "full", "float32"),
            ("small", "QUICKSTART", "full", "bfloat16"),
        )
    )
    for model, workload, remat, dtype in chosen[: 3 if settings.brief else None]:
        for backend in ("xla", "npu_bridge"):
            common = dict(backend=backend, model=model, workload=workload, remat=remat, dtype=dtype)
            sizes = {
                "planned": in_own_process("benchmarks.cases.plan:planned", **common),
                "measured": in_own_process("benchmarks.cases.plan:probe", threads=settings.threads, **common),
            }
            yield Comparison(
                f"{backend}: {model}, {workload.lower()}, remat {remat}, {dtype}",
                [Side(name, size=size / 2**20) for name, size in sizes.items()],
                unit="MiB",
                note="The ratio is measured over planned. What an operator of torch takes inside is not in the "
                "bridge's plan.",
            )
