"""Peak memory of a training step: each side alone in a process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Comparison, Side
from benchmarks.registry import Settings, case

KINDS = {
    "transformers SDPA, packed": ("packed", False),
    "transformers SDPA, padded": ("padded", False),
    "transformers SDPA, padded, checkpointing": ("padded", True),
}


def prepare(folder: str, model: str, workload: str) -> None:
    """Write parameters, our batch and their inputs, so that the process of a side only computes steps."""
    import pickle

    import numpy as np
    import torch
    from safetensors.numpy import save_file

    from benchmarks import ours, twin, workloads
    from mindvl_jax.weights.save import save_parameters

    config, out = workloads.MODELS[model]("float32"), Path(folder)
    parameters = ours.initial(config)
    save_parameters(out / "published", config, parameters)
    save_file({path: np.asarray(value) for path, value in parameters.items()}, out / "parameters.safetensors")
    reference = twin.load(out / "published", config)
    packed = workloads.build(getattr(workloads, workload), config, reference)
    (out / "batch.pickle").write_bytes(pickle.dumps(packed.batch))
    torch.save(
        {"packed": twin.packed_inputs(packed), "padded": twin.padded_inputs(packed.samples, config, reference)},
        out / "inputs.pt",
    )


def probe(side: str, folder: str, model: str, workload: str, threads: int, remat: str = "none") -> dict[str, float]:
    """Bytes of one side at the peak of its second step.

    Returns:
      process: growth since before the model existed: parameters, moments, batch, temporaries of the step, compiled code
        and leftovers of the compiler. Memory used only during compilation is freed before.
      step: growth since between two steps, when parameters, moments and batch are held, and no gradients. loss: of the
        first step.
    """
    from benchmarks.machine import use_threads

    use_threads(threads)
    import gc
    import pickle

    import jax
    import jax.numpy as jnp
    import torch
    from safetensors.numpy import load_file

    from benchmarks import memory, ours, twin, workloads

    torch.set_num_threads(threads)
    config, mix, files = (
        workloads.MODELS[model]("float32").model_copy(update=dict(remat=remat)),
        getattr(workloads, workload),
        Path(folder),
    )
    jax.devices()
    before = memory.anonymous_bytes()
    if side == "ours":
        parameters = {path: jnp.asarray(value) for path, value in load_file(files / "parameters.safetensors").items()}
        step = ours.Step(config, mix, pickle.loads((files / "batch.pickle").read_bytes()), parameters)
        del parameters

        def drop_gradients():
            return None
    else:
        layout, checkpointing = KINDS[side]
        reference = twin.load(files / "published", config)
        reference.attend_by("sdpa")
        if checkpointing:
            reference.checkpoint_layers()
        inputs = torch.load(files / "inputs.pt")[layout]
        optimizer = twin.optimizer_of(
            reference, learning_rate=ours.LEARNING_RATE, weight_decay=ours.WEIGHT_DECAY, config=ours.OPTIMIZER
        )
        step = twin.trainer(reference, inputs, optimizer, clip_norm=ours.OPTIMIZER.clip_norm, bfloat16=False)

        def drop_gradients():
            return optimizer.zero_grad(set_to_none=True)

    loss, _ = step()
    drop_gradients()
    gc.collect()
    jax.clear_caches()
    memory.trim()
    resting = memory.anonymous_bytes()
    with memory.Peak() as peak:
        step()  # the same program on the same shapes: another would take no more
    return {"process": peak.peak - before, "step": peak.peak - resting, "loss": loss}


@case("step-memory")
def step_memory(settings: Settings) -> Iterator[Comparison]:
    """Peak memory of a step with and without remat, beside transformers with and without gradient checkpointing."""
    from benchmarks.memory import in_own_process

    against, bar = "transformers SDPA, padded, checkpointing", 1 / 0.7
    for model, workload in (("dry", "DRY"),) if settings.dry else (("tiny", "LLAVA"), ("small", "QUICKSTART")):
        sides = {"ours, remat full": dict(side="ours", remat="full"), against: dict(side=against)}
        if not (
            settings.dry or settings.brief
        ):  # what is not recomputed, and the other ways of transformers, have no bar
            sides |= {"ours": dict(side="ours")} | {name: dict(side=name) for name in KINDS}
        with tempfile.TemporaryDirectory() as folder:
            common = dict(folder=folder, model=model, workload=workload)
            in_own_process("benchmarks.cases.step_memory:prepare", **common)
            told = {
                name: in_own_process(
                    "benchmarks.cases.step_memory:probe", threads=settings.threads, **common, **arguments
                )
                for name, arguments in sides.items()
            }
        losses = [one["loss"] for one in told.values()]
        spread = (max(losses) - min(losses)) / min(losses)
        if not spread < 1e-4:  # as the training-step case allows float32
            raise AssertionError(f"the sides do not do the same work: losses {dict(zip(told, losses))}")
        for what, meaning in (
            ("process", "Growth of the process since before the model was there."),
            ("step", "Growth during the step; parameters, moments and the batch lie there before."),
        ):
            yield Comparison(
                f"{model}, {workload.lower()}, float32, {what}",
                [Side(name, size=one[what] / 2**20) for name, one in told.items()],
                unit="MiB",
                bars={against: bar},
                checked={"loss difference": spread},
                note=meaning,
            )
