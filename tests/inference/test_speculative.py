"""Speculative decoding with an MTP head: tokens of plain greedy decoding, whatever the head drafts."""

import dataclasses
import json
import shutil
import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mindvl_jax.cli.main import main
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import flatten
from mindvl_jax.inference import Generator, Request, Sampling, speculative
from mindvl_jax.models.deepseek_v3.config import DeepSeekV3Config
from mindvl_jax.models.layers.config import DeepSeekV3TextConfig, MoEConfig
from mindvl_jax.models.outline import outline_of
from mindvl_jax.weights.save import save_parameters

D, CONTEXT = 48, 128


def _config(vocabulary: int, mtp_layers: int = 1) -> DeepSeekV3Config:
    routing = dict(scoring="sigmoid", renormalize=True, selection_bias=True)
    moe = MoEConfig(experts=4, experts_per_token=2, intermediate_size=16, shared_experts=1, **routing)
    sizes = dict(q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    text = dict(vocab_size=vocabulary, hidden_size=D, intermediate_size=32, num_layers=2, dense_layers=1, num_heads=2)
    text = DeepSeekV3TextConfig(**text, **sizes, moe=moe, mtp_layers=mtp_layers)
    return DeepSeekV3Config(text=text, compute_dtype="float32")


def _model(config: DeepSeekV3Config, context_share: float):
    """Random, but layers add `context_share` of what they would: the rest is a chain from token to token. The head
    copies the token's half of its input, so it knows the chain and nothing of the context.
    """
    random, params = np.random.default_rng(3), {}
    for path, like in outline_of(config).shapes.items():
        value = random.normal(0, 1, like.shape)
        if path.endswith("scale"):
            value = np.ones(like.shape)
        elif len(like.shape) > 1 and not path.endswith("embedding"):
            value *= 1 / like.shape[-2] ** 0.5
        if path.endswith(("output/kernel", "down/kernel", "experts/down")):
            value *= 0.0 if "/mtp/" in path else context_share
        params[path] = jnp.asarray(value, jnp.float32)
    if config.text.mtp_layers:
        params["language/mtp/joint/kernel"] = jnp.asarray([np.concatenate([np.eye(D), np.zeros((D, D))])], jnp.float32)
    return outline_of(config).merge(params)


@pytest.fixture(scope="module")
def opened(tokenizer):
    model = _model(_config(tokenizer.vocab_size), 0.35)
    return types.SimpleNamespace(model=model, tokenizer=tokenizer, min_pixels=784, max_pixels=784)


def _requests(count: int = 7) -> list[Request]:
    random, words = np.random.default_rng(5), ["what", "is", "here", "?", "read", "number"]
    return [
        Request.from_prompt(
            " ".join(random.choice(words, 1 + index % 4)),
            id=str(index),
            sampling=Sampling(max_new_tokens=1 + 9 * index, ignore_eos=index % 2 == 0),
        )
        for index in range(count)
    ]


def _answers(opened, **options):
    generator = Generator(opened, slots=3, context=CONTEXT, **options)
    return generator.generate(_requests()), generator


def test_tokens_are_those_of_plain_greedy_decoding_with_drafts_taken_and_refused(opened):
    plain, other = _answers(opened)
    ours, generator = _answers(opened, programs=speculative)
    drafted, accepted = generator.drafts
    assert 0.1 < accepted / drafted < 0.9, (accepted, drafted)
    for expected, found in zip(plain, ours, strict=True):
        assert found.tokens == expected.tokens and found.finish == expected.finish, found.id
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    assert generator._engine.decoded_tokens == other._engine.decoded_tokens
    assert len({answer.tokens for answer in plain}) == 7 and other.drafts == (0, 0)


def test_layers_that_are_scanned_over_a_stacked_cache_give_the_same_tokens(opened, monkeypatch):
    plain, _ = _answers(opened)
    monkeypatch.setattr(speculative, "unstack_layers", lambda graphdef, params: None)
    scanned, generator = _answers(opened, programs=speculative)
    assert not generator._engine._state.cache.unrolled
    assert [answer.tokens for answer in scanned] == [answer.tokens for answer in plain]


def test_an_answer_fills_its_context_to_the_last_position(opened):
    """The draft behind the last position has a slot of its own; an answer has one token more than its slots."""
    request = dataclasses.replace(_requests(1)[0], sampling=Sampling(max_new_tokens=500, ignore_eos=True))
    (plain,) = Generator(opened, slots=3, context=CONTEXT).generate([request])
    (ours,) = Generator(opened, slots=3, context=CONTEXT, programs=speculative).generate([request])
    assert ours.tokens == plain.tokens and len(ours.tokens) + ours.prompt_tokens == CONTEXT + 1


def test_what_is_not_greedy_and_models_without_a_head_are_refused(opened, tokenizer):
    generator = Generator(opened, slots=1, context=64, programs=speculative)
    request = Request.from_prompt("what", sampling=Sampling(temperature=0.5, repetition_penalty=1.2))
    with pytest.raises(UserError, match=r"temperature 0\.5, repetition_penalty 1\.2"):
        generator.generate([request])
    bare = types.SimpleNamespace(**vars(opened) | {"model": _model(_config(tokenizer.vocab_size, 0), 0.3)})
    with pytest.raises(UserError, match="MTP head"):
        Generator(bare, slots=1, context=64, programs=speculative).generate(_requests(1))


def test_the_command_gives_the_plain_answer_and_tells_how_many_drafts_were_accepted(opened, tmp_path, capsys):
    folder = tmp_path / "model"
    save_parameters(folder, opened.model.config, flatten(nnx.state(opened.model, nnx.Param)))
    shutil.copy(opened.tokenizer._file, folder / "tokenizer.json")
    said = {}
    for options in ((), ("--speculative",)):
        command = ["generate", "--weights", str(folder), "--prompt", "what is here", "--max-new-tokens", "12", "--json"]
        assert main([*command, *options]) == 0
        told = capsys.readouterr()
        said[options] = json.loads(told.out)["tokens"]
        assert ("drafted tokens accepted" in told.err) == bool(options), told.err
    assert said[()] == said["--speculative",]
