"""MTP heads of DeepSeek-V3 against the formula in plain torch; transformers gives the decoder layers, no MTP."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from torch.nn.functional import cross_entropy, rms_norm
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from mindvl_jax.models.outline import outline_of
from mindvl_jax.models.vision_language.batch import Batch
from mindvl_jax.weights.errors import WeightsError
from mindvl_jax.weights.load import load_parameters
from mindvl_jax.weights.mapping import read_config
from mindvl_jax.weights.save import save_parameters

V, D, L, T, K = 61, 32, 2, 18, 2
"""K: heads, whose layers are numbers L and L + 1 in the files."""


@pytest.fixture(scope="module")
def reference():
    """A transformers model of L + K layers, the last of which are the heads' own, and the heads' other tensors."""
    config = DeepseekV3Config(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=40,
        moe_intermediate_size=16,
        num_hidden_layers=L + K,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_shared_experts=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        q_lora_rank=12,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        attn_implementation="eager",
    )
    model, generator = DeepseekV3ForCausalLM(config).float().eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                drawn = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(drawn * 0.2 + (1.0 if "norm" in name else 0.0))

    def gain():
        return 1 + 0.2 * torch.randn(D, generator=generator)

    heads = {}
    for layer in range(L, L + K):
        heads |= {f"model.layers.{layer}.{name}.weight": gain() for name in ("enorm", "hnorm", "shared_head.norm")}
        heads[f"model.layers.{layer}.eh_proj.weight"] = 0.2 * torch.randn(D, 2 * D, generator=generator)
    return model, {name: value.requires_grad_() for name, value in heads.items()}


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    """The published layout: the heads' layers behind the others, token table and output matrix repeated in each."""
    model, heads = reference
    folder = tmp_path_factory.mktemp("mtp")
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file) | {name: value.detach().numpy() for name, value in heads.items()}
    for layer in range(L, L + K):
        tensors[f"model.layers.{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        tensors[f"model.layers.{layer}.shared_head.head.weight"] = tensors["lm_head.weight"]
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    content |= {"num_hidden_layers": L, "num_nextn_predict_layers": K}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def _losses_in_torch(model, heads, ids, targets, weights, samples) -> tuple[list, list]:
    """Weighted losses of each head, sample by sample, and the weights used; all at the predicting position."""
    base, found = model.model, [torch.zeros(T) for _ in range(K)]
    used = [torch.zeros(T) for _ in range(K)]
    for start, stop in samples:
        own, length = ids[None, start:stop], stop - start
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        rotary = base.rotary_emb(base.embed_tokens(own), torch.arange(length)[None])

        def layer(number, x, mask=mask, rotary=rotary):
            return base.layers[number](x, attention_mask=mask, position_embeddings=rotary)

        embeddings = base.embed_tokens(own)
        h = embeddings
        for number in range(L):
            h = layer(number, h)
        h = base.norm(h)
        for k in range(1, K + 1):
            name = f"model.layers.{L + k - 1}"
            ahead = torch.zeros_like(embeddings)
            ahead[:, :-k] = embeddings[:, k:]
            halves = [
                rms_norm(x, (D,), heads[f"{name}.{norm}.weight"], 1e-6) for norm, x in (("enorm", ahead), ("hnorm", h))
            ]
            h = layer(L + k - 1, torch.cat(halves, -1) @ heads[f"{name}.eh_proj.weight"].T)
            logits = model.lm_head(rms_norm(h, (D,), heads[f"{name}.shared_head.norm.weight"], 1e-6))[0]
            for t in range(length - k):  # `targets` at t is token t + 1, so head k is taught the one at t + k
                weight = weights[start + t + k]
                used[k - 1][start + t] = weight
                found[k - 1][start + t] = weight * cross_entropy(logits[t], targets[start + t + k])
    return found, used


def _batch(ids, targets, weights, samples) -> Batch:
    segments, positions = np.zeros((1, T), np.int32), np.zeros((1, 3, T), np.int32)
    for number, (start, stop) in enumerate(samples):
        segments[0, start:stop], positions[0, :, start:stop] = number + 1, np.arange(stop - start)
    text = dict(tokens=ids[None], targets=targets[None], loss_weights=weights[None], segment_ids=segments)
    lengths = np.asarray([[stop - start for start, stop in samples]], np.int32)
    nothing = dict.fromkeys(Batch.__dataclass_fields__)
    fields = nothing | text | dict(positions=positions, segment_lengths=lengths)
    return Batch(**{name: None if value is None else jnp.asarray(value) for name, value in fields.items()})


def test_losses_and_gradients_of_packed_samples_are_those_of_the_formula(reference, folder):
    model, heads = reference
    config = read_config(folder).model_copy(update=dict(compute_dtype="float32"))
    assert config.text.mtp_layers == K
    random, samples = np.random.default_rng(2), ((0, 7), (7, 16))  # and two positions of padding
    ids, targets = random.integers(0, V, T), random.integers(0, V, T)
    weights = (random.random(T) < 0.7).astype(np.float32)
    torch_losses, torch_weights = _losses_in_torch(
        model, heads, torch.tensor(ids), torch.tensor(targets), torch.tensor(weights), samples
    )
    batch = _batch(ids, targets, weights, samples)

    @jax.jit
    def ours(params):
        found = outline_of(config).merge(params).routed_losses(batch, chunk=8, mtp=True)
        return jnp.sum(found.mtp.losses_MBT), found

    params = load_parameters(folder)
    gradients, found = jax.grad(ours, has_aux=True)(params)
    for k in range(K):
        expected = torch_losses[k].detach().numpy()
        assert np.abs(np.asarray(found.mtp.losses_MBT[k, 0]) - expected).max() < 1e-5
        np.testing.assert_array_equal(found.mtp.weights_MBT[k, 0], torch_weights[k])
    # A head routes the positions that have a token so far ahead: 16 tokens less one and two of each sample.
    np.testing.assert_array_equal(found.mtp.tokens_M, [14, 12])
    np.testing.assert_array_equal(np.asarray(found.routing.load).sum(-1), [2 * 16, 2 * 14, 2 * 12])

    model.zero_grad()
    sum(loss.sum() for loss in torch_losses).backward()
    matrices = {"language/embed/embedding": model.model.embed_tokens.weight.grad}
    matrices["language/head/kernel"] = model.lm_head.weight.grad.T
    matrices["language/dense/mlp/up/kernel"] = model.model.layers[0].mlp.up_proj.weight.grad.T[None]

    def stacked(name):
        return torch.stack([heads[f"model.layers.{n}.{name}.weight"].grad for n in range(L, L + K)])

    matrices["language/mtp/joint/kernel"] = stacked("eh_proj").transpose(1, 2)
    names = {"token_norm": "enorm", "hidden_norm": "hnorm", "norm": "shared_head.norm"}
    matrices |= {f"language/mtp/{mine}/scale": stacked(theirs) for mine, theirs in names.items()}
    own = [model.model.layers[n] for n in range(L, L + K)]
    kernel = torch.stack([layer.self_attn.kv_b_proj.weight.grad.T for layer in own])
    matrices["language/mtp/layer/attention/latent_up/kernel"] = kernel
    matrices["language/mtp/layer/moe/router/kernel"] = torch.stack([layer.mlp.gate.weight.grad.T for layer in own])
    for path, expected in matrices.items():
        difference = np.abs(np.asarray(gradients[path]) - expected.numpy()).max() / max(
            1.0, float(expected.abs().max())
        )
        assert difference < 1e-4, f"{path}: {difference}"


def test_published_files_with_heads_are_read_and_written_to_equal_bytes(folder, tmp_path):
    config, params = read_config(folder), load_parameters(folder)
    save_parameters(tmp_path, config, params)
    before, after = (safetensors.numpy.load_file(place / "model.safetensors") for place in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(value.tobytes() == after[name].tobytes() for name, value in before.items())
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == K


def test_a_head_with_a_token_table_of_its_own_is_refused_and_counted_heads_may_be_absent(folder, tmp_path):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    content = (folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(content)
    name = f"model.layers.{L + 1}.embed_tokens.weight"
    safetensors.numpy.save_file(tensors | {name: tensors[name] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=f"{name} differs from model.embed_tokens.weight"):
        load_parameters(tmp_path)
    of_heads = tuple(f"model.layers.{number}." for number in range(L, L + K))
    kept = {key: value for key, value in tensors.items() if not key.startswith(of_heads)}
    safetensors.numpy.save_file(kept, tmp_path / "model.safetensors")
    assert read_config(tmp_path).text.mtp_layers == 0 and load_parameters(tmp_path)
