"""Slices of the published sizes on one GPU: ours on XLA, ours through the bridge, transformers; same weights, same
packed batch.

A slice has the full widths and vocabulary and few layers, so that two copies with their optimizer states fit one
device. Written for jax 0.10 and 0.11 and torch 2.11 and later. A side that runs out of memory is left out and named.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

from benchmarks.measure import Comparison, Side
from benchmarks.registry import Settings, case


def slice_of(preset: str, *, text_layers: int, vision_layers: int, full: tuple[int, ...], tied: bool):
    from mindvl_jax.config import families

    config = families.preset(preset)
    text = config.text.model_copy(update=dict(num_layers=text_layers, tie_word_embeddings=tied))
    vision = config.vision.model_copy(update=dict(depth=vision_layers, fullatt_block_indexes=full))
    return config.model_copy(update=dict(text=text, vision=vision, compute_dtype="bfloat16"))


def gpu_workload(tokens: int, dry: bool):
    from benchmarks import workloads

    if dry:
        return workloads.DRY
    return dataclasses.replace(
        workloads.LLAVA,
        name=f"LLaVA-like, {tokens} tokens",
        rows=1,
        tokens=tokens,
        patches=2 * tokens,
        samples=128,
        loss_chunk=2048,
    )


def without_memory(error: Exception) -> bool:
    return "out of memory" in str(error).lower() or "RESOURCE_EXHAUSTED" in str(error)


def compare_on_gpu(settings: Settings, name: str, config, tokens: int, *, bridge: bool) -> Comparison:
    import gc

    import jax
    import torch

    from benchmarks import ours, twin, workloads
    from mindvl_jax.core.devices import known_peak
    from mindvl_jax.models.vision_language.counts import batch_counts
    from mindvl_jax.models.vision_language.flops import FlopCounter

    device = "cpu" if settings.dry else "cuda"
    if device == "cuda" and (jax.default_backend() != "gpu" or not torch.cuda.is_available()):
        raise SystemExit(
            f"suite gpu needs a GPU that both jax (found {jax.default_backend()}) and torch (CUDA: "
            f"{torch.cuda.is_available()}) see; `--dry` starts it on a CPU"
        )
    workload = gpu_workload(tokens, settings.dry)
    parameters = ours.initial(config)
    reference = twin.make(config.model_copy(update=dict(compute_dtype="float32")), parameters)
    packed = workloads.build(workload, config, reference)
    mine = ours.Step(config, workload, packed.batch, parameters)
    flops = FlopCounter(config, mine.outline.shapes, list(mine.outline.shapes))(
        {key: float(value) for key, value in batch_counts(packed.batch).items()}
    )
    peak = known_peak(jax.devices()[0].device_kind)
    facts = {
        "compile s": mine.compile_seconds,
        "planned MiB": mine.planned_bytes / 2**20,
        "TFLOP of the language model": flops.language / 1e12,
        "TFLOP of the tower": flops.vision / 1e12,
    }
    if peak:
        facts["device peak TFLOP/s"] = peak / 1e12

    first = mine()  # the first loss of every side is compared with this
    sides, left_out, worst = [Side("ours, XLA", mine, packed.work, facts)], [], 0.0

    def add(side: str, build: Callable[[], Callable[[], tuple[float, float]]], tolerance: float) -> None:
        nonlocal worst
        try:
            step = build()
            loss = step()[0]
        except (RuntimeError, jax.errors.JaxRuntimeError) as error:
            if not without_memory(error):
                raise
            left_out.append(side)
            gc.collect()
            return
        difference = abs(loss - first[0]) / abs(loss)
        if not difference <= tolerance:
            raise AssertionError(
                f"{side}: the first loss is {loss:.6f}, ours {first[0]:.6f} ({difference:.1e} apart, allowed "
                f"{tolerance:.0e}): the sides do not do the same work"
            )
        worst = max(worst, difference)
        sides.append(Side(side, step, packed.work))

    def transformers_step(attention: str) -> Callable[[], tuple[float, float]]:
        reference.attend_by(attention)
        reference.to(device)
        inputs = {key: value.to(device) for key, value in twin.packed_inputs(packed).items()}
        optimizer = twin.optimizer_of(
            reference, learning_rate=ours.LEARNING_RATE, weight_decay=ours.WEIGHT_DECAY, config=ours.OPTIMIZER
        )
        return twin.trainer(reference, inputs, optimizer, clip_norm=ours.OPTIMIZER.clip_norm, bfloat16=True)

    add("transformers SDPA, packed", lambda: transformers_step("sdpa"), 5e-3)
    if bridge:
        add(
            f"npu_bridge, torch on {device}",
            functools.partial(ours.Step, config, workload, packed.batch, parameters, bridge=device),
            5e-3,
        )
    del parameters
    note = (
        f"{sum(value.size for value in mine.state.trained.values()) / 1e6:.0f} M parameters, "
        f"{len(packed.samples)} samples; bfloat16 over float32 masters."
    )
    if left_out:
        note += f" Out of memory and left out: {', '.join(left_out)}."
    bound = (flops.language + flops.vision) / peak if peak else None
    return Comparison(
        f"{name}, {tokens} tokens",
        sides,
        unit="tokens",
        checked={"loss difference": worst},
        bars={side.name: 1.3 for side in sides if side.name.startswith("transformers")},
        note=note,
        bound=bound,
    )


@case("gpu-2b", suite="gpu")
def gpu_2b(settings: Settings) -> Iterator[Comparison]:
    """A slice of MindVL with Qwen3-1.7B's widths (8 of 28 layers, 8 of the tower's 32) at 4k to 32k packed tokens."""
    from benchmarks import workloads

    for tokens in (4096,) if settings.dry else (4096, 8192, 16384, 32768):
        config = (
            workloads.MODELS["dry"]("bfloat16")
            if settings.dry
            else slice_of("mindvl-1.7b", text_layers=8, vision_layers=8, full=(7,), tied=True)
        )
        yield compare_on_gpu(settings, "2B slice", config, tokens, bridge=tokens <= 8192)


@case("gpu-8b", suite="gpu")
def gpu_8b(settings: Settings) -> Iterator[Comparison]:
    """A slice of MindVL-8B (3 of 36 layers, 4 of the tower's 32, output matrix tied) at 4k and 8k packed tokens."""
    from benchmarks import workloads

    for tokens in (4096,) if settings.dry else (4096, 8192):
        config = (
            workloads.MODELS["dry"]("bfloat16")
            if settings.dry
            else slice_of("mindvl-8b", text_layers=3, vision_layers=4, full=(3,), tied=True)
        )
        yield compare_on_gpu(settings, "8B slice", config, tokens, bridge=False)
