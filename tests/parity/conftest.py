"""Tiny random transformers models, saved as folders in the published layout, and ours loaded from the same folders."""

import functools
import types

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from mindvl_jax.models.mindvl.reference import ComposedMindVL
from mindvl_jax.models.outline import outline_of
from mindvl_jax.parity.reference import load_reference
from mindvl_jax.weights.load import load_parameters
from mindvl_jax.weights.mapping import read_config

torch.set_num_threads(1)
TOKENS = dict(image_token_id=192, video_token_id=193, vision_start_token_id=190, vision_end_token_id=191)
WIDTHS = dict(
    vocab_size=200,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
VISION = dict(
    depth=4,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    out_hidden_size=64,
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
    in_channels=3,
    window_size=56,
    fullatt_block_indexes=[1, 3],
    tokens_per_second=2,
)


def _qwen2_5_vl(tied=False, **vision):
    text = dict(
        WIDTHS,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]),
        tie_word_embeddings=tied,
    )
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=VISION | vision, tie_word_embeddings=tied, **TOKENS
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _mindvl(mrope):
    rope = dict(rope_type="default", rope_theta=1e4) | (dict(mrope_section=[4, 4, 4]) if mrope else {})
    text = dict(WIDTHS.items()) | dict(model_type="qwen3", head_dim=24, rope_parameters=rope, tie_word_embeddings=False)
    return ComposedMindVL(
        dict(model_type="mindvl", text_config=text, vision_config=VISION, tie_word_embeddings=False, **TOKENS)
    )


BUILDERS = {
    "qwen2.5-vl": _qwen2_5_vl,
    "qwen2.5-vl-tied": functools.partial(_qwen2_5_vl, tied=True),
    # 70 px is no multiple of the 28 px of a merged group: windows are 2 x 2 groups. 112 px windows, irregular full
    # blocks.
    "qwen2.5-vl-window-70": functools.partial(_qwen2_5_vl, window_size=70, fullatt_block_indexes=[2]),
    "qwen2.5-vl-window-112": functools.partial(_qwen2_5_vl, window_size=112, fullatt_block_indexes=[0, 3]),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **WIDTHS, head_dim=24, tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e4)
        )
    ),
    "qwen2.5": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **WIDTHS, tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=1e4)
        )
    ),
    "mindvl-mrope": functools.partial(_mindvl, True),
    "mindvl-1d": functools.partial(_mindvl, False),
}


def _randomise(model):
    """Random values everywhere: norms away from one and biases away from zero, so that none can be forgotten unseen."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        # A width of 64 wants larger matrices than 0.02, or attention would be uniform and prove little.
        parameter.data = (
            (1 + 0.1 * noise) if "norm" in name or "ln_q" in name else noise * (0.1 if parameter.ndim > 1 else 0.05)
        )


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """family(name) -> reference, config, folder, model (graphdef, parameters): built once a session."""

    @functools.cache
    def build(name):
        folder = tmp_path_factory.mktemp(name.replace(".", "-"))
        reference = BUILDERS[name]().float().eval()
        _randomise(reference)
        if isinstance(reference, ComposedMindVL):
            _save_composed(reference, folder)
        else:
            reference.config._attn_implementation = "eager"
            reference.save_pretrained(folder)
        reference = load_reference(folder)
        config = read_config(folder)
        config = config.model_copy(update=dict(compute_dtype="float32"))
        model = outline_of(config).merge(load_parameters(folder, config))
        graph, state = nnx.split(model, nnx.Param)
        return types.SimpleNamespace(
            name=name,
            reference=reference,
            config=config,
            folder=folder,
            model=model,
            graph=graph,
            state=state,
            text=config.text,
        )

    return build


def _save_composed(reference, folder):
    import json

    from safetensors.torch import save_file

    content = dict(model_type="mindvl", tie_word_embeddings=False, **TOKENS, vision_config=VISION)
    rope = dict(rope_type="default", rope_theta=1e4) | (
        dict(mrope_section=reference.sections) if reference.sections else {}
    )
    content["text_config"] = dict(WIDTHS, model_type="qwen3", head_dim=24, rope_parameters=rope)
    (folder / "config.json").write_text(json.dumps(content))
    save_file(
        {name: tensor.contiguous() for name, tensor in reference.state_dict().items() if "inv_freq" not in name},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def max_difference(ours, theirs) -> float:
    return float(np.max(np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))))


def mean_kl(ours, theirs) -> float:
    """Mean Kullback-Leibler divergence of the reference's distributions from ours, over all places; float64."""

    def log(x):
        return x - np.log(np.sum(np.exp(x - x.max(-1, keepdims=True)), -1, keepdims=True)) - x.max(-1, keepdims=True)

    p, q = log(np.asarray(theirs, np.float64)), log(np.asarray(ours, np.float64))
    return float(np.mean(np.sum(np.exp(p) * (p - q), -1)))


@pytest.fixture(scope="session")
def compare():
    return types.SimpleNamespace(max_difference=max_difference, mean_kl=mean_kl)
