"""Prompts that begin as one before: the tokens of a generator that keeps nothing, whatever comes in which order."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from mindvl_jax.inference import Generator, Request, Sampling, prefix_cache
from mindvl_jax.inference.backends import BridgePrograms
from mindvl_jax.inference.prefix_cache import Entry, PrefixCache, common
from mindvl_jax.inference.prompts import Prompt

SYSTEM = "You are a careful reader of small pictures, and you answer in very few words. " * 2
SETTINGS = Sampling(max_new_tokens=10, ignore_eos=True)


def request(question, picture=None, sampling=SETTINGS):
    images = () if picture is None else (picture,)
    asked = Request.from_prompt(SYSTEM + "<image>" * len(images) + question, images, sampling=sampling)
    return asked


@pytest.fixture(scope="module")
def plain(opened):
    return Generator(opened, slots=4, context=512)


@pytest.fixture
def keeping(opened, monkeypatch):
    monkeypatch.setattr(prefix_cache, "KEPT_AT_ONCE", 64)
    return Generator(opened, slots=4, context=512, prefix_bytes=1 << 26)


def one_by_one(generator, requests):
    return [generator.generate([each])[0].tokens for each in requests]


def test_a_common_beginning_is_read_once_and_the_answers_stay(plain, keeping, draw_pictures):
    first, second = draw_pictures(2, seed=3)
    second = second.resize(first.size)
    asked = [
        request("What is it?", first),
        request("What is it?", second),  # the same text and size
        request("Is it red or blue?", first),
        request("Is it red or blue?", second),
        request("What is it?", first),  # all but its last token is known
        request("And without a picture?"),
        request("And without any?"),
    ]
    expected = one_by_one(plain, asked)
    assert len(set(expected)) == 6, "answers do not depend on the pictures: the comparison would prove nothing"
    found, reused = [], []
    for each in asked:
        found += one_by_one(keeping, [each])
        reused.append(keeping._engine.reused_tokens)
    assert found == expected
    gained = np.diff([0, *reused])
    text = len(keeping.encode(request("What is it?")).example.tokens)
    whole = [len(keeping.encode(each).example.tokens) for each in asked]
    assert gained[0] == 0 and gained[2] > whole[2] - 40 and gained[3] > whole[3] - 40
    assert gained[1] == 0, "the rest after the common text holds a picture, which wants the tower"
    assert gained[4] == whole[4] - 1 and gained[6] > text - 40


def test_pictures_of_one_size_have_entries_of_their_own(keeping, draw_pictures):
    first, second = draw_pictures(2, seed=3)
    prompts = [keeping.encode(request("What is it?", picture.resize((112, 84)))) for picture in (first, second)]
    assert np.array_equal(prompts[0].example.tokens, prompts[1].example.tokens)
    visual = prompts[0].example.visual_index >= 0
    one, two = (prompt.identity for prompt in prompts)
    assert common(one, two) == np.flatnonzero(visual)[0] and not np.isin(one[visual], two[visual]).any()
    assert len(set(one[visual])) == visual.sum() and (one[visual] < 0).all()
    example = prompts[0].example
    later = dataclasses.replace(example, positions=example.positions + visual * np.array([[2], [0], [0]], np.int32))
    assert not np.isin(one[visual], Prompt("", later, prompts[0].bucket).identity[visual]).any(), (
        "pixels at other rotary positions have other keys"
    )
    one_by_one(keeping, [request("What is it?", picture.resize((112, 84))) for picture in (first, second)])
    assert len(keeping._engine.prefixes) == 2


def test_a_batch_with_samples_logprobs_and_a_picture_in_the_rest(plain, keeping, draw_pictures):
    first, second = draw_pictures(2, seed=5)
    several = dataclasses.replace(SETTINGS, n=2, temperature=0.8, seed=4, top_logprobs=3)
    later = Request(
        messages=[
            {"role": "user", "content": SYSTEM + "<image>What is it?"},
            {"role": "assistant", "content": "A square."},
            {"role": "user", "content": "<image>And this?"},
        ],
        images=(first, second),
        sampling=SETTINGS,
    )
    asked = [request("What is it?", first), request("How many?", first, several), later, request("Where?", first)]
    one_by_one(keeping, asked[:1])
    got, want = keeping.generate(asked), plain.generate(asked)
    assert [answer.tokens for answer in got] == [answer.tokens for answer in want]
    for one, two in zip(got, want, strict=True):
        np.testing.assert_allclose(one.logprobs, two.logprobs, atol=2e-4)
    assert keeping._engine.reused_tokens > 300


def test_new_weights_empty_the_cache(opened, keeping):
    asked = [request("one?"), request("two?")]
    before = one_by_one(keeping, asked)
    engine = keeping._engine
    changed = jax.tree.map(lambda leaf: leaf * 1.5 if leaf.ndim > 1 else leaf, engine.parameters)
    engine.load(changed)
    assert len(engine.prefixes) == 0
    graph = nnx.graphdef(opened.model)
    fresh = Generator(type(opened)(**{**vars(opened), "model": nnx.merge(graph, changed)}), slots=4, context=512)
    after = one_by_one(keeping, asked)
    assert after == one_by_one(fresh, asked) and after != before


def test_the_bridge_goes_on_after_a_known_beginning(opened, plain, monkeypatch):
    monkeypatch.setattr(prefix_cache, "KEPT_AT_ONCE", 64)
    bridge = Generator(opened, slots=4, context=512, programs=BridgePrograms("cpu"), prefix_bytes=1 << 26)
    asked = [request("one?"), request("two?"), request("three?"), request("four?")]  # three times from the cache
    assert one_by_one(bridge, asked) == one_by_one(plain, asked)
    assert bridge._engine.reused_tokens > 450


def test_entries_leave_when_the_limit_is_reached_and_short_prompts_wait_for_a_second_meeting():
    cache = PrefixCache(limit=250)
    arrays = [np.zeros(50, np.uint8)] * 2

    def identity(start, length=300):
        return np.arange(start, start + length)

    for start in (0, 1000, 2000):
        cache.add(Entry(identity(start), *arrays))
    assert len(cache) == 2 and cache.held == 200
    assert cache.longest(identity(0)) is None and cache.longest(identity(2000))[1] == 299
    cache.add(Entry(identity(9), np.zeros(300, np.uint8), np.zeros(1, np.uint8)))
    assert len(cache) == 2, "an entry beyond the limit is not kept"
    assert cache.wants(identity(5000)) and not cache.wants(identity(6000, 100)) and cache.wants(identity(6000, 90))
    assert not cache.wants(identity(2000, 200)), "the beginning of an entry adds nothing"


@pytest.mark.parametrize("kept", [0, 1 << 26], ids=["alone", "with known beginnings"])
def test_long_prompts_read_in_pieces_answer_alike_and_are_not_overtaken(opened, plain, draw_pictures, kept):
    first, second = draw_pictures(2, seed=5)
    pieces = Generator(opened, slots=4, context=512, prefill_chunk=64, prefix_bytes=kept)
    several = dataclasses.replace(SETTINGS, n=2, temperature=0.8, seed=4)
    asked = [
        request("one?" * 20),
        request("What is it?" * 9, first),
        Request.from_prompt("short", sampling=SETTINGS),
        request("two?" * 30, second, several),
        request("one?" * 20),
        Request.from_prompt("also short", sampling=SETTINGS),
    ]
    for _ in range(2):
        got, want = pieces.generate(asked), plain.generate(asked)
        assert [answer.tokens for answer in got] == [answer.tokens for answer in want]
    assert not pieces._engine.busy
    streamed = [piece.answer.tokens for piece in pieces.stream(asked, chunk=2) if piece.answer is not None]
    assert sorted(streamed) == sorted(answer.tokens for answer in plain.generate(asked))


def test_running_answers_go_on_between_the_pieces_of_a_long_prompt_and_an_abort_drops_it(opened):
    generator = Generator(opened, slots=2, context=512, prefill_chunk=64)
    engine, told = generator.new_engine(), {"short": [], "long": []}

    def submit(name, text, tokens):
        asked = Request.from_prompt(text, sampling=Sampling(max_new_tokens=tokens, ignore_eos=True))
        return generator.submit(engine, 0, asked, generator.encode(asked), told[name].append)

    submit("short", "a", 200)
    engine.step(chunk=1)
    watchers = submit("long", "word " * 80, 4)
    steps = 0
    while engine.waiting:
        before = engine.decoded_tokens
        engine.step(chunk=1)
        steps += 1
        gained = engine.decoded_tokens - before
        assert gained == (1 if engine.waiting else 3), "the running answer stood still"  # 3: two of the new one
    assert steps == -(-len(generator.encode(Request.from_prompt("word " * 80)).example.tokens) // 64)
    engine.abort(watchers)
    watchers = submit("long", "other " * 60, 4)
    engine.step(chunk=1)
    assert engine._reading is not None and engine.waiting == 1
    engine.abort(watchers)
    assert engine._reading is None and engine.waiting == 0 and engine.running == 1
