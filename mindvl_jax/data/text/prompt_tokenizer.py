"""Tokenizers of text encoders: prompts to ids of a fixed length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors

from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import read_text

CLIP_PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # of its byte pairs
)
START, END = "<|startoftext|>", "<|endoftext|>"


class PromptTokenizer:
    """Tokenizer folder of a diffusers pipeline.

    Attributes:
      longest: of the folder's tokenizer_config.json, None where it names none.
    """

    def __init__(self, folder: Path):
        """Read tokenizer.json, or vocab.json and merges.txt of a CLIP tokenizer.

        Raises:
          UserError: neither is there, or one is not readable.
        """
        settings = _json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        length = settings.get("model_max_length")
        self.longest = length if isinstance(length, int) and length < 10**6 else None
        try:
            if (folder / "tokenizer.json").is_file():
                self._text = tokenizers.Tokenizer.from_str(read_text(folder / "tokenizer.json"))
            elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                self._text = _clip(_json(folder / "vocab.json"), read_text(folder / "merges.txt"))
            else:
                raise UserError(f"{folder}: no tokenizer.json, and no vocab.json with merges.txt")
        except UserError:
            raise
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"{folder}: the tokenizer cannot be read ({error})") from error
        pad = settings.get("pad_token", END)
        self._pad = pad.get("content") if isinstance(pad, dict) else pad
        if self._text.token_to_id(self._pad) is None:
            raise UserError(f"{folder}: pad token {self._pad!r} is not in the vocabulary")

    def __call__(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, list[int]]:
        """Ids (n, length) int32, padded and cut to it, and the numbers of the texts that were cut."""
        self._text.no_truncation()
        self._text.no_padding()
        cut = [number for number, text in enumerate(texts) if len(self._text.encode(text).ids) > length]
        self._text.enable_truncation(length)
        self._text.enable_padding(length=length, pad_id=self._text.token_to_id(self._pad), pad_token=self._pad)
        return np.array([encoding.ids for encoding in self._text.encode_batch(list(texts))], np.int32), cut


def _json(path: Path) -> dict:
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


def _clip(vocabulary: dict[str, int], merges: str) -> tokenizers.Tokenizer:
    """The published byte-pair tokenizer of CLIP: lower case, one space, words that end in </w>."""
    pairs = [tuple(line.split()) for line in merges.splitlines() if line and not line.startswith("#version")]
    text = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=pairs,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=END,
        )
    )
    text.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    text.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    text.post_processor = processors.RobertaProcessing(
        (END, vocabulary[END]), (START, vocabulary[START]), trim_offsets=False, add_prefix_space=False
    )
    text.add_special_tokens([START, END])
    return text
