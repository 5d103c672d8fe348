"""The training step: ours on XLA beside transformers on torch, same weights, same samples, same threads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from benchmarks.measure import Comparison, Side
from benchmarks.registry import Settings, case

# Largest relative difference of losses. bfloat16 has 8 significant bits and the two sides round at different points;
# averaged over hundreds of labels that is a few 1e-4 of the loss.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}


def compare_steps(
    settings: Settings, model: str, workload, dtype: str, kinds: dict[str, tuple[str, str]], bars: dict[str, float]
) -> Comparison:
    """Build ours and the twins, check that they agree, and return them for timing.

    Args:
      kinds: name of a side -> (attention implementation, "packed" or "padded").
    """
    import torch

    from benchmarks import ours, twin, workloads
    from mindvl_jax.models.vision_language.counts import batch_counts
    from mindvl_jax.models.vision_language.flops import FlopCounter

    torch.set_num_threads(settings.threads)
    config = workloads.MODELS[model](dtype)
    parameters = ours.initial(config)
    exporter = config.model_copy(update=dict(compute_dtype="float32"))
    twins = {name: twin.make(exporter, parameters) for name in kinds}
    packed = workloads.build(workload, config, next(iter(twins.values())))
    mine = ours.Step(config, workload, packed.batch, parameters)
    steps = {}
    for name, (attention, layout) in kinds.items():
        other = twins[name]
        other.attend_by(attention)
        inputs = twin.packed_inputs(packed) if layout == "packed" else twin.padded_inputs(packed.samples, config, other)
        if attention == "eager":
            inputs = twin.eager_masks(inputs)
        optimizer = twin.optimizer_of(
            other, learning_rate=ours.LEARNING_RATE, weight_decay=ours.WEIGHT_DECAY, config=ours.OPTIMIZER
        )
        steps[name] = twin.trainer(
            other, inputs, optimizer, clip_norm=ours.OPTIMIZER.clip_norm, bfloat16=dtype == "bfloat16"
        )
    checked = ours.agree(mine, steps, tolerance=TOLERANCE[dtype])
    parameters_count = sum(value.size for value in parameters.values())
    flops = FlopCounter(config, mine.outline.shapes, list(mine.outline.shapes))(
        {key: float(value) for key, value in batch_counts(packed.batch).items()}
    )
    work = packed.work | {"FLOP": flops.language + flops.vision}
    facts = {"compile s": mine.compile_seconds, "planned MiB": mine.planned_bytes / 2**20}
    sides = [Side("ours, XLA", mine, work, facts), *(Side(name, step, work) for name, step in steps.items())]
    filled = ", ".join(
        f"{share:.0%} of {what.removesuffix(' filled')}" for what, share in workloads.share_filled(packed).items()
    )
    note = (
        f"{parameters_count / 1e6:.1f} M parameters; {len(packed.samples)} samples in {workload.rows} rows of "
        f"{workload.tokens} tokens and {workload.patches} patches ({filled} filled)"
    )
    return Comparison(
        f"{model}, {workload.name}, {dtype}",
        sides,
        unit="tokens",
        checked=checked,
        bars={name: bar for name, bar in bars.items() if name in kinds},
        note=note,
    )


EAGER, SDPA = "transformers eager, packed", "transformers SDPA, packed"
PADDED, PADDED_EAGER = "transformers SDPA, padded", "transformers eager, padded"
KINDS = {
    EAGER: ("eager", "packed"),
    SDPA: ("sdpa", "packed"),
    PADDED: ("sdpa", "padded"),
    PADDED_EAGER: ("eager", "padded"),
}


@case("training-step")
def training_step(settings: Settings) -> Iterator[Comparison]:
    """Forward, backward, clipping and AdamW of one model on equal samples: packed, and padded to one sample a row."""
    from benchmarks import workloads

    if settings.dry:
        yield compare_steps(settings, "dry", workloads.DRY, "float32", KINDS, {EAGER: 1.5})
        return
    for dtype in ("float32", "bfloat16"):
        yield compare_steps(settings, "tiny", workloads.QUICKSTART, dtype, KINDS, {EAGER: 1.5, SDPA: 1.5})


def share_of_peak(step: Side, dtype: str, dry: bool) -> Comparison:
    """The step's floating-point operations a second beside those of square matrix products alone, in turns: the ratio
    is the share of the measured peak.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    size, times = (64, 2) if dry else (2048, 8)
    values = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    x, tensor = jnp.asarray(values, dtype), torch.tensor(values).to(getattr(torch, dtype))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))

    def on_xla():
        for _ in range(times):
            product(x, x).block_until_ready()

    def on_torch():
        for _ in range(times):
            tensor @ tensor

    work = {"FLOP": 2.0 * size**3 * times}
    sides = [
        Side(step.name, step.run, {"FLOP": step.work["FLOP"]}),
        Side("XLA, products alone", on_xla, work),
        Side("torch, products alone", on_torch, work),
    ]
    return Comparison(
        f"share of the matmul peak, {dtype}",
        sides,
        unit="FLOP",
        bars={side.name: 0.5 for side in sides[1:]},
        note=f"Counted is what the real tokens and patches need, no padding; products of {size} x {size} "
        "matrices. The larger rate of the two is the peak.",
    )


@case("training-step-small")
def training_step_small(settings: Settings) -> Iterator[Comparison]:
    """The step of the 60 M model beside transformers, and its share of this machine's measured matmul peak."""
    from benchmarks import workloads

    model, workload = ("dry", workloads.DRY) if settings.dry else ("small", workloads.QUICKSTART)
    for dtype in ("float32",) if settings.dry or settings.brief else ("float32", "bfloat16"):
        comparison = compare_steps(settings, model, workload, dtype, {SDPA: KINDS[SDPA]}, {SDPA: 1.5})
        yield comparison
        yield share_of_peak(comparison.sides[0], dtype, settings.dry)


@case("training-step-llava")
def training_step_llava(settings: Settings) -> Iterator[Comparison]:
    """The same on the lengths of LLaVA-Instruct, to measure the cost of padding."""
    from benchmarks import workloads

    # About 30 samples, a usual batch for fine-tuning: the longest sample of a batch determines the padding.
    batch = dataclasses.replace(workloads.LLAVA, rows=4)

    for dtype in ("bfloat16",) if settings.brief else ("float32", "bfloat16"):
        yield compare_steps(
            settings,
            "dry" if settings.dry else "tiny",
            workloads.DRY if settings.dry else batch,
            dtype,
            {name: KINDS[name] for name in (SDPA, PADDED)},
            {PADDED: 3.0},
        )
