"""Logits, loss and the gradient of every parameter against transformers, float32, tiny random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from mindvl_jax.parity.samples import pack, random_sample, reference_inputs
from mindvl_jax.weights.mapping import slots
from npu_bridge import ops

TEXT = ["qwen3", "qwen2.5"]
TRAINED = ["qwen2.5-vl", "qwen2.5-vl-window-70", "mindvl-mrope", *TEXT]
FORWARD_ONLY = [
    "qwen2.5-vl-tied",
    "qwen2.5-vl-window-112",
    "mindvl-1d",
]  # their backward passes hold nothing that the others do not
# Nearly all of this file's time is compilation of tiny programs.
QUICK = {"xla_backend_optimization_level": 0}


def samples_of(config, *, text_only):
    rng = np.random.default_rng(7)

    def make(*pieces):
        return random_sample(config, rng, *pieces)

    if text_only:
        return [make(9), make(20), make(1)]
    return [
        make(3, ("image", (1, 6, 10)), 5),  # one image, wider than the window, divided by it or not
        make(
            ("image", (1, 2, 2)), 2, ("image", (1, 8, 6)), 1, ("image", (1, 4, 4)), 3
        ),  # several sizes, the smallest there is
        make(2, ("video", (3, 4, 6), 1.5), 4, ("image", (1, 4, 2)), 2),  # a video with its own clock, then an image
        make(12),  # text only
        make(1, ("image", (1, 2, 40)), 2),  # an extreme aspect ratio
        make(("image", (1, 28, 2)), 2),  # and the other one
    ]


# Two rows, samples of every kind beside each other, padding in both rows: 2 x 130 places, 2 x 224 patches.
ROWS = [[0, 2, 3], [1, 4, 5]]


@pytest.fixture(scope="module")
def measured(family):
    """name -> reference logits, losses and gradients; ours on the packed rows. One forward and backward pass each."""
    store = {}

    def measure(name):
        if name in store:
            return store[name]
        made = family(name)
        text_only = name in TEXT
        samples = samples_of(made.config, text_only=text_only)
        rows = [[samples[i] for i in row] for row in ([[0, 1], [2]] if text_only else ROWS)]
        reference = made.reference
        reference.zero_grad()
        logits, losses = {}, {}
        for sample in samples:
            out = reference(**reference_inputs(sample, made.config))
            nll = torch.nn.functional.cross_entropy(
                out.logits[0, :-1], torch.tensor(sample.tokens[1:]), reduction="none"
            )
            learned = torch.tensor(sample.learned[1:]).float()
            (nll * learned).sum().backward()
            logits[id(sample)] = out.logits[0].detach().numpy()
            losses[id(sample)] = (nll * learned).detach().numpy()
        batch = jax.tree.map(
            jnp.asarray, pack(rows, made.config, reference, tokens=130, patches=0 if text_only else 224)
        )

        def run(state, batch):
            def total(state):
                model = nnx.merge(made.graph, state)
                hidden = model(batch, max_sample_length=80, max_image_patches=80)
                loss = ops.cross_entropy(
                    hidden, model.head_kernel(), batch.targets, batch.loss_weights, chunk=64
                )  # as token_losses does
                return loss.sum(), (model.logits(hidden), loss)

            if name in TRAINED:
                (_, (logits, loss)), grads = jax.value_and_grad(total, has_aux=True)(state)
                return logits, loss, grads
            return *total(state)[1], None

        ours = jax.jit(run, compiler_options=QUICK)(made.state, batch)
        store[name] = (made, rows, logits, losses, jax.device_get(ours))
        return store[name]

    return measure


def places(rows):
    for b, row in enumerate(rows):
        start = 0
        for sample in row:
            yield sample, b, slice(start, start + len(sample.tokens))
            start += len(sample.tokens)


@pytest.mark.parametrize("name", TRAINED + FORWARD_ONLY)
def test_logits_of_packed_rows_equal_those_of_transformers_on_each_sample_alone(measured, compare, name):
    _made, rows, logits, _, (ours, _, _) = measured(name)
    worst, kl = 0.0, []
    for sample, b, here in places(rows):
        worst = max(worst, compare.max_difference(ours[b, here], logits[id(sample)]))
        kl.append(compare.mean_kl(ours[b, here], logits[id(sample)]))
    spread = max(float(value.std()) for value in logits.values())
    assert spread > 0.1, f"the reference logits hardly vary ({spread}): the comparison would prove nothing"
    assert worst < 1e-4, f"largest logit difference {worst:.2e} (logits spread {spread:.2f})"
    assert np.mean(kl) < 1e-6, f"mean KL {np.mean(kl):.2e}"


@pytest.mark.parametrize("name", TRAINED + FORWARD_ONLY)
def test_loss_of_each_token_equals_that_of_transformers(measured, compare, name):
    _made, rows, _, losses, (_, ours, _) = measured(name)
    for sample, b, here in places(rows):
        worst = compare.max_difference(ours[b, here][:-1], losses[id(sample)])
        assert worst < 1e-4, f"largest token loss difference {worst:.2e}"
    total = sum(value.sum() for value in losses.values())
    assert abs(ours.sum() - total) / total < 1e-6, f"summed loss {ours.sum()} against {total}"


@pytest.mark.parametrize("name", TRAINED)
def test_gradient_of_every_parameter_equals_that_of_transformers(measured, name):
    made, _, _, _, (_, _, grads) = measured(name)
    flat = {"/".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(grads)}
    theirs = dict(made.reference.named_parameters())
    aliases = {"visual.": "model.visual.", "model.": "model.language_model."}
    seen, worst = set(), ("", 0.0)
    for slot in slots(made.config, {path: value.shape for path, value in flat.items()}):
        name_there = slot.name
        if name_there not in theirs:
            name_there = next(
                new + slot.name.removeprefix(old) for old, new in aliases.items() if slot.name.startswith(old)
            )
        gradient = theirs[name_there].grad.numpy()
        for path, want in zip(slot.rule.ours, slot.rule.form.to_ours(gradient, slot.shapes), strict=True):
            ours = flat[path][slot.index]
            relative = float(np.linalg.norm(ours - want) / np.linalg.norm(want))
            worst = max(worst, (f"{path}{list(slot.index)}", relative), key=lambda pair: pair[1])
            seen.add(path)
    assert seen == set(flat), f"never compared: {set(flat) - seen}"
    assert worst[1] < 1e-4, f"largest relative L2 difference {worst[1]:.2e} in {worst[0]}"
