"""Part by part: every submodule of ours on the very input that the reference's submodule got.

So an error shows where it arises, not where it ends up.

B rows, T tokens, P patches, D width.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from mindvl_jax.parity.reference import to_numpy
from mindvl_jax.parity.samples import ParitySample, pack, reference_inputs, visual_tokens
from mindvl_jax.weights.mapping import mapping_of
from npu_bridge import ops


@dataclasses.dataclass(frozen=True)
class Part:
    """Outcome for one submodule. difference: largest absolute one; scale: largest absolute output of the reference."""

    name: str
    difference: float
    scale: float
    layer: int | None = None


def _modules(reference, config) -> dict[str, Any]:
    """The reference's submodules by our names, as the family's mapping lists them."""
    found = {}
    for name, paths in mapping_of(config).reference_parts.items():
        for number in itertools.count():
            module = next(
                (module for path in paths if (module := _submodule(reference, path.format(layer=number))) is not None),
                None,
            )
            if module is not None:
                found[name.format(layer=number)] = module
            if module is None or "{layer}" not in name:
                break
    return found


def _submodule(module, path: str):
    """A submodule by dotted path; None where there is none."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def record(
    reference, config, inputs: dict[str, Any]
) -> tuple[dict[str, list[tuple[np.ndarray, np.ndarray]]], np.ndarray]:
    """Run the reference once: (input, output) of every submodule in call order, and the logits (T, V)."""
    calls: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    def hook(name):
        def keep(module, args, kwargs, output):
            given = args[0] if args else kwargs["hidden_states"]
            output = output[0] if isinstance(output, tuple) else output
            calls.setdefault(name, []).append(
                (given.detach().numpy() if not given.is_floating_point() else to_numpy(given), to_numpy(output))
            )

        return keep

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in _modules(reference, config).items()
    ]
    try:
        with torch.no_grad():
            logits = to_numpy(reference(**inputs).logits[0])
    finally:
        for handle in handles:
            handle.remove()
    return calls, logits


def compare_parts(model, reference, samples: Sequence[ParitySample]) -> list[Part]:
    """Every submodule on every sample; a part's outcome is the worst over samples and calls.

    Args:
      model: ours, float32. reference: of the same weights, float32.
    """
    worst: dict[str, Part] = {}
    jitted: dict[str, Callable] = {}
    for sample in samples:
        calls, _ = record(reference, model.config, reference_inputs(sample, model.config))
        batch = pack(
            [[sample]],
            model.config,
            reference,
            tokens=len(sample.tokens),
            patches=sum(len(visual.pixels) for visual in sample.visuals),
        )
        images = _visual_batches(model, reference, sample)
        for name, pairs in calls.items():
            contexts = images if name.startswith(("projector", "vision")) else [batch]
            for (given, want), context in zip(pairs, contexts, strict=True):
                got = np.asarray(_run(model, name, given, context, jitted)).reshape(want.shape)
                layer = next((int(word) for word in name.split() if word.isdigit()), None)
                part = Part(name, float(np.abs(got - want).max()), float(np.abs(want).max()), layer)
                worst[name] = max(worst.get(name, part), part, key=lambda p: p.difference)
    return list(worst.values())


def _visual_batches(model, reference, sample: ParitySample) -> list:
    """One batch for each call of the reference's tower: it sees all images at once, then all videos."""
    if not hasattr(model.config, "vision"):
        return []
    batches = []
    for kind in (1, 2):
        chosen = tuple(visual for visual in sample.visuals if visual.kind == kind)
        if chosen:
            tokens = np.concatenate([visual_tokens(model.config, kind, visual.grid) for visual in chosen])
            alone = dataclasses.replace(sample, tokens=tokens, visuals=chosen, learned=np.zeros(len(tokens), bool))
            batches.append(
                pack([[alone]], model.config, reference, tokens=len(tokens), patches=sum(len(v.pixels) for v in chosen))
            )
    return batches


def _layer(stack, number: int):
    return jax.tree.map(lambda leaf: leaf[number], stack)


def _run(model, name: str, given: np.ndarray, batch, jitted: dict[str, Callable]):
    """Our output for the reference's input of one part."""
    words = name.split()
    kind = words[0] if words[0] != "layer" else words[2]
    number = next((int(word) for word in words if word.isdigit()), None)
    x = jnp.asarray(given)
    whole = {
        "embed": lambda model, x: model.language.embed(x),
        "norm": lambda model, x: model.language.norm(x),
        "head": lambda model, x: model.logits(x),
        "projector": lambda model, x: model.projector(x[None]),
        "vision patch_embed": lambda model, x: model.vision.patch_embed(x[None]),
    }
    if name in whole:
        return jitted.setdefault(name, jax.jit(whole[name]))(model, x)
    if kind == "vision":
        program = jitted.setdefault(
            f"vision {number}", jax.jit(lambda model, x, batch: model.vision.run_block(number, x, batch))
        )
        return program(model, x[None], batch)
    if kind == "projector":  # one of several, by the name of their stack

        def project(model, x):
            return _layer(getattr(model.projector, words[1]), number)(x[None])

        return jitted.setdefault(name, jax.jit(project))(model, x)
    layer = _layer(model.language.layers, number)
    if kind != "attention":
        return jitted.setdefault(kind, jax.jit(lambda layer, x, kind=kind: getattr(layer, kind)(x)))(layer, x)

    def attend(layer, x, positions, ids):
        tables = model.language.rotary(positions)
        return layer.attention.finish(
            ops.attention(*layer.attention.project(x, *tables), segment_ids_q=ids, segment_ids_kv=ids, causal=True)
        )

    return jitted.setdefault(kind, jax.jit(attend))(
        layer, x, jnp.asarray(batch.positions), jnp.asarray(batch.segment_ids)
    )
