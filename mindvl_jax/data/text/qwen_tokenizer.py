"""Build the Qwen2.5 and Qwen3 tokenizers from ranks that a package on PyPI carries.

The `dashscope` package holds `qwen.tiktoken`: every token's bytes with its rank, which is its id (0 to 151,642).
Byte-pair merges are not in it but follow from it: the last merge that makes a token joins the two pieces that byte-pair
encoding of its bytes leaves when only lower ranks may be used. Pattern and control tokens are those of the published
tokenizer.json. The result is kept in the user's cache folder, because building takes seconds and reading a fraction of
one.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import write_text

QWEN_NAMES = ("qwen2.5", "qwen3")

# sha256 of the published ranks. Another file would give other ids, and every trained weight would silently be wrong.
RANKS_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
RANKS = 151_643
RECIPE = 1  # counts changes of this file that change its result; part of the cached file's name

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CONTROL_TOKENS = (
    *(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|object_ref_start|>",
        "<|object_ref_end|>",
        "<|box_start|>",
        "<|box_end|>",
    ),
    *(
        "<|quad_start|>",
        "<|quad_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ),
)
# Whole tokens that are ordinary text to a decoder: answers show them.
TEXT_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
QWEN3_TEXT_TOKENS = ("<tool_response>", "</tool_response>", "<think>", "</think>")


def qwen_tokenizer_file(name: str) -> Path:
    """Path of the tokenizer.json of `qwen2.5` or `qwen3`, built on first use.

    Raises:
      UserError: the ranks are not installed, or are not the published ones, or nowhere can be written.
    """
    if name not in QWEN_NAMES:
        raise UserError(f"no tokenizer {name!r}; known: {', '.join(QWEN_NAMES)}")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindvl_jax" / "tokenizers"
    file = folder / f"{name}-{RANKS_SHA256[:12]}-{RECIPE}.json"
    if not file.is_file():
        tokenizer = build_qwen_tokenizer(name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(file, tokenizer.to_str())  # several processes may build at once; all write the same
        except OSError as error:
            raise UserError(
                f"cannot keep the built tokenizer in {folder} ({error.strerror}); set XDG_CACHE_HOME to a "
                "folder that can be written"
            ) from None
    return file


def build_qwen_tokenizer(name: str) -> Tokenizer:
    """The tokenizer itself: 151,665 entries (Qwen2.5) or 151,669 (Qwen3)."""
    ranks = _read_ranks()
    letters = _byte_letters()

    def write(piece):
        return "".join(letters[byte] for byte in piece)

    merges = [(write(left), write(right)) for left, right in recover_merges(ranks)]
    tokenizer = Tokenizer(
        models.BPE({write(piece): rank for piece, rank in ranks.items()}, merges, byte_fallback=False)
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS])
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token in TEXT_TOKENS + (QWEN3_TEXT_TOKENS if name == "qwen3" else ())]
    )
    return tokenizer


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge list, in order of rank, of a byte-level vocabulary in which each token was made by one merge.

    Raises:
      UserError: a token that no single merge of lower ranks makes.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        pieces = _byte_pair_encode(token, ranks, below=rank)
        if len(pieces) != 2:
            raise UserError(
                f"token {token!r} (rank {rank}) splits into {len(pieces)} pieces of lower rank, not 2: these "
                "are not byte-pair ranks"
            )
        merges.append((pieces[0], pieces[1]))
    return merges


def _byte_pair_encode(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    pieces = [bytes([byte]) for byte in token]
    while True:
        best, place = below, None
        for index in range(len(pieces) - 1):
            rank = ranks.get(pieces[index] + pieces[index + 1], below)
            if rank < best:
                best, place = rank, index
        if place is None:
            return pieces
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


def _read_ranks() -> dict[bytes, int]:
    # find_spec of a top-level name does not import it: dashscope's own import pulls an HTTP stack and takes a second.
    spec = importlib.util.find_spec("dashscope")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the Qwen tokenizer is built from ranks in the `dashscope` package, which is not installed: `pip "
            "install dashscope`, or name a tokenizer.json in tokenizer.path"
        )
    file = Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}): this release of `dashscope` lacks the ranks; the "
            "tested one is in the requirement files"
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != RANKS_SHA256:
        raise UserError(
            f"{file} has sha256 {found}, not {RANKS_SHA256}: other ranks give other ids. Install the tested "
            "`dashscope` of the requirement files"
        )
    ranks = {
        base64.b64decode(token): int(rank) for token, rank in (line.split() for line in content.splitlines() if line)
    }
    if len(ranks) != RANKS:
        raise UserError(f"{file} holds {len(ranks)} ranks, not {RANKS}")
    return ranks


def _byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte in byte-level vocabularies: itself where printable, else from
    U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(0x100 + len(letters) - len(printable))
    return letters
