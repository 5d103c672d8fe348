"""Qwen3-MoE and DeepSeek-V3 against transformers: logits, gradients, chosen experts, packing, balancing terms."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from mindvl_jax.config.adapters import AdaptersConfig
from mindvl_jax.models.adapters import is_adapter, kernel_path, leaf_path
from mindvl_jax.models.deepseek_v3.config import DeepSeekV3Config
from mindvl_jax.models.layers.config import DeepSeekV3TextConfig, MoEConfig, Qwen3MoETextConfig, YarnConfig
from mindvl_jax.models.layers.decoder import self_attention
from mindvl_jax.models.layers.language_model import LanguageModel
from mindvl_jax.models.layers.mla import rotary_tables, softmax_scale
from mindvl_jax.models.outline import outline_of
from mindvl_jax.models.qwen3_moe.config import Qwen3MoEConfig
from mindvl_jax.models.registry import SPECS
from mindvl_jax.objectives import routing
from mindvl_jax.weights.adapter_layout import layout_of
from mindvl_jax.weights.adapters import WEIGHTS, read_adapter, write_adapter
from mindvl_jax.weights.errors import WeightsError
from mindvl_jax.weights.load import load_parameters
from mindvl_jax.weights.mapping import read_config
from mindvl_jax.weights.merge import merge_folder
from mindvl_jax.weights.save import save_parameters

V, T = 97, 20
YARN = YarnConfig(factor=4, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)


def _deepseek(
    *, query_rank: int | None = 24, yarn: YarnConfig | None = YARN, groups: int = 4, kept: int = 2
) -> DeepSeekV3Config:
    moe = MoEConfig(
        experts=8,
        experts_per_token=3,
        intermediate_size=24,
        shared_experts=1,
        scoring="sigmoid",
        selection_bias=True,
        groups=groups,
        groups_kept=kept,
        renormalize=True,
        scale=2.5,
        balance_loss=1e-2,
        balance="sequence",
        bias_update_rate=1e-2,
    )
    text = DeepSeekV3TextConfig(
        vocab_size=V,
        hidden_size=48,
        intermediate_size=64,
        num_layers=3,
        dense_layers=1,
        num_heads=4,
        q_lora_rank=query_rank,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        moe=moe,
        yarn=yarn,
    )
    return DeepSeekV3Config(text=text, compute_dtype="float32")


def _qwen(renormalize: bool = True) -> Qwen3MoEConfig:
    moe = MoEConfig(
        experts=6,
        experts_per_token=2,
        intermediate_size=20,
        scoring="softmax",
        renormalize=renormalize,
        balance_loss=1e-2,
        z_loss=1e-3,
    )
    text = Qwen3MoETextConfig(
        vocab_size=V,
        hidden_size=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope_theta=1e4,
        tie_word_embeddings=False,
        rope="1d",
        moe=moe,
    )
    return Qwen3MoEConfig(text=text, compute_dtype="float32")


def _theirs(config):
    text, moe = config.text, config.text.moe
    common = dict(
        vocab_size=V,
        hidden_size=text.hidden_size,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
        max_position_embeddings=256,
        moe_intermediate_size=moe.intermediate_size,
        num_experts_per_tok=moe.experts_per_token,
        norm_topk_prob=moe.renormalize,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
    )
    if config.family == "qwen3_moe":
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **common,
                num_key_value_heads=2,
                head_dim=16,
                num_experts=moe.experts,
                rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            )
        )
    rope = {"rope_type": "default", "rope_theta": text.rope_theta}
    if text.yarn is not None:
        rope |= dict(
            rope_type="yarn",
            factor=text.yarn.factor,
            original_max_position_embeddings=text.yarn.original_max_position_embeddings,
            beta_fast=32,
            beta_slow=1,
            mscale=text.yarn.mscale,
            mscale_all_dim=text.yarn.mscale_all_dim,
        )
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **common,
            intermediate_size=text.intermediate_size,
            num_key_value_heads=text.num_heads,
            n_shared_experts=1,
            n_routed_experts=moe.experts,
            routed_scaling_factor=moe.scale,
            kv_lora_rank=text.kv_lora_rank,
            q_lora_rank=text.q_lora_rank,
            qk_rope_head_dim=text.qk_rope_head_dim,
            qk_nope_head_dim=text.qk_nope_head_dim,
            v_head_dim=text.v_head_dim,
            n_group=moe.groups,
            topk_group=moe.groups_kept,
            first_k_dense_replace=text.dense_layers,
            rope_parameters=rope,
        )
    )


def _randomised(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            scale = 0.6 if "correction_bias" in name else 0.15
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + (1.0 if "norm" in name else 0.0))
    return model.float().eval()


def _ours(config, theirs) -> dict[str, np.ndarray]:
    """Our parameters from a transformers model, by a mapping written for this test."""
    state = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    text = config.text
    dense = text.dense_layers if config.family == "deepseek_v3" else 0
    found: dict[str, np.ndarray] = {}

    def linear(name):
        return state[f"{name}.weight"].T

    found["language/embed/embedding"] = state["model.embed_tokens.weight"]
    found["language/norm/scale"] = state["model.norm.weight"]
    found["language/head/kernel"] = linear("lm_head")
    for ours, numbers in (("language/dense", range(dense)), ("language/layers", range(dense, text.num_layers))):
        columns: dict[str, list[np.ndarray]] = {}
        for number in numbers:
            layer = f"model.layers.{number}"
            attention = f"{layer}.self_attn"
            values = {
                "norm1/scale": state[f"{layer}.input_layernorm.weight"],
                "norm2/scale": state[f"{layer}.post_attention_layernorm.weight"],
                "attention/output/kernel": linear(f"{attention}.o_proj"),
            }
            if config.family == "qwen3_moe":
                values |= {
                    f"attention/{part}/kernel": linear(f"{attention}.{part[0]}_proj")
                    for part in ("query", "key", "value")
                }
                values |= {
                    f"attention/{part}_norm/scale": state[f"{attention}.{part[0]}_norm.weight"]
                    for part in ("query", "key")
                }
            else:
                names = {"latent_down": "kv_a_proj_with_mqa", "latent_up": "kv_b_proj"}
                names |= (
                    {"query_up": "q_proj"}
                    if text.q_lora_rank is None
                    else {"query_down": "q_a_proj", "query_up": "q_b_proj"}
                )
                values |= {f"attention/{mine}/kernel": linear(f"{attention}.{name}") for mine, name in names.items()}
                values["attention/latent_norm/scale"] = state[f"{attention}.kv_a_layernorm.weight"]
                if text.q_lora_rank is not None:
                    values["attention/query_norm/scale"] = state[f"{attention}.q_a_layernorm.weight"]
            if number < dense:
                values |= {f"mlp/{part}/kernel": linear(f"{layer}.mlp.{part}_proj") for part in ("gate", "up", "down")}
            else:
                width = text.moe.intermediate_size
                gate_up = state[f"{layer}.mlp.experts.gate_up_proj"].transpose(0, 2, 1)
                values |= {
                    "moe/experts/gate": gate_up[..., :width],
                    "moe/experts/up": gate_up[..., width:],
                    "moe/experts/down": state[f"{layer}.mlp.experts.down_proj"].transpose(0, 2, 1),
                    "moe/router/kernel": linear(f"{layer}.mlp.gate"),
                }
                if config.family == "deepseek_v3":
                    values["moe/router/bias"] = state[f"{layer}.mlp.gate.e_score_correction_bias"]
                    values |= {
                        f"moe/shared/{part}/kernel": linear(f"{layer}.mlp.shared_experts.{part}_proj")
                        for part in ("gate", "up", "down")
                    }
            for path, value in values.items():
                columns.setdefault(f"{ours}/{path}", []).append(value)
        found |= {path: np.stack(column) for path, column in columns.items()}
    return found


@dataclasses.dataclass
class Pair:
    config: object
    theirs: torch.nn.Module
    params: dict

    def logits(self, params, ids_BT, positions=None, segments=None):
        model = outline_of(self.config).merge(params)
        hidden, routed = self._hidden(model, ids_BT, positions, segments)
        return model.logits(hidden), routed

    def _hidden(self, model: LanguageModel, ids_BT, positions, segments):
        B, T = ids_BT.shape
        positions = jnp.broadcast_to(jnp.arange(T), (B, 3, T)) if positions is None else positions
        segments = jnp.ones((B, T), jnp.int32) if segments is None else segments
        return model.language.routed(model.language.embed(ids_BT), positions, segments)


CASES = {
    "qwen3-moe": _qwen,
    "qwen3-moe without renormalising": lambda: _qwen(False),
    "deepseek-v3": _deepseek,
    "deepseek-v3, direct queries, plain rope": lambda: _deepseek(query_rank=None, yarn=None),
    "deepseek-v3, one group": lambda: _deepseek(groups=1, kept=1),
}


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request):
    config = CASES[request.param]()
    theirs = _randomised(_theirs(config))
    params = {path: jnp.asarray(value) for path, value in _ours(config, theirs).items()}
    shapes = outline_of(config).shapes
    assert {path: value.shape for path, value in params.items()} == {
        path: shape.shape for path, shape in shapes.items()
    }
    return Pair(config, theirs, params)


def _ids(rows: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, (rows, T))


def _largest(ours, theirs) -> float:
    return float(
        np.abs(np.asarray(ours) - theirs.detach().numpy()).max() / max(1.0, np.abs(theirs.detach().numpy()).max())
    )


def test_logits_and_chosen_experts_are_those_of_transformers(pair):
    ids = _ids()
    chosen = []
    name = "mlp.gate"
    hooks = [
        module.register_forward_hook(lambda _, __, out: chosen.append(out))
        for path, module in pair.theirs.named_modules()
        if path.endswith(name)
    ]
    expected = pair.theirs(torch.from_numpy(ids)).logits
    for hook in hooks:
        hook.remove()
    logits, routed = jax.jit(pair.logits)(pair.params, jnp.asarray(ids))
    assert _largest(logits, expected) < 1e-5
    E = pair.config.text.moe.experts
    for layer, out in enumerate(chosen):
        indices = (
            next(part for part in out if torch.is_tensor(part) and not part.is_floating_point())
            if isinstance(out, tuple)
            else None
        )
        if indices is not None:
            counts = np.bincount(indices.reshape(-1).numpy(), minlength=E)
            np.testing.assert_array_equal(np.asarray(routed.load[layer]), counts)


def test_gradients_of_every_parameter_are_those_of_transformers(pair):
    ids, targets = _ids(seed=1), _ids(seed=2)
    logits = pair.theirs(torch.from_numpy(ids)).logits
    pair.theirs.zero_grad()
    torch.nn.functional.cross_entropy(logits.reshape(-1, V), torch.from_numpy(targets).reshape(-1)).backward()

    def loss(params):
        own = pair.logits(params, jnp.asarray(ids))[0]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(own), jnp.asarray(targets)[..., None], -1))

    ours = jax.jit(jax.grad(loss))(pair.params)
    gradients = {name: torch.zeros_like(value) for name, value in pair.theirs.state_dict().items()}
    gradients |= {name: parameter.grad for name, parameter in pair.theirs.named_parameters()}

    class Gradients:
        def state_dict(self):
            return gradients

    for path, expected in _ours(pair.config, Gradients()).items():
        difference = np.abs(np.asarray(ours[path]) - expected).max() / max(1e-3, np.abs(expected).max())
        assert difference < 1e-4, f"{path}: {difference}"
    if "language/layers/moe/router/bias" in ours:
        assert not np.any(ours["language/layers/moe/router/bias"]), "the selection bias has no gradient"


def test_a_packed_row_gives_the_logits_of_its_samples_alone_and_padding_counts_nowhere(pair):
    ids = _ids(rows=1, seed=5)
    first, second, padding = 8, 9, T - 17
    segments = jnp.asarray([[1] * first + [2] * second + [0] * padding])
    positions = jnp.broadcast_to(jnp.asarray([[*range(first), *range(second), *[0] * padding]]), (1, 3, T))
    packed, routed = jax.jit(pair.logits)(pair.params, jnp.asarray(ids), positions, segments)
    alone = [
        jax.jit(pair.logits)(pair.params, jnp.asarray(ids[:, part]))
        for part in (slice(0, first), slice(first, first + second))
    ]
    expected = np.concatenate([np.asarray(logits)[0] for logits, _ in alone])
    assert np.abs(np.asarray(packed)[0, : first + second] - expected).max() < 2e-5
    for field in dataclasses.fields(routed):
        value = getattr(routed, field.name)
        total = sum(np.asarray(getattr(one, field.name)) for _, one in alone)
        np.testing.assert_allclose(value, total, rtol=1e-5, atol=1e-5, err_msg=field.name)


def test_sequence_balance_is_the_formula_of_the_report():
    config = _deepseek()
    pair = Pair(
        config,
        None,
        {
            path: jnp.asarray(np.random.default_rng(7).normal(0, 0.2, shape.shape), jnp.float32)
            for path, shape in outline_of(config).shapes.items()
        },
    )
    ids = jnp.asarray(_ids(rows=1, seed=8))
    segments = jnp.asarray([[1] * 11 + [2] * 6 + [0] * 3])
    model = outline_of(config).merge(pair.params)
    x = jnp.asarray(np.random.default_rng(9).normal(0, 1, (1, T, 48)), jnp.float32)
    layer = jax.tree.map(lambda leaf: leaf[0], model.language.layers)
    _, routed = layer.moe(x, segments)
    scores = 1 / (1 + np.exp(-np.asarray(layer.moe.router(x[0]), np.float64)))
    biased = scores + np.asarray(layer.moe.router.bias[...], np.float64)
    expected = 0.0
    for start, stop in ((0, 11), (11, 17)):
        counts, means = np.zeros(8), np.zeros(8)
        for token in range(start, stop):
            strength = np.sort(biased[token].reshape(4, 2), -1).sum(-1)
            eligible = np.repeat(np.isin(np.arange(4), np.argsort(-strength)[:2]), 2)
            for expert in np.argsort(-np.where(eligible, biased[token], -np.inf))[:3]:
                counts[expert] += 1
            means += scores[token] / scores[token].sum()
        length = stop - start
        expected += np.sum(counts * 8 / (3 * length) * means / length)
    assert abs(float(routed.sequence_balance) - expected) < 1e-5
    assert ids.shape == segments.shape


def test_pooled_balance_loss_is_that_of_transformers_and_z_loss_that_of_the_formula():
    config = _qwen()
    theirs = _randomised(_theirs(config))
    pair = Pair(config, theirs, {path: jnp.asarray(value) for path, value in _ours(config, theirs).items()})
    ids = _ids(seed=4)
    out = theirs(torch.from_numpy(ids), output_router_logits=True)
    expected = load_balancing_loss_func(out.router_logits, 6, 2)
    _, routed = pair.logits(pair.params, jnp.asarray(ids))
    tokens = ids.size
    assert abs(float(routing.balance(routed, config.text.moe, tokens, segments=3.0)) - float(expected)) < 1e-5
    logits = torch.stack([layer.reshape(-1, 6) for layer in out.router_logits])
    z = torch.logsumexp(logits, -1).square().mean()
    assert abs(float(routing.z(routed, tokens)) - float(z)) < 1e-4


def test_the_bias_moves_towards_experts_that_got_less_than_the_mean():
    bias = jnp.asarray([[0.0, 0.5, -0.5, 0.0]])
    load = jnp.asarray([[10.0, 2.0, 4.0, 4.0]])  # mean 5
    np.testing.assert_allclose(routing.moved_bias(bias, load, 0.01), [[-0.01, 0.51, -0.49, 0.01]], rtol=1e-6)


def test_published_sizes_have_their_published_numbers_of_parameters():
    expected = {"qwen3-30b-a3b": 30_532_122_624, "qwen3-235b-a22b": 235_093_634_560, "deepseek-v3": 671_026_419_200}
    for family in ("qwen3_moe", "deepseek_v3"):
        for name, build in SPECS[family].presets.items():
            config = build()
            assert sum(math.prod(shape.shape) for shape in outline_of(config).shapes.values()) == expected[name], name
    assert SPECS["deepseek_v3"].presets["deepseek-v3"]().text.cache_width == 576


def test_absorbed_decoding_attends_as_the_unabsorbed_form():
    config = _deepseek()
    shapes = outline_of(config).shapes
    model = outline_of(config).merge(
        {
            path: jnp.asarray(np.random.default_rng(3).normal(0, 0.3, shape.shape), jnp.float32)
            for path, shape in shapes.items()
        }
    )
    attention = jax.tree.map(lambda leaf: leaf[0], model.language.layers).attention
    x = jnp.asarray(np.random.default_rng(4).normal(0, 1, (2, T, 48)), jnp.float32)
    tables = rotary_tables(jnp.broadcast_to(jnp.arange(T), (2, 3, T)), config.text)
    nope, rotary = attention.queries(x, *tables)
    latent, shared = attention.latents(x, *tables)
    k, v = attention.keys_and_values(latent, shared)
    whole = self_attention(
        jnp.concatenate([nope, rotary], -1),
        k,
        v,
        jnp.ones((2, T), jnp.int32),
        None,
        None,
        scale=softmax_scale(config.text),
    )
    for place in (0, 7, T - 1):
        seen = jnp.broadcast_to(jnp.arange(T) <= place, (2, T))
        one = attention.attend_absorbed(nope[:, place], rotary[:, place], latent, shared, seen)
        assert np.abs(np.asarray(one - whole[:, place])).max() < 1e-5
    assert latent.shape[-1] + shared.shape[-1] == config.text.cache_width


def test_remat_changes_neither_loss_nor_load():
    config = _deepseek()
    shapes = outline_of(config).shapes
    params = {
        path: jnp.asarray(np.random.default_rng(5).normal(0, 0.2, shape.shape), jnp.float32)
        for path, shape in shapes.items()
    }
    found = {}
    for remat in ("none", "full", "attention"):
        pair = Pair(config.model_copy(update=dict(remat=remat)), None, params)

        def loss(params, pair=pair):
            logits, routed = pair.logits(params, jnp.asarray(_ids()))
            return jnp.mean(jnp.square(logits)), routed.load

        found[remat] = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    (value, load), gradients = found["none"]
    for remat, ((other, other_load), others) in found.items():
        assert abs(float(other - value)) <= 1e-6 * abs(float(value)), remat
        np.testing.assert_array_equal(load, other_load)
        worst = max(
            float(jnp.abs(others[path] - gradients[path]).max() / (jnp.abs(gradients[path]).max() + 1e-6))
            for path in gradients
        )
        assert worst < 1e-5, (remat, worst)
    assert nnx.state(outline_of(config).merge(params)) is not None


@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3", "deepseek-v3, direct queries, plain rope"])
def test_published_files_are_read_to_the_same_parameters_and_written_back_to_equal_bytes(name, tmp_path):
    """transformers writes one tensor an expert; the mapping of this test, written by hand, is the witness."""
    config = CASES[name]()
    theirs = _randomised(_theirs(config))
    theirs.save_pretrained(tmp_path / "theirs")
    read = read_config(tmp_path / "theirs")
    balancing = dict(
        balance_loss=config.text.moe.balance_loss,
        z_loss=config.text.moe.z_loss,
        bias_update_rate=config.text.moe.bias_update_rate,
    )
    text = read.text.model_copy(
        update=dict(
            moe=read.text.moe.model_copy(update=balancing), max_position_embeddings=config.text.max_position_embeddings
        )
    )
    if config.family == "qwen3_moe":
        text = text.model_copy(update=dict(intermediate_size=1))
    assert text == config.text
    params = load_parameters(tmp_path / "theirs")
    expected = _ours(config, theirs)
    assert set(params) == set(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(params[path], value, err_msg=path)
    save_parameters(tmp_path / "ours", read, params)
    files = [
        {
            key: value
            for file in folder.glob("*.safetensors")
            for key, value in safetensors.numpy.load_file(file).items()
        }
        for folder in (tmp_path / "theirs", tmp_path / "ours")
    ]
    assert files[0].keys() == files[1].keys()
    for key, value in files[0].items():
        assert value.tobytes() == files[1][key].tobytes(), key
    assert any(".experts.3.gate_proj" in key for key in files[0])


def test_a_quantised_folder_and_one_with_an_mtp_layer_that_config_json_denies_are_refused_by_name(tmp_path):
    theirs = _theirs(_deepseek())
    theirs.config.num_nextn_predict_layers = 0
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(
        safetensors.numpy.load_file(file) | {"model.layers.3.enorm.weight": np.ones(48, np.float32)},
        file,
        {"format": "pt"},
    )
    with pytest.raises(WeightsError, match=r"unexpected +model\.layers\.3\.enorm\.weight"):
        load_parameters(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="block-scaled FP8"):
        read_config(tmp_path)


ADAPTED = {
    "qwen3-moe": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
    "deepseek-v3": ["kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_of_attention_and_of_every_expert_give_the_merged_models_logits(name, tmp_path):
    """One adapter an expert and matrix, as PEFT's files have them; the merged matrices are written out by hand."""
    theirs = _randomised(_theirs(CASES[name]()))
    theirs.save_pretrained(tmp_path / "base")
    config = read_config(tmp_path / "base").model_copy(update=dict(compute_dtype="float32"))
    settings = AdaptersConfig(targets=ADAPTED[name], rank=2, alpha=5, ranks={"down_proj": 3})
    layout, outline = layout_of(settings, config), outline_of(config, settings)
    rng = np.random.default_rng(0)
    adapters = {
        path: rng.normal(size=like.shape).astype(np.float32) * 0.15
        for path, like in outline.shapes.items()
        if is_adapter(path)
    }
    assert {path.split("/")[-2] for path in adapters} >= {"gate_adapter", "up_adapter", "down_adapter"}
    write_adapter(tmp_path / "adapter", config, layout, adapters)
    again = read_adapter(tmp_path / "adapter", config)
    assert again.layout == layout and all(np.array_equal(again.parameters[path], adapters[path]) for path in adapters)

    ids, positions = _ids(), jnp.broadcast_to(jnp.arange(T), (3, 3, T))
    parameters = load_parameters(tmp_path / "base", config)

    def logits(outline, parameters):
        @jax.jit
        def run(parameters):
            model = outline.merge(parameters)
            hidden, _ = model.language.routed(model.language.embed(ids), positions, jnp.ones((3, T), jnp.int32))
            return model.logits(hidden)

        return run(parameters)

    found = logits(outline, {**parameters, **adapters})
    merged = {
        path: np.asarray(value)
        + sum(
            (5 / adapter.rank) * (adapters[leaf_path(module, "lora_a")] @ adapters[leaf_path(module, "lora_b")])
            for module, adapter in layout.items()
            if kernel_path(module) == path
        )
        for path, value in parameters.items()
    }
    np.testing.assert_allclose(found, logits(outline_of(config), merged), atol=2e-5)
    assert np.abs(found - logits(outline_of(config), parameters)).max() > 0.1, "the adapters do nothing"
    # Not PEFT's own model: its conversion of experts (0.19.1) fails with this transformers. The names are its.
    names = safetensors.numpy.load_file(tmp_path / "adapter" / WEIGHTS)
    assert "base_model.model.model.layers.1.mlp.experts.5.gate_proj.lora_A.weight" in names
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    with torch.no_grad():
        expected = type(theirs).from_pretrained(tmp_path / "merged").eval()(torch.from_numpy(ids)).logits
    assert _largest(found, expected) < 1e-5
