"""Pictures that come again: the tower does not run, and the answers are those of a generator that keeps nothing."""

import jax
import numpy as np
import pytest
from flax import nnx

from mindvl_jax.core.lru import ByteLimitedLRU
from mindvl_jax.inference import Generator, Request, Sampling
from mindvl_jax.inference.backends import BridgePrograms

SETTINGS = Sampling(max_new_tokens=10, ignore_eos=True)


def asked(text, *pictures):
    return Request.from_prompt(text, pictures, sampling=SETTINGS)


@pytest.fixture(scope="module")
def plain(opened):
    return Generator(opened, slots=4, context=256)


def test_a_picture_that_comes_again_is_not_seen_again_and_the_answers_stay(opened, plain, draw_pictures, monkeypatch):
    first, second, third = (picture.resize((84, 56)) for picture in draw_pictures(3, seed=8))
    keeping = Generator(opened, slots=4, context=256, prefix_bytes=1 << 24)
    new = [asked("one <image>", first), asked("other <image> and <image>", second, first)]
    again = [asked("Now <image>", first), asked("See <image>", second), asked("<image> by <image>?", first, second)]
    expected = [[answer.tokens for answer in plain.generate(each)] for each in (new, again)]
    assert len(set(expected[1])) == 3
    assert [answer.tokens for answer in keeping.generate(new)] == expected[0]
    engine = keeping._engine
    assert len(engine.pictures) == 2 and not engine.reused_pictures and not engine.reused_tokens

    def tower(*_, **__):
        pytest.fail("the tower ran again")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_prefill", tower)
        assert [answer.tokens for answer in keeping.generate(again)] == expected[1]
    assert engine.reused_pictures == 4
    mixed = [asked("Now <image>", first), asked("Now <image>", third)]  # of one size, under equal text
    one, two = plain.generate(mixed)
    assert one.tokens != two.tokens
    assert [answer.tokens for answer in keeping.generate(mixed)] == [one.tokens, two.tokens]
    assert len(engine.pictures) == 3
    engine.load(jax.tree.map(lambda leaf: leaf * 1.1, nnx.state(opened.model)))
    assert not len(engine.pictures)


def test_pictures_leave_when_the_limit_is_reached():
    cache, one = ByteLimitedLRU(100), np.zeros((5, 2), np.float32)
    for digest in b"a", b"b":
        cache.add(digest, one, one.nbytes)
    cache.get(b"a")
    cache.add(b"c", one, one.nbytes)
    cache.add(b"large", np.zeros(101, np.uint8), 101)
    assert b"a" in cache and b"b" not in cache and b"c" in cache and b"large" not in cache
    assert cache.held == 80 and len(cache) == 2


def test_the_bridge_reads_a_picture_that_it_has_seen(opened, plain, draw_pictures):
    picture = draw_pictures(1, seed=8)[0].resize((84, 56))
    texts = ("one <image>", "Now <image>", "See <image>", "By <image>?")  # three times from the cache
    every = [asked(text, picture) for text in texts]
    expected = [answer.tokens for answer in plain.generate(every)]
    keeping = Generator(opened, slots=4, context=256, prefix_bytes=1 << 24, programs=BridgePrograms("cpu"))
    assert [keeping.generate([each])[0].tokens for each in every] == expected
    assert keeping._engine.reused_pictures == 3
