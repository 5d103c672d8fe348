"""Text encoders and the image autoencoder against transformers and diffusers, with every parameter random."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from mindvl_jax.core.errors import UserError
from mindvl_jax.models.frozen import clip_text, kl_vae, t5
from mindvl_jax.models.frozen.tensors import Tensors, check


def randomised(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.15 + (parameter.ndim == 1) * 0.5)
    return model.eval()


def tensors_of(model):
    return {name: jnp.asarray(value.numpy()) for name, value in model.state_dict().items()}


def close(ours, theirs, bar=1e-5):
    theirs = theirs.detach().numpy()
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert error <= bar, f"differs by {error:.1e}"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (CLIPTextModel, dict(hidden_act="quick_gelu", eos_token_id=2)),
        (CLIPTextModelWithProjection, dict(hidden_act="gelu", eos_token_id=30, projection_dim=12)),
    ],
)
def test_clip_text_equals_transformers(kind, options):
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    config = CLIPTextConfig(**sizes, max_position_embeddings=9, **options)
    theirs, end = randomised(kind(config)), 39 if options["eos_token_id"] == 2 else 30
    ids = np.array([[5, 7, 2, end, 0, 0, 0], [5, 1, 3, 4, 8, end, 0]])
    expected = theirs(torch.tensor(ids), output_hidden_states=True)
    read, values = clip_text.ClipText.read(config.to_dict()), tensors_of(theirs)
    ours = jax.jit(lambda values, ids: clip_text.encode(read, Tensors(values), ids))(values, ids)
    close(ours.last, expected.last_hidden_state)
    close(ours.penultimate, expected.hidden_states[-2])
    close(ours.pooled, expected.text_embeds if "projection_dim" in options else expected.pooler_output)
    check(lambda tensors: clip_text.encode(read, tensors, jnp.asarray(ids)), values, "folder")


@pytest.mark.parametrize("kind", ["t5", "umt5"])
def test_t5_encoders_equal_transformers_with_and_without_a_mask(kind):
    config = (T5Config if kind == "t5" else UMT5Config)(
        vocab_size=40,
        d_model=16,
        d_kv=6,
        d_ff=20,
        num_layers=3,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
    )
    theirs = randomised((T5EncoderModel if kind == "t5" else UMT5EncoderModel)(config))
    ids = np.random.default_rng(0).integers(0, 40, (2, 26))
    mask = np.arange(26) < np.array([[9], [26]])
    read, values = t5.T5Encoder.read(config.to_dict()), tensors_of(theirs)
    run = jax.jit(lambda values, mask: t5.encode(read, Tensors(values), ids, mask))
    close(run(values, None), theirs(torch.tensor(ids)).last_hidden_state)
    masked = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
    close(np.asarray(run(values, mask))[mask], masked[torch.tensor(mask)])
    check(lambda tensors: t5.encode(read, tensors, jnp.asarray(ids)), values, "folder")


@pytest.mark.parametrize("quantised", [True, False])
def test_autoencoder_equals_diffusers(quantised):
    theirs = randomised(
        AutoencoderKL(
            block_out_channels=(8, 12),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=3,
            norm_num_groups=2,
            use_quant_conv=quantised,
            use_post_quant_conv=quantised,
        )
    )
    rng = np.random.default_rng(0)
    pixels, latents = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 8, 12), (2, 3, 4, 6)))
    read, values = kl_vae.KlVae.read(dict(theirs.config)), tensors_of(theirs)
    mean, log_variance = jax.jit(lambda values: kl_vae.encode(read, Tensors(values), pixels))(values)
    expected = theirs.encode(torch.tensor(pixels)).latent_dist
    close(mean, expected.mean)
    close(log_variance, expected.logvar)
    decoded = jax.jit(lambda values: kl_vae.decode(read, Tensors(values), latents))(values)
    close(decoded, theirs.decode(torch.tensor(latents)).sample)

    def whole(tensors):
        return kl_vae.encode(read, tensors, jnp.asarray(pixels)), kl_vae.decode(read, tensors, jnp.asarray(latents))

    check(whole, values, "folder")
    with pytest.raises(UserError, match="belong to nothing in this network: spare"):
        check(whole, values | {"spare": jnp.zeros(1)}, "folder")
    with pytest.raises(UserError, match=r"decoder.conv_in.weight is missing"):
        check(whole, {k: v for k, v in values.items() if k != "decoder.conv_in.weight"}, "folder")


def test_what_is_not_built_is_refused_by_name():
    with pytest.raises(UserError, match="act_fn is 'mish'"):
        kl_vae.KlVae.read({"act_fn": "mish", "block_out_channels": [8]})
    with pytest.raises(UserError, match="hidden_act is 'tanh'"):
        clip_text.ClipText.read({"hidden_act": "tanh"})
    with pytest.raises(UserError, match="model_type is 'bert'"):
        t5.T5Encoder.read(json.loads('{"model_type": "bert"}'))
