"""Settings of the server."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits and switches of a server.

    Attributes:
      model: name under which `/v1/models` lists the model and which requests must give.
      api_keys: accepted bearer tokens; empty: everybody may ask.
      queue: most requests that wait or decode; one more is answered 429.
      body_bytes: largest request body. images: most images of a request. image_bytes: largest encoded image or video.
      max_pixels: largest image area after resizing, which bounds the patches of a prompt; None: the model's own
        setting.
      hosts: host names from which `https` media may be fetched; empty: none.
      private_addresses: also fetch from addresses that are not public (for a store in the same network).
      fetch_seconds: time limit of one fetch. request_seconds: time limit of one answer.
      sampling: of `Sampling`, used where a request does not say otherwise (the folder's generation_config.json).
      chunk: tokens decoded between two looks at the queue. Small is smooth, large is fast.
    """

    model: str
    api_keys: tuple[str, ...] = ()
    queue: int = 1024
    body_bytes: int = 32 << 20
    images: int = 16
    image_bytes: int = 20 << 20
    max_pixels: int | None = None
    hosts: tuple[str, ...] = ()
    private_addresses: bool = False
    fetch_seconds: float = 10.0
    request_seconds: float = 600.0
    sampling: Mapping[str, float] = dataclasses.field(default_factory=dict)
    chunk: int = 4
