"""Files behind a URL of fsspec: `s3://`, `gs://`, `hf://datasets/...`, `https://`, `memory://`, ...

Parquet is read where it lies, a row group at a time: training starts without a download. Other formats and media have
no useful random access over a network, so a copy is kept in the user's cache, by URL and version.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import fsspec

from mindvl_jax.core.compiled import cache_folder
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import foreign, replacing

Result = TypeVar("Result")
_VERSION = ("ETag", "etag", "md5", "md5Hash", "checksum", "sha256", "mtime", "last_modified", "LastModified", "created")


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def parent(url: str) -> str:
    """Return the folder of a file."""
    return url.rpartition("/")[0]


def list_files(url: str, suffixes: Collection[str]) -> list[str]:
    """URLs of a file, of a glob, or of the files in a folder whose endings are known; in a fixed order.

    Folders inside are left alone, as for local paths: they often hold other splits.

    Raises:
      UserError: no such file system here, or it cannot be reached.
    """

    def found() -> list[str]:
        system, path = fsspec.core.url_to_fs(url)
        if any(sign in path for sign in "*?["):
            names = system.glob(path)
        elif system.isfile(path):
            names = [path]
        elif system.isdir(path):
            names = [
                name
                for name in system.ls(path, detail=False)
                if PurePosixPath(name).suffix.lower() in suffixes and not foreign(PurePosixPath(name).name)
            ]
        else:
            names = []
        return sorted(system.unstrip_protocol(name) for name in names)

    return _told(url, found)


def opened(url: str) -> BinaryIO:
    """Open for random access: only what is read is fetched."""
    return _told(url, lambda: fsspec.open(url, "rb").open())


def version(url: str) -> str:
    """Tell this content from a later one under the same URL: size and what the server says of the version."""
    info = _told(url, lambda: _info(url))
    return f"{url};{info.get('size')};" + ";".join(f"{key}={info[key]}" for key in _VERSION if info.get(key))


def local_copy(url: str) -> str:
    """Path of a copy in the user's cache, made when it is not there in this version.

    Raises:
      UserError: the file is not there or cannot be fetched.
    """
    kept = cache_folder().parent / "data"
    digest = hashlib.blake2b(version(url).encode(), digest_size=10).hexdigest()
    path = kept / f"{digest}-{PurePosixPath(url).name[-100:]}"
    if not path.is_file():
        kept.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            _told(url, lambda: _fetch(url, temporary))
    return str(path)


def joined(root: str, name: str) -> str | None:
    """URL of a file below a folder, or None for a name that leads elsewhere."""
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or "://" in name or ".." in parts or "" in parts:
        return None
    return f"{root.rstrip('/')}/{name}"


def _fetch(url: str, target: Path) -> None:
    with fsspec.open(url, "rb") as source, open(target, "wb") as file:
        while block := source.read(1 << 22):
            file.write(block)


@functools.lru_cache(maxsize=4096)
def _info(url: str) -> dict[str, Any]:
    system, path = fsspec.core.url_to_fs(url)
    return system.info(path)


def _told(url: str, work: Callable[[], Result]) -> Result:
    try:
        return work()
    except UserError:
        raise
    except (ImportError, ValueError) as error:  # an unknown protocol, or one whose package is missing
        raise UserError(f"{url}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{url}: there is no such file") from None
    except Exception as error:  # each file system has errors of its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{url} cannot be read: {reason}") from None
