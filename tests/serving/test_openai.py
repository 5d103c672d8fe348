"""The official client and the batch generator as witnesses of the server's answers."""

import base64
import concurrent.futures
import json
import random
import time

import httpx
import openai
import pytest

from mindvl_jax.inference import Generator, Request, Sampling

SHORT = dict(model="tiny", temperature=0, max_tokens=10)


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=running.url + "/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def batch(opened):
    return Generator(opened, slots=4, context=256)


def _image_bytes(uri: str) -> bytes:
    return base64.b64decode(uri.partition(",")[2])


def test_chat_answers_are_those_of_the_batch_generator(client, batch, data_uri):
    expected = batch.generate(
        [Request.from_prompt("what is it", [_image_bytes(data_uri(3))], sampling=Sampling(max_new_tokens=10))]
    )[0]
    parts = [{"type": "image_url", "image_url": {"url": data_uri(3)}}, {"type": "text", "text": "what is it"}]
    answer = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **SHORT)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish
    assert answer.usage.prompt_tokens == expected.prompt_tokens and answer.usage.completion_tokens == len(
        expected.tokens
    )


def test_two_images_of_one_size_under_equal_text_give_their_own_answers(client, batch, data_uri):
    for seed in (11, 12):
        expected = batch.generate(
            [Request.from_prompt("which", [_image_bytes(data_uri(seed))], sampling=Sampling(max_new_tokens=10))]
        )[0].text
        parts = [{"type": "image_url", "image_url": {"url": data_uri(seed)}}, {"type": "text", "text": "which"}]
        assert (
            client.chat.completions.create(messages=[{"role": "user", "content": parts}], **SHORT)
            .choices[0]
            .message.content
            == expected
        )


def test_a_stream_joins_to_the_whole_answer_and_ends_with_its_usage(client):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "count"}]
    whole = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, **SHORT)
    chunks = list(
        client.chat.completions.create(
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            top_logprobs=2,
            **SHORT,
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    streamed = [
        token.logprob
        for chunk in chunks
        if chunk.choices and chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    # Not to the bit: other rows of the batch may decode beside the second request, so products sum in another order.
    assert streamed == pytest.approx([token.logprob for token in whole.choices[0].logprobs.content], abs=1e-5)
    assert all(len(token.top_logprobs) == 2 for token in whole.choices[0].logprobs.content)


def test_n_answers_differ_and_a_seed_repeats_them(client):
    settings = dict(n=3, seed=5, temperature=1.5, max_tokens=8, extra_body={"min_p": 0.01, "top_k": 50})
    first, second = (
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "go"}], **settings)
        for _ in range(2)
    )
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert texts == [choice.message.content for choice in second.choices]


def test_completions_continue_text_without_a_template(client, batch, tokenizer):
    text = "once upon a time"
    answer = client.completions.create(prompt=[text, "another"], logprobs=2, **SHORT)
    assert [choice.index for choice in answer.choices] == [0, 1]
    prompt = batch.encode.text(Request.from_prompt(text))
    assert prompt.example.tokens.tolist() == tokenizer.encode(text)
    assert answer.usage.prompt_tokens == len(tokenizer.encode(text)) + len(tokenizer.encode("another"))
    assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.token_logprobs)
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(prompt=text, stream=True, **SHORT))
    assert streamed == answer.choices[0].text
    parts = [
        chunk.choices[0].logprobs for chunk in client.completions.create(prompt=text, stream=True, logprobs=2, **SHORT)
    ]
    whole = answer.choices[0].logprobs
    for name in ("tokens", "text_offset"):
        assert [item for part in parts if part for item in getattr(part, name)] == getattr(whole, name)


def test_stop_strings_end_an_answer_before_them(client):
    messages = [{"role": "user", "content": "tell"}]
    whole = (
        client.chat.completions.create(messages=messages, extra_body={"ignore_eos": True}, **SHORT)
        .choices[0]
        .message.content
    )
    stop = whole[3]
    cut = client.chat.completions.create(
        messages=messages, stop=[stop], extra_body={"ignore_eos": True}, **SHORT
    ).choices[0]
    assert cut.message.content == whole[: whole.index(stop)] and cut.finish_reason == "stop"


def test_models_are_listed_and_an_unknown_one_is_named(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])


def test_random_arrivals_aborts_and_lengths_answer_as_the_batch_generator_and_compile_nothing(
    running, client, batch, data_uri
):
    """Forty requests at random moments, a quarter of which their clients abandon."""
    generator = random.Random(0)
    jobs = []
    for number in range(40):
        images = [data_uri(100 + number)] if number % 3 == 0 else []
        jobs.append(
            (
                f"question {number} " * generator.randint(1, 4),
                images,
                generator.randint(1, 24),
                generator.random() < 0.25,
                generator.random(),
            )
        )
    requests = [
        Request.from_prompt(
            text, [_image_bytes(uri) for uri in images], sampling=Sampling(max_new_tokens=most, ignore_eos=True)
        )
        for text, images, most, _, _ in jobs
    ]
    expected = [answer.text for answer in batch.generate(requests)]
    before = running.runner.metrics.compilations_since_warm_up()
    own = openai.OpenAI(base_url=running.url + "/v1", api_key="x", max_retries=5)

    def ask(job):
        text, images, most, leaves, delay = job
        time.sleep(delay)
        content = [{"type": "image_url", "image_url": {"url": uri}} for uri in images] + [
            {"type": "text", "text": text}
        ]
        stream = own.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": content}],
            stream=True,
            temperature=0,
            max_tokens=most,
            extra_body={"ignore_eos": True},
        )
        said = ""
        for chunk in stream:
            said += chunk.choices[0].delta.content or ""
            if leaves and said:
                stream.close()
                return None
        return said

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        got = list(pool.map(ask, jobs))
    for number, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        assert mine is None or mine == theirs, f"request {number}"
    assert running.idle(), "a slot or a ticket leaked"
    assert running.runner.metrics.compilations_since_warm_up() == before


def test_a_client_that_leaves_before_its_answer_frees_the_slot(running):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "long"}], "max_tokens": 200, "ignore_eos": True}
    with httpx.Client(base_url=running.url, timeout=0.05) as client, pytest.raises(httpx.TimeoutException):
        client.post("/v1/chat/completions", json=body)
    assert running.idle()


def test_metrics_count_what_was_asked(http):
    text = http.get("/metrics").text
    figures = {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line and line[0] != "#"
    }
    assert figures['mindvl_requests_total{outcome="done"}'] > 0 and figures["mindvl_answer_tokens_total"] > 0
    assert figures["mindvl_slots"] == 4 and figures["mindvl_running_answers"] == 0
    assert http.get("/health").json() == {"status": "ok"}


def test_every_event_of_a_stream_is_json(http):
    with http.stream(
        "POST",
        "/v1/chat/completions",
        json={"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 3},
    ) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["object"] == "chat.completion.chunk" for line in lines[:-1])
