"""Records of the accepted shapes to samples.

What changes what is learned is used or refused by its name, never dropped: turns' weights, tools and their calls,
reasoning, media named in content parts. Fields with another meaning (dates, sources, scores) are left alone.
"""

from __future__ import annotations

import functools
import json
import math
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mindvl_jax.config.schema import ColumnMapping
from mindvl_jax.core.errors import shortened
from mindvl_jax.data.marks import IMAGE, VIDEO, before_mark, literal, pieces
from mindvl_jax.data.media.inline import InlineError, decode_base64, inline_bytes
from mindvl_jax.data.questions import with_turns
from mindvl_jax.data.sample import Media, Message, Sample, SampleError, Unreadable

# Role names of the shapes in circulation. A source's `columns` adds its own.
ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
# Turns whose content is the JSON of calls: they belong to the assistant's turn before them, if there is one.
CALL_ROLES = ("function_call", "tool_call")

# Fields that would change what is learned and whose meaning is not built. Empty ones say nothing.
REFUSED_IN_RECORD = (
    "rejected", "chosen", "rejected_response", "rejected_messages", "rejected_images", "rejected_conversations",
    "kto_tag", "audio", "audios", "sound", "sounds",
    "objects", "loss", "loss_mask", "loss_weight", "loss_scale", "weight", "sample_weight", "history", "bbox", "masks",
    "documents", "chat_template_kwargs", "enable_thinking", "response_format", "reasoning", "reasoning_content",
    "input_ids", "labels", "attention_mask", "assistant_masks", "completion", "tool_choice",
    )  # fmt: skip
REFUSED_IN_TURN = (
    "audio", "audios", "refusal", "prefix", "partial", "loss_mask", "loss_scale", "token_weights", "train_detail",
    "mask", "masked", "rejected", "chosen", "thinking_blocks",
    "reasoning_details", "images", "image", "videos", "video", "tools", "functions", "documents", "attachments",
    "files", "bbox", "objects", "enable_thinking",
    )  # fmt: skip
FALSE_MATTERS = ("loss", "weight", "enable_thinking", "label")  # of other fields `false` says nothing
WEIGHTS = (
    "weight",
    "loss",
    "loss_weight",
    "train",
    "trainable",
)  # names of a turn's weight: a number, or whether it is learned
REASONING = ("reasoning_content", "reasoning", "thinking", "thought")
REFUSED_IN_PART = (
    "min_pixels", "max_pixels", "resized_height", "resized_width", "fps", "nframes", "max_frames", "min_frames",
    "video_start", "video_end", "bbox", "crop", "loss", "weight",
    )  # fmt: skip
_KINDS = {
    "text": "text", "input_text": "text", "output_text": "text",
    "image": "image", "image_url": "image", "input_image": "image",
    "video": "video", "video_url": "video", "input_video": "video",
}  # fmt: skip
_MEDIA_KEYS = {
    "image": ("image", "image_url", "url", "path", "base64", "data", "bytes", "source"),
    "video": ("video", "video_url", "url", "path", "base64", "data", "bytes", "source"),
}


def _add_system(messages: list[Message], system: str | None) -> None:
    """Insert the record's system text as the first turn, unless a system turn repeats it."""
    if not system:
        return
    own = [message.content for message in messages if message.role == "system"]
    if own and own != [literal(system)] and own != [system]:
        raise SampleError(
            "malformed",
            "the record has a system text beside a system turn that says something else; keep one of them",
        )
    if not own:
        messages.insert(0, Message("system", system))


def sample_from_record(
    record: Any,
    *,
    columns: ColumnMapping,
    media_root: str | None,
    default_id: str,
    origin: str,
    media_in_file: bool = False,
) -> Sample:
    """Read one record of any accepted shape: `messages` (MLLM, parquet, JSONL), `conversations` (LLaVA, ShareGPT), or a
    question and its answer (see `questions`).

    Args:
      media_in_file: the record's media are the file's own (a tar): paths that its content parts name are not looked
        for.

    Raises:
      SampleError: not an object, no turns, an unknown role, media of an unknown form, or a field whose meaning is not
        built.
    """
    if not isinstance(record, Mapping):
        raise SampleError("malformed", f"a sample must be an object with named fields, found {type(record).__name__}")
    turns = _either(record, columns.messages, "conversations")
    if turns is None and (asked := with_turns(record, columns)) is not None:
        record, turns = asked, asked[columns.messages]
    if not isinstance(turns, (list, tuple)):
        keys = shortened(", ".join(map(str, list(record)[:8])))
        raise SampleError(
            "malformed",
            f"no list of turns in {columns.messages!r} or 'conversations' (the record has: {keys}); name the "
            "column in columns.messages, or in columns.question and columns.answer",
        )
    _refuse(record, REFUSED_IN_RECORD, "the record", keep=_used(columns))
    if isinstance(record.get("label"), bool):  # of a preference (KTO); other labels are classes
        _refuse(record, ("label",), "the record", keep=_used(columns))
    media = _Media(
        {
            "image": _listed(_either(record, columns.images, "image")),
            "video": _listed(_either(record, columns.videos, "video")),
        },
        media_root,
        media_in_file,
    )
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        message, calls_alone = _message(turn, index, columns, media)
        if calls_alone and messages and messages[-1].role == "assistant":
            message = Message(
                "assistant",
                messages[-1].content,
                messages[-1].weight,
                messages[-1].reasoning,
                messages[-1].calls + message.calls,
            )
            messages.pop()
        messages.append(message)
    _add_system(messages, _system(record, columns))
    images, videos = media.finish()
    identifier, task = _cell(record, columns.id), _cell(record, "task")
    return Sample(
        id=default_id if identifier is None else _text(identifier),
        messages=tuple(messages),
        images=images,
        videos=videos,
        task=None if task is None else _text(task),
        answers=tuple(_text(answer) for answer in _listed(_cell(record, "answers"))),
        tools=_tools(record),
        origin=origin,
    )


def conversation(
    turns: Sequence[Mapping[str, Any]],
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    *,
    media_root: str | None = None,
) -> tuple[tuple[Message, ...], tuple[Media, ...], tuple[Media, ...]]:
    """Read the turns of a request: contents may be text or lists of parts.

    Media named in parts come before `images` of bare marks.

    Raises SampleError as `sample_from_record`.
    """
    media = _Media({"image": list(images), "video": list(videos)}, media_root, False)
    messages = tuple(_message(turn, index, ColumnMapping(), media)[0] for index, turn in enumerate(turns))
    return (messages, *media.finish())


# --- fields ----------------------------------------------------------------------------------------------------------


def _cell(record: Mapping[str, Any], name: str) -> Any:
    value = record.get(name)
    if isinstance(value, Unreadable):
        raise SampleError("malformed", f"{name!r} cannot be read: {value.message}")
    return value


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, tuple, dict, bytes)) and len(value) == 0)


def _either(record: Mapping[str, Any], *names: str) -> Any:
    """The field by the first of its names that holds something.

    Two that differ are refused: one of them would be dropped.
    """
    found = [(name, value) for name in dict.fromkeys(names) if not _empty(value := _cell(record, name))]
    if len(found) > 1 and _listed(found[0][1]) != _listed(found[1][1]):
        raise SampleError(
            "malformed",
            f"the fields {found[0][0]!r} and {found[1][0]!r} both hold something, and not the same; keep one of them",
        )
    return found[0][1] if found else next((record[name] for name in names if record.get(name) is not None), None)


def _refuse(holder: Mapping[str, Any], names: Sequence[str], what: str, keep: Sequence[str] = ()) -> None:
    for name in names:
        value = holder.get(name)
        if name in holder and name not in keep and not _empty(value) and (value is not False or name in FALSE_MATTERS):
            raise SampleError(
                "unsupported_field",
                f"{what} has {name!r} ({shortened(repr(value), 80)}), which changes what is learned and is "
                "not supported; take it out, or convert the data",
            )


def _used(columns: ColumnMapping) -> tuple[str, ...]:
    """Names of fields that the source's mapping gives a meaning."""
    return tuple(columns.model_dump().values())


@functools.lru_cache(maxsize=16)
def _role_names(columns: ColumnMapping) -> dict[str, str]:
    return {columns.user: "user", columns.assistant: "assistant", columns.system: "system", columns.tool: "tool"}


def _text(value: Any) -> str:
    """Text that is UTF-8: JSON can hold lone surrogates, which no tokenizer and no file takes."""
    text = value if isinstance(value, str) else str(value)
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _system(record: Mapping[str, Any], columns: ColumnMapping) -> str:
    value = _either(record, "system", "system_prompt")
    if _empty(value):
        return ""
    if not isinstance(value, str):
        raise SampleError("malformed", f"the record's system text is a {type(value).__name__}; expected text")
    return _text(value)


# --- turns -----------------------------------------------------------------------------------------------------------


def _message(turn: Any, index: int, columns: ColumnMapping, media: _Media) -> tuple[Message, bool]:
    """The turn, and whether it is nothing but calls of tools."""
    if not isinstance(turn, Mapping):
        raise SampleError(
            "malformed", f"turn {index} must be an object with a role and content, found {type(turn).__name__}"
        )
    where = f"turn {index}"
    role, content = _either(turn, columns.role, "from"), _either(turn, columns.content, "value")
    own = _role_names(columns)
    name = role if isinstance(role, str) else None
    known = own.get(name) or ("assistant" if name in CALL_ROLES else ROLE_ALIASES.get(name))
    if known is None:
        raise SampleError(
            "unknown_role",
            f"{where} has role {shortened(repr(role))}; known are "
            f"{', '.join(sorted({*own, *ROLE_ALIASES, *CALL_ROLES}))} (name others in columns)",
        )
    keep = (columns.role, columns.content)  # names of the record's own columns mean nothing in a turn
    _refuse(turn, REFUSED_IN_TURN, where, keep=keep)
    weight, reasoning = _weight(turn, where, known, keep=keep), _reasoning(turn, where, known)
    calls = _calls(turn.get("tool_calls"), where, known) + _calls(turn.get("function_call"), where, known)
    if name in CALL_ROLES and name not in own:
        return Message("assistant", "", weight, reasoning, calls + _calls(content, where, known)), True
    if content is None and (calls or reasoning):
        content = ""
    return Message(known, media.content(content, index), weight, reasoning, calls), False


def _weight(turn: Mapping[str, Any], where: str, role: str, keep: Sequence[str]) -> float:
    found = {name: turn[name] for name in WEIGHTS if turn.get(name) is not None and name not in keep}
    values = set()
    for name, value in found.items():
        if not isinstance(value, (bool, int, float)) or not math.isfinite(value) or not 0 <= value <= 1e6:
            raise SampleError(
                "malformed",
                f"{where} has {name} {shortened(repr(value), 80)}; expected true, false or a number from 0 upwards",
            )
        values.add(float(value))
    if len(values) > 1:
        raise SampleError("malformed", f"{where} has {' and '.join(found)} that differ; keep one of them")
    weight = values.pop() if values else 1.0
    if role != "assistant":
        if found and weight:
            raise SampleError(
                "unsupported_field",
                f"{where} is the {role}'s and has {next(iter(found))} {weight:g}, but only answers are "
                "learned turn by turn; take it out, or set data.train_on to `all`",
            )
        return 1.0
    return weight


def _reasoning(turn: Mapping[str, Any], where: str, role: str) -> str:
    found = {name: turn[name] for name in REASONING if not _empty(turn.get(name))}
    if not found:
        return ""
    if (
        role != "assistant"
        or not all(isinstance(value, str) for value in found.values())
        or len(set(found.values())) > 1
    ):
        raise SampleError(
            "malformed", f"{where} has {' and '.join(found)}; expected one text, and in the assistant's turns only"
        )
    return _text(next(iter(found.values())))


def _calls(value: Any, where: str, role: str) -> tuple[str, ...]:
    """Calls as the JSON objects {"name", "arguments"} that the published format writes."""
    if _empty(value):
        return ()
    if role != "assistant":
        raise SampleError("malformed", f"{where} calls tools, but it is the {role}'s; only the assistant calls tools")
    return tuple(_call(entry, where) for entry in _listed(_parsed(value, f"{where}: the calls")))


def _call(entry: Any, where: str) -> str:
    entry = _parsed(entry, f"{where}: a call")
    inner = entry.get("function", entry) if isinstance(entry, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise SampleError(
            "malformed",
            f'{where} calls a tool without a name; expected {{"function": {{"name": ..., "arguments": {{...}}}}}}',
        )
    arguments = inner.get("arguments", inner.get("parameters"))
    if isinstance(arguments, str):
        # As they are written: the published format copies a text of arguments letter by letter.
        if arguments.strip() and not isinstance(
            _parsed(arguments, f"{where}: arguments of {inner['name']!r}"), Mapping
        ):
            raise SampleError("malformed", f"{where}: arguments of {inner['name']!r} must be a JSON object")
        text = arguments if arguments.strip() else "{}"
    elif arguments is None or isinstance(arguments, Mapping):
        text = json.dumps(arguments or {}, ensure_ascii=False, default=str)
    else:
        raise SampleError(
            "malformed",
            f"{where}: arguments of {inner['name']!r} must be a JSON object, found {type(arguments).__name__}",
        )
    return _text(f'{{"name": {json.dumps(inner["name"], ensure_ascii=False)}, "arguments": {text}}}')


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise SampleError("malformed", f"{what} are not JSON: {shortened(str(error))}") from None


def _tools(record: Mapping[str, Any]) -> tuple[str, ...]:
    value = _either(record, "tools", "functions")
    if _empty(value):
        return ()
    tools = []
    for entry in _listed(_parsed(value, "the record's tools")):
        entry = _parsed(entry, "a tool")
        if not isinstance(entry, Mapping):
            raise SampleError("malformed", f"the record's tools must be objects, found {type(entry).__name__}")
        whole = (
            entry
            if entry.get("type") == "function" and "function" in entry
            else {"type": "function", "function": entry}
        )
        tools.append(_text(json.dumps(whole, ensure_ascii=False, default=str)))
    return tuple(tools)


# --- media and content -----------------------------------------------------------------------------------------------


class _Media:
    """Media of one record in the order in which its turns mark them."""

    def __init__(self, columns: Mapping[str, list[Any]], root: str | None, in_file: bool):
        self._columns = {kind: [media_of(item, root) for item in items] for kind, items in columns.items()}
        self._root, self._in_file = root, in_file
        self._marked: dict[str, list[Media | None]] = {"image": [], "video": []}  # None takes the next of the column
        self._named: dict[str, str] = {}

    def content(self, content: Any, index: int) -> str:
        """The turn's text with marks; notes which media stand at them."""
        if isinstance(content, str):
            text = _text(content)
            for kind, _ in pieces(text):
                if kind != "text":
                    self._marked[kind].append(None)
            return text
        if not isinstance(content, (list, tuple)):
            raise SampleError(
                "malformed",
                f"the content of turn {index} must be text or a list of parts, found {type(content).__name__}",
            )
        text = ""
        for part in content:
            if isinstance(part, str):
                part = {"type": "text", "text": part}
            kind = _kind_of(part, index)
            if kind == "text":
                text += literal(_text(part.get("text")))
                continue
            _refuse(part, REFUSED_IN_PART, f"a part of turn {index}")
            self._marked[kind].append(self._own(part, kind, index))
            text = before_mark(text) + (IMAGE if kind == "image" else VIDEO)
        return text

    def _own(self, part: Mapping[str, Any], kind: str, index: int) -> Media | None:
        found = {key: part[key] for key in _MEDIA_KEYS[kind] if not _empty(part.get(key))}
        if not found:
            return None
        if len(found) > 1:
            raise SampleError(
                "malformed", f"a part of turn {index} names its {kind} twice ({', '.join(found)}); keep one of them"
            )
        key, value = next(iter(found.items()))
        if isinstance(value, Mapping) and key in ("image_url", "video_url"):
            value = value.get("url")
        media = (
            Media(data=_decoded(value))
            if key in ("base64", "data") and isinstance(value, str)
            else media_of(value, self._root)
        )
        if self._in_file and media.data is None:
            return None
        self._named[kind] = f"turn {index} names {shortened(repr(media.path), 80) if media.path else 'embedded bytes'}"
        return media

    def finish(self) -> tuple[tuple[Media, ...], tuple[Media, ...]]:
        return self._resolved("image"), self._resolved("video")

    def _resolved(self, kind: str) -> tuple[Media, ...]:
        marked, column = self._marked[kind], self._columns[kind]
        named = [media for media in marked if media is not None]
        if not named:
            return tuple(column)  # their number against the marks is checked where the sample is encoded
        if column and len(named) == len(marked):
            if named == column:
                return tuple(named)
            raise SampleError(
                "media_mismatch",
                f"{self._named[kind]} in its content, and the record lists other {kind}s beside "
                f"({len(column)}); keep one of them",
            )
        if len(marked) - len(named) != len(column):
            raise SampleError(
                "media_mismatch",
                f"{len(marked) - len(named)} marks take their {kind} from the record's list, which has {len(column)}",
            )
        rest = iter(column)
        return tuple(next(rest) if media is None else media for media in marked)


def _kind_of(part: Any, index: int) -> str:
    if not isinstance(part, Mapping):
        raise SampleError(
            "malformed",
            f"turn {index} has a part that is a {type(part).__name__}; expected an object with type text, "
            "image or video",
        )
    said = part.get("type")
    if said is None:
        kinds = [
            kind
            for key, kind in (
                ("text", "text"),
                ("image", "image"),
                ("image_url", "image"),
                ("video", "video"),
                ("video_url", "video"),
            )
            if not _empty(part.get(key))
        ]
        kind = kinds[0] if len(kinds) == 1 else None
    else:
        kind = _KINDS.get(said) if isinstance(said, str) else None
    text, media = (
        part.get("text"),
        any(not _empty(part.get(key)) for key in ("image", "image_url", "video", "video_url")),
    )
    if kind is None or (kind == "text" and not isinstance(text, str)):
        raise SampleError(
            "malformed", f"turn {index} has a part of type {shortened(repr(said), 80)}; expected text, image or video"
        )
    if media if kind == "text" else not _empty(text):
        raise SampleError(
            "malformed", f"turn {index} has a part that is text and a medium at once; make two parts of it"
        )
    return kind


def _decoded(text: str) -> bytes:
    try:
        return inline_bytes(text) or decode_base64(text)
    except InlineError as error:
        raise SampleError("undecodable", str(error)) from None


def media_of(item: Any, root: str | None) -> Media:
    """Read one medium of a record: a path below `root`, a data URI or base64, bytes, or an object that holds one of
    them.

    Raises SampleError for anything else.
    """
    if isinstance(item, Media):
        return item
    if isinstance(item, str):
        try:
            data = inline_bytes(item)
        except InlineError as error:
            raise SampleError("undecodable", str(error)) from None
        return Media(path=_path(item), root=root) if data is None else Media(data=data)
    if isinstance(item, (bytes, bytearray, memoryview)):
        return Media(data=bytes(item))
    if isinstance(item, Mapping):
        item = {key: value for key, value in item.items() if not _empty(value) or isinstance(value, (bytes, bytearray))}
        data, path = item.get("bytes"), item.get("path")
        path = path if isinstance(path, str) else None
        if isinstance(data, (bytes, bytearray, memoryview)):
            return Media(data=bytes(data), path=path)
        if isinstance(data, str):
            return Media(data=_decoded(data), path=path)
        encoded = item.get("base64", item.get("data"))
        if isinstance(encoded, str) and (item.get("type") in (None, "base64")):
            return Media(data=_decoded(encoded), path=path)
        named = [value for key in ("path", "url", "image", "video", "file") if isinstance(value := item.get(key), str)]
        if len(named) == 1:
            return media_of(named[0], root)
    raise SampleError("malformed", f"a medium must be a path, bytes, or {{bytes, path}}; found {type(item).__name__}")


def _path(text: str) -> str:
    """A path, or the path of a `file://` URL of this machine."""
    if not text.lower().startswith("file://"):
        return text
    host, slash, path = text[7:].partition("/")
    if host.lower() not in ("", "localhost") or not slash:
        raise SampleError("not_a_file", f"{shortened(repr(text))} names another machine; expected file:///PATH")
    return urllib.parse.unquote("/" + path)


def turns_of(
    sample: Sample, role: str = "role", content: str = "content", names: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Write a sample's turns as a record's, every field that `sample_from_record` reads back in place."""
    for message in sample.messages:
        turn: dict[str, Any] = {role: (names or {}).get(message.role, message.role), content: message.content}
        if message.reasoning:
            turn["reasoning_content"] = message.reasoning
        if message.calls:
            turn["tool_calls"] = [{"type": "function", "function": _written(call)} for call in message.calls]
        if message.weight != 1:
            turn["weight"] = message.weight
        yield turn


def _written(call: str) -> dict[str, str]:
    """A call with its arguments as the text that they are: written anew they could get other blanks, and so other
    tokens.
    """
    name = json.loads(call)["name"]
    return {
        "name": name,
        "arguments": call[len(f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": ') : -1],
    }
