import dataclasses

import jax
import numpy as np
import pytest

from mindvl_jax.core.errors import UserError
from mindvl_jax.inference import Generator, Request, Sampling
from mindvl_jax.inference.prompts import pack_bucket


@pytest.fixture(scope="module")
def generator(opened):
    return Generator(opened, slots=4, context=256)  # one context: one decode program


@pytest.fixture(scope="module")
def requests(draw_pictures):
    drawn = iter(draw_pictures(20, largest=84))
    return [
        Request.from_prompt(
            "tell me " * (1 + index % 4),
            [next(drawn) for _ in range((0, 0, 1, 2)[index % 4])],
            id=f"r{index}",
            sampling=Sampling(max_new_tokens=2 + index % 7),
        )
        for index in range(10)
    ]


@pytest.fixture(scope="module")
def answers(generator, requests):
    return generator.generate(requests)


def _reference(opened, generator, request, steps):
    """Return greedy tokens and log-probabilities without a cache: one training forward of the whole row per token."""
    prompt = generator.encode(request)
    size = prompt.tokens + steps
    batch = pack_bucket(
        [[prompt]],
        prompt.bucket.__class__(tokens=size, patches=prompt.bucket.patches, images=prompt.bucket.images),
        1,
        opened.model.config.vision,
    )
    start = int(batch.positions[0].max()) + 1
    tokens, logprobs = [], []
    forward = jax.jit(lambda model, batch: model.logits(model(batch)))
    for step in range(steps):
        logits = np.asarray(forward(opened.model, batch))[0, prompt.tokens + step - 1]
        token = int(logits.argmax())
        tokens.append(token)
        logprobs.append(float(logits[token] - np.logaddexp.reduce(logits.astype(np.float64))))
        if token in generator.eos_ids:
            break
        place = prompt.tokens + step
        batch.tokens[0, place], batch.segment_ids[0, place], batch.positions[0, :, place] = token, 1, start + step
    return tokens, logprobs


@pytest.mark.parametrize("index", [0, 3])  # no image, two images
def test_cached_decoding_gives_the_tokens_of_reading_everything_again(opened, generator, requests, answers, index):
    tokens, logprobs = _reference(opened, generator, requests[index], requests[index].sampling.max_new_tokens)
    assert list(answers[index].tokens) == tokens
    difference = np.abs(np.array(answers[index].logprobs) - logprobs).max()
    assert difference < 1e-4, f"max difference {difference}"  # float32, other orders of summation


def test_a_batch_of_mixed_requests_answers_as_each_would_alone(opened, requests, answers):
    alone = Generator(opened, slots=1, context=256)
    for request, batched in list(zip(requests, answers))[:4]:  # none, none, one and two images
        assert alone.generate([request])[0].tokens == batched.tokens, request.id


def test_pictures_decide_what_is_answered(generator, draw_pictures):
    asked = [
        Request.from_prompt("what", [picture], sampling=Sampling(max_new_tokens=8))
        for picture in draw_pictures(6, seed=3, largest=84)
    ]
    assert len({answer.tokens for answer in generator.generate(asked)}) > 1, (
        "six different pictures all gave the same answer"
    )


def test_answers_come_back_in_the_order_of_the_requests(requests, answers):
    assert [answer.id for answer in answers] == [request.id for request in requests]


def test_an_answer_never_exceeds_its_limit_and_says_why_it_ended(requests, answers, generator):
    for request, answer in zip(requests, answers):
        assert len(answer.tokens) <= request.sampling.max_new_tokens
        assert answer.finish == ("stop" if answer.tokens[-1] in generator.eos_ids else "length")


def test_ignoring_the_end_token_runs_to_the_limit(generator):
    answer = generator.generate(
        [Request.from_prompt("x", sampling=Sampling(max_new_tokens=70, ignore_eos=True, temperature=3.0, seed=2))]
    )[0]
    assert len(answer.tokens) == 70 and answer.finish == "length"  # more than two chunks of decoding


def test_the_same_seed_gives_the_same_sample_whatever_else_is_in_the_batch(generator, requests):
    asked = Request.from_prompt("say", sampling=Sampling(max_new_tokens=12, temperature=1.0, top_p=0.95, seed=11))
    alone = generator.generate([asked])[0]
    among = generator.generate([*requests[:5], asked, *requests[5:8]])[5]
    other = generator.generate(
        [Request.from_prompt("say", sampling=Sampling(max_new_tokens=12, temperature=1.0, top_p=0.95, seed=12))]
    )[0]
    assert alone.tokens == among.tokens
    assert alone.tokens != other.tokens


def test_n_samples_differ_and_the_first_is_the_one_of_n_equal_one(generator):
    sampling = dict(max_new_tokens=10, temperature=1.5, seed=5)
    many = generator.generate(
        [Request.from_prompt("hm", id="a", sampling=Sampling(n=6, **sampling))]
    )  # more than there are slots
    one = generator.generate([Request.from_prompt("hm", id="a", sampling=Sampling(n=1, **sampling))])
    assert [answer.sample for answer in many] == list(range(6))
    assert many[0].tokens == one[0].tokens
    assert len({answer.tokens for answer in many}) > 1


def test_a_stop_string_ends_the_answer_before_it(generator):
    free = generator.generate(
        [Request.from_prompt("go on", sampling=Sampling(max_new_tokens=20, temperature=2.0, seed=3, ignore_eos=True))]
    )[0]
    stop = next(free.text[k : k + 2] for k in range(3, len(free.text) - 2) if "\ufffd" not in free.text[k : k + 2])
    stopped = generator.generate(
        [
            Request.from_prompt(
                "go on", sampling=Sampling(max_new_tokens=20, temperature=2.0, seed=3, ignore_eos=True, stop=(stop,))
            )
        ]
    )[0]
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish == "stop"
    assert stopped.tokens == free.tokens[: len(stopped.tokens)] and len(stopped.logprobs) == len(stopped.tokens)


def test_streamed_pieces_add_up_to_the_answer(generator, requests):
    whole = generator.generate(requests[:3])
    texts, final = {}, {}
    for piece in generator.stream(requests[:3], chunk=2):
        texts[piece.request] = texts.get(piece.request, "") + piece.text
        if piece.answer:
            final[piece.request] = piece.answer
    assert [texts[index] for index in range(3)] == [answer.text for answer in whole]
    for index, answer in enumerate(whole):
        # The two calls may fill slots differently: float32 sums then differ in their last bits, the answers do not.
        assert dataclasses.replace(final[index], logprobs=answer.logprobs) == answer
        np.testing.assert_allclose(final[index].logprobs, answer.logprobs, rtol=1e-5)


def test_repetition_penalty_reaches_prompt_and_answer(generator):
    plain = generator.generate([Request.from_prompt("abc", sampling=Sampling(max_new_tokens=24, ignore_eos=True))])[0]
    punished = generator.generate(
        [Request.from_prompt("abc", sampling=Sampling(max_new_tokens=24, ignore_eos=True, repetition_penalty=50.0))]
    )[0]
    assert len(set(punished.tokens)) == 24, "so strong a penalty must never repeat a token"
    assert len(set(plain.tokens)) < 24


def test_a_prompt_longer_than_the_context_is_refused_with_its_size(opened):
    small = Generator(opened, slots=4, context=64)
    with pytest.raises(UserError, match=r"prompt of long has \d+ tokens .* context holds 64"):
        small.generate([Request.from_prompt("a" * 100, id="long")])


def test_an_answer_ends_where_the_context_is_full(opened, generator):
    small = Generator(opened, slots=4, context=64)
    prompt_tokens = small.encode(Request.from_prompt("a" * 20)).tokens
    answer = small.generate([Request.from_prompt("a" * 20, sampling=Sampling(max_new_tokens=500, ignore_eos=True))])[0]
    assert answer.finish == "length" and len(answer.tokens) == 64 - prompt_tokens + 1
    long = generator.generate(
        [Request.from_prompt("a" * 20, sampling=Sampling(max_new_tokens=len(answer.tokens), ignore_eos=True))]
    )[0]
    assert long.tokens == answer.tokens


def test_answers_are_the_same_wherever_in_the_ring_of_places_they_begin(generator):
    asked = Request.from_prompt("b" * 9, sampling=Sampling(max_new_tokens=90, ignore_eos=True))
    answers = [generator.generate([asked])[0].tokens for _ in range(4)]  # 89 of 256 places further each time
    assert len(set(answers)) == 1


def test_a_broken_picture_is_refused_by_name_or_answered_with_its_error(generator, draw_pictures):
    good, bad = (
        Request.from_prompt("q", draw_pictures(1, largest=84), id="good"),
        Request.from_prompt("q", [b"no picture"], id="bad"),
    )
    with pytest.raises(UserError, match="request bad: "):
        generator.generate([good, bad])
    answers = generator.generate([good, bad], skip_errors=True)
    assert answers[0].error is None and answers[0].tokens
    assert answers[1].finish == "error" and "image" in answers[1].error


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(temperature=-1.0), "temperature is -1"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(top_p=0.0), "top_p is 0"),
        (dict(top_p=1.5), "top_p is 1.5"),
        (dict(top_k=-3), "top_k is -3"),
        (dict(n=0), "n is 0"),
        (dict(stop=("",)), "empty string"),
        (dict(repetition_penalty=0.0), "repetition_penalty is 0"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_by_name(wrong, message):
    with pytest.raises(UserError, match=message):
        Sampling(**wrong)
