"""A folder's own chat template gives the ids of its rendering; what users write in it stays text."""

from __future__ import annotations

import jinja2.sandbox
import pytest
from data_toys import encoded, model_config, picture, tokenizer

from mindvl_jax.config.schema import TokenizerConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.data.sample import Media, Message, Sample
from mindvl_jax.data.text.template import OwnTemplate
from mindvl_jax.data.text.tokenizer import load_tokenizer
from mindvl_jax.models.vision_language.example import EncodeLimits, ExampleEncoder

# Two forms in circulation: a default system turn, and an empty thought in the last answer.
WITH_SYSTEM = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
WITH_THOUGHT = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


class Templated:
    """The shared tokenizer with a template of its own; reading the vocabulary again for each would take seconds."""

    def __init__(self, template: str):
        self.template = template

    def __getattr__(self, name):
        return getattr(tokenizer(), name)


def encoder(template: str, **limits) -> ExampleEncoder:
    return ExampleEncoder(
        model_config(), Templated(template), EncodeLimits(**{"min_pixels": 784, "max_pixels": 12544, **limits})
    )


def rendered(template: str, messages, ask: bool = False) -> list[int]:
    """The witness: the template rendered with the texts in it, and encoded at once."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    pictures = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    text = environment.from_string(template).render(
        messages=[{"role": role, "content": content.replace("<image>", pictures)} for role, content in messages],
        add_generation_prompt=ask,
    )
    return tokenizer().encode(text.rstrip("\n") if not ask else text, allow_special=True)


TURNS = (("user", "<image> What is it?"), ("assistant", "A ship."), ("user", "Sure?"), ("assistant", "Yes, sure."))


@pytest.mark.parametrize("template", [WITH_SYSTEM, WITH_THOUGHT])
def test_ids_are_those_of_the_rendered_template(template):
    sample = Sample("s", tuple(Message(*turn) for turn in TURNS), (Media(data=encoded(picture(0))),))
    example = encoder(template).encode(sample)
    assert example.tokens.tolist() == rendered(template, TURNS)
    learned = tokenizer().decode(example.targets[example.loss_weights > 0].tolist(), skip_special=False)
    assert learned == "A ship.<|im_end|>Yes, sure.<|im_end|>"
    prompt = encoder(template).encode_prompt(sample.messages[:3], sample.images)
    assert prompt.tokens.tolist() == rendered(template, TURNS[:3], ask=True)


def test_control_tokens_in_the_text_do_not_reach_the_template():
    spelled = "close <|im_end|> and open <|im_start|>"
    example = encoder(WITH_SYSTEM).encode(Sample("s", (Message("user", spelled), Message("assistant", "no"))))
    special = [token for token in example.tokens.tolist() if tokenizer().is_special(token)]
    assert len(special) == 6 and spelled in tokenizer().decode(example.tokens.tolist(), skip_special=False)


def test_truncation_keeps_whole_turns_of_the_template():
    sample = Sample("s", tuple(Message(*turn) for turn in TURNS), (Media(data=encoded(picture(0))),))
    whole = encoder(WITH_SYSTEM).encode(sample)
    short = encoder(WITH_SYSTEM, max_tokens=whole.length - 1).encode(sample)
    assert short.truncated == 2 and short.tokens.tolist() == whole.tokens[: short.length].tolist()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages[1:] %}{{ m.content }}<|im_end|>{% endfor %}", "each must come once"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "does not close turn 0"),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{% for %}", "does not compile"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "each must come once|refuses"),
    ],
)
def test_templates_that_cannot_be_taken_apart_are_refused(template, message):
    with pytest.raises(UserError, match=message):
        OwnTemplate(template, "<|im_end|>").frames([Message("user", "a"), Message("assistant", "b")])


def test_asking_for_a_template_that_is_not_there_is_an_error():
    with pytest.raises(UserError, match="has no chat template"):
        load_tokenizer(TokenizerConfig(path="qwen3", template="tokenizer"))
