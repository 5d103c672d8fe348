"""Images and videos that a request names: data URIs, and https from allowed hosts.

A server that fetches what strangers name can be made to read its own network. So nothing is fetched unless the operator
allows the host; the name is resolved once, every address must be public, and the connection goes to exactly that
address.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import socket
import urllib.parse

import httpx

from mindvl_jax.inference.server.errors import HTTPError
from mindvl_jax.inference.server.settings import ServerSettings

SHOWN = 60  # characters of a URL that a message quotes


def read_media(url: str, settings: ServerSettings, param: str) -> bytes:
    """The bytes that a URL stands for. Blocks; call it from a worker thread.

    Raises:
      HTTPError: 400 for a URL that is not accepted, cannot be read or is too large; `param` names the request field.
    """
    if url.startswith("data:"):
        return _data_uri(url, settings, param)
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https":
        raise HTTPError(
            400,
            f"{param}: {_quote(url)} is neither a data: URI nor https; send the image as data:image/png;base64,...",
            param=param,
        )
    return _fetch(url, parts, settings, param)


def _quote(url: str) -> str:
    return repr(url if len(url) <= SHOWN else url[:SHOWN] + "...")


def _data_uri(url: str, settings: ServerSettings, param: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise HTTPError(
            400, f"{param}: a data URI must read data:image/png;base64,...; found {_quote(url)}", param=param
        )
    if len(payload) > settings.image_bytes * 4 // 3 + 4:
        raise HTTPError(
            400,
            f"{param}: the encoded image is larger than {settings.image_bytes} bytes; send a smaller one",
            param=param,
        )
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise HTTPError(400, f"{param}: the part after `base64,` is not base64", param=param) from None


def _fetch(url: str, parts: urllib.parse.SplitResult, settings: ServerSettings, param: str) -> bytes:
    try:
        host, port = parts.hostname or "", parts.port or 443
    except ValueError:
        raise HTTPError(400, f"{param}: {_quote(url)} has no usable port", param=param) from None
    if host.lower() not in {name.lower() for name in settings.hosts}:
        allowed = ", ".join(settings.hosts) or "none"
        raise HTTPError(
            400,
            f"{param}: images are not fetched from host {host!r} (allowed: {allowed}); send a data: URI",
            param=param,
        )
    address = _public_address(host, port, settings, param)
    target = urllib.parse.urlunsplit(
        ("https", f"[{address}]:{port}" if ":" in address else f"{address}:{port}", parts.path or "/", parts.query, "")
    )
    try:
        with (
            httpx.Client(timeout=settings.fetch_seconds, follow_redirects=False, trust_env=False) as client,
            client.stream("GET", target, headers={"Host": host}, extensions={"sni_hostname": host}) as response,
        ):
            if response.status_code != 200:
                raise HTTPError(
                    400,
                    f"{param}: host {host} answered {response.status_code} (redirects are not followed)",
                    param=param,
                )
            content = bytearray()
            for part in response.iter_bytes():
                content += part
                if len(content) > settings.image_bytes:
                    raise HTTPError(400, f"{param}: the file is larger than {settings.image_bytes} bytes", param=param)
            return bytes(content)
    except httpx.HTTPError as error:
        raise HTTPError(400, f"{param}: host {host} could not be read ({type(error).__name__})", param=param) from None


def _public_address(host: str, port: int, settings: ServerSettings, param: str) -> str:
    """One address of the host, after all of them have been checked."""
    try:
        found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except OSError:
        raise HTTPError(400, f"{param}: host {host!r} is not known", param=param) from None
    for text in found:
        if not settings.private_addresses and not ipaddress.ip_address(text.partition("%")[0]).is_global:
            raise HTTPError(400, f"{param}: host {host!r} has an address that is not public", param=param)
    return found[0]
