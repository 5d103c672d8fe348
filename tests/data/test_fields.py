"""Fields that change what is learned are used or refused by name, in every format and through every conversion."""

from __future__ import annotations

import base64
import json

import pytest
from data_toys import encoded, model_config, picture, tokenizer

from mindvl_jax.config.schema import ColumnMapping, SourceConfig
from mindvl_jax.data.marks import before_mark, literal, marks, pieces, plain
from mindvl_jax.data.record import conversation, sample_from_record
from mindvl_jax.data.sample import SampleError
from mindvl_jax.data.sources.convert import ENDINGS, convert
from mindvl_jax.data.sources.readers import Source
from mindvl_jax.models.vision_language.example import EncodeLimits, ExampleEncoder

ASK = {"role": "user", "content": "Weather in Oslo?"}
TOOL = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Oslo"}'}}
WRITTEN_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city":"Oslo"}}\n</tool_call>'
PNG = encoded(picture(1, 28, 28))


def read(record: dict, **options):
    return sample_from_record(record, columns=ColumnMapping(), media_root=None, default_id="d", origin="o", **options)


def texts(record: dict, **limits) -> tuple[str, str]:
    """(text of all tokens, text of what is learned)."""
    example = ExampleEncoder(
        model_config(), tokenizer(), EncodeLimits(**{"min_pixels": 784, "max_pixels": 12544, **limits})
    ).encode(read(record))

    def decode(ids):
        return tokenizer().decode([int(token) for token in ids], skip_special=False)

    return decode(example.tokens), decode(example.targets[example.loss_weights > 0])


def answer(**fields) -> dict:
    return {
        "messages": [
            ASK,
            {"role": "assistant", "content": "BAD", **fields},
            ASK,
            {"role": "assistant", "content": "GOOD"},
        ]
    }


# (record, all tokens, what is learned) in the form that Qwen2.5 and Qwen3 publish, written by hand.
USED = {
    "tool calls": (
        {
            "messages": [
                ASK,
                {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL, CALL]},
                {"role": "tool", "content": "12C"},
                {"role": "assistant", "content": "12 degrees."},
            ]
        },
        f"<|im_start|>user\nWeather in Oslo?<|im_end|>\n<|im_start|>assistant\nLet me look.\n{WRITTEN_CALL}\n"
        f"{WRITTEN_CALL}<|im_end|>\n<|im_start|>user\n<tool_response>\n12C\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n12 degrees.<|im_end|>",
        f"Let me look.\n{WRITTEN_CALL}\n{WRITTEN_CALL}<|im_end|>12 degrees.<|im_end|>",
    ),
    "calls as a turn of their own (ShareGPT)": (
        {
            "conversations": [
                {"from": "human", "value": "Weather?"},
                {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city":"Oslo"}}'},
                {"from": "observation", "value": "12C"},
                {"from": "gpt", "value": "12."},
            ]
        },
        "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n<|im_start|>user\n'
        "<tool_response>\n12C\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n12.<|im_end|>",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>12.<|im_end|>',
    ),
    "tools": (
        {
            "tools": json.dumps([TOOL]),
            "messages": [{"role": "system", "content": "Be short."}, ASK, {"role": "assistant", "content": "No."}],
        },
        "<|im_start|>system\nBe short.\n\n# Tools\n"
        "\nYou may call one or more functions to assist with the user query.\n"
        "\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        + json.dumps({"type": "function", "function": TOOL})
        + "\n</tools>\n"
        "\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nWeather in Oslo?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>",
        "No.<|im_end|>",
    ),
    "loss false (ms-swift)": (answer(loss=False), None, "GOOD<|im_end|>"),
    "weight 0 (OpenAI)": (answer(weight=0), None, "GOOD<|im_end|>"),
    "train false (axolotl)": (answer(train=False), None, "GOOD<|im_end|>"),
    "reasoning": (
        {
            "messages": [
                {"role": "user", "content": "2+2?"},
                {"role": "assistant", "reasoning_content": "two and two", "content": "4"},
            ]
        },
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\ntwo and two\n</think>\n\n4<|im_end|>",
        "<think>\ntwo and two\n</think>\n\n4<|im_end|>",
    ),
    "a system text of the record": (
        {"system": "Be short.", "messages": answer()["messages"]},
        None,
        "BAD<|im_end|>GOOD<|im_end|>",
    ),
    "letters that spell a mark": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Is <image> a tag?"}]},
                {"role": "assistant", "content": "Yes, \\<image>."},
            ]
        },
        "<|im_start|>user\nIs <image> a tag?<|im_end|>\n<|im_start|>assistant\nYes, <image>.<|im_end|>",
        "Yes, <image>.<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", USED)
def test_a_field_is_written_as_the_published_format_has_it(name):
    record, whole, learned = USED[name]
    seen = texts(record)
    assert seen[1] == learned
    assert whole is None or seen[0] == whole


def test_a_turn_of_half_weight_is_learned_with_half_of_the_loss():
    example = ExampleEncoder(model_config(), tokenizer(), EncodeLimits(784, 12544)).encode(read(answer(weight=0.5)))
    assert sorted(set(example.loss_weights.tolist())) == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({**answer(), "rejected": [ASK]}, "'rejected'"),
        ({**answer(), "audios": ["a.wav"]}, "'audios'"),
        ({**answer(), "objects": {"bbox": [[0, 0, 1, 1]]}}, "'objects'"),
        ({**answer(), "weight": 0}, "'weight'"),
        ({**answer(), "image": "a.png", "images": ["b.png"]}, "'image'"),
        ({**answer(), "conversations": [{"from": "human", "value": "other"}]}, "'conversations'"),
        ({"system": "A", "messages": [{"role": "system", "content": "B"}, *answer()["messages"]]},
        "says something else"),
        ({"system": ["A"], **answer()}, "expected text"),
        (answer(refusal="I cannot"), "'refusal'"),
        (answer(prefix=True), "'prefix'"),
        (answer(loss=False, weight=1), "differ"),
        (answer(weight="high"), "weight"),
        (answer(tool_calls=[{"function": {"arguments": "{}"}}]), "without a name"),
        (answer(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), "not JSON"),
        (answer(reasoning_content="first"), "after the last user turn"),
        ({"messages": [{**ASK, "loss": True}, {"role": "assistant", "content": "a"}]}, "only answers are learned"),
        ({"messages": [{**ASK, "tool_calls": [CALL]}, {"role": "assistant", "content": "a"}]},
        "only the assistant calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png", "max_pixels": 784}]},
        {"role": "assistant", "content": "a"}]}, "'max_pixels'"),
        ({"images": ["b.png"], "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]},
        {"role": "assistant", "content": "a"}]}, "names 'a.png'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image": "a.png"}]},
        {"role": "assistant", "content": "a"}]}, "text and a medium"),
        ({"images": ["https://example.org/a.png"], "messages": [{"role": "user", "content": "<image>"},
        {"role": "assistant", "content": "a"}]}, "URL"),
        ({"images": ["file://host/a.png"], "messages": [{"role": "user", "content": "<image>"}, {"role": "assistant",
        "content": "a"}]}, "another machine"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(record, says):
    with pytest.raises(SampleError, match=says):
        texts(record)


DATA_URI = "data:image/png;base64," + base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": DATA_URI, "detail": "auto"}},
        {"type": "image_url", "image_url": DATA_URI},
        {"type": "image", "image": DATA_URI, "text": None},
        {"type": "image", "base64": base64.b64encode(PNG).decode()},
        {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": base64.b64encode(PNG).decode()},
        },
        {"type": "image", "image": {"bytes": PNG, "path": None}},
        {"image": base64.b64encode(PNG).decode()},
        {"type": "input_image", "image_url": DATA_URI},
    ],
)
def test_an_image_inside_a_part_is_read_in_every_published_form(part):
    messages, images, _ = conversation([{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}])
    assert images[0].data == PNG and messages[0].content == "<image>What?"


def test_parts_and_marks_take_their_images_in_order():
    turns = [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "image"}]},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "<image>"},
    ]
    sample = read({"images": ["1.png", "2.png"], "messages": [*turns, {"role": "assistant", "content": "y"}]})
    assert [media.path for media in sample.images] == ["a.png", "1.png", "2.png"]


def test_a_file_url_is_a_path_below_the_root(tmp_path):
    (tmp_path / "a b.png").write_bytes(PNG)
    assert read({"images": [f"file://{tmp_path}/a%20b.png"], **answer()}).images[0].path == f"{tmp_path}/a b.png"


@pytest.mark.parametrize(
    "text",
    [
        "data:image/png,abc",
        "data:" + "x" * 10_000_000,
        "data:image/png;base64,@@@@",
        "data:image/png;base64," + "A" * (90 << 20),
    ],
    ids=["form", "no comma", "alphabet", "too large"],
)
def test_a_damaged_data_uri_is_refused_at_once_and_never_quoted(text):
    with pytest.raises(SampleError) as error:
        read({"images": [text], **answer()})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("text", ["a", "<image>", "\\<image>", "\\\\<video>\\", "x\\\\\\<image><video>", "<image"])
def test_any_letters_can_be_written_as_text(text):
    assert plain(literal(text)) == text and not marks(literal(text))
    assert [piece for kind, piece in pieces(before_mark(literal(text)) + "<image>") if kind == "text"] in ([text], [])


@pytest.mark.parametrize("to", ENDINGS)
@pytest.mark.parametrize("name", USED)
def test_converting_keeps_every_field(tmp_path, name, to):
    path = tmp_path / "in.json"
    path.write_text(json.dumps([USED[name][0]]))
    out = tmp_path / f"out{ENDINGS[to]}"
    assert convert(Source("d", SourceConfig(path=str(path))), to, str(out)).skipped == 0
    before, after = (Source("d", SourceConfig(path=str(p)))[0] for p in (path, out))
    assert (after.messages, after.tools) == (before.messages, before.tools)
