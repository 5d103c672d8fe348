"""Data sets from one format to another. Nothing is dropped unseen: what cannot be read is listed beside the output."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import replacing
from mindvl_jax.data.marks import IMAGE, VIDEO, marks
from mindvl_jax.data.media.files import read_bytes, resolve
from mindvl_jax.data.media.image import image_size
from mindvl_jax.data.record import turns_of
from mindvl_jax.data.sample import Media, Sample, SampleError
from mindvl_jax.data.sources.readers import Source

FORMATS = ("mllm", "llava", "sharegpt", "jsonl", "parquet", "webdataset")
ENDINGS = {
    "mllm": ".json",
    "llava": ".json",
    "sharegpt": ".json",
    "jsonl": ".jsonl",
    "parquet": ".parquet",
    "webdataset": ".tar",
}
TO_LLAVA = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
TURN_COLUMNS = ("role", "content", "reasoning_content", "tool_calls", "weight")
GROUP = 1000  # rows of a parquet row group: small, for shuffled reading
MAGIC = (
    (b"\xff\xd8", "jpg"),
    (b"\x89PNG", "png"),
    (b"GIF8", "gif"),
    (b"RIFF", "webp"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Result of a conversion. `media_root`: to be set for the new source, or None if its own folder serves."""

    written: int
    skipped: int
    skipped_list: str | None
    media_root: str | None


def _require_writable(out: str, to: str, overwrite: bool) -> None:
    if not out.endswith(ENDINGS[to]):
        raise UserError(f"--out {out} must end in {ENDINGS[to]} for the format {to}")
    if os.path.exists(out) and not overwrite:
        raise UserError(f"{out} exists; choose another name or add --overwrite")


def _list_skipped(out: str, skipped: Sequence[Mapping[str, str]]) -> str | None:
    """Write the skipped samples beside `out`; return the path, or None if there are none."""
    if not skipped:
        return None
    listed = out + ".skipped.jsonl"
    with open(listed, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped)
    return listed


def convert(
    source: Source,
    to: str,
    out: str,
    *,
    prefix: str = "",
    overwrite: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> Conversion:
    """Write every readable sample of `source` to `out` in format `to`.

    JSON formats keep paths (relative to the media root) and put embedded media into a folder beside the file; parquet
    and tar embed all media. Every medium is opened: one that is missing makes its sample a skipped one.

    Args:
      prefix: folder put before each media path, such as `train2017` for COCO's images in LLaVA-Instruct.
    Raises UserError when `out` exists, has the wrong ending, or nothing could be converted.
    """
    _require_writable(out, to, overwrite)
    folder = os.path.dirname(os.path.abspath(out))
    os.makedirs(folder, exist_ok=True)
    media_folder = os.path.splitext(os.path.abspath(out))[0] + "_media"
    skipped: list[dict[str, str]] = []
    roots: set[str] = set()

    def samples() -> Iterator[Sample]:
        for index in range(len(source)):
            progress()
            identifier = f"{source.name}:{index}"
            try:
                sample = source[index]
                identifier = sample.id
                sample = _prefixed(sample, prefix)
                _check(sample)
                yield sample
            except SampleError as error:
                skipped.append(
                    {
                        "id": error.sample_id or identifier,
                        "where": source.where(index),
                        "reason": error.reason,
                        "message": str(error),
                    }
                )

    store = _MediaStore(folder, media_folder, roots)
    written = 0
    with replacing(out) as temporary:
        with _WRITERS[to](str(temporary), store) as write:
            for sample in samples():
                write(sample)
                written += 1
        if written == 0:
            reasons = sorted({f"{entry['reason']}: {entry['message']}" for entry in skipped})[:3]
            raise UserError(f"none of the {len(source)} samples can be converted; for instance {'; '.join(reasons)}")
    root = next(iter(roots)) if roots else None
    return Conversion(
        written,
        len(skipped),
        _list_skipped(out, skipped),
        None if root is None or os.path.realpath(root) == os.path.realpath(folder) else root,
    )


def _prefixed(sample: Sample, prefix: str) -> Sample:
    if not prefix:
        return sample

    def move(media):
        return (
            media
            if media.path is None or media.data is not None
            else dataclasses.replace(media, path=os.path.join(prefix, media.path))
        )

    return dataclasses.replace(sample, images=tuple(map(move, sample.images)), videos=tuple(map(move, sample.videos)))


def _check(sample: Sample) -> None:
    for media in sample.images:
        image_size(media)
    for media in sample.videos:
        read_bytes(media)
    marked = [mark for message in sample.messages for mark in marks(message.content)]
    for mark, found in ((IMAGE, sample.images), (VIDEO, sample.videos)):
        if marked.count(mark) != len(found):
            raise SampleError(
                "media_mismatch",
                f"the text has {marked.count(mark)} {mark} placeholder(s) but the sample has {len(found)}",
            )


class _MediaStore:
    """Paths for the JSON formats."""

    def __init__(self, folder: str, media_folder: str, roots: set[str]):
        self._folder = folder
        self._media_folder = media_folder
        self._roots = roots
        self._count = 0

    def path(self, media: Media) -> str:
        """A path relative to the media root; embedded media become files."""
        if media.data is None:
            resolve(media)
            self._roots.add(os.path.realpath(media.root or os.getcwd()))
            if len(self._roots) > 1:
                raise UserError("the samples' media lie below several roots; convert one source at a time")
            return os.path.normpath(media.path or "")
        data = read_bytes(media)
        suffix = os.path.splitext(media.path or "")[1].lstrip(".") or next(
            (ending for magic, ending in MAGIC if data.startswith(magic)), "bin"
        )
        os.makedirs(self._media_folder, exist_ok=True)
        name = f"{self._count:08d}.{suffix}"
        self._count += 1
        with open(os.path.join(self._media_folder, name), "wb") as file:
            file.write(data)
        return os.path.join(os.path.basename(self._media_folder), name)


def _mllm(sample: Sample, store: _MediaStore) -> dict[str, Any]:
    record: dict[str, Any] = {"id": sample.id, "images": [store.path(media) for media in sample.images]}
    if sample.videos:
        record["videos"] = [store.path(media) for media in sample.videos]
    record["messages"] = list(turns_of(sample))
    return {**record, **_extras(sample)}


def _llava(sample: Sample, store: _MediaStore) -> dict[str, Any]:
    record: dict[str, Any] = {"id": sample.id}
    if sample.images:
        paths = [store.path(media) for media in sample.images]
        record["image"] = paths[0] if len(paths) == 1 else paths
    if sample.videos:
        record["video"] = [store.path(media) for media in sample.videos]
    record["conversations"] = list(turns_of(sample, "from", "value", TO_LLAVA))
    return {**record, **_extras(sample)}


def _extras(sample: Sample) -> dict[str, Any]:
    extras: dict[str, Any] = {"task": sample.task} if sample.task is not None else {}
    if sample.answers:
        extras["answers"] = list(sample.answers)
    if sample.tools:
        extras["tools"] = [json.loads(tool) for tool in sample.tools]
    return extras


@contextlib.contextmanager
def _json_list(path: str, store: _MediaStore, shape: Callable[[Sample, _MediaStore], dict[str, Any]]):
    with open(path, "w", encoding="utf-8") as file:
        separator = "[\n"

        def write(sample: Sample) -> None:
            nonlocal separator
            record = shape(sample, store)
            file.write(separator + json.dumps(record, ensure_ascii=False))
            separator = ",\n"

        yield write
        file.write("\n]\n" if separator == ",\n" else "[]\n")


@contextlib.contextmanager
def _json_lines(path: str, store: _MediaStore):
    with open(path, "w", encoding="utf-8") as file:
        yield lambda sample: file.write(json.dumps(_mllm(sample, store), ensure_ascii=False) + "\n")


def _flat(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn for a column of structs: calls as JSON text, because a struct would give each call the arguments of all
    others.
    """
    return {**turn, "tool_calls": json.dumps(turn["tool_calls"], ensure_ascii=False)} if "tool_calls" in turn else turn


@contextlib.contextmanager
def _parquet(path: str, store: _MediaStore):
    media = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("images", media),
            ("videos", media),
            (
                "messages",
                pa.list_(
                    pa.struct([(name, pa.string() if name != "weight" else pa.float64()) for name in TURN_COLUMNS])
                ),
            ),
            ("task", pa.string()),
            ("answers", pa.list_(pa.string())),
            ("tools", pa.string()),
        ]
    )
    rows: list[dict[str, Any]] = []
    with pq.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema), row_group_size=GROUP)
                rows.clear()

        def write(sample: Sample) -> None:
            def embed(found):
                return [{"bytes": read_bytes(item), "path": item.path} for item in found]

            rows.append(
                {
                    "id": sample.id,
                    "images": embed(sample.images),
                    "videos": embed(sample.videos),
                    "messages": [_flat(turn) for turn in turns_of(sample)],
                    "task": sample.task,
                    "answers": list(sample.answers),
                    "tools": f"[{', '.join(sample.tools)}]" if sample.tools else None,
                }
            )
            if len(rows) >= GROUP:
                flush()

        yield write
        flush()


@contextlib.contextmanager
def _tar(path: str, store: _MediaStore):
    with tarfile.open(path, "w") as archive:
        count = 0

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

        def write(sample: Sample) -> None:
            nonlocal count
            key = f"{count:08d}"
            count += 1
            record = {"id": sample.id, "messages": list(turns_of(sample)), **_extras(sample)}
            add(f"{key}.json", json.dumps(record, ensure_ascii=False).encode())
            for index, media in enumerate((*sample.images, *sample.videos)):
                data = read_bytes(media)
                sniffed = next((ending for magic, ending in MAGIC if data.startswith(magic)), "png")
                suffix = sniffed if media in sample.images else os.path.splitext(media.path or "x.mp4")[1].lstrip(".")
                add(f"{key}.{index:03d}.{suffix}", data)

        yield write


_WRITERS: dict[str, Callable[..., Any]] = {
    "mllm": lambda path, store: _json_list(path, store, _mllm),
    "llava": lambda path, store: _json_list(path, store, _llava),
    "sharegpt": lambda path, store: _json_list(path, store, _llava),
    "jsonl": _json_lines,
    "parquet": _parquet,
    "webdataset": _tar,
}
