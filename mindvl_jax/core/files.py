"""Read and write small files; writes are atomic, so a file is complete or absent."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` and rename it to `path` at the end: readers and killed runs never see half a
    file.

    The temporary file is unique, so several processes may write the same path; the last one wins. It is removed on any
    exception.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def decode_text(data: bytes) -> str:
    """Decode a text file's bytes: UTF-8, with or without a byte order mark, or UTF-16 with one.

    Raises:
      UnicodeDecodeError: anything else.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    return data.decode("utf-8-sig")


def read_text(path: str | Path) -> str:
    """Read a text file as `decode_text`; its line ends become newlines. Raises OSError and UnicodeDecodeError."""
    return decode_text(Path(path).read_bytes()).replace("\r\n", "\n")


def private_folder(folder: Path) -> bool:
    """Make a folder of the user's own; return whether nobody else can put files into it.

    What is run from a folder (compiled programs) must not come from one that others may write.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return False
    return not hasattr(os, "geteuid") or (found.st_uid == os.geteuid() and not found.st_mode & 0o022)


def foreign(name: str) -> bool:
    """Whether a file name is one that another system leaves behind (`.DS_Store`, `._x.json`, `Thumbs.db`) or that is
    hidden.
    """
    parts = str(name).replace("\\", "/").split("/")
    return parts[-1].startswith(".") or parts[-1].lower() in ("thumbs.db", "desktop.ini") or "__MACOSX" in parts


def write_json(path: str | Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: str | Path, default: Any = None) -> Any:
    """Read a JSON file; `default` if it does not exist.

    Raises:
      ValueError: the file is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(read_text(path)) if path.is_file() else default
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None


def read_jsonl(path: str | Path, *, whole: bool = True) -> list[dict]:
    """Read the rows of a JSONL file; no rows if it does not exist. A last line truncated by a kill is dropped.

    Args:
      whole: False leaves out every line that is no JSON object, for files whose lines can be made again.

    Raises:
      ValueError: with `whole`, a line that is no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        return []
    rows = []
    with open(path, encoding="utf-8", errors="strict" if whole else "replace") as file:
        lines = file.read().split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} holds a {type(row).__name__}; expected an object")
            rows.append(row)
        except (ValueError, RecursionError):
            if whole and number < len(lines):  # with no newline after it, it was being written
                raise
    return rows
