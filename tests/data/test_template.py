"""A folder's own chat template gives the ids of its rendering; what users write in it stays text."""

from __future__ import annotations

import time

import jinja2.sandbox
import pytest
from data_toys import encoded, model_config, picture, tokenizer

from mindvl_jax.config.schema import TokenizerConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.data.sample import Media, Message, Sample
from mindvl_jax.data.text import sandbox
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


GROWS = "{% set ns = namespace(x='a', l=[1]) %}{% for i in range(60) %}{% set ns.x = BODY %}{% endfor %}{{ ns.x }}"
HOSTILE = {
    "nested loops": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "macros that call each other": "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a loop without end": "{% for a in [[1, 2]] recursive %}{{ loop([[1, 2], [3]]) }}{% endfor %}",
    "doubled by ~": GROWS.replace("BODY", "ns.x ~ ns.x"), "doubled by +": GROWS.replace("BODY", "ns.x + ns.x"), "replaced by more": GROWS.replace("BODY", "ns.x.replace('a', 'aaaa')"),
    "a filter that replaces": GROWS.replace("BODY", "ns.x | replace('a', 'aaaa')"), "lists of lists": GROWS.replace("BODY", "[ns.x, ns.x]"), "mappings": GROWS.replace("BODY", "dict(a=ns.x, b=ns.x)"),
    "a long text": "{{ 'ab' * 10000000000 }}", "a long list": "{{ 10000000000 * [1] }}", "a power": "{{ 9 ** 9 ** 9 ** 9 }}", "a large product": "{% set ns = namespace(x=9999) %}{% for i in range(900) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    **{f"wide {form[:12]}": "{{ " + form + " }}" for form in ("'a' | center(1000000000000)", "'a'.ljust(1000000000000)", "'a'.zfill(1000000000000)", "'{:>99999999999}'.format(1)", "'{:>{w}}'.format(1, w=99999999999)", "'%99999999999d' % 1",
        "'%*d' % (99999999999, 1)", "'%99999999d' | format(1)", "'{a:>99999999999}'.format_map({'a': 1})", "'a\nb' | indent(1000000000000)", "[1] | tojson(indent=1000000000000)", "1.5 | round(999999999)", "lipsum(n=10000000)",
        "('a' * 4000000).join(range(99999) | map('string'))", "range(99999) | join('a' * 4000000)", "('a' * 4000000).translate({97: 'b' * 4000000})", "range(99999) | map('string') | map('replace', '', 'a' * 900000) | list")},
    "written again and again": "{% set x = 'a' * 4000000 %}{% for i in range(99999) %}{{ x }}{% endfor %}", "kept again and again": "{% set x = 'a' * 4000000 %}{% set y %}{% for i in range(99999) %}{{ x }}{% endfor %}{% endset %}",
    "Python's inside": "{{ ().__class__.__base__.__subclasses__() }}", "a file": "{% include '/etc/passwd' %}", "a module": "{% import 'os' as o %}", "the environment": "{{ self._TemplateReference__context.environment }}",
    "nested brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_in_bounded_time_and_memory(monkeypatch, name):
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        OwnTemplate(HOSTILE[name], "<|im_end|>").frames([Message("user", "a"), Message("assistant", "b")])
    assert time.monotonic() - start < 10 and len(str(error.value)) < 1000
