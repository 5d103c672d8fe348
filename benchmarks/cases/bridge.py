"""The training step through npu_bridge on torch, beside a torch model written by hand and beside XLA."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.measure import Comparison, Side
from benchmarks.registry import Settings, case


def compare_bridge(settings: Settings, model: str, workload, device: str) -> Comparison:
    import torch

    from benchmarks import handwritten, ours, twin, workloads

    torch.set_num_threads(settings.threads)
    config = workloads.MODELS[model]("float32")
    parameters = ours.initial(config)
    packed = workloads.build(workload, config, twin.make(config, parameters))
    written = handwritten.Handwritten(config, parameters, packed.batch, device=device)
    by_hand = handwritten.trainer(
        written, learning_rate=ours.LEARNING_RATE, weight_decay=ours.WEIGHT_DECAY, config=ours.OPTIMIZER
    )
    through = ours.Step(config, workload, packed.batch, parameters, bridge=device)
    on_xla = ours.Step(config, workload, packed.batch, parameters)
    checked = ours.agree(through, {"torch by hand": by_hand, "XLA": on_xla}, tolerance=1e-4)
    facts = {"lowering s": through.compile_seconds, "planned MiB": through.planned_bytes / 2**20}
    sides = [
        Side("npu_bridge, torch", through, packed.work, facts),
        Side("torch by hand", by_hand, packed.work),
        Side(
            "XLA",
            on_xla,
            packed.work,
            {"compile s": on_xla.compile_seconds, "planned MiB": on_xla.planned_bytes / 2**20},
        ),
    ]
    return Comparison(
        f"{model}, {workload.name}, float32, torch on {device}",
        sides,
        unit="tokens",
        checked=checked,
        bars={"torch by hand": 1.0},
        note="On a CPU the bridge runs the torch equivalents of its kernels: what is measured is the program that "
        "it writes, not fused kernels.",
    )


@case("bridge")
def bridge_case(settings: Settings) -> Iterator[Comparison]:
    """The whole training step through npu_bridge on torch CPU, beside torch by hand and XLA."""
    from benchmarks import workloads

    yield (
        compare_bridge(settings, "dry", workloads.DRY, "cpu")
        if settings.dry
        else compare_bridge(settings, "tiny", workloads.QUICKSTART, "cpu")
    )
