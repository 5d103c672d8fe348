"""Bytes of media, read from inside the data root only."""

from __future__ import annotations

import functools
import os

from mindvl_jax.core.errors import UserError
from mindvl_jax.data import remote
from mindvl_jax.data.sample import Media, SampleError


def resolve(media: Media) -> str:
    """Real path of a medium below its root.

    Raises SampleError when it climbs out of the root (through `..`, an absolute path or a symlink), is a URL, or is
    missing.
    """
    path = media.path or ""
    if "://" in path:
        raise SampleError(
            "not_a_file", f"{path!r} is a URL; media are read from files only: download them first and give paths"
        )
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise SampleError("missing_media", f"{path!r} holds characters that no file name can have") from None
    if "\0" in path or not path:
        raise SampleError("missing_media", f"{path!r} is not a path")
    if media.root is not None and remote.is_remote(media.root):
        return _fetched(media.root, path)
    root = _real_root(media.root or os.getcwd())
    real = os.path.realpath(os.path.join(root, path))
    if real != root and not real.startswith(root.rstrip(os.sep) + os.sep):
        raise SampleError(
            "outside_root",
            f"{path!r} leads to {real!r}, outside the data root {root!r}; set media_root to a folder that "
            "holds all media",
        )
    if not os.path.isfile(real):
        raise SampleError(
            "missing_media",
            f"{real!r} does not exist or is not a file (from {path!r} below {root!r}); check media_root",
        )
    return real


def _fetched(root: str, path: str) -> str:
    """Local copy of a medium below a root that is a URL."""
    url = remote.joined(root, path)
    if url is None:
        raise SampleError("outside_root", f"{path!r} leads outside of the data root {root!r}")
    try:
        return remote.local_copy(url)
    except UserError as error:
        raise SampleError("missing_media", str(error)) from None


@functools.lru_cache(maxsize=256)
def _real_root(root: str) -> str:
    return os.path.realpath(root)


def read_bytes(media: Media) -> bytes:
    """The encoded bytes of a medium. Raises SampleError when there are none to read."""
    if media.data is not None:
        data = media.data
    else:
        path = resolve(media)
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise SampleError("missing_media", f"{path!r} cannot be read: {error.strerror}") from None
    if len(data) == 0:
        raise SampleError("undecodable", f"{media.path or 'the medium'!r} has 0 bytes")
    return data


def named_file(path: str) -> Media:
    """A file that the user named himself, on the command line: read at once, from anywhere."""
    absolute = os.path.abspath(path)
    media = Media(path=absolute, root=os.path.dirname(os.path.realpath(absolute)))
    return Media(data=read_bytes(media), path=path)


def name(media: Media) -> str:
    """Return a medium's name for messages."""
    return repr(media.path) if media.path else "embedded bytes"
