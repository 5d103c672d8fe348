"""Kernels of one layer, forward and backward: MindVL through the bridge against the same model written by hand with the
same fused calls.
"""

import collections

import jax
import numpy as np
import pytest
import torch
import torch_npu  # noqa: F401  (a broken installation fails here; nothing is skipped)

import npu_bridge
import npu_bridge.emulator as emulator
from mindvl_jax.golden import steps as golden
from mindvl_jax.models.outline import outline_of
from mindvl_jax.objectives import sft
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.training.state import initial_params
from tests.emulator.device.handwritten import Handwritten


def model(text_layers, vision_blocks):
    config = golden.configuration(compute_dtype="float32", device="npu")
    vision = config.model.vision.model_copy(update=dict(depth=vision_blocks, fullatt_block_indexes=(1,)))
    return config, config.model.model_copy(
        update=dict(vision=vision, text=config.model.text.model_copy(update=dict(num_layers=text_layers)))
    )


def both(text_layers, vision_blocks):
    """Kernels and loss of forward and backward by the bridge and by hand, on the same parameters and batch."""
    config, own = model(text_layers, vision_blocks)
    outline = outline_of(own)
    parameters = initial_params(outline, make_mesh(config.mesh, jax.devices()[:1]), 0)
    shape, (batch, *_) = golden.batches(own)

    def mean_loss(parameters, batch):
        token_losses = outline.merge(parameters).token_losses(batch, chunk=golden.ROWS * golden.TOKENS)
        numerator, denominator = sft.loss_terms(
            token_losses, batch.loss_weights, batch.segment_ids, samples=shape.samples, reduction="token"
        )
        return numerator / denominator

    jitted = npu_bridge.jit(jax.value_and_grad(mean_loss), device="npu", capture=False)
    jitted(parameters, batch)  # constants are made once
    placed = jax.tree.map(np.asarray, batch)
    with emulator.count() as bridge:
        loss, _ = jitted(parameters, placed)
        torch.npu.synchronize()
    twin = Handwritten(own, {path: np.asarray(value) for path, value in parameters.items()}, batch)
    with emulator.count() as hand:
        by_hand = twin.loss()
        torch.autograd.grad(by_hand, list(twin.leaves.values()))
        torch.npu.synchronize()
    assert abs(float(np.asarray(loss)) - by_hand.item()) < 1e-5 * by_hand.item(), (
        float(np.asarray(loss)),
        by_hand.item(),
    )
    return collections.Counter(bridge.kernels), collections.Counter(hand.kernels)


@pytest.fixture(scope="module")
def counted():
    small = both(2, 2)
    return {
        name: [large - own for large, own in zip(both(*sizes), small)] for name, sizes in zip(PARTS, ((3, 2), (2, 3)))
    }


def table(bridge, hand):
    lines = ["| Kernel | Bridge | By hand |", "|---|---|---|"]
    lines += [
        f"| {name.removeprefix('aclnn')} | {bridge[name]} | {hand[name]} |"
        for name in sorted({*bridge, *hand}, key=lambda name: (-max(bridge[name], hand[name]), name))
    ]
    return "\n".join([*lines, f"| **all** | **{bridge.total()}** | **{hand.total()}** |"])


PARTS = ("a layer of the language model", "a block of the vision tower")


@pytest.mark.parametrize("part", PARTS)
def test_a_layer_takes_no_more_kernels_than_by_hand(part, counted, record_property):
    bridge, hand = counted[part]
    record_property("bridge", bridge.total())
    record_property("by hand", hand.total())
    record_property(f"table: {part}", table(bridge, hand))
    assert bridge.total() <= hand.total(), (
        f"{part}: {bridge.total()} kernels through the bridge, {hand.total()} by hand; {table(bridge, hand)}"
    )
