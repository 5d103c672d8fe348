"""The compact id table: every token that the quickstart's texts can need, whatever the seed and the size of the build.

The table is derived from the closed lists that the generators draw from, not from samples: a table cut from training
text alone could not write questions about unseen tables. The builder encodes every text with it and fails on the first
that does not fit. The stand-in benchmark sets are always the same questions, and enter as they are asked.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Iterable, Iterator

from examples.quickstart import assets, captions, charts, chat, digits, emoji, pictures, shapes, text, words
from mindvl_jax.config.schema import TokenizerConfig
from mindvl_jax.data.text.tokenizer import Tokenizer, load_tokenizer

TOKENIZER = "qwen3"

# Control tokens of the template and of media. The order of the table is its ids' order; pad comes first, as id 0.
CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "system",
    "user",
    "assistant",
    "tool",
    "\n",
    "\n\n",
    "You are a helpful assistant.",
    "Picture 1: ",
    "Video 1: ",
    "Yes",
    "No",
    "yes",
    "no",
)


def id_table(further: Iterable[str] = ()) -> list[int]:
    """Real ids in compact order: control tokens, then all others by rising id.

    `further` texts can be written as well.
    """
    tokenizer = load_tokenizer(TokenizerConfig(path=TOKENIZER))
    control = [tokenizer.token_id(token) for token in CONTROL]
    found = set(_single_bytes(tokenizer))
    for phrase in itertools.chain(closed_texts(), further):
        found.update(tokenizer.encode(phrase))
    return control + sorted(found - set(control))


def closed_texts() -> Iterator[str]:
    """Every list that generators fill their templates from, at a text's start and after a space, and the templates."""
    yield from TEMPLATE
    for template in (*_templates(), *itertools.chain(*shapes.wordings())):
        yield template
        yield " " + template  # text data puts a question behind what it is about
    slots = (
        *string.ascii_letters,
        *string.digits,
        *string.punctuation,
        *assets.concepts(),
        *shapes.SHAPES,
        *shapes.COLOURS,
    )
    for slot in (*slots, *pictures.NAMED_COLOURS, *captions.PAPERS, *charts.PLACES, *chat.THINGS.values()):
        yield slot
        yield " " + slot
    for split in ("train", "validation", "test"):
        for column in assets.columns(split):
            yield from (" " + label for label in column.labels)  # no text begins with a label
    # Every published test question uses a wording of the training part; this keeps the table right should that change.
    yield from sorted(
        {piece for picture in assets.shape_pictures("test") for pair in picture.questions for piece in pair}
    )


def _templates() -> Iterator[str]:
    templates: list[str] = [digits.QUESTION, words.QUESTION, emoji.QUESTION, captions.QUESTION]
    for table in (text.TEMPLATES, captions.TEMPLATES, chat.TEMPLATES):
        templates += table.values()
    templates += [template for _, template in charts.QUESTIONS.values()]
    for wordings in chat.WORDINGS.values():
        templates += wordings
    for questions in chat.FOLLOW_UPS.values():
        templates += questions
    for template in [*templates, *(template + chat.WORD_OR_PHRASE for template in templates)]:
        yield re.sub(
            r"\{\w+\}", "x", template
        )  # a letter stands for what is filled in, so that its neighbours split as they will


def _single_bytes(tokenizer: Tokenizer) -> Iterable[int]:
    return range(256)  # ranks 0 to 255 of the published vocabulary are the bytes
