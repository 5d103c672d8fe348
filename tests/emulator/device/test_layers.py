"""Kernels of one layer, forward and backward: MindVL through the bridge against the same model written by hand with the same fused calls."""

import collections

import jax
import numpy as np
import pytest
import torch
import torch_npu  # noqa: F401  (a broken installation fails here; nothing is skipped)

import npu_bridge
import npu_bridge.emulator as emulator
from mindvl_jax.doctor import golden
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.training import losses
from mindvl_jax.training.params import outline_of
from mindvl_jax.training.state import initial_params
from tests.emulator.device.handwritten import Handwritten


def model(text_layers, vision_blocks):
    config = golden.configuration(compute_dtype="float32", device="npu")
    vision = config.model.vision.model_copy(update=dict(depth=vision_blocks, fullatt_block_indexes=(1,)))
    return config, config.model.model_copy(update=dict(vision=vision, text=config.model.text.model_copy(update=dict(num_layers=text_layers))))


def both(text_layers, vision_blocks):
    """Kernels and loss of forward and backward by the bridge and by hand, on the same parameters and batch."""
    config, own = model(text_layers, vision_blocks)
    outline = outline_of(own)
    parameters = initial_params(outline, make_mesh(config.mesh, jax.devices()[:1]), 0)
    shape, (batch, *_) = golden.batches(own)

    def mean_loss(parameters, batch):
        token_losses = outline.merge(parameters).token_losses(batch, chunk=golden.ROWS * golden.TOKENS)
        numerator, denominator = losses.loss_terms(token_losses, batch.loss_weights, batch.segment_ids, samples=shape.samples, reduction="token")
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
    assert abs(float(np.asarray(loss)) - by_hand.item()) < 1e-5 * by_hand.item(), (float(np.asarray(loss)), by_hand.item())
    return collections.Counter(bridge.kernels), collections.Counter(hand.kernels)


@pytest.fixture(scope="module")
def counted():
    small = both(2, 2)
    return {name: [large - own for large, own in zip(both(*sizes), small)] for name, sizes in (("a layer of the language model", (3, 2)), ("a block of the vision tower", (2, 3)))}


def table(bridge, hand):
    lines = ["| Kernel | Bridge | By hand |", "|---|---|---|"]
    lines += [f"| {name.removeprefix('aclnn')} | {bridge[name]} | {hand[name]} |" for name in sorted({*bridge, *hand}, key=lambda name: (-max(bridge[name], hand[name]), name))]
    return "\n".join([*lines, f"| **all** | **{bridge.total()}** | **{hand.total()}** |"])


# What the bridge takes more than by hand, at most. The aim is 0; each line is what a pass would still have to remove.
#   8 padding that attends nothing: two comparisons, four fills, a fill of ones and the copy of statistics in attention and its gradient
#   4 tables of the rotary gradient, negated and swapped anew in every layer
#   3 one concatenation and two copies of SwiGLU's gradient; by hand the forward's concatenation is kept
#   8 statistics handed on as one number (logarithm, sum), copies of operands that are views
#   7 biases of the vision tower, added beside the product that could take them
MORE = {"a layer of the language model": 23, "a block of the vision tower": 30}


@pytest.mark.parametrize("part", MORE)
def test_a_layer_takes_no_more_kernels_than_by_hand_and_what_is_known(part, counted, record_property):
    bridge, hand = counted[part]
    record_property("bridge", bridge.total())
    record_property("by hand", hand.total())
    record_property(f"table: {part}", table(bridge, hand))
    assert bridge.total() <= hand.total() + MORE[part], f"{part}: {bridge.total()} kernels through the bridge, {hand.total()} by hand; {table(bridge, hand)}"
