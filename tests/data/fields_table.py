"""Every field of the published data formats in every file format: used, refused by name, or of no meaning for training.

`python -m tests.data.fields_table` writes docs/data_fields.md; `test_fields_table.py` compares.
"""

from __future__ import annotations

import base64
import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mindvl_jax.config.schema import SourceConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.data.sources.readers import Source
from mindvl_jax.models.vision_language.example import EncodeLimits, ExampleEncoder
from tests.data.data_toys import encoded, model_config, picture, tokenizer

PNG, OTHER = (base64.b64encode(encoded(picture(seed, 28, 28))).decode() for seed in (1, 2))
URI = f"data:image/png;base64,{OTHER}"
CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TURNS = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "Cold."}]
LONG = [*TURNS, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]

# (where, field, value, who publishes it)
RECORD = [
    ("id", "x-1", "all"),
    ("images", [PNG], "LLaMA-Factory, ms-swift"),
    ("image", PNG, "LLaVA"),
    ("videos", ["a.mp4"], "LLaMA-Factory"),
    ("audios", ["a.wav"], "LLaMA-Factory"),
    ("system", "Be short.", "LLaMA-Factory"),
    ("system_prompt", "Be short.", "ShareGPT"),
    ("tools", json.dumps([TOOL]), "LLaMA-Factory, OpenAI"),
    ("functions", json.dumps([TOOL]), "OpenAI, old"),
    ("parallel_tool_calls", True, "OpenAI"),
    ("documents", [{"title": "a", "text": "b"}], "transformers"),
    ("chat_template_kwargs", {"enable_thinking": True}, "transformers, TRL"),
    ("enable_thinking", True, "Qwen3"),
    ("chosen", TURNS, "TRL, LLaMA-Factory"),
    ("rejected", TURNS, "TRL, LLaMA-Factory"),
    ("rejected_response", "Warm.", "ms-swift"),
    ("kto_tag", True, "LLaMA-Factory"),
    ("label", False, "TRL (KTO)"),
    ("completion", "x", "TRL"),
    ("history", [["a", "b"]], "Alpaca"),
    ("objects", {"bbox": [[0, 0, 1, 1]]}, "ms-swift"),
    ("loss_mask", [0, 1], "several"),
    ("weight", 0.0, "several"),
    ("loss_scale", 0.5, "ms-swift"),
    ("input_ids", [1, 2], "tokenised"),
    ("labels", [1, 2], "tokenised"),
    ("assistant_masks", [0, 1], "TRL"),
    ("reasoning", "think", "several"),
    ("solution", "x", "GRPO"),
    ("reward", 0.1, "GRPO"),
    ("response_format", {"type": "json"}, "OpenAI"),
    ("audio", "a.wav", "Qwen-Omni"),
    ("masks", ["m.png"], "grounding"),
    ("bbox", [0, 0, 1, 1], "grounding"),
    ("source", "web", "all"),
    ("dataset", "d", "all"),
    ("language", "en", "all"),
    ("metadata", {"a": 1}, "all"),
    ("score", 0.5, "all"),
    ("date", "2026-01-01", "all"),
    ("task", "t", "ours"),
    ("answers", ["Cold."], "ours"),
    ("channel", "a", "ms-swift"),
    ("license", "cc", "all"),
]
TURN = [
    ("tool_calls", [CALL], "OpenAI"),
    ("function_call", CALL["function"], "OpenAI, old"),
    ("reasoning_content", "think", "Qwen3, DeepSeek"),
    ("thinking", "think", "transformers"),
    ("weight", 0, "OpenAI"),
    ("loss", False, "ms-swift"),
    ("train", False, "axolotl"),
    ("loss_weight", 0.5, "several"),
    ("loss_mask", 0, "several"),
    ("loss_scale", 0.5, "ms-swift"),
    ("mask", True, "several"),
    ("refusal", "no", "OpenAI"),
    ("prefix", True, "Mistral, DeepSeek"),
    ("partial", True, "Moonshot"),
    ("audio", {"id": "a"}, "OpenAI"),
    ("images", [PNG], "Ollama"),
    ("image", PNG, "several"),
    ("tools", [TOOL], "xLAM, GLM"),
    ("functions", [TOOL], "xLAM, GLM"),
    ("documents", [{"text": "b"}], "Cohere"),
    ("citations", [{"start": 0}], "Cohere"),
    ("attachments", ["a.png"], "several"),
    ("files", ["a.png"], "several"),
    ("bbox", [0, 0, 1, 1], "grounding"),
    ("rejected", "Warm.", "several"),
    ("token_weights", [1.0], "several"),
    ("name", "anna", "OpenAI"),
    ("tool_call_id", "c", "OpenAI"),
    ("id", "t1", "all"),
    ("timestamp", 1, "all"),
    ("annotations", ["a"], "OpenAI"),
]
PART = [
    ("min_pixels", 784, "Qwen"),
    ("max_pixels", 784, "Qwen"),
    ("resized_height", 28, "Qwen"),
    ("resized_width", 28, "Qwen"),
    ("fps", 1.0, "Qwen"),
    ("nframes", 2, "Qwen"),
    ("video_start", 1.0, "Qwen"),
    ("bbox", [0, 0, 1, 1], "grounding"),
    ("text", "a caption", "several"),
    ("crop", [0, 0, 1, 1], "several"),
    ("loss", False, "several"),
    ("detail", "auto", "OpenAI"),
    ("cache_control", {"type": "e"}, "Anthropic"),
    ("mime_type", "image/png", "several"),
]
HARMLESS = {
    "record": {
        "id",
        "source",
        "dataset",
        "language",
        "metadata",
        "score",
        "date",
        "task",
        "answers",
        "channel",
        "license",
        "parallel_tool_calls",
        "reward",
        "solution",
    },
    "turn": {"name", "tool_call_id", "id", "timestamp", "annotations", "citations"},
    "part": {"detail", "cache_control", "mime_type"},
}
"""Names and notes that change nothing of what is learned (`answers` is what evaluation compares with)."""


def record_of(place: str, field: str | None, value: Any, shape: str) -> dict[str, Any]:
    """A record that has the field, or the plain one."""
    image = {"type": "image", "image": URI}
    turns = [dict(turn) for turn in TURNS]
    if place == "part":
        turns[0]["content"] = [image, {"type": "text", "text": "Weather?"}]
        turns[1]["content"] = [{"type": "text", "text": turns[1]["content"]}]  # a column of a table has one type
    record: dict[str, Any] = {"messages": turns}
    if field is not None and place == "record":
        record[field] = value
        if field in ("image", "images", "videos"):
            turns[0]["content"] = ("<video>" if field == "videos" else "<image>") + "Weather?"
    elif field is not None and place == "turn":
        turns[1 if field not in ("tools", "functions", "documents", "attachments", "files") else 0][field] = value
    elif field is not None:
        image[field] = value
    if (field == "weight" and place == "turn") or (field in ("loss", "train") and place == "turn"):
        record["messages"] = [*turns, *map(dict, LONG[2:])]  # something must be left to learn
    if shape == "conversations":
        names = {"user": "human", "assistant": "gpt"}
        record["conversations"] = [
            {"from": names[turn.pop("role")], "value": turn.pop("content"), **turn} for turn in record.pop("messages")
        ]
    return record


def write(folder: Path, kind: str, record: dict[str, Any]) -> Path:
    path = folder / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps([record]))
    elif kind == "jsonl":
        path.write_text(json.dumps(record))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist([record]), path)
    else:
        with tarfile.open(path, "w") as tar:
            content = json.dumps(record).encode()
            member = tarfile.TarInfo("a.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def signature(path: Path) -> tuple:
    """What is learned from a file's one sample."""
    sample = Source("d", SourceConfig(path=str(path)))[0]
    encoder = ExampleEncoder(model_config(), tokenizer(), EncodeLimits(min_pixels=784, max_pixels=12544))
    example = encoder.encode(sample)
    return tuple(example.tokens.tolist()), tuple(example.loss_weights.tolist()), example.patches, repr(sample.images)


def outcome(folder: Path, kind: str, shape: str, place: str, field: str, value: Any) -> str:
    """`used`, `refused` or `not read`."""
    plain_record = record_of(place, None, None, shape)
    if place == "turn" and field in ("weight", "loss", "train"):
        plain_record = record_of(place, None, None, shape)
        key = "conversations" if shape == "conversations" else "messages"
        plain_record[key] = record_of("turn", field, None, shape)[key]
    plain = signature(write(folder, kind, plain_record))
    try:
        found = signature(write(folder, kind, record_of(place, field, value, shape)))
    except UserError as error:
        named = field in str(error) or any(said in str(error) for said in SAID_OTHERWISE)
        return "refused" if named else f"refused without its name: {error}"
    return "used" if found != plain else "not read"


SAID_OTHERWISE = ("text and a medium", "check media_root", "but the sample has 0")
"""Of `text` in an image's part, of a medium that is not there, and of a tar file, whose images are its own members."""


KINDS = [
    ("json", "messages"),
    ("json", "conversations"),
    ("jsonl", "messages"),
    ("parquet", "messages"),
    ("tar", "messages"),
]


def table() -> list[tuple[str, str, str, list[str]]]:
    """(place, field, who publishes it, outcome in each kind)."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for place, fields in (("record", RECORD), ("turn", TURN), ("part", PART)):
            for field, value, who in fields:
                rows.append(
                    (
                        place,
                        field,
                        who,
                        [outcome(Path(folder), kind, shape, place, field, value) for kind, shape in KINDS],
                    )
                )
    return rows


def document() -> str:
    """docs/data_fields.md."""
    kinds = [f"{kind}, `{shape}`" for kind, shape in KINDS]
    lines = [
        "# Fields of published data formats",
        "",
        "What becomes of each field, found by encoding a record with and without it (`tests/data/fields_table.py`",
        "writes this page, a test compares): *used*, *refused* by its name, or *not read* because it changes nothing ",
        "of what is learned. A field that is in none of these is not read: take it out, or write it into a turn.",
        "",
        f"| Of | Field | Published by | {' | '.join(kinds)} |",
        "|---|---|---|" + "---|" * len(kinds),
    ]
    lines += [f"| {place} | `{field}` | {who} | {' | '.join(found)} |" for place, field, who, found in table()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parents[2] / "docs" / "data_fields.md").write_text(document(), encoding="utf-8")
