"""SD3's transformer against diffusers, with every parameter random: outputs, gradients, both published layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

from mindvl_jax.core.params import Outline
from mindvl_jax.models.hf import ConfigReader
from mindvl_jax.models.sd3.hf import diffusers_rules, original_rules, read_config
from mindvl_jax.models.sd3.model import Sd3
from mindvl_jax.weights.tensors import to_parameters, to_published

SIZES = dict(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    caption_projection_dim=16,
    pooled_projection_dim=10,
    pos_embed_max_size=7,
)


@pytest.fixture(scope="module", params=[None, "rms_norm"], ids=["sd3", "sd3.5"])
def pair(request):
    torch.manual_seed(0)
    theirs = SD3Transformer2DModel(**SIZES, qk_norm=request.param)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (parameter.ndim == 1) * 0.1)
    reader = ConfigReader()
    config = read_config(dict(theirs.config), reader)
    assert not reader.problems
    config = config.model_copy(update={"compute_dtype": "float32"})
    outline = Outline.of(lambda rngs: Sd3(config, rngs=rngs))
    tensors = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    return theirs, config, outline, tensors, to_parameters(tensors, diffusers_rules(config), outline.shapes, "sd3")


def test_forward_and_every_gradient_equal_diffusers(pair):
    theirs, config, outline, _, params = pair
    rng = np.random.default_rng(1)
    noisy, text, pooled, weights = (
        rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 6, 8), (2, 5, 12), (2, 10), (2, 3, 6, 8))
    )
    # Angles up to 100 radians: at 900 the reference's frequencies, rounded to float32, differ by 2e-5 in the result.
    times = np.array([0.1, 0.025], np.float32)
    out = theirs(torch.tensor(noisy), torch.tensor(text), torch.tensor(pooled), torch.tensor(times * 1000)).sample
    theirs.zero_grad()
    (out * torch.tensor(weights)).sum().backward()

    @jax.jit
    def loss(params):
        predicted = outline.merge(params).velocity(noisy, times, text, pooled)
        return jnp.sum(predicted * weights), predicted

    gradients, predicted = jax.grad(loss, has_aux=True)(params)
    expected = out.detach().numpy()
    error = np.abs(predicted - expected).max() / np.abs(expected).max()
    assert error <= 1e-5, f"forward differs by {error:.1e}"
    published = to_published(gradients, diffusers_rules(config))
    unread = []
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None or not parameter.grad.abs().max() > 0:
            unread.append(name)
            assert np.abs(published[name]).max() == 0
            continue
        wanted = parameter.grad.numpy()
        error = np.abs(published[name] - wanted).max() / np.abs(wanted).max()
        assert error <= 1e-4, f"gradient of {name} differs by {error:.1e}"
    # the last block's text is attended, but its own queries are read by nobody
    assert all("transformer_blocks.2" in name and ("add_q" in name or "norm_added_q" in name) for name in unread)


def test_both_layouts_come_back_with_equal_bytes(pair):
    _, config, outline, tensors, params = pair
    again = to_published(params, diffusers_rules(config))
    assert again.keys() == tensors.keys()
    assert all(again[name].tobytes() == tensors[name].tobytes() for name in tensors)
    original = to_published(params, original_rules(config))
    back = to_parameters(original, original_rules(config), outline.shapes, "sd3")
    assert all(back[path].tobytes() == params[path].tobytes() for path in params)
    # diffusers' own conversion of original files reads ours
    converted = convert_sd3_transformer_checkpoint_to_diffusers(
        {name: torch.tensor(value) for name, value in original.items()}
    )
    assert converted.keys() == tensors.keys()
    for name, value in converted.items():
        np.testing.assert_array_equal(value.numpy(), tensors[name], err_msg=name)


def test_what_is_not_built_is_refused_by_name():
    reader = ConfigReader()
    read_config({**SIZES, "dual_attention_layers": [0, 1], "patch_size": 4}, reader)
    assert "dual_attention_layers (SD3.5-Medium) is not supported" in reader.problems
    assert any("patch_size is 4" in problem for problem in reader.problems)
