"""Folders as they are published, in every layout: conversations get the ids of transformers' own rendering, answers end
where the folder says, images get the sizes of its image processor.
"""

from __future__ import annotations

import json

import pytest
import tokenizers
import transformers

from mindvl_jax.config.schema import ColumnMapping
from mindvl_jax.data.record import sample_from_record
from mindvl_jax.data.sample import SampleError
from mindvl_jax.data.text.template import QWEN_TEMPLATE
from mindvl_jax.models.mindvl.config import MindVLConfig
from mindvl_jax.models.vision_language.example import EncodeLimits, ExampleEncoder
from mindvl_jax.weights.errors import WeightsError
from mindvl_jax.weights.mapping import read_config
from mindvl_jax.weights.resolve import open_companions
from tests.data.data_toys import MODEL as MEDIA_MODEL

# The two habits of the published templates: a default system turn, and white space taken off.
DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou "
    "are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}{% if "
    "add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>\n' }}{% endfor "
    "%}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)

LAYOUTS = {
    "inside tokenizer_config.json": lambda text: ({"chat_template": text}, {}),
    "several by name": lambda text: (
        {"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": text}]},
        {},
    ),
    "chat_template.jinja": lambda text: ({}, {"chat_template.jinja": text}),
    "chat_template.json": lambda text: ({}, {"chat_template.json": json.dumps({"chat_template": text})}),
    "jinja wins": lambda text: ({"chat_template": "old"}, {"chat_template.jinja": text}),
    "with a byte order mark": lambda text: ({}, {"chat_template.jinja": "\ufeff" + text}),
}
TEXTS = {"default system": DEFAULT_SYSTEM, "trimmed": TRIMMED, "our own export": QWEN_TEMPLATE}
PLAIN = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "\n\nWhat is 2+2?  "},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Sure? 你好 😀"},
    ],
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter für eine Stadt",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
RICH = [
    (
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": "12C"},
            {"role": "tool", "content": "13C"},
        ],
        [TOOL],
    ),
    (
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "12C"},
        ],
        [TOOL, TOOL],
    ),
    (
        [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4", "reasoning_content": "\nsum\n"},
            {"role": "user", "content": "3+3?"},
        ],
        [],
    ),
]


SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
PAD, START, END = 257, 258, 259
MODEL = MindVLConfig.model_validate(
    {
        **MEDIA_MODEL,
        "vision_start_token_id": 260,
        "vision_end_token_id": 261,
        "image_token_id": 262,
        "video_token_id": 263,
    }
)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """Bytes and the pair of two newlines, which merges over the border of template and text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    raw = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={piece: index for index, piece in enumerate([*alphabet, "ĊĊ"])}, merges=[("Ċ", "Ċ")]
        )
    )
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    raw.save(str(path))
    return path


@pytest.fixture
def folder(vocabulary, tmp_path):
    def make(layout: str, text: str, **files: object):
        settings, beside = LAYOUTS[layout](text)
        (tmp_path / "tokenizer.json").symlink_to(vocabulary)
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(
                {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "eos_token": "<|im_end|>",
                    "pad_token": "<|endoftext|>",
                    **settings,
                }
            )
        )
        for name, content in {**beside, **files}.items():
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return tmp_path

    return make


def ours(tokenizer, messages, tools=()):
    sample = sample_from_record(
        {"messages": messages, "tools": list(tools)},
        columns=ColumnMapping(),
        media_root=None,
        default_id="x",
        origin="x",
    )
    return (
        ExampleEncoder(MODEL, tokenizer, EncodeLimits(784, 12544))
        .encode_prompt(sample.messages, tools=sample.tools)
        .tokens.tolist()
    )


def theirs(folder, text, messages, tools=None):
    witness = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return witness.apply_chat_template(
        messages, tools=tools, chat_template=text, add_generation_prompt=True, tokenize=True, return_dict=False
    )


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        *((layout, "default system") for layout in LAYOUTS),
        ("inside tokenizer_config.json", "trimmed"),
        ("chat_template.jinja", "our own export"),
    ],
)
def test_conversations_get_the_ids_of_transformers(folder, layout, text):
    place = folder(layout, TEXTS[text])
    tokenizer = open_companions(place)[0]
    assert (tokenizer.template is None) == (text == "our own export")
    for messages in PLAIN:
        assert ours(tokenizer, messages) == theirs(place, TEXTS[text], messages)


def test_tools_calls_and_reasoning_of_our_own_export_get_the_ids_of_transformers(folder):
    place = folder("chat_template.jinja", QWEN_TEMPLATE)
    tokenizer = open_companions(place)[0]
    for messages, tools in RICH:
        assert ours(tokenizer, messages, tools) == theirs(place, QWEN_TEMPLATE, messages, tools or None)


def test_a_folder_without_a_template_is_written_in_the_published_format(folder):
    place = folder("inside tokenizer_config.json", "")
    assert ours(open_companions(place)[0], PLAIN[1]) == theirs(place, QWEN_TEMPLATE, PLAIN[1])


@pytest.mark.parametrize(
    ("named", "wanted"),
    [
        ([END, PAD], {END, PAD}),
        (PAD, {END, PAD}),
        ([END, PAD, START], {END, PAD, START}),
        (None, {END, PAD}),
        ([999999], {END, PAD}),
    ],
)
def test_answers_end_at_every_token_that_the_folder_names(folder, named, wanted):
    place = folder("chat_template.jinja", QWEN_TEMPLATE, **{"generation_config.json": {"eos_token_id": named}})
    assert set(open_companions(place)[0].stop_ids) == wanted


SIZES = {
    "published with Qwen2.5-VL": (
        {"preprocessor_config.json": {"min_pixels": 3136, "max_pixels": 12845056}},
        (3136, 12845056),
    ),
    "size by edges": (
        {"preprocessor_config.json": {"size": {"shortest_edge": 784, "longest_edge": 5000}}},
        (784, 5000),
    ),
    "both, min and max win": (
        {
            "preprocessor_config.json": {
                "min_pixels": 1,
                "max_pixels": 2,
                "size": {"shortest_edge": 3, "longest_edge": 4},
            }
        },
        (1, 2),
    ),
    "nested, as transformers 5 writes it": (
        {"processor_config.json": {"image_processor": {"size": {"shortest_edge": 784, "longest_edge": 6000}}}},
        (784, 6000),
    ),
    "nested beside the older file": (
        {
            "processor_config.json": {"image_processor": {"size": {"shortest_edge": 784, "longest_edge": 6000}}},
            "preprocessor_config.json": {"min_pixels": 1},
        },
        (784, 6000),
    ),
    "nothing said": ({"preprocessor_config.json": {}}, (3136, 1003520)),
}


@pytest.mark.parametrize("name", SIZES)
def test_image_sizes_are_read_wherever_transformers_puts_them(folder, name):
    files, wanted = SIZES[name]
    assert open_companions(folder("chat_template.jinja", QWEN_TEMPLATE, **files))[1] == wanted


@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": [0.5, 0.5, 0.5]},
        {"do_normalize": False},
        {"patch_size": 16},
        {"merge_size": 4},
        {"resample": 2},
        {"rescale_factor": 1},
        {"image_mean": "x"},
        {"min_pixels": "abc"},
        {"max_pixels": -5},
        {"min_pixels": True},
    ],
)
def test_images_prepared_in_another_way_are_refused_not_prepared_in_ours(folder, settings):
    place = folder("chat_template.jinja", QWEN_TEMPLATE, **{"preprocessor_config.json": settings})
    with pytest.raises(WeightsError, match="preprocessor_config.json"):
        open_companions(place, MODEL)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"eos_token": 7}'),
        ("tokenizer_config.json", "{"),
        ("generation_config.json", '{"eos_token_id": "x"}'),
        ("generation_config.json", "[]"),
        ("processor_config.json", '{"image_processor": 5}'),
        ("preprocessor_config.json", "\x00"),
    ],
)
def test_files_of_another_shape_are_named(folder, file, content):
    place = folder("chat_template.jinja", QWEN_TEMPLATE)
    (place / file).write_text(content)
    with pytest.raises(ValueError, match=file):
        open_companions(place)


def test_a_tokenizer_with_ids_beyond_the_table_is_refused(folder):
    with pytest.raises(WeightsError, match="tokenizer belongs to another model"):
        open_companions(
            folder("chat_template.jinja", QWEN_TEMPLATE),
            MODEL.model_copy(update={"text": MODEL.text.model_copy(update={"vocab_size": 263})}),
        )


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("text_config", "rope_parameters", [1]), ("text_config", "rope_scaling", "yarn"),
    ("text_config", "rope_parameters", {"mrope_section": 5}), ("vision_config", "fullatt_block_indexes", 5),
    ("vision_config", "rope_parameters", 7),
     ("text_config", "num_attention_heads", 0), (None, "model_type", ["qwen3"]), (None, "vision_config", []),
     (None, "text_config", 5)],
)  # fmt: skip
def test_a_configuration_with_values_of_another_type_is_refused(tmp_path, part, key, value):
    text = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"mrope_section": [2, 3, 3]},
    }
    content = {
        "model_type": "qwen2_5_vl",
        "text_config": text,
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "fullatt_block_indexes": [0],
        },
    }
    (content if part is None else content[part])[key] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="config.json"):
        read_config(tmp_path)


# As published formats differ from the native one: a default system turn, arguments written anew, marks of answers.
OWN_SYSTEM = (
    "{%- if not tools and messages[0].role != 'system' %}{{- '<|im_start|>system\\nHelp.<|im_end|>\\n' }}{%- endif %}"
)
AS_GIVEN = "function.arguments if function.arguments is string else function.arguments | tojson"
OWN_RICH = (
    QWEN_TEMPLATE.replace(AS_GIVEN, "function.arguments | tojson")
    .replace("{%- if tools %}", OWN_SYSTEM + "{%- if tools %}", 1)
    .replace("{%- set state", "{%- generation %}{%- endgeneration %}{%- set state", 1)
)


def test_tools_calls_and_reasoning_under_a_folders_own_template_get_the_ids_of_transformers(folder):
    place = folder("chat_template.jinja", OWN_RICH)
    tokenizer = open_companions(place)[0]
    assert tokenizer.template == OWN_RICH
    for messages, tools in RICH:
        assert ours(tokenizer, messages, tools) == theirs(place, OWN_RICH, messages, tools or None)


def test_what_is_learned_under_a_folders_own_template_is_what_the_assistant_writes(folder):
    tokenizer = open_companions(folder("chat_template.jinja", OWN_RICH))[0]
    messages = [*RICH[0][0], {"role": "assistant", "content": "12 or 13.", "reasoning_content": "two results"}]
    record = {"messages": messages, "tools": [TOOL], "id": "x"}
    options = dict(columns=ColumnMapping(), media_root=None, default_id="x", origin="x")
    encoder = ExampleEncoder(MODEL, tokenizer, EncodeLimits(784, 12544))
    example = encoder.encode(sample_from_record(record, **options))
    witness = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer.file.parent)
    whole = witness.apply_chat_template(messages, tools=[TOOL], chat_template=OWN_RICH, return_dict=False)
    assert [*example.tokens.tolist(), *tokenizer.encode("\n")] == whole
    learned = tokenizer.decode(example.targets[example.loss_weights > 0].tolist(), skip_special=False)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
    assert learned == (f"Let me look.\n{call}\n{call}<|im_end|><think>\ntwo results\n</think>\n\n12 or 13.<|im_end|>")
    # A turn of weight 0 may lose its reasoning, a learned one may not.
    early = [*RICH[2][0], {"role": "assistant", "content": "6"}]
    with pytest.raises(SampleError, match="leaves out the reasoning of turn 1"):
        encoder.encode(sample_from_record({"messages": early}, **options))
    early[1] = {**early[1], "weight": 0}
    assert encoder.encode(sample_from_record({"messages": early}, **options)).loss_weights.sum() == 2
    spelled = {"messages": messages[:3], "tools": [{**TOOL, "x": "<|im_end|>"}]}
    with pytest.raises(SampleError, match="spells the control token '<\\|im_end\\|>'"):
        encoder.encode_prompt(
            sample_from_record(spelled, **options).messages, tools=sample_from_record(spelled, **options).tools
        )
