"""Flux's transformer against diffusers, with every parameter random: outputs, gradients, both published layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel

from mindvl_jax.core.params import Outline
from mindvl_jax.models.flux.hf import diffusers_rules, original_rules, read_config
from mindvl_jax.models.flux.model import Flux, from_tokens, to_tokens
from mindvl_jax.models.hf import ConfigReader
from mindvl_jax.weights.errors import WeightsError
from mindvl_jax.weights.tensors import to_parameters, to_published

SIZES = dict(
    in_channels=20,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    guidance_embeds=True,
    axes_dims_rope=(4, 6, 6),
)
GRID, TEXT, ROWS = (3, 2), 5, 2


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**SIZES)
    with torch.no_grad():  # modulation and gates start so small that half of the model would not be seen
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (parameter.ndim == 1) * 0.1)
    return model


@pytest.fixture(scope="module")
def ours(theirs):
    reader = ConfigReader()
    config = read_config(dict(theirs.config), reader)
    assert not reader.problems
    config = config.model_copy(update={"compute_dtype": "float32"})
    outline = Outline.of(lambda rngs: Flux(config, rngs=rngs))
    tensors = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    return config, outline, tensors, to_parameters(tensors, diffusers_rules(config), outline.shapes, "flux")


def inputs():
    rng = np.random.default_rng(1)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    # Angles up to 1,000 radians: beyond, the reference's own frequencies, rounded to float32, differ by more than 1e-4.
    times, guidance = np.array([0.9, 0.25], np.float32), np.array([1.0, 0.5], np.float32)
    return normal(ROWS, GRID[0] * GRID[1], 20), times, normal(ROWS, TEXT, 12), normal(ROWS, 10), guidance


def test_forward_and_every_gradient_equal_diffusers(theirs, ours):
    config, outline, _, params = ours
    noisy, times, text, pooled, guidance = inputs()
    rows, columns = np.meshgrid(range(GRID[0]), range(GRID[1]), indexing="ij")
    ids = np.stack([0 * rows, rows, columns], -1).reshape(-1, 3).astype(np.float32)
    weights = np.random.default_rng(2).normal(size=noisy.shape).astype(np.float32)
    out = theirs(
        torch.tensor(noisy),
        torch.tensor(text),
        torch.tensor(pooled),
        torch.tensor(times),
        torch.tensor(ids),
        torch.zeros(TEXT, 3),
        torch.tensor(guidance),
    ).sample
    theirs.zero_grad()
    (out * torch.tensor(weights)).sum().backward()

    @jax.jit
    def loss(params):
        predicted = outline.merge(params).velocity(noisy, times, text, pooled, grid=GRID, guidance_B=guidance)
        return jnp.sum(predicted * weights), predicted

    gradients, predicted = jax.grad(loss, has_aux=True)(params)
    expected = out.detach().numpy()
    error = np.abs(predicted - expected).max() / np.abs(expected).max()
    assert error <= 1e-5, f"forward differs by {error:.1e}"
    published = to_published(gradients, diffusers_rules(config))
    for name, parameter in theirs.named_parameters():
        wanted = parameter.grad.numpy()
        assert np.abs(wanted).max() > 0, f"{name} has no gradient"
        error = np.abs(published[name] - wanted).max() / np.abs(wanted).max()
        assert error <= 1e-4, f"gradient of {name} differs by {error:.1e}"


def test_both_layouts_come_back_with_equal_bytes(ours):
    config, outline, tensors, params = ours
    again = to_published(params, diffusers_rules(config))
    assert again.keys() == tensors.keys()
    assert all(again[name].tobytes() == tensors[name].tobytes() for name in tensors)
    original = to_published(params, original_rules(config))
    # as diffusers' conversion script splits and swaps them
    halves = np.split(original["final_layer.adaLN_modulation.1.weight"], 2)
    np.testing.assert_array_equal(np.concatenate(halves[::-1]), tensors["norm_out.linear.weight"])
    q, k, v, mlp = np.split(original["single_blocks.1.linear1.weight"], [32, 64, 96])
    for part, name in ((q, "attn.to_q"), (k, "attn.to_k"), (v, "attn.to_v"), (mlp, "proj_mlp")):
        np.testing.assert_array_equal(part, tensors[f"single_transformer_blocks.1.{name}.weight"])
    fused = np.concatenate([tensors[f"transformer_blocks.0.attn.add_{part}_proj.bias"] for part in "qkv"])
    np.testing.assert_array_equal(original["double_blocks.0.txt_attn.qkv.bias"], fused)
    back = to_parameters(original, original_rules(config), outline.shapes, "flux")
    assert all(back[path].tobytes() == params[path].tobytes() for path in params)


def test_tokens_are_two_by_two_neighbours_with_the_channel_slowest():
    latents = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)
    tokens = np.asarray(to_tokens(latents))
    np.testing.assert_array_equal(tokens[1, 4], latents[1, :, 2:4, 2:4].reshape(-1))  # row 1, column 1 of 2 x 3
    np.testing.assert_array_equal(from_tokens(tokens, 2, 3), latents)


def test_weights_that_do_not_fit_are_told_all_at_once(ours):
    config, outline, tensors, _ = ours
    wrong = dict(tensors, extra=np.zeros(1))
    wrong["x_embedder.weight"] = wrong["x_embedder.weight"][:, :1]
    del wrong["proj_out.bias"]
    with pytest.raises(WeightsError, match=r"(?s)3 problems.*proj_out.bias: missing.*extra: belongs.*x_embedder"):
        to_parameters(wrong, diffusers_rules(config), outline.shapes, "flux")
