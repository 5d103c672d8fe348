"""Peak memory of a training step: each side alone in a process."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.measure import Comparison, Side
from benchmarks.registry import Settings, case

KINDS = {"transformers SDPA, packed": ("packed", False), "transformers SDPA, padded": ("padded", False), "transformers SDPA, padded, checkpointing": ("padded", True)}


def probe(side: str, model: str, workload: str, threads: int, remat: str = "none") -> int:
    """Growth in bytes from before the model is there to the highest point of a step, after a first one.

    What XLA's compiler and the export needed is given back before; what a program keeps (parameters, moments, code) counts.
    """
    from benchmarks.machine import use_threads

    use_threads(threads)
    import gc

    import jax
    import torch

    from benchmarks import memory, ours, twin, workloads

    torch.set_num_threads(threads)
    mix = getattr(workloads, workload)
    config = workloads.MODELS[model]("float32").model_copy(update=dict(remat=remat))
    jax.devices()
    before = memory.anonymous_bytes()
    parameters = ours.initial(config)
    reference = twin.make(config, parameters)
    packed = workloads.build(mix, config, reference)
    if side == "ours":
        del reference
        step = ours.Step(config, mix, packed.batch, parameters)
    else:
        layout, checkpointing = KINDS[side]
        reference.attend_by("sdpa")
        if checkpointing:
            reference.checkpoint_layers()
        inputs = twin.packed_inputs(packed) if layout == "packed" else twin.padded_inputs(packed.samples, config, reference)
        optimizer = twin.optimizer_of(reference, learning_rate=ours.LEARNING_RATE, weight_decay=ours.WEIGHT_DECAY, config=ours.OPTIMIZER)
        step = twin.trainer(reference, inputs, optimizer, clip_norm=ours.OPTIMIZER.clip_norm, bfloat16=False)
    del parameters, packed
    step()
    gc.collect()
    jax.clear_caches()
    memory.trim()
    with memory.Peak() as peak:
        step()  # the same program on the same shapes: another would take no more
    return peak.peak - before


@case("step-memory")
def step_memory(settings: Settings) -> Iterator[Comparison]:
    """Peak memory of the step, ours with and without remat beside transformers with and without gradient checkpointing."""
    from benchmarks.memory import in_own_process

    against = "transformers SDPA, padded, checkpointing"
    for model, workload in (("dry", "DRY"),) if settings.dry else (("tiny", "LLAVA"), ("small", "QUICKSTART")):
        sides = {"ours, remat full": dict(side="ours", remat="full"), against: dict(side=against)}
        if not settings.dry:
            sides |= {"ours": dict(side="ours")}
        if not (settings.dry or settings.brief):  # the other ways of transformers have no bar
            sides |= {name: dict(side=name) for name in KINDS}
        common = dict(model=model, workload=workload, threads=settings.threads)
        grown = {name: in_own_process("benchmarks.cases.step_memory:probe", **common, **arguments) / 2**20 for name, arguments in sides.items()}
        yield Comparison(f"{model}, {workload.lower()}, float32", [Side(name, size=size) for name, size in grown.items()], unit="MiB", bars={against: 1 / 0.7})
