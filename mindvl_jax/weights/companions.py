"""Files beside the weights of a published folder: tokenizer, chat template, image processor, generation settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mindvl_jax.checkpoints.names import ID_TABLE
from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.core.files import read_text
from mindvl_jax.data.text.tokenizer import Tokenizer
from mindvl_jax.models.hf import Pixels
from mindvl_jax.weights.mapping import mapping_of


def write_companions(
    folder: Path, config: ModelConfig, tokenizer: Tokenizer | None, min_pixels: int, max_pixels: int
) -> None:
    """Write everything but config.json and the weights."""
    mapping = mapping_of(config)
    if tokenizer is not None:
        _write_tokenizer(folder, tokenizer, config.text.max_position_embeddings, mapping.chat_template)
        _dump(
            folder / "generation_config.json",
            {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id, "do_sample": False},
        )
    for name, content in mapping.companions(config, Pixels(min_pixels, max_pixels)).items():
        _dump(folder / name, content)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, longest: int, chat_template: str | None) -> None:
    content = json.loads(read_text(tokenizer.file))
    if tokenizer.real_ids is not None:
        _renumber(content, tokenizer.real_ids)
        _dump(folder / ID_TABLE, list(range(len(tokenizer.real_ids))))
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    def name(token):
        return _content_of(content, token)

    _dump(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": longest,
            "eos_token": name(tokenizer.eos_id),
            "pad_token": name(tokenizer.pad_id),
            "clean_up_tokenization_spaces": False,
        },
    )
    # The one that the conversations were written with: a folder's own may add turns that the model never saw.
    template = chat_template if tokenizer.template is None else tokenizer.template
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _renumber(content: dict[str, Any], kept: tuple[int, ...]) -> None:
    """Give a tokenizer.json the ids of a compact vocabulary: kept tokens first, in the model's order, all others after
    them.

    So the file says by itself what the model's ids are; a token that the model never learned has an id past its table,
    which no program can mistake for another token. Control tokens move into the vocabulary, because the file format
    would otherwise number them anew.
    """
    vocabulary: dict[str, int] = content["model"]["vocab"]
    for token in content.get("added_tokens", ()):
        vocabulary.setdefault(token["content"], token["id"])
    rest = sorted(set(vocabulary.values()) - set(kept))
    new = {old: number for number, old in enumerate([*kept, *rest])}
    content["model"]["vocab"] = dict(
        sorted(((token, new[old]) for token, old in vocabulary.items()), key=lambda pair: pair[1])
    )
    for token in content.get("added_tokens", ()):
        token["id"] = new[token["id"]]
    content.get("added_tokens", []).sort(key=lambda token: token["id"])


def _content_of(content: dict[str, Any], number: int) -> str:
    added = {token["id"]: token["content"] for token in content.get("added_tokens", ())}
    return added.get(number) or next(token for token, value in content["model"]["vocab"].items() if value == number)


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
