"""Answers by a grammar and calls of tools, asked for with the official client."""

import concurrent.futures
import json
import re

import openai
import pytest

from mindvl_jax.config.schema import TokenizerConfig
from mindvl_jax.data.text.tokenizer import load_tokenizer
from mindvl_jax.inference import Generator, Request, Sampling
from mindvl_jax.inference.buckets import Bucket
from mindvl_jax.inference.grammar import Grammar, GrammarReader
from mindvl_jax.inference.server.protocol import ChatBody, parse
from mindvl_jax.inference.server.settings import ServerSettings
from mindvl_jax.inference.server.tools import ToolCallReader

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "sure": {"type": "boolean"}, "count": {"enum": [1, 22]}},
    "required": ["kind", "sure", "count"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "about " + name,
            "parameters": {
                "type": "object",
                "properties": {"unit": {"enum": ["mm", "m"]}},
                "required": ["unit"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("length", "width")
]
ASK = dict(model="tiny", messages=[{"role": "user", "content": "measure it"}], max_tokens=150)


@pytest.fixture(scope="module")
def running(opened, start):
    """A server with room for descriptions of tools, in bytes."""
    with start(opened, context=1024, sizes=[(Bucket(patches=0, tokens=1024, images=0), 1)]) as server:
        yield server


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=running.url + "/v1", api_key="unused", max_retries=0)


def test_answers_match_their_schema_expression_or_choice_whole(client):
    by_schema = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
    kinds = set()
    for seed in range(3):
        answer = client.chat.completions.create(response_format=by_schema, seed=seed, n=2, **ASK)
        for choice in answer.choices:
            content = json.loads(choice.message.content)
            assert set(content) == {"kind", "sure", "count"} and content["kind"] in ("cat", "dog")
            assert type(content["sure"]) is bool and content["count"] in (1, 22) and choice.finish_reason == "stop"
            kinds.add(choice.message.content)
    assert len(kinds) > 1  # sampled inside the grammar, not one fixed text
    by_regex = {"type": "regex", "regex": "(ab|cd){2}-[0-9]{3}"}
    text = client.chat.completions.create(temperature=0, extra_body={"response_format": by_regex}, **ASK)
    assert re.fullmatch(by_regex["regex"], text.choices[0].message.content)
    chosen = client.completions.create(
        model="tiny", prompt="say", max_tokens=9, extra_body={"structured_outputs": {"choice": ["ye(s", "no"]}}
    )
    assert chosen.choices[0].text in ("ye(s", "no") and chosen.choices[0].finish_reason == "stop"


def test_any_object_is_json_as_far_as_it_goes(client):
    answer = client.chat.completions.create(response_format={"type": "json_object"}, temperature=0, **ASK).choices[0]
    assert answer.message.content.startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)


def test_answers_beside_one_by_a_grammar_are_those_of_the_batch_generator_and_nothing_compiles(running, client, opened):
    asked = [Request.from_prompt(f"tell {number}", sampling=Sampling(max_new_tokens=20)) for number in range(6)]
    expected = [answer.text for answer in Generator(opened, slots=4, context=1024).generate(asked)]
    before = running.runner.metrics.compilations_since_warm_up()

    def ask(number: int) -> str:
        if number % 2:
            body = {"response_format": {"type": "regex", "regex": "[0-9]{12}"}}
            return client.chat.completions.create(extra_body=body, **ASK).choices[0].message.content
        messages = [{"role": "user", "content": f"tell {number // 2}"}]
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=20, temperature=0)
        return answer.choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        got = list(pool.map(ask, range(12)))
    assert got[::2] == expected and all(re.fullmatch("[0-9]{12}", text) for text in got[1::2])
    assert running.runner.metrics.compilations_since_warm_up() == before and running.idle()


def test_a_required_call_names_a_tool_and_a_stream_of_it_joins_to_the_same(client):
    whole = client.chat.completions.create(tools=TOOLS, tool_choice="required", parallel_tool_calls=False,
                                           temperature=0, **ASK).choices[0]  # fmt: skip
    (call,) = whole.message.tool_calls
    assert call.function.name in ("length", "width") and json.loads(call.function.arguments)["unit"] in ("mm", "m")
    assert whole.finish_reason == "tool_calls" and whole.message.content is None and call.id.startswith("call_")
    name, arguments, finish = "", "", None
    for chunk in client.chat.completions.create(
        tools=TOOLS, tool_choice="required", parallel_tool_calls=False, temperature=0, stream=True, **ASK
    ):
        choice = chunk.choices[0]
        assert not (choice.delta.content or "").strip()
        finish = choice.finish_reason or finish
        for part in choice.delta.tool_calls or ():
            name += part.function.name or ""
            arguments += part.function.arguments or ""
    assert (name, arguments, finish) == (call.function.name, call.function.arguments, "tool_calls")
    named = client.chat.completions.create(
        tools=TOOLS, tool_choice={"type": "function", "function": {"name": "width"}}, **ASK
    )
    assert [call.function.name for call in named.choices[0].message.tool_calls] == ["width"]
    messages = [
        *ASK["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "4"},
    ]
    after = client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, max_tokens=4)
    assert after.choices[0].finish_reason in ("length", "stop")


def test_tools_calls_and_results_stand_in_the_prompt_in_the_published_form(opened):
    call = {"id": "c1", "type": "function", "function": {"name": "length", "arguments": '{"unit": "m"}'}}
    body = parse(
        ChatBody,
        {
            "model": "tiny",
            "messages": [
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": "how long"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": "4"},
            ],
            "tools": TOOLS[:1],
        },
    )
    request = body.request("x", ServerSettings(model="tiny"), 256, read=lambda *_: b"")
    text = opened.tokenizer.decode(Generator(opened, context=1024).encode(request).example.tokens, skip_special=False)
    system = text[: text.index("<|im_end|>")]
    assert "be brief\n\n# Tools" in system and json.dumps(TOOLS[0]) in system
    assert '<tool_call>\n{"name": "length", "arguments": {"unit": "m"}}\n</tool_call><|im_end|>' in text
    assert "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>" in text


CALLS = 'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": "}<", "b": [1, {"c": "\\""}]}}\n</tool_call>\n' + (
    '<tool_call>\n{"arguments": {}, "name": "g"}\n</tool_call>'
)


@pytest.mark.parametrize("step", [1, 3, 7, 1000])
def test_calls_are_read_alike_however_the_text_arrives(step):
    reader = ToolCallReader()
    said, names, arguments = "", {}, {}
    for start in range(0, len(CALLS), step):
        text, deltas = reader.push(CALLS[start : start + step], last=start + step >= len(CALLS))
        said += text
        for delta in deltas:
            names.setdefault(delta["index"], delta["function"].get("name"))
            arguments[delta["index"]] = arguments.get(delta["index"], "") + delta["function"]["arguments"]
    assert said == reader.text == "Let me see." and names == {0: "f", 1: "g"}
    assert [json.loads(arguments[number]) for number in (0, 1)] == [{"a": "}<", "b": [1, {"c": '"'}]}, {}]


@pytest.mark.parametrize(
    "text",
    ["a < b and <tool", "<tool_call>\nno object\n</tool_call> then", "<tool_call>\n[1", "ends in lines\n\n",
     '<tool_call>{"name": 3, "arguments": {}}</tool_call>'],
)  # fmt: skip
def test_what_is_no_call_stays_text(text):
    reader = ToolCallReader()
    said = "".join(reader.push(character)[0] for character in text) + reader.push("", last=True)[0]
    assert said == reader.text == text and not reader.calls


def test_a_grammar_allows_the_same_texts_in_a_compact_vocabulary(tokenizer, tmp_path):
    """The table keeps digits, the minus sign and the control tokens in another order."""
    table = [*reversed(range(len(tokenizer.special) + 256))]
    (tmp_path / "table.json").write_text(json.dumps(table))
    compact = load_tokenizer(TokenizerConfig(path=str(tokenizer.file), id_table=str(tmp_path / "table.json")))
    assert compact.real_ids is not None
    for vocabulary in (tokenizer, compact):
        matcher = GrammarReader(vocabulary, len(table) + 5, vocabulary.stop_ids).matcher(Grammar("regex", "-[01]"))
        assert [vocabulary.decode([token]) for token in matcher.allowed().nonzero()[0]] == ["-"]
        matcher.accept(vocabulary.encode("-"))
        assert sorted(vocabulary.decode([token]) for token in matcher.allowed().nonzero()[0]) == ["0", "1"]
        matcher.accept(vocabulary.encode("1"))
        assert set(matcher.allowed().nonzero()[0]) == set(vocabulary.stop_ids)


def test_settings_of_the_folder_hold_where_a_request_gives_none():
    defaults = {"temperature": 0.1, "top_k": 1, "repetition_penalty": 1.05}
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    sampling = parse(ChatBody, ask).sampling(10, defaults)
    assert (sampling.temperature, sampling.top_k, sampling.repetition_penalty) == (0.1, 1, 1.05)
    sampling = parse(ChatBody, ask | {"temperature": 0, "top_k": -1}).sampling(10, defaults)
    assert (sampling.temperature, sampling.top_k, sampling.repetition_penalty) == (0, 0, 1.05)
    assert parse(ChatBody, ask).sampling(10).temperature == 1
