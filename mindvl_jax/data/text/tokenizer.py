"""Text to token ids and back: the Qwen tokenizer, any tokenizer.json, and a compact vocabulary for small models.

`load_tokenizer` is the only door. Where the Qwen2.5 and Qwen3 tokenizers come from, without a download: see
`qwen_tokenizer.py`.

Two vocabularies meet here. *Real* ids are those of the published tokenizer. *Compact* ids are what a small model
computes
with: a softmax over 151,000 entries would be most of a 4 M parameter model. The table (`tokenizer.id_table`, a JSON
list of real ids) maps one to the other; everything outside this file sees compact ids only.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from mindvl_jax.config.schema import TokenizerConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import read_text
from mindvl_jax.data.text.qwen_tokenizer import QWEN_NAMES, qwen_tokenizer_file
from mindvl_jax.data.text.template import QWEN_TEMPLATE


class TokenizerError(UserError):
    """A tokenizer that cannot be loaded, or a text that the compact vocabulary cannot write."""


class Tokenizer:
    """Encode and decodes text in the model's own (possibly compact) vocabulary.

    Attributes:
      vocab_size: number of ids; the model's `text.vocab_size` must not be smaller.
      pad_id: id of padding places; never learned.
      eos_id: the tokenizer's own end of text; a chat tokenizer's is the end of a turn.
      stop_ids: every id that ends an answer: `eos_id`, `<|im_end|>` that closes a turn of the Qwen format, padding, and
        what the folder's generation_config.json names. The tokenizer of a base model ends texts with another token than
        turns.
      special: control tokens (`<|im_start|>`, `<|image_pad|>` ...) by name; those that the compact table leaves out are
        absent.
      chat_template: Jinja text that came with a Hugging Face folder, or None.
      template: the one that conversations are written with; None is the published Qwen format.
      real_ids: for each compact id its real id; None without a table.
    """

    def __init__(
        self,
        file: str | Path,
        *,
        id_table: Sequence[int] | None = None,
        pad_token: str = "<|endoftext|>",
        eos_token: str = "<|im_end|>",
        chat_template: str | None = None,
        stop_ids: Sequence[int] = (),
    ):
        """Read `file` (a tokenizer.json).

        Raises:
          TokenizerError: unreadable file, a table with repeated or unknown ids, or no such pad or eos token.
        """
        self._file = Path(file)
        self._text = _read_tokenizer(self._file)
        self._text.encode_special_tokens = True  # control tokens that a user writes stay plain text
        self.chat_template = chat_template
        self.template: str | None = None
        self._size = self._text.get_vocab_size(with_added_tokens=True)
        self.real_ids = tuple(id_table) if id_table is not None else None
        self._compact = _invert(self.real_ids, self._text) if self.real_ids is not None else None
        self.vocab_size = len(self.real_ids) if self.real_ids is not None else self._size
        self._require_ids_of_the_file()
        added = self._text.get_added_tokens_decoder()
        self.special: Mapping[str, int] = {
            token.content: self._to_compact_or_none(real)
            for real, token in sorted(added.items())
            if token.special and self._to_compact_or_none(real) is not None
        }
        self._special_ids = frozenset(self.special.values())
        self.pad_id = self.token_id(pad_token)
        self.eos_id = self.token_id(eos_token)
        named = [
            compact
            for real in stop_ids
            if real < self._size and (compact := self._to_compact_or_none(real)) is not None
        ]
        turn_end = [self.special["<|im_end|>"]] if "<|im_end|>" in self.special else []
        self.stop_ids = tuple(dict.fromkeys((self.eos_id, *turn_end, self.pad_id, *named)))

    def _require_ids_of_the_file(self) -> None:
        """Raise TokenizerError when a control token does not have the id that the file gives it.

        The library numbers added tokens anew where their ids leave a hole: they would mean other rows of the table.
        """
        tokens = _read_object(self._file).get("added_tokens") or []
        for token in tokens:
            found = self._text.token_to_id(token["content"])
            if found != token["id"]:
                raise TokenizerError(
                    f"{self._file}: the token {_shorten(token['content'])!r} has id {token['id']}, which leaves a hole "
                    f"in the numbers: it would become {found}"
                )

    @property
    def file(self) -> Path:
        """The tokenizer.json that it reads; its ids are real ids."""
        return self._file

    def use_own_template(self) -> None:
        """Write conversations by the template that came with the folder.

        Our own exports carry the format that is written natively.
        """
        self.template = None if self.chat_template == QWEN_TEMPLATE else self.chat_template

    @functools.cached_property
    def largest_id(self) -> int:
        """The largest id that a text can get: a folder may have holes in its numbers."""
        return (
            self.vocab_size - 1
            if self.real_ids is not None
            else max(self._text.get_vocab(with_added_tokens=True).values(), default=-1)
        )

    @functools.cached_property
    def digest(self) -> str:
        """Tell this vocabulary, table and template from any other, wherever their files lie."""
        digest = hashlib.blake2b(self._file.read_bytes(), digest_size=16)
        digest.update(repr((self.real_ids, self.template, self.pad_id, self.eos_id)).encode())
        return digest.hexdigest()

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`; no token is added at its ends.

        Args:
          allow_special: whether control tokens written in the text become their ids. Only for templates: what a user or
            a data set wrote must never be able to end a turn or claim an image.

        Raises:
          TokenizerError: the compact table lacks an id; the message quotes the text.
        """
        real = (self._template if allow_special else self._text).encode(text, add_special_tokens=False).ids
        if self._compact is None:
            return real
        try:
            return [self._compact[token] for token in real]
        except KeyError:
            missing = {
                token: self._text.decode([token], skip_special_tokens=False)
                for token in real
                if token not in self._compact
            }
            raise TokenizerError(
                f"the compact vocabulary ({self.vocab_size} ids) cannot write {_shorten(text)!r}: it lacks "
                + ", ".join(f"{piece!r} (id {token})" for token, piece in list(missing.items())[:8])
                + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
                + (
                    ". Use words that the training data used, or build tokenizer.id_table from this text too and "
                    "train again"
                )
            ) from None

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`. Ids past the vocabulary (rows that pad a published embedding table) have no text.

        Raises:
          ValueError: a negative id.
        """
        ids = [int(token) for token in ids]
        if any(token < 0 for token in ids):
            raise ValueError(f"token ids are not negative, found {min(ids)}")
        real = [self.to_real(token) for token in ids if token < self.vocab_size]
        return self._text.decode(real, skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int:
        """Id of one whole token, by its name in the vocabulary.

        Raises:
          TokenizerError: no such token, or the compact table leaves it out.
        """
        real = self._text.token_to_id(token)
        if real is None:
            raise TokenizerError(f"{self._file.name} has no token {token!r}")
        compact = self._to_compact_or_none(real)
        if compact is None:
            raise TokenizerError(
                f"tokenizer.id_table leaves out {token!r} (id {real}), which this model needs; build the "
                "table again with it"
            )
        return compact

    def to_real(self, token: int) -> int:
        """Published id of an id of this vocabulary."""
        return token if self.real_ids is None else self.real_ids[token]

    def is_special(self, token: int) -> bool:
        return token in self._special_ids

    def _to_compact_or_none(self, real: int) -> int | None:
        return real if self._compact is None else self._compact.get(real)

    @functools.cached_property
    def _template(self) -> tokenizers.Tokenizer:
        # A second reading, because `encode_special_tokens` is a setting of the object: flipping it would not be thread
        # safe.
        return _read_tokenizer(self._file)


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `config.path` names: `qwen2.5`, `qwen3`, a tokenizer.json or a Hugging Face folder.

    Raises:
      TokenizerError: nothing usable there (the message says what was looked for), or `template: tokenizer` without a
        template.
    """
    tokenizer = _load(config)
    if config.template == "tokenizer":
        if tokenizer.chat_template is None:
            raise TokenizerError(
                f"tokenizer.template is `tokenizer`, but {config.path!r} has no chat template "
                "(chat_template.jinja, or chat_template in tokenizer_config.json); use `qwen`"
            )
        tokenizer.use_own_template()
    return tokenizer


def _load(config: TokenizerConfig) -> Tokenizer:
    table = read_id_table(config.id_table) if config.id_table else None
    if config.path in QWEN_NAMES:
        return Tokenizer(qwen_tokenizer_file(config.path), id_table=table)
    path = Path(config.path).expanduser()
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise TokenizerError(
                f"tokenizer.path {config.path!r} is a folder without tokenizer.json (found: "
                f"{', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing'}). "
                "Save the fast tokenizer there (`tokenizer.save_pretrained(folder)` of transformers writes it)"
            )
        return Tokenizer(path / "tokenizer.json", id_table=table, **_folder_settings(path))
    if path.is_file():
        return Tokenizer(path, id_table=table, **_folder_settings(path.parent))
    raise TokenizerError(
        f"tokenizer.path {config.path!r} is neither {' nor '.join(repr(name) for name in QWEN_NAMES)}, nor a "
        "tokenizer.json, nor a folder that has one"
    )


def read_id_table(path: str | Path) -> tuple[int, ...]:
    """Read a compact table: a JSON list of distinct real ids.

    Raises:
      TokenizerError: missing file, or content of another form.
    """
    try:
        content = json.loads(read_text(Path(path).expanduser()))
    except OSError as error:
        raise TokenizerError(
            f"tokenizer.id_table {str(path)!r} cannot be read ({error.strerror}). `make quickstart` builds "
            "the one of the quickstart data"
        ) from None
    except ValueError as error:
        raise TokenizerError(f"tokenizer.id_table {str(path)!r} is not JSON: {error}") from None
    if not isinstance(content, list) or not content or not all(type(token) is int and token >= 0 for token in content):
        raise TokenizerError(
            f"tokenizer.id_table {str(path)!r} must be a JSON list of token ids (whole numbers from 0), one at least"
        )
    return tuple(content)


def _folder_settings(folder: Path) -> dict[str, Any]:
    """Pad token, end of text, stop ids and chat template as a Hugging Face folder gives them; Qwen's names where it
    gives none.
    """
    settings: dict[str, Any] = {}
    content = _read_object(folder / "tokenizer_config.json")
    for name in ("pad_token", "eos_token"):
        value = content.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(value, str):
            raise TokenizerError(
                f"{folder / 'tokenizer_config.json'}: {name} is {str(value)[:80]}; expected the text of a token"
            )
        if value:
            settings[name] = value
    if settings and "pad_token" not in settings:
        settings["pad_token"] = settings["eos_token"]  # Llama's files name no padding; padding is never learned
    stops = _read_object(folder / "generation_config.json").get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if not all(type(stop) is int and stop >= 0 for stop in stops):
        raise TokenizerError(
            f"{folder / 'generation_config.json'}: eos_token_id is {str(stops)[:80]}; expected token ids"
        )
    settings["stop_ids"] = stops
    template: Any = content.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next(
            (entry.get("template") for entry in template if isinstance(entry, dict) and entry.get("name") == "default"),
            None,
        )
    if (
        folder / "chat_template.jinja"
    ).is_file():  # transformers 5 writes the template beside the file, earlier releases inside it
        try:
            template = read_text(folder / "chat_template.jinja")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{folder / 'chat_template.jinja'} cannot be read: {error}") from None
    elif template is None:
        template = _read_object(folder / "chat_template.json").get("chat_template")
    if isinstance(template, str) and template.strip():
        settings["chat_template"] = template
    return settings


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object of a folder; empty when the file is not there. Raises TokenizerError for anything else."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file} is not JSON: {error}") from None
    except OSError as error:
        raise TokenizerError(f"{file} cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{file}: expected a JSON object, found a {type(content).__name__}")
    return content


def _read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    try:
        if file.read_bytes()[:3] == b"\xef\xbb\xbf":
            return tokenizers.Tokenizer.from_str(read_text(file))
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for every kind of bad file
        raise TokenizerError(f"{file} is not a readable tokenizer.json: {error}") from None


def _invert(real_ids: tuple[int, ...], tokenizer: tokenizers.Tokenizer) -> dict[int, int]:
    compact = {real: index for index, real in enumerate(real_ids)}
    if len(compact) != len(real_ids):
        raise TokenizerError(
            f"tokenizer.id_table repeats {len(real_ids) - len(compact)} of its ids; each may stand once"
        )
    unknown = [real for real in real_ids if tokenizer.id_to_token(real) is None]
    if unknown:
        raise TokenizerError(
            f"tokenizer.id_table holds ids that the tokenizer lacks: {unknown[:8]}. The table belongs to "
            "another tokenizer"
        )
    return compact


def _shorten(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
