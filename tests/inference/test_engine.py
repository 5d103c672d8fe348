"""The engine under requests that come and go, and the settings that only a server asks for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.generation.logits_process import MinPLogitsWarper

from mindvl_jax.inference import Generator, Request, Sampling, sampling
from mindvl_jax.inference.engine import Engine


@pytest.fixture(scope="module")
def generator(opened):
    return Generator(opened, slots=4, context=256)


def _engine(opened, generator) -> Engine:
    return Engine(opened.model, eos_ids=generator.eos_ids, slots=4, context=256)


def _request(text: str, **settings) -> Request:
    return Request.from_prompt(text, sampling=Sampling(max_new_tokens=12, ignore_eos=True, **settings))


class _Recorder:
    def __init__(self):
        self.tokens, self.ended = [], None

    def __call__(self, new) -> bool:
        self.tokens += new.tokens
        self.ended = new.ended
        return False


def test_min_p_keeps_the_tokens_that_transformers_keeps():
    logits = np.random.default_rng(0).normal(0, 3, (6, 50)).astype(np.float32)
    limits = np.asarray([0.0, 0.01, 0.1, 0.3, 0.9, 1.0], np.float32)
    kept = (
        np.asarray(sampling.restrict(logits, jnp.zeros(6, jnp.int32), jnp.ones(6), jnp.asarray(limits)))
        > sampling.NEGATIVE
    )
    for row, limit in enumerate(limits):
        theirs = (
            MinPLogitsWarper(float(limit))(None, torch.from_numpy(logits[row : row + 1]))
            if limit
            else torch.zeros(1, 50)
        )
        assert (kept[row] == np.isfinite(theirs[0].numpy())).all(), f"min_p {limit}"


def test_presence_and_frequency_penalties_follow_the_published_formula():
    logits = np.random.default_rng(1).normal(size=(2, 5)).astype(np.float32)
    counts = np.asarray([[0, 1, 3, 0, 2], [4, 0, 0, 0, 1]], np.int32)
    presence, frequency = np.float32([0.5, -1.0]), np.float32([0.25, 2.0])
    expected = logits - counts * frequency[:, None] - (counts > 0) * presence[:, None]
    np.testing.assert_allclose(sampling.apply_count_penalties(logits, counts, presence, frequency), expected, rtol=1e-6)


def test_a_strong_frequency_penalty_forbids_repeated_tokens_while_a_neighbour_decodes_as_alone(generator):
    plain = _request("say a word")
    alone = generator.generate([plain])[0]
    assert len(set(alone.tokens)) < len(alone.tokens), "the random model repeats itself, else this test shows nothing"
    penalised = _request("say a word", frequency_penalty=2.0, presence_penalty=2.0, temperature=1e-3, top_k=1)
    first, second = generator.generate([penalised, plain])
    assert second.tokens == alone.tokens

    def repeats(tokens):
        return len(tokens) - len(set(tokens))

    assert repeats(first.tokens) < repeats(alone.tokens)


def test_alternatives_are_the_likeliest_tokens_and_hold_the_greedy_one_first(generator):
    answer, other = generator.generate([_request("which one", top_logprobs=3), _request("another")])
    assert other.alternatives == ()
    assert len(answer.alternatives) == len(answer.tokens)
    for token, logprob, pairs in zip(answer.tokens, answer.logprobs, answer.alternatives, strict=True):
        assert len(pairs) == 3 and pairs[0][0] == token
        assert abs(pairs[0][1] - logprob) < 1e-5
        assert pairs[0][1] >= pairs[1][1] >= pairs[2][1]


def test_aborted_answers_free_their_slots_and_the_others_go_on_unchanged(opened, generator):
    requests = [_request(f"question {number} ") for number in range(7)]
    expected = generator.generate(requests)
    engine = _engine(opened, generator)
    recorders = [_Recorder() for _ in requests]
    for request, recorder in zip(requests, recorders):
        engine.submit(generator.encode(request), request.sampling, [0], [recorder])
    engine.step(chunk=3)
    engine.abort([recorders[1], recorders[2], recorders[6]])  # two that decode, one that waits
    while engine.busy:
        engine.step(chunk=3)
    for number, (answer, recorder) in enumerate(zip(expected, recorders, strict=True)):
        if number in (1, 2):
            assert recorder.ended is None and recorder.tokens == list(answer.tokens[: len(recorder.tokens)])
        elif number == 6:
            assert recorder.tokens == []
        else:
            assert recorder.tokens == list(answer.tokens), f"request {number}"


def test_owners_take_turns_and_their_answers_stay_the_same(opened, generator):
    requests = [_request(f"question {number} ") for number in range(12)]
    expected = generator.generate(requests)
    engine = _engine(opened, generator)
    recorders = [_Recorder() for _ in requests]
    for number, (request, recorder) in enumerate(zip(requests, recorders)):
        whose = dict(owner="few" if number > 9 else "many", priority=-1 if number == 9 else 0)
        engine.submit(generator.encode(request), request.sampling, [0], [recorder], **whose)
    engine.step(chunk=1)
    started = [number for number, recorder in enumerate(recorders) if recorder.tokens]
    assert started == [0, 9, 10, 11]  # the urgent and the oldest of the one owner, both of the other
    while engine.busy:
        engine.step()
    assert [recorder.tokens for recorder in recorders] == [list(answer.tokens) for answer in expected]


def test_new_parameters_answer_as_a_new_engine_would_and_others_are_refused(opened, generator):
    request = _request("after a step of training")
    changed = jax.tree.map(lambda leaf: leaf * 1.1, nnx.state(opened.model))
    merged = nnx.merge(nnx.graphdef(opened.model), changed)
    expected = Generator(
        dataclasses.replace(opened, model=merged)
        if dataclasses.is_dataclass(opened)
        else type(opened)(**{**vars(opened), "model": merged}),
        slots=4,
        context=256,
    ).generate([request])[0]
    engine, recorder = _engine(opened, generator), _Recorder()
    engine.load(changed)
    engine.submit(generator.encode(request), request.sampling, [0], [recorder])
    while engine.busy:
        engine.step()
    assert recorder.tokens == list(expected.tokens)
    with pytest.raises(ValueError, match="another structure, shapes or dtypes"):
        engine.load(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), changed))
