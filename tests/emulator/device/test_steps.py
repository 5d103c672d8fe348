"""A MindVL training step on the emulated NPU: what it launches and waits for, captured and not, and a hundred of them
against XLA.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch_npu  # noqa: F401  (a broken installation fails here; nothing is skipped)

import npu_bridge
import npu_bridge.emulator as emulator
from mindvl_jax.golden import steps as golden
from npu_bridge import ops

STEPS = 100


def training(device):
    return golden.Training(golden.configuration(compute_dtype="float32", device=device))


def counted(step, warm=4):
    """Counters of one step, after some."""
    for _ in range(warm):
        metrics = step()
    float(np.asarray(metrics["loss"]))
    with emulator.count() as counts:
        step()
    return counts


def proof(counts):
    """For the page of results."""
    return {
        "kernels": sum(counts.kernels.values()),
        "launched by the host": sum(int(c["calls"] - c["captured"]) for c in counts.raw["kernels"].values()),
        "replays": counts.replays,
        "waits": sum(counts.synchronisations.values()),
        "copies from the host": counts.copies.get("host to device", 0),
    }


def test_a_captured_step_is_one_replay_without_synchronisation(monkeypatch, record_property):
    """Attention by masks, batch and learning rate on the device: what the host launches are copies of them into the
    graph's buffers and of the metrics out.
    """
    fused = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *operands, lengths=None, **named: fused(*operands, **named))
    own = training("npu")
    batch, rate = npu_bridge.jit(lambda arrays: jax.tree.map(jnp.copy, arrays), device="npu")(
        (own.batches[0], np.float32(golden.LEARNING_RATE))
    )

    def step():
        own.state, metrics = own.program(own.state, batch, rate)
        return metrics

    found = proof(check_captured(counted(step)))
    for name, value in found.items():
        record_property(name, value)


def check_captured(counts):
    """One replay without waiting; beside it the host launches nothing but copies."""
    found = proof(counts)
    launched = {
        name: int(c["calls"] - c["captured"]) for name, c in counts.raw["kernels"].items() if c["calls"] > c["captured"]
    }
    assert found["replays"] == 1 and found["waits"] == 0 and found["kernels"] > 100, (found, counts.synchronisations)
    assert set(launched) <= {"aclnnInplaceCopy"} and sum(launched.values()) <= 40, launched
    return counts


def test_a_captured_step_with_packed_attention_takes_the_lengths_of_each_batch(record_property):
    """Batches whose rows hold other samples, against XLA on the same; the batches come from the host."""
    losses = {}
    for device in (None, "npu"):
        own = training(device)
        turned = [
            jax.tree.map(lambda x: np.roll(np.asarray(x), turn, 0), batch) for turn, batch in enumerate(own.batches)
        ]
        assert len({np.asarray(batch.segment_lengths).tobytes() for batch in turned}) > 2, "the lengths are to differ"
        losses[device] = []
        for batch in (*turned, *turned):
            own.state, metrics = own.program(own.state, batch, np.float32(golden.LEARNING_RATE))
            losses[device].append(float(np.asarray(metrics["loss"])))
    relative = np.abs(np.subtract(losses["npu"], losses[None])) / losses[None]
    assert relative.max() <= 1e-5, f"losses of eight steps differ by {relative.max():.2e}, relative: {losses}"
    with emulator.count() as counts:
        own.state, _ = own.program(own.state, turned[1], np.float32(golden.LEARNING_RATE))
    found = proof(check_captured(counts))
    for name, value in found.items():
        record_property(name, value)


def test_losses_of_a_hundred_steps_equal_xla(monkeypatch, record_property):
    # The four batches are seen 25 times: at the rate of the twenty steps they are known by heart, and what is compared
    # is next to nothing.
    monkeypatch.setattr(golden, "LEARNING_RATE", 2e-4)
    losses = {}
    for device in (None, "npu"):
        own = training(device)
        metrics = [own.step() for _ in range(STEPS)]
        losses[device] = np.array([float(np.asarray(step["loss"])) for step in metrics])
    relative = np.abs(losses["npu"] - losses[None]) / losses[None]
    record_property("difference over 20 steps", f"{relative[:20].max():.1e}")
    record_property("difference over 100 steps", f"{relative.max():.1e}")
    record_property("loss", f"{losses['npu'][0]:.3f} to {losses['npu'][-1]:.3f}")
    assert losses["npu"][-1] < 0.8 * losses["npu"][0], "the training does not learn"
    assert relative[:20].max() <= 1e-5, f"losses of twenty steps differ by {relative[:20].max():.2e}, relative"
    assert relative.max() <= 1e-4, (
        f"losses of a hundred steps differ by {relative.max():.2e} at step {relative.argmax() + 1}, relative"
    )
