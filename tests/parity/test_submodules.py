"""Each submodule against its counterpart in transformers: same input, same weights, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mindvl_jax.models.layers.rope import text_tables, vision_tables
from mindvl_jax.parity.probe import compare_parts
from mindvl_jax.parity.samples import random_sample


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3"])
def test_every_part_agrees_on_the_input_that_the_reference_gave_it(family, name):
    made = family(name)
    rng = np.random.default_rng(1)
    pieces = (4,) if not hasattr(made.config, "vision") else (3, ("image", (1, 6, 10)), 2, ("video", (2, 4, 4), 1.0), 3)
    parts = compare_parts(made.model, made.reference, [random_sample(made.config, rng, *pieces)])
    names = {part.name for part in parts}
    expected = {"embed", "layer 0 attention", "layer 2 mlp", "norm", "head"}
    if hasattr(made.config, "vision"):
        expected |= {"vision patch_embed", "vision block 0", "vision block 3", "projector"}
    assert expected <= names, f"never compared: {expected - names}"
    worst = max(parts, key=lambda part: part.difference)
    assert all(part.scale > 1e-3 for part in parts), "a part whose output is nearly zero proves nothing"
    assert worst.difference < 1e-4, (
        f"{worst.name}: max difference {worst.difference:.1e} (outputs up to {worst.scale:.1f})"
    )


def test_vision_rotary_tables_are_those_of_transformers(family):
    reference = family("qwen2.5-vl").reference
    positions = np.random.default_rng(0).integers(0, 300, (1, 50, 2))
    theirs = reference.model.visual.rotary_pos_emb(torch.zeros(1), torch.tensor(positions[0]))
    for ours, want in zip(vision_tables(jnp.asarray(positions), 16, 1e4), theirs, strict=True):
        # Angles up to 300 rad in float32: their rounding, half a unit in the ninth bit after the point, is 1.5e-5.
        difference = np.abs(np.asarray(ours[0]) - want.numpy()).max()
        assert difference < 5e-5, f"max difference {difference:.1e}"


@pytest.mark.parametrize("name, sections", [("qwen2.5-vl", (2, 3, 3)), ("qwen3", None)])
def test_text_rotary_tables_are_those_of_transformers(family, name, sections):
    reference = family(name).reference
    positions = np.random.default_rng(0).integers(0, 500, (2, 3, 40))
    if sections:
        rotary, theirs_in, head_dim = (
            reference.model.language_model.rotary_emb,
            torch.tensor(positions).transpose(0, 1),
            16,
        )
    else:
        rotary, theirs_in, head_dim = reference.model.rotary_emb, torch.tensor(positions[:, 0]), 24
    theirs = rotary(torch.zeros(1), theirs_in)
    for ours, want in zip(text_tables(jnp.asarray(positions), head_dim, 1e4, sections), theirs, strict=True):
        difference = np.abs(np.asarray(ours) - want.numpy()).max()
        assert difference < 1e-4, f"max difference {difference:.1e}"  # angles up to 500 rad, as above


def test_published_section_split_turns_the_published_frequencies():
    """16, 24, 24 of 64: written out, frequency by frequency."""
    positions = np.array([[[3], [5], [7]]])
    cos, _ = text_tables(jnp.asarray(positions), 128, 1e6, (16, 24, 24))
    rows = [3] * 16 + [5] * 24 + [7] * 24
    want = [np.cos(row * 1e6 ** (-2 * i / 128)) for i, row in enumerate(rows)]
    np.testing.assert_allclose(cos[0, 0, :64], want, atol=1e-6)
    np.testing.assert_allclose(cos[0, 0, 64:], want, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen2.5-vl", "mindvl-mrope", "qwen3", "qwen2.5"])
def test_bfloat16_is_no_farther_from_float32_than_that_of_transformers(family, name):
    """Compare RMS errors over logits of several samples, ours and theirs, with weights rounded the same way."""
    from flax import nnx

    from mindvl_jax.models.outline import outline_of
    from mindvl_jax.parity.reference import load_reference
    from mindvl_jax.parity.samples import pack, reference_inputs
    from mindvl_jax.weights.load import load_parameters

    made = family(name)
    text_only = not hasattr(made.config, "vision")
    half_config = made.config.model_copy(update=dict(compute_dtype="bfloat16", param_dtype="bfloat16"))
    half = outline_of(half_config).merge(load_parameters(made.folder, half_config, dtype=jnp.bfloat16))
    # The float32 witness has the rounded weights too: only the computation differs.
    exact = load_reference(made.folder, torch.bfloat16).float()
    theirs = load_reference(made.folder, torch.bfloat16)
    rng = np.random.default_rng(4)
    shapes = [(24,), (40,), (30,)] if text_only else [(3, ("image", (1, 6, 8)), 8), (40,), (("image", (1, 4, 4)), 20)]
    samples = [random_sample(made.config, rng, *pieces) for pieces in shapes]
    graph, state = nnx.split(half, nnx.Param)
    batch = jax.tree.map(
        jnp.asarray,
        pack([[s] for s in samples], made.config, made.reference, tokens=48, patches=0 if text_only else 48),
    )

    def logits(state, batch):
        model = nnx.merge(graph, state)
        return model.logits(model(batch))

    ours = np.asarray(jax.jit(logits, compiler_options={"xla_backend_optimization_level": 0})(state, batch))
    errors = {"ours": [], "theirs": []}
    for row, sample in enumerate(samples):
        inputs = reference_inputs(sample, made.config)
        with torch.no_grad():
            want = exact(**inputs).logits[0].numpy()
            errors["theirs"].append(theirs(**inputs).logits[0].float().numpy() - want)
        errors["ours"].append(ours[row, : len(sample.tokens)] - want)
    rms = {who: float(np.sqrt(np.mean(np.concatenate(parts) ** 2))) for who, parts in errors.items()}
    assert rms["theirs"] > 0
    # Both are sums of the same number of random roundings; 5 % is the spread of such an estimate over these 20,000
    # logits.
    assert rms["ours"] < 1.05 * rms["theirs"], f"rms error {rms['ours']:.2e} against transformers' {rms['theirs']:.2e}"
